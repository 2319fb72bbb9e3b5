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
from reimpl.functional._losses import half as _losses_half
from reimpl.testing import bits_equal

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SHAPES = [(), (0,), (37,), (7, 33), (3, 5, 6, 7)]


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plain, "_BLOCK", 50)


def check_rounded_once(ours: Tensor, exact: Tensor, errors: float = 0.0) -> None:
    """Half a unit in the last place of the half-width dtype, a hundredth of it for the errors of float32, and what
    these come to where numbers cancel."""
    info = torch.finfo(ours.dtype)
    least = info.tiny * info.eps
    torch.testing.assert_close(ours.double(), exact, rtol=0.51 * info.eps, atol=0.51 * least + errors, equal_nan=True)


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
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_rounded_once(
    weighted: bool, ignore_index: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_PART", "_PART_OF_FEW"):
        monkeypatch.setattr(_losses_half, name, 64)
    for shape in ((37, 11), (5, 1100), (3, 11, 4, 5), (11,)):
        x = (4 * torch.randn(shape)).to(dtype)
        classes = shape[0] if len(shape) == 1 else shape[1]
        target = torch.randint(0, classes, () if len(shape) == 1 else (shape[0], *shape[2:]))
        if len(shape) > 1:
            target.view(-1)[::4] = ignore_index
        weight = torch.rand(classes).to(dtype) if weighted else None
        for reduction in ("none", "mean", "sum"):
            grad = torch.randn(target.shape if reduction == "none" else ()).to(dtype)
            results = []
            for m, wide in ((F, dtype), (torch_functional, torch.float64)):
                w = None if weight is None else weight.to(wide)
                results.append(
                    with_gradient(
                        lambda x, m=m, w=w, target=target, reduction=reduction: m.cross_entropy(
                            x, target, w, ignore_index=ignore_index, reduction=reduction
                        ),
                        x.to(wide),
                        grad.to(wide),
                    )
                )
            for mine, exact in zip(*results, strict=True):
                assert mine.dtype is dtype
                # a difference of numbers up to 16 and their exponentials, in float32
                errors = 64 * torch.finfo(torch.float32).eps * float(exact.abs().nan_to_num().max())
                check_rounded_once(mine, exact, errors)


@DTYPES
def test_cross_entropy_once_more_and_by_maps(dtype: torch.dtype) -> None:
    x, target, weight = torch.randn(6, 5).to(dtype), torch.arange(6) % 5, torch.rand(5).to(dtype)
    results: list[Any] = []
    for module, wide in ((F, dtype), (torch_functional, torch.float64)):
        leaf = x.to(wide).requires_grad_()
        loss = module.cross_entropy(leaf, target, weight.to(wide), ignore_index=1)
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        second = torch.autograd.grad(grad[:, 0].sum(), leaf, retain_graph=True)[0]
        mapped = torch.autograd.grad(loss, leaf, torch.ones(2, dtype=wide), is_grads_batched=True)[0]
        results.append((grad.double(), second.double(), mapped.double()))
    # rounded to half the width once on the way, and once at the end
    for mine, exact in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps / 8)


@DTYPES
def test_a_target_that_is_no_class_is_refused(dtype: torch.dtype) -> None:
    x = torch.randn(6, 5).to(dtype)
    for bad in (5, -1):
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            F.cross_entropy(x, torch.tensor([0, 1, bad, 2, -100, 3]))


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
