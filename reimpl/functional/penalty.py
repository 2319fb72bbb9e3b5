"""Penalties on the size of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_to_float32, call, opmath_dtype


def lp_penalty(input: Tensor | Iterable[Tensor], p: float = 2.0, weight: float = 1.0, *, power: bool = False) -> Tensor:
    r"""Penalty :math:`\frac{\lambda}{p} \|x\|_p`, or with ``power`` :math:`\frac{\lambda}{p} \|x\|_p^p`.

    :math:`p = 1` is L1 regularisation, which makes numbers exactly 0. At :math:`p = 2` only the power is weight decay,
    with gradient :math:`\lambda x`; the norm's gradient :math:`\frac{\lambda}{2} x/\|x\|` has the same length however
    small :math:`x` is. Where :math:`x = 0` the norm gets the gradient 0.

    Args:
        input: a tensor, or several (such as ``model.parameters()``), taken as one vector of all their elements.
        p: the exponent, at least 1 and finite.
        weight: :math:`\lambda`.
        power: leave out the root.

    Returns:
        a number, in the dtype that the tensors promote to.

    Raises:
        ValueError: ``p`` is less than 1 or not finite, or there is no tensor.
        NotImplementedError: a tensor is not of a real floating-point dtype.

    Source: F12; N1, N4. PyTorch has none.
    """
    if not (p >= 1 and isfinite(p)):
        raise ValueError(f"p must be at least 1 and finite, got {p}")
    tensors = (input,) if isinstance(input, Tensor) else tuple(input)
    if not tensors:
        raise ValueError("input must hold at least one tensor, got none")
    tensors = autocast_to_float32(*tensors)
    dtype = tensors[0].dtype
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise NotImplementedError(f"lp_penalty is not implemented for {tensor.dtype}")
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = opmath_dtype(dtype)
    total = torch.stack([call(_Powers, _powers, tensor, p, wide).sum() for tensor in tensors]).sum()
    return (weight / p * (total if power or p == 1 else call(_Root, _root, total, p))).to(dtype)


def _root(total: Tensor, p: float) -> Tensor:
    positive = total > 0
    safe = torch.where(positive, total, 1)
    return torch.where(positive, safe.sqrt() if p == 2 else safe.pow(1 / p), total)


class _Root(torch.autograd.Function):
    r""":math:`\bar t = \frac1p t^{1/p - 1} \bar y`; what is not positive passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(total: Tensor, p: float) -> Tensor:
        return _root(total, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        total, ctx.p = inputs
        ctx.save_for_backward(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (total,) = ctx.saved_tensors
        positive = total > 0
        safe = torch.where(positive, total, 1)
        slope = 0.5 * safe.rsqrt() if ctx.p == 2 else safe.pow(1 / ctx.p - 1) / ctx.p
        return grad * torch.where(positive, slope, 1), None


def _powers(input: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    x = input.to(dtype)
    if p == 1:
        return x.abs()
    return x * x if p == 2 else x.abs().pow(p)


class _Powers(torch.autograd.Function):
    r""":math:`\bar x = p\, |x|^{p - 1} \operatorname{sign}(x)\, \bar y`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, p: float, dtype: torch.dtype) -> Tensor:
        return _powers(input, p, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.p, _ = inputs
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (input,) = ctx.saved_tensors
        x, p = input.to(grad.dtype), ctx.p
        if p == 1:
            slope = x.sign()
        else:
            slope = 2 * x if p == 2 else p * x.sign() * x.abs().pow(p - 1)
        return (grad * slope).to(input.dtype), None, None
