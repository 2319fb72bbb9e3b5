"""Losses number by number with their sum or mean as one Function, for plain tensors: in place, or by a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import opmath_dtype
from reimpl.functional._losses.plain import final, half_runs_plainly, in_parts, runs_plainly
from reimpl.functional._losses.targets import check_unit_interval
from reimpl.functional._plain import HALF, final_on_cpu, in_float32, ordinary
from reimpl.functional.kernels import attempt, kernels_for, teach

_KERNELS = "_losses.numba_pointwise"


@dataclass(frozen=True)
class Pointwise:
    """A loss of pairs of numbers.

    Args:
        name: the kernels' name of it.
        write: put the losses of ``(input, target)`` into the third tensor, which may be the input.
        write_gradient: put the gradient of the input into the third tensor, for a loss's gradient, the fourth.
        function: the Function of the losses without reduction, whose backward pass is differentiable.
        probabilities: whether the numbers must lie in [0, 1].
    """

    name: str
    write: Callable[[Tensor, Tensor, Tensor], object]
    write_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], object]
    function: Any
    probabilities: bool = False

    def through(self, options: tuple[str], grads: Any, saved: Any, *_: object) -> Tensor:
        """The gradient of the input from that of the losses' reduction, by differentiable operators."""
        (reduction,), (grad,), (input, target) = options, grads, saved
        ctx = SimpleNamespace(saved_tensors=(input, target, None), needs_input_grad=(True, False, False, False))
        divisor = input.numel() if reduction == "mean" else 1
        each = grad.to(opmath_dtype(grad.dtype)) / divisor
        gradient: Tensor = self.function.backward(ctx, each.expand(input.shape))[0]
        return gradient


def suits(input: Tensor, target: Tensor) -> bool:
    """Whether the tensors are plain, of one dtype, have elements in the same places, and the target is fixed. The
    half-width types do on the CPU, where autocast does not widen them first."""
    return (
        (runs_plainly(input, target) or half_runs_plainly(input, target))
        and input.dtype is target.dtype
        and input.shape == target.shape
        and input.device == target.device
        and input.is_contiguous()
        and target.is_contiguous()
        and not target.requires_grad
        and input.numel() > 0
        # strides of single elements say nothing of where these lie, and yet they show in the result
        and (1 not in input.shape or input.stride() == target.stride())
    )


def laid_out(result: Tensor, *operands: Tensor) -> Tensor:
    """``result`` with the strides that PyTorch's operators give to what they make of ``operands``, number by number;
    contiguous without any. For ordinary tensors; others stay as they are."""
    usual = result.is_contiguous() and 1 not in result.shape and all(t.is_contiguous() for t in operands)
    if usual or not ordinary(result, *operands):
        return result
    shape, device = result.shape, torch.device("meta")
    pattern = torch.empty_like(operands[0], device=device) if operands else torch.empty(shape, device=device)
    for other in operands[1:]:
        pattern = pattern + torch.empty_strided(other.shape, other.stride(), device=device)
    if result.stride() == pattern.stride():
        return result
    return torch.empty_strided(shape, pattern.stride(), dtype=result.dtype, device=result.device).copy_(result)


def pointwise_loss(input: Tensor, target: Tensor, loss: Pointwise, reduction: str) -> Tensor:
    """A loss of pairs of numbers that :func:`suits`, reduced."""
    done: Tensor | None = attempt((loss.name, reduction), input, target)
    return PointwiseLoss.apply(input, target, loss, reduction) if done is None else done


class PointwiseLoss(torch.autograd.Function):
    """The losses of a :class:`Pointwise`, their sum or mean."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, loss: Pointwise, reduction: str) -> Tensor:
        ctx.loss, ctx.reduction, ctx.divisor = loss, reduction, input.numel() if reduction == "mean" else 1
        ctx.save_for_backward(input, target)
        kernels = kernels_for(_KERNELS, input, target)
        result: Tensor | None = None
        if kernels:
            result = kernels.losses(loss.name, input, target, reduction)
            teach((loss.name, reduction), kernels, loss.through, input)
        if result is None:
            if loss.probabilities:
                check_unit_interval(input, "input")
                check_unit_interval(target, "target")
            result = _reduced(loss.write, input, target, reduction)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, target = saved = ctx.saved_tensors
        if not (final(grad) or final_on_cpu(grad)):
            return ctx.loss.through((ctx.reduction,), (grad,), saved), None, None, None
        kernels = kernels_for(_KERNELS, grad, input, target)
        if kernels:
            return kernels.gradient(ctx.loss.name, grad, input, target, ctx.divisor), None, None, None
        result = torch.empty_like(input)
        # a scalar's quotient must not be rounded to half the width
        factor = grad if grad.dim() else grad.to(opmath_dtype(grad.dtype)) / ctx.divisor
        for x, t, d, g in _in_parts(input, target, result, factor):
            ctx.loss.write_gradient(x, t, d, g)
        return result, None, None, None


def _reduced(
    write: Callable[[Tensor, Tensor, Tensor], object], input: Tensor, target: Tensor, reduction: str
) -> Tensor:
    if reduction == "none":
        result = torch.empty_like(input)
        for x, t, y, _ in _in_parts(input, target, result):
            write(x, t, y)
        return result
    total: Tensor | None = None
    for x, t, scratch, _ in _in_parts(input, target):
        write(x, t, scratch)
        total = scratch.sum() if total is None else total.add_(scratch.sum())
    assert total is not None
    return (total.div_(input.numel()) if reduction == "mean" else total).to(input.dtype)


def _in_parts(
    input: Tensor, target: Tensor, result: Tensor | None = None, grad: Tensor | None = None
) -> Iterator[tuple[Any, ...]]:
    """The operands, a result to be written or else room for it, and a gradient, in parts and in the dtype of sums."""
    if input.dtype in HALF:
        each = grad is not None and grad.dim() > 0
        for x, t, *own, y in in_float32(input, target, *((grad,) if each else ()), result=result):
            yield x, t, y, own[0] if each else grad
        return
    scratch = None
    for x, t, y, g in in_parts(input, target, result, grad):
        if y is None:
            y = scratch = torch.empty_like(x) if scratch is None else scratch[: len(x)] if x.dim() else scratch
        yield x, t, y, g
