"""What a call keeps for its backward pass: no more than PyTorch's keeps for the same call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.declarations import FUNCTIONS
from parity_tests.functional_cases import reference_of, whole
from reimpl.testing import FunctionTechnique, Sample, seeded_generator

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an attribute of a node."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes that a call's graph keeps: each storage once, inputs and parameters too, and what Functions keep aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for value in vars(node).values() if hasattr(node, "__dict__") else ():
            for tensor in _tensors(value):
                pack(tensor)
        nodes += [before for before, _ in node.next_functions]
    return sum(kept.values())


def test_counts_what_is_kept() -> None:
    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x, x.view(-1))
            ctx.aside = (x.new_empty(5), "text")
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    x = torch.ones(2, 3, requires_grad=True)
    assert saved_bytes(lambda: Keeping.apply(x)) == 4 * (6 + 5)
    assert saved_bytes(lambda: (x * x).exp()) == 4 * (6 + 6)


def _allowance(technique: FunctionTechnique, sample: Sample, dtype: torch.dtype) -> int:
    """Mean and variance of each channel stay in float32, without which the gradient would lose half its digits, and so
    does the one sum that a norm or a mean of the samples that count divides by; PyTorch rounds them to the dtype of the
    parameters."""
    if dtype != torch.bfloat16:
        return 0
    channels = sample.args[0].shape[1] if technique.name in ("batch_norm", "batch_norm_relu") else 0
    weighted = sample.kwargs.get("weight") is not None and technique.name == "mse_loss"
    sums = technique.name in ("lp_penalty", "cross_entropy") or weighted
    return (4 - 2) * (2 * channels + sums)


def _cases() -> Iterator[Any]:
    for technique in FUNCTIONS:
        for dtype in (torch.float32, torch.bfloat16):
            if technique.differentiable:
                yield pytest.param(technique, dtype, id=f"{technique.name}-{dtype}")


@pytest.mark.parametrize("technique, dtype", list(_cases()))
def test_keeps_no_more_than_pytorchs(technique: FunctionTechnique, dtype: torch.dtype, device: torch.device) -> None:
    assert technique.samples is not None
    reference = reference_of(technique)
    for sample in technique.samples(device, dtype, seeded_generator(0, technique.name)):
        torch_kwargs = sample.kwargs if sample.torch_kwargs is None else sample.torch_kwargs
        ours = saved_bytes(lambda s=sample: whole(technique.ours(*s.args, **s.kwargs)))  # type: ignore[misc]
        theirs = saved_bytes(lambda s=sample, k=torch_kwargs: whole(reference(*s.args, **k)))  # type: ignore[misc]
        limit = theirs + _allowance(technique, sample, dtype)
        assert ours <= limit, f"{sample.desc}: {ours} bytes, PyTorch's {theirs}"


def _layers(device: torch.device) -> dict[str, Callable[[Any], Tensor]]:
    """Layers large enough for every fast path, as calls of a namespace."""
    x = torch.randn(16, 32, 12, 12, device=device, requires_grad=True)
    pixels = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    w, b = (torch.randn(32, device=device, requires_grad=True) for _ in range(2))
    averages = torch.zeros(32, device=device), torch.ones(32, device=device)
    kernel = torch.randn(32, 32, 3, 3, device=device, requires_grad=True)
    rows, matrix = (torch.randn(s, device=device, requires_grad=True) for s in ((512, 64), (32, 64)))

    def fused(m: Any, training: bool) -> Tensor:
        arguments = (x, *averages, w, b, training)
        if m is F:
            return F.batch_norm_relu(*arguments)
        return m.relu(m.batch_norm(*arguments))  # type: ignore[no-any-return]

    return {
        "batch_norm": lambda m: m.batch_norm(x, None, None, w, b, training=True),
        "batch_norm, channels_last": lambda m: m.batch_norm(pixels, None, None, w, b, training=True),
        "batch_norm, features": lambda m: m.batch_norm(rows, None, None, training=True),
        "batch_norm, evaluation": lambda m: m.batch_norm(x, *averages, w, b),
        "batch_norm + relu": lambda m: fused(m, True),
        "batch_norm + relu, evaluation": lambda m: fused(m, False),
        "conv2d": lambda m: m.conv2d(x, kernel, b, padding=1),
        "conv2d, channels_last": lambda m: m.conv2d(pixels, kernel, b),
        "linear + tanh": lambda m: (
            F.linear_activation(rows, matrix, b, "tanh") if m is F else torch.tanh(m.linear(rows, matrix, b))
        ),
        "max_pool2d": lambda m: m.max_pool2d(x, 2),
        "relu": lambda m: m.relu(x),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["as it comes", "kernels"])
def test_large_layers_keep_no_more(compiled: bool, device: torch.device) -> None:
    if compiled:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    with F.use_kernels(compiled):
        for name, call in _layers(device).items():
            ours, theirs = (saved_bytes(lambda m=m, call=call: call(m)) for m in (F, torch_functional))  # type: ignore[misc]
            assert ours <= theirs, (name, ours, theirs)
