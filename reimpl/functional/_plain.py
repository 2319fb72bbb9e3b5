"""What ordinary tensors allow that mapped, traced and differentiated ones do not: writing over, and work on bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = {Tensor, Parameter}
_wrapped, _legacy = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
HALF = (torch.bfloat16, torch.float16)
_LOG2_E = math.log2(math.e)
_ALL_BITS = BITS | dict.fromkeys(HALF, torch.int16)
# Numbers in a block, 1 MB of float32: two or three of them stay in the cache from one operator to the next.
_BLOCK = 1 << 18


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether all are tensors of PyTorch's own, their memory holds their numbers, and nothing maps over them."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN or _wrapped(t) or _legacy(t) or t.is_neg()):
            return False
    return True


def plain_on_cpu(*tensors: Tensor) -> bool:
    """Whether several operators that write over one result are the quickest way: on the CPU, for final results."""
    return tensors[0].device.type == "cpu" and not torch.is_grad_enabled() and plain(*tensors)


def final_on_cpu(*tensors: Tensor) -> bool:
    """:func:`plain_on_cpu` of the half-width types too, for what goes by :func:`in_wide_blocks` or works on bits."""
    if tensors[0].device.type != "cpu" or torch.is_grad_enabled():
        return False
    for t in tensors:
        if t.dtype not in _ALL_BITS:
            return False
    return ordinary(*tensors)


def laid_out_alike(first: Tensor, *others: Tensor) -> bool:
    """Whether the numbers of all lie densely, and in the same order."""
    if first.is_contiguous():
        # a loop without a generator around it, since it is asked twice a layer
        return not [t for t in others if not t.is_contiguous()]
    dense = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    return dense and all(t.stride() == first.stride() for t in others)


def in_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, or where they are large the same few numbers of each at a time: what several operators in a row
    make of these then stays in the cache. For :func:`final_on_cpu` tensors of one shape, elementwise work."""
    count = tensors[0].numel()
    if count < 4 * _BLOCK or not laid_out_alike(*tensors):
        return iter([tensors])
    return zip(*(t.as_strided((count,), (1,)).split(_BLOCK) for t in tensors), strict=True)


def in_wide_blocks(*operands: Tensor, result: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """:func:`in_blocks` of operands and of the result that is made of them, which may be in place of the first: those
    of half the width by way of :func:`in_float32`."""
    return in_float32(*operands, result=result) if result.dtype in HALF else in_blocks(*operands, result)


def in_float32(*operands: Tensor, result: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
    """:func:`in_blocks` of operands of half the width as float32, and once more the first, to be written over: from
    there the result is rounded, once, when the next block is asked for."""
    wide: list[Tensor] = []
    for block in in_blocks(*operands) if result is None else in_blocks(*operands, result):
        if not wide or wide[0].shape != block[0].shape:
            wide = [torch.empty_like(t, dtype=torch.float32) for t in block[: len(operands)]]
        for own, narrow in zip(wide, block, strict=False):
            own.copy_(narrow)
        yield (*wide, wide[0])
        if result is not None:
            block[-1].copy_(wide[0])


def plain(*tensors: Tensor | None) -> bool:
    """Whether all are :func:`ordinary` tensors of one of the wide types."""
    for t in tensors:
        if t is not None and t.dtype not in BITS:
            return False
    return ordinary(*tensors)


def overwrite(tensor: Tensor, output: Tensor) -> Tensor:
    """``tensor`` with the numbers of ``output``, which has been made of it."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return tensor.copy_(output)
    recorded = torch.is_grad_enabled() and tensor.requires_grad and not (tensor.is_leaf or tensor._is_view())
    if recorded and forward_ad._current_level < 0 and ordinary(tensor, output):
        return _Overwrite.apply(tensor, output)  # type: ignore[no-any-return]
    return tensor.copy_(output)


class _Overwrite(torch.autograd.Function):
    """A copy in place that gives what it overwrites no gradient, where PyTorch's gives zeros, which are then added."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)  # which counts the change, so that the copy should not
        tensor.data.copy_(output)
        return tensor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def of_bits(tensor: Tensor) -> Tensor:
    """A floating-point tensor's bits as integers, in its memory."""
    return tensor.view(_ALL_BITS[tensor.dtype])


def exponential(input: Tensor, out: Tensor, factor: float = 1) -> Tensor:
    """:math:`e^{ax}` where it is not itself the result, written to ``out``, which may be the input.

    On the CPU by way of :math:`2^{a x \\log_2 e}`, which takes half the time. It is off by about :math:`|ax|/2` units
    in the last place: no more than :math:`x` is off that is a difference, or was rounded to half the width.
    """
    if input.is_cpu:
        return torch.mul(input, factor * _LOG2_E, out=out).exp2_()
    return torch.mul(input, factor, out=out).exp_() if factor != 1 else torch.exp(input, out=out)


def masked(grad: Tensor, rectified: Tensor) -> Tensor:
    """The gradient where the rectified value is not 0, and 0 elsewhere, bit by bit (NaN and infinities included).

    For :func:`ordinary` tensors of one floating-point dtype. On the CPU ``torch.where`` takes several times as long
    where its condition is random, and a shift by more than the width of a number leaves nothing of it; elsewhere
    neither need be so.
    """
    if not grad.is_cpu:
        return torch.where(rectified == 0, 0, grad)
    result = torch.empty_like(rectified)
    for g, y, d in in_blocks(grad, rectified, result):
        # the bits of 1 shift everything out
        shift = of_bits(torch.eq(y, 0, out=d))
        torch.bitwise_left_shift(of_bits(g), shift, out=shift)
    return result
