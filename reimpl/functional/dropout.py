"""Dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import call
from reimpl.functional._options import check_flags, check_number


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    r"""Inverted dropout: :math:`y_i = m_i x_i/(1 - p)` with :math:`m_i \sim \operatorname{Bernoulli}(1 - p)`.

    The division keeps the expectation, so that nothing needs to be done at test time. On the CPU the same state of
    the generator gives PyTorch's mask, and its bits; PyTorch's CUDA kernel draws in an order of its own.

    Args:
        input: any shape, a floating-point or complex dtype.
        p: probability of an element being set to 0.
        training: return ``input`` itself where false.
        inplace: write the result into ``input`` and return it.

    Raises:
        ValueError: ``p`` lies outside [0, 1].
        RuntimeError: the dtype is not floating-point or complex, or ``p`` is NaN.

    Source: F11; N1, N4. PyTorch: :func:`torch.nn.functional.dropout`.
    """
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    check_number(p)
    check_flags(training)
    p = float(p)
    if p != p:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0 or not training or input.numel() == 0:
        return input
    real = input.dtype.to_real() if input.is_complex() else input.dtype
    # At p = 1 nothing is drawn; the product, rather than zeros, lets NaN and infinity through as NaN.
    scale = input.new_zeros(()) if p == 1 else torch.empty_like(input, dtype=real).bernoulli_(1 - p).div_(1 - p)
    if inplace:
        return input.mul_(scale)
    return call(_Scale, torch.mul, input, scale)  # type: ignore[no-any-return]


class _Scale(torch.autograd.Function):
    r""":math:`\bar x_i = \bar y_i m_i/(1 - p)`: the same mask."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, scale: Tensor) -> Tensor:
        return input * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None
