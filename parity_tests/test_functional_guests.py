"""What surrounding code does with results and with what was saved: in-place changes, checkpoints; beside PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap
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


def _changed(namespace: Any, name: str, *args: Tensor) -> Tensor:
    return CALLS[name][1](namespace, *args).add_(0.5).relu_()


def _leaves(name: str, mapped: tuple[bool, ...], device: torch.device) -> list[Tensor]:
    """The arguments of a call, with three of each ``mapped`` one."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, *shape) if several else shape for several, shape in zip(mapped, CALLS[name][0], strict=True)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device).requires_grad_() for s in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_results_can_be_changed_in_place_under_grad_and_jacrev(name: str, device: torch.device) -> None:
    leaves = _leaves(name, (False,) * len(CALLS[name][0]), device)
    places, found = tuple(range(len(leaves))), []
    for namespace in (F, torch_functional):
        gradients = grad(lambda *args, m=namespace: _changed(m, name, *args).square().sum(), places)(*leaves)
        jacobians = jacrev(lambda *args, m=namespace: _changed(m, name, *args), places)(*leaves)
        of_gradients = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        found.append([*gradients, *jacobians, *of_gradients])
    _check(*found)


# the first argument mapped with the others, alone, or shared by them
MAPPED = [
    (name, m) for name in CALLS for m in ("all", "the first", "the others") if m == "all" or len(CALLS[name][0]) > 1
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mapped"), MAPPED)
def test_results_can_be_changed_in_place_under_vmap(name: str, mapped: str, device: torch.device) -> None:
    """What is mapped, and is a variable outside too; beside PyTorch's one after the other, since ``vmap`` gives other
    second derivatives of its batch normalisation."""
    count = len(CALLS[name][0])
    each = tuple(mapped == "all" or (mapped == "the first") == (place == 0) for place in range(count))
    leaves, places = _leaves(name, each, device), tuple(range(count))
    of_ours = grad(lambda *args: _changed(F, name, *args).square().sum(), places)
    ours = list(vmap(of_ours, tuple(0 if m else None for m in each))(*leaves))
    of_theirs = grad(lambda *args: _changed(torch_functional, name, *args).square().sum(), places)
    rows = [of_theirs(*(leaf[i] if m else leaf for leaf, m in zip(leaves, each, strict=True))) for i in range(3)]
    theirs = [torch.stack(row) for row in zip(*rows, strict=True)]
    for found in (ours, theirs):
        found += torch.autograd.grad(sum(g.square().sum() for g in found), leaves)
    _check(ours, theirs)


SHARED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor]]] = {
    "batch_norm": ((4, 6), (6,), lambda m, x, w: m.batch_norm(x, None, None, w, None, True)),
    "cross_entropy": ((4, 6), (4,), lambda m, x, t: m.cross_entropy(x, t.mul(9).long().remainder(6))),
    "cross_entropy, weighted": ((4, 6), (6,), lambda m, x, w: m.cross_entropy(x, _classes(x), w.detach().exp())),
    "cross_entropy, probabilities": ((4, 6), (4, 6), lambda m, x, t: m.cross_entropy(x, t.softmax(1))),
    "mse_loss, weighted": ((4, 6), (4, 6), lambda m, x, w: m.mse_loss(x, x.detach().sin(), weight=w.exp())),
}


@pytest.mark.parametrize("name", SHARED)
def test_second_derivatives_of_what_mapped_arguments_share(name: str, device: torch.device) -> None:
    """Mean, variance and log-probabilities of a shared input count once, and not once for each of what is mapped."""
    shape, other_shape, call = SHARED[name]
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (3, *other_shape))
    x, others = (torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes)

    def of(namespace: Any) -> Callable[..., Tensor]:
        return grad(lambda x, other: call(namespace, x, other).sin().sum())

    leaf, found = x.requires_grad_(), []
    for first in (vmap(of(F), (None, 0))(leaf, others), torch.stack([of(torch_functional)(leaf, o) for o in others])):
        found.append([first, *torch.autograd.grad(first.square().sum(), leaf)])
    _check(*found)


def _check(ours: list[Tensor], theirs: list[Tensor]) -> None:
    # sums of some hundred products, each rounded as its largest part is: a wrong gradient is off by far more
    atol = 64 * torch.finfo(theirs[0].dtype).eps * max(float(b.detach().abs().max()) for b in theirs)
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
