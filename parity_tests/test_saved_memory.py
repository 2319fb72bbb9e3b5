"""What a call keeps for its backward pass: no more than PyTorch's keeps for the same call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parity_tests.functional_cases import each_differentiable_function, reference_of, whole
from reimpl.testing import FunctionTechnique, seeded_generator

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


@each_differentiable_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_no_more_than_pytorchs(technique: FunctionTechnique, dtype: torch.dtype, device: torch.device) -> None:
    assert technique.samples is not None
    reference = reference_of(technique)
    for sample in technique.samples(device, dtype, seeded_generator(0, technique.name)):
        torch_kwargs = sample.kwargs if sample.torch_kwargs is None else sample.torch_kwargs
        ours = saved_bytes(lambda s=sample: whole(technique.ours(*s.args, **s.kwargs)))
        theirs = saved_bytes(lambda s=sample, k=torch_kwargs: whole(reference(*s.args, **k)))
        assert ours <= theirs, f"{sample.desc}: {ours} bytes, PyTorch's {theirs}"
