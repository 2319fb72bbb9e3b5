"""Activations and dropout in place, of tensors on the way to a gradient: the same citizens as out of place."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.utils.checkpoint import checkpoint

import reimpl.functional as F
import reimpl.nn as nn

Both = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

FUNCTIONS: dict[str, Both] = {
    "relu": (lambda x: F.relu(x, inplace=True), lambda x: torch_functional.relu(x, inplace=True)),
    "relu_": (F.relu_, torch_functional.relu_),
    "leaky_relu_": (F.leaky_relu_, torch_functional.leaky_relu_),
    "sigmoid_": (F.sigmoid_, torch.sigmoid_),
    "tanh_": (F.tanh_, torch.tanh_),
    # what is drawn at random is nothing to compare
    "dropout": (lambda x: F.dropout(x, 1.0, inplace=True), lambda x: torch_functional.dropout(x, 1.0, inplace=True)),
}

# of tracing, and of its own deprecation
pytestmark = pytest.mark.filterwarnings("ignore")


def after(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function in place of what is no leaf, with a factor whose gradient needs its result."""
    return lambda x: function(2 * x) * x


@pytest.fixture(params=FUNCTIONS)
def both(request: pytest.FixtureRequest) -> Both:
    ours, theirs = FUNCTIONS[request.param]
    return after(ours), after(theirs)


def assert_same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x = torch.randn(7, 5, device=device, requires_grad=True)
    results = [(y := function(x), *torch.autograd.grad(y.sum(), x)) for function in (ours, theirs)]
    torch.testing.assert_close(*results)


def test_compiles_whole(both: Both, device: torch.device) -> None:
    torch._dynamo.reset()
    assert_same(torch.compile(both[0], fullgraph=True, backend="aot_eager"), both[1], device)


def test_is_traced_and_saved(both: Both, device: torch.device) -> None:
    traced = torch.jit.trace(both[0], torch.randn(3, 2, device=device, requires_grad=True), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_same(torch.jit.load(file), both[1], device)


def test_is_exported(device: torch.device) -> None:
    model = torch.nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True)).to(device)
    exported = torch.export.export(model, (torch.randn(7, 5, device=device),)).module()
    assert_same(exported, model, device)


def test_under_transforms(both: Both, device: torch.device) -> None:
    x = torch.randn(7, 5, device=device)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum())),
        lambda f: torch.func.jacrev(f),
        lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    ):
        torch.testing.assert_close(transform(both[0])(x), transform(both[1])(x))


def test_under_a_checkpoint(both: Both, device: torch.device) -> None:
    assert_same(lambda x: checkpoint(both[0], x, use_reentrant=False), both[1], device)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "dropout"])
def test_second_derivatives(name: str, device: torch.device) -> None:
    x = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: FUNCTIONS[name][0](2 * x), x)
