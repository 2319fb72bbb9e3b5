"""Maxout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import call


def maxout(input: Tensor, pieces: int, dim: int = 1) -> Tensor:
    r"""Maxout :math:`y_i = \max_{j < k} x_{ik + j}`: the largest of each ``pieces`` neighbours along ``dim``.

    After an affine map or a convolution with :math:`k` times the units, each unit is the maximum of :math:`k` linear
    pieces, so that its shape as a function is learnt. Of equal pieces the first gets the gradient; NaN passes.

    Args:
        input: any shape, :math:`mk` long along ``dim``, a real dtype.
        pieces: :math:`k`, at least 1.
        dim: the dimension of the units.

    Returns:
        the shape of ``input`` with :math:`m` in ``dim``.

    Raises:
        IndexError: ``dim`` is out of range.
        ValueError: ``pieces`` is not positive or does not divide the units.

    Source: F2; N2; Goodfellow et al. (2013). PyTorch has none.
    """
    bound = max(input.dim(), 1)
    if not -bound <= dim < bound:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-bound}, {bound - 1}], but got {dim})")
    units = input.shape[dim] if input.dim() else 1
    if pieces < 1 or units % pieces:
        raise ValueError(f"pieces must be positive and divide the {units} units of dimension {dim}, got {pieces}")
    dim %= bound
    groups = (input if input.dim() else input.unsqueeze(0)).unflatten(dim, (units // pieces, pieces))
    largest: Tensor = call(_Maxout, _largest_piece, groups, dim + 1)[0]
    return largest if input.dim() else largest.squeeze(0)


def _largest_piece(groups: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    places = groups.detach().argmax(dim, keepdim=True)
    return groups.gather(dim, places).squeeze(dim), places


class _Maxout(torch.autograd.Function):
    r"""The gradient of each maximum goes to the piece that it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(groups: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        return _largest_piece(groups, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        groups, ctx.dim = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.pieces = groups.shape[ctx.dim]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        grad = grad.unsqueeze(ctx.dim)
        shape = (*grad.shape[: ctx.dim], ctx.pieces, *grad.shape[ctx.dim + 1 :])
        return grad.new_zeros(shape).scatter(ctx.dim, places, grad), None
