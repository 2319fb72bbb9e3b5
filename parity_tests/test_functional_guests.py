"""What surrounding code does with results and with what was saved: in-place changes, checkpoints; beside PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.utils.checkpoint import checkpoint

import reimpl.functional as F
import reimpl.nn
from reimpl.functional._node import native

pytestmark = pytest.mark.quick

CALLS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Tensor]]] = {
    "conv2d": (((2, 3, 5, 5), (3, 3, 3, 3)), lambda m, x, w: m.conv2d(x, w, padding=1)),
    "conv2d, strided": (((4, 16, 9, 9), (24, 16, 3, 3)), lambda m, x, w: m.conv2d(x, w, stride=2, padding=1)),
    "conv2d, one image": (((1, 3, 5, 5), (3, 3, 3, 3)), lambda m, x, w: m.conv2d(x, w, padding=1)),
    "conv2d, no batch": (((3, 5, 5), (3, 3, 3, 3)), lambda m, x, w: m.conv2d(x, w)),
    "conv2d, taps in the padding": (
        ((1, 2, 1, 1), (4, 2, 1, 1)),
        lambda m, x, w: m.conv2d(x, w, stride=2, padding=1),
    ),
    "conv2d, rows of taps in the padding": (
        ((2, 1, 1, 4), (9, 1, 2, 3)),
        lambda m, x, w: m.conv2d(x, w, padding="same", dilation=2),
    ),
    "conv1d": (((2, 3, 9), (4, 3, 3)), lambda m, x, w: m.conv1d(x, w)),
    "linear": (((5, 8), (4, 8)), lambda m, x, w: m.linear(x, w)),
    "linear, 3-D": (((2, 5, 8), (4, 8)), lambda m, x, w: m.linear(x, w)),
    "linear, 1-D": (((8,), (4, 8)), lambda m, x, w: m.linear(x, w)),
    "embedding": (((7, 4),), lambda m, w: m.embedding(torch.tensor([[1, 2], [3, 3]], device=w.device), w)),
    "leaky_relu": (((4, 3),), lambda m, x: m.leaky_relu(x, 0.1)),
    "max_pool2d": (((2, 3, 6, 6),), lambda m, x: m.max_pool2d(x, 2)),
    "avg_pool2d": (((2, 3, 6, 6),), lambda m, x: m.avg_pool2d(x, 2)),
    "adaptive_avg_pool2d": (((2, 3, 6, 6),), lambda m, x: m.adaptive_avg_pool2d(x, 1)),
    "batch_norm": (((2, 3, 6, 6), (3,)), lambda m, x, w: m.batch_norm(x, None, None, w, None, True)),
    "mse_loss": (((2, 3), (2, 3)), lambda m, x, t: m.mse_loss(x, t, reduction="none")),
    "cross_entropy": (((4, 6),), lambda m, x: m.cross_entropy(x, _classes(x), reduction="none")),
    "cross_entropy of planes": (((2, 6, 3, 3),), lambda m, x: m.cross_entropy(x, _classes(x), reduction="none")),
    "nll_loss": (((4, 6),), lambda m, x: m.nll_loss(x, _classes(x), reduction="none")),
}


def _classes(x: Tensor) -> Tensor:
    shape = (x.shape[0], *x.shape[2:])
    return (torch.arange(x[:, 0].numel(), device=x.device) % x.shape[1]).view(shape)


@pytest.fixture(params=["as it comes", "kernels"], autouse=True)
def _way(request: pytest.FixtureRequest) -> Any:
    if request.param == "kernels":
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    with F.use_kernels(request.param == "kernels"):
        yield


def _gradients(
    namespace: Any, call: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: Any
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=dtype).to(device).requires_grad_() for shape in shapes]
    result = call(namespace, *drawn)
    # a skip connection, added in place, and the activation after it
    result.add_(0.5).mul_(2.0)
    return list(torch.autograd.grad(result.square().sum(), drawn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CALLS)
def test_results_can_be_changed_in_place(name: str, dtype: torch.dtype, device: torch.device) -> None:
    shapes, call = CALLS[name]
    for _ in range(2):  # the second time by the compiled node, where there is one
        ours, theirs = (_gradients(m, call, shapes, dtype, device) for m in (F, torch_functional))
        _check(ours, theirs)


def _check(ours: list[Tensor], theirs: list[Tensor]) -> None:
    # sums of some hundred products, each rounded as its largest part is: a wrong gradient is off by far more
    atol = 64 * torch.finfo(theirs[0].dtype).eps * max(float(b.abs().max()) for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", ["BatchNorm2d", "Conv2d", "LeakyReLU", "MaxPool2d"])
def test_checkpoints(layer: str, train: bool, device: torch.device) -> None:
    arguments = {"BatchNorm2d": (3,), "Conv2d": (3, 4, 3), "LeakyReLU": (0.1,), "MaxPool2d": (2,)}[layer]
    native.wait()
    ours = getattr(reimpl.nn, layer)(*arguments).to(device).train(train)
    theirs = getattr(torch.nn, layer)(*arguments).to(device).train(train)
    theirs.load_state_dict(ours.state_dict())
    # sizes that no other test has: in the first pass the compiled node is taught what it could do in the second
    x = torch.randn(2, 3, 7 + train, 11, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):
        found = []
        for module in (ours, theirs):
            input = x.clone().requires_grad_()
            checkpoint(module, input, use_reentrant=False).square().sum().backward()
            found.append([input.grad, *(p.grad for p in module.parameters())])
        _check(*found)
