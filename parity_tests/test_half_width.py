"""Elementwise layers and losses of bfloat16 and float16 on the CPU: computed in float32 by blocks, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from reimpl.functional import _plain
from reimpl.testing import bits_equal

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHAPES = [(), (0,), (37,), (7, 33), (3, 5, 6, 7)]


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plain, "_BLOCK", 50)


def check_rounded_once(ours: Tensor, exact: Tensor) -> None:
    """Half a unit in the last place of the half-width dtype, and a hundredth of it for the errors of float32."""
    info = torch.finfo(ours.dtype)
    least = info.tiny * info.eps
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * info.eps, atol=0.51 * least, equal_nan=True)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, grad.expand(y.shape))[0]


@DTYPES
@pytest.mark.parametrize("slope", [None, 0.0, 0.01, 1.0, 1.5, -0.3])
def test_rectifiers_have_pytorchs_bits(slope: float | None, dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    special = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-40, -1e-40, 3.0, -3.0, 6e-8, -6e-8] * 21)
    odd = torch.tensor([1.0, inf, -inf, -0.0, 2.0, -1.0, 1e-7] * 33)
    inputs = [(special.to(dtype), odd.to(dtype))] + [torch.randn(2, *shape).to(dtype).unbind() for shape in SHAPES]
    for x, grad in inputs:
        for layout in (torch.contiguous_format, torch.channels_last):
            if layout == torch.channels_last and x.dim() != 4:
                continue
            ours, theirs = (
                with_gradient(
                    (lambda x, m=m: m.relu(x)) if slope is None else (lambda x, m=m: m.leaky_relu(x, slope)),
                    x.to(memory_format=layout),
                    grad.to(memory_format=layout),
                )
                for m in (F, torch_functional)
            )
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.stride() == other.stride()
                assert torch.equal(mine.isnan(), other.isnan())
                assert torch.equal(mine.nan_to_num(7), other.nan_to_num(7))


@DTYPES
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_saturating_activations_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for factor in (1, 20, 2**-6):
            x, grad = (factor * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
            y, slope = with_gradient(getattr(F, name), x, grad)
            check_rounded_once(y, getattr(torch, name)(x.double()))
            wide = y.double()
            check_rounded_once(slope, grad.double() * (wide * (1 - wide) if name == "sigmoid" else 1 - wide * wide))


@DTYPES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["mse_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_losses_are_rounded_once(name: str, reduction: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[:1] + SHAPES[2:]:
        # labels of 0 and 1: of others the two parts of a gradient cancel
        x, t = torch.rand(shape).clamp(0.02, 0.98).to(dtype), torch.randint(0, 2, shape).to(dtype)
        if name == "binary_cross_entropy_with_logits":
            x = (8 * x - 4).to(dtype)
        grad = torch.randn(shape if reduction == "none" else ()).to(dtype)
        ours = with_gradient(lambda x, t=t: getattr(F, name)(x, t, reduction=reduction), x, grad)
        wide = with_gradient(
            lambda x, t=t: getattr(torch_functional, name)(x, t.double(), reduction=reduction),
            x.double(),
            grad.double(),
        )
        for mine, exact in zip(ours, wide, strict=True):
            assert mine.dtype is dtype
            check_rounded_once(mine, exact)


@DTYPES
def test_second_derivatives_of_losses(dtype: torch.dtype) -> None:
    x, t = torch.randn(300).to(dtype), torch.rand(300).to(dtype)
    for reduction in ("mean", "sum"):
        results: list[Any] = []
        for module, wide in ((F, dtype), (torch_functional, torch.float64)):
            leaf = x.detach().to(wide).requires_grad_()
            loss = module.binary_cross_entropy_with_logits(leaf, t.to(wide), reduction=reduction)
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            results.append(torch.autograd.grad(grad, leaf, torch.ones_like(grad))[0].double())
        # the gradient of the gradient is rounded at each of a few operators, at most six
        info = torch.finfo(dtype)
        torch.testing.assert_close(*results, rtol=3 * info.eps, atol=3 * info.tiny * info.eps)


@DTYPES
def test_autocast_widens_losses_first(dtype: torch.dtype) -> None:
    x, t = torch.randn(30).to(dtype), torch.rand(30).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("mse_loss", "binary_cross_entropy_with_logits"):
            ours, theirs = (getattr(m, name)(x, t) for m in (F, torch_functional))
            assert ours.dtype is theirs.dtype
            torch.testing.assert_close(ours, theirs)


@DTYPES
def test_an_improbable_probability_is_refused(dtype: torch.dtype) -> None:
    x = torch.rand(300).to(dtype)
    for bad in (1.5, -0.25, torch.nan):
        x[123] = bad
        with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
            F.binary_cross_entropy(x, torch.zeros_like(x))


@DTYPES
def test_blocks_give_way_to_graphs_and_maps(dtype: torch.dtype) -> None:
    x, t = torch.randn(2, 300).to(dtype)
    for function in (F.relu, F.sigmoid, F.tanh, F.leaky_relu):
        alone = with_gradient(function, x, t)
        mapped = torch.vmap(lambda x, t, f=function: torch.func.vjp(f, x)[1](t)[0])(x.view(3, 100), t.view(3, 100))
        # other operators, each of which is rounded by itself
        torch.testing.assert_close(mapped.view(-1), alone[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert bits_equal(torch.vmap(function)(x.view(3, 100)).view(-1), alone[0]) or function in (F.sigmoid, F.tanh)
