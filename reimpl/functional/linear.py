"""The affine map."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_disabled, autocast_enabled, autocast_to_lower, call


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Affine map :math:`y = x W^\top + b`.

    Args:
        input: shape :math:`(*, \text{in})`.
        weight: shape :math:`(\text{out}, \text{in})`, or :math:`(\text{in},)` for a single output without an axis.
        bias: shape :math:`(\text{out},)`, or one that broadcasts with the result.

    Returns:
        shape :math:`(*, \text{out})`, or :math:`(*,)` for a weight of one dimension.

    Raises:
        RuntimeError: shapes or dtypes do not fit; the text is PyTorch's.

    Source: F1; N3, the layer equation. PyTorch: :func:`torch.nn.functional.linear`.
    """
    if not autocast_enabled(input.device):
        return _linear(input, weight, bias)
    input, weight, bias = autocast_to_lower(input, weight, bias)
    with autocast_disabled(input.device):
        return _linear(input, weight, bias)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(input, weight, bias)
    if bias is not None and input.dim() != 2 and bias.dim() != 1 and bias.squeeze().dim() != 1:
        return _linear(input, weight, None).add_(bias)  # which may broadcast over other dimensions than the last
    if weight.dim() == 1:
        return call(_Linear, affine, input, weight.unsqueeze(0), bias).squeeze(-1)  # type: ignore[no-any-return]
    return call(_Linear, affine, input, weight, bias)  # type: ignore[no-any-return]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.dim() == 0 or weight.dim() == 0:
        raise RuntimeError(
            f"both arguments to linear need to be at least 1D, but they are {input.dim()}D and {weight.dim()}D"
        )
    if weight.dim() > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {weight.dim()}D")
    if weight.dim() == 1 and bias is not None and (input.dim() == 2 or bias.dim() == 1):
        raise RuntimeError("addmm: mat2 must be a matrix, got 1-D tensor")
    if weight.dim() == 1 and input.shape[-1] != weight.shape[0]:
        rows, columns, others = prod(input.shape[:-1]), input.shape[-1], weight.shape[0]
        if input.dim() > 1:
            raise RuntimeError(f"size mismatch, got input ({rows}), mat ({rows}x{columns}), vec ({others})")
        raise RuntimeError(
            f"inconsistent tensor size, expected tensor [{columns}] and src [{others}] to have the same number of "
            f"elements, but got {columns} and {others} elements respectively"
        )


def affine(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`linear` in differentiable tensor arithmetic alone."""
    rows = _rows(input)
    out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return out if input.dim() == 2 else out.reshape(*input.shape[:-1], weight.shape[0])


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def _by_columns(matrix: Tensor) -> bool:
    """Whether the numbers lie densely, column by column."""
    return matrix.stride() == (1, matrix.shape[0])


def _product(first: Tensor, second: Tensor, by_columns: bool) -> Tensor:
    return (second.t() @ first.t()).t() if by_columns else first @ second


class _Linear(torch.autograd.Function):
    r"""With :math:`\bar y = \partial E/\partial y`: :math:`\bar x = \bar y W`, :math:`\bar W = \bar y^\top x`,
    :math:`\bar b = \sum \bar y`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return affine(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias = inputs
        ctx.save_for_backward(input, weight)
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not autocast_enabled(grad.device):
            return affine_gradients(ctx, grad, *ctx.saved_tensors)
        with autocast_disabled(grad.device):
            return affine_gradients(ctx, grad, *ctx.saved_tensors)


def affine_gradients(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias, those that ``ctx`` asks for; it knows the shape of the bias.

    They lie in memory as PyTorch's: by columns that of an input which does, and of a weight that is not contiguous.
    """
    rows = _rows(grad)
    grad_input = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = _product(rows, weight.conj(), _by_columns(_rows(input)))
        if input.dim() != 2:
            grad_input = grad_input.reshape(input.shape)
    if ctx.needs_input_grad[1]:
        grad_weight = _product(rows.t(), _rows(input).conj(), not _by_columns(weight.t()))
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0) if ctx.bias_shape == rows.shape[1:] else rows.sum_to_size(ctx.bias_shape)
    return grad_input, grad_weight, grad_bias
