"""Squared error, with and without the half."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_to_float32, call, opmath_dtype, scalar_type_name
from reimpl.functional._losses.pointwise import Pointwise, laid_out, pointwise_loss, suits
from reimpl.functional._losses.reduction import legacy_reduction, reduced, resolve
from reimpl.functional._losses.targets import check_no_truth_values


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared error :math:`\ell_i = w_i (x_i - t_i)^2`; ``"mean"`` divides the sum by :math:`\sum_i w_i`.

    Args:
        input, target: shapes that broadcast; a warning says so where they differ.
        size_average, reduce: deprecated, as in PyTorch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: :math:`w`, of the shape of ``input``; 1 without.

    Raises:
        ValueError: ``weight`` has another shape than ``input``, or ``reduction`` is unknown.
        RuntimeError: the shapes do not broadcast.
        NotImplementedError: neither dtype is floating-point, without ``weight``; a tensor is boolean, with it.

    Source: F4; N3, where the code's mean stands. PyTorch: :func:`torch.nn.functional.mse_loss`.
    """
    _warn_of_broadcast(input, target)
    if weight is not None and weight.size() != input.size():
        raise ValueError("Weights and input must have the same size.")
    reduction = legacy_reduction(reduction, size_average, reduce)
    if weight is not None and reduction not in ("none", "mean", "sum"):
        raise ValueError(f"Invalid reduction mode: {reduction}. Expected one of 'none', 'mean', 'sum'.")
    reduction = resolve(reduction)
    if weight is None and suits(input, target):
        return pointwise_loss(input, target, _SQUARED_ERROR, reduction)
    input, target, weight = autocast_to_float32(input, target, weight)
    if weight is None:
        losses, dtype = _squared_errors(input, target)
        return reduced(losses, reduction, dtype)
    check_no_truth_values(input, target)
    dtype = torch.promote_types(input.dtype, target.dtype)
    if not dtype.is_floating_point or weight.is_complex():
        losses, _ = _weighted_squares(input, target, weight, dtype)
        total = losses if reduction == "none" else losses.sum()
        return total / weight.sum() if reduction == "mean" else total
    dtype, input, target = _promoted(input, target)
    losses, _ = call(_WeightedSquares, _weighted_squares, input, target, weight, dtype)
    return reduced(losses, reduction, torch.promote_types(dtype, weight.dtype), weight.sum(dtype=losses.dtype))


def half_squared_error(input: Tensor, target: Tensor, reduction: str = "sum") -> Tensor:
    r"""Half the squared error, :math:`E = \tfrac12 \sum_i (x_i - t_i)^2`, whose first error is :math:`x - t`.

    ``"sum"`` is the notes' formula, ``"mean"``, half of :func:`mse_loss`, their code: they differ by the number of
    elements. Arguments and errors are otherwise those of :func:`mse_loss`.

    Source: F4, F18; N3. PyTorch has none.
    """
    _warn_of_broadcast(input, target)
    reduction = resolve(reduction)
    input, target = autocast_to_float32(input, target)
    losses, dtype = _squared_errors(input, target)
    return reduced(losses, reduction, dtype) * 0.5


def _warn_of_broadcast(input: Tensor, target: Tensor) -> None:
    if target.size() != input.size():
        warnings.warn(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}). "
            "This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size.",
            stacklevel=4,  # over the door in reimpl.functional
        )


def _promoted(input: Tensor, target: Tensor) -> tuple[torch.dtype, Tensor, Tensor]:
    """The dtype of the result, and the tensors in the shape of the losses."""
    dtype = torch.promote_types(input.dtype, target.dtype)
    if not dtype.is_floating_point:
        raise NotImplementedError(f"\"mse_{input.device.type}\" not implemented for '{scalar_type_name(dtype)}'")
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    return dtype, input, target


def _squared_errors(input: Tensor, target: Tensor) -> tuple[Tensor, torch.dtype]:
    """The squared errors, in the dtype in which sums are taken, and the dtype of the result."""
    dtype, input, target = _promoted(input, target)
    return call(_SquaredError, _square, input, target, opmath_dtype(dtype)), dtype


def _square(input: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    difference = input.to(dtype) - target.to(dtype)
    return difference * difference


class _SquaredError(torch.autograd.Function):
    r""":math:`\bar x = 2 (x - t) \bar\ell`, :math:`\bar t = -\bar x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
        return _square(input, target, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, target = ctx.saved_tensors[:2]
        dtype = opmath_dtype(torch.promote_types(input.dtype, target.dtype))
        slope = (input.to(dtype) - target.to(dtype)) * (2 * grad)
        wants_input, wants_target = ctx.needs_input_grad[:2]
        grad_input = laid_out(slope.to(input.dtype)) if wants_input else None
        return grad_input, laid_out(-slope.to(target.dtype)) if wants_target else None, None


def _weighted_squares(input: Tensor, target: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weighted squares, in the dtype in which sums are taken, and the differences in ``dtype``."""
    wide = opmath_dtype(dtype)
    difference = input.to(wide) - target.to(wide)
    return difference * difference * weight, difference.to(dtype)


class _WeightedSquares(torch.autograd.Function):
    r""":math:`\bar x = 2 w d \bar\ell`, :math:`\bar t = -\bar x`, :math:`\bar w = d^2 \bar\ell` with :math:`d = x - t`.

    The differences are an output: kept in place of input and target, they can still be differentiated.
    """

    generate_vmap_rule = True
    results_differ = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _weighted_squares(input, target, weight, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, target, weight, _ = inputs
        ctx.dtypes = input.dtype, target.dtype
        ctx.save_for_backward(output[1], weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_difference: Tensor) -> tuple[Tensor | None, ...]:
        difference, weight = ctx.saved_tensors
        wants_input, wants_target, wants_weight = ctx.needs_input_grad[:3]
        difference = difference.to(grad.dtype)
        grad_input = grad_target = grad_weight = None
        if wants_input or wants_target:
            # in PyTorch's order, on which the strides depend
            whole = grad * weight * (2 * difference) + grad_difference
            grad_input = whole.to(ctx.dtypes[0]) if wants_input else None
            grad_target = -whole.to(ctx.dtypes[1]) if wants_target else None
        if wants_weight:
            grad_weight = (grad * (difference * difference)).to(weight.dtype)
        return grad_input, grad_target, grad_weight, None


def _write_squares(input: Tensor, target: Tensor, output: Tensor) -> None:
    torch.sub(input, target, out=output).mul_(output)


def _write_gradient(input: Tensor, target: Tensor, output: Tensor, grad: Tensor) -> None:
    torch.sub(input, target, out=output).mul_(2 * grad)


_SQUARED_ERROR = Pointwise("mse_loss", _write_squares, _write_gradient, _SquaredError)
