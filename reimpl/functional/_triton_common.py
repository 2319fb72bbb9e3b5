"""What the Triton kernels of the layers share: elementary functions, activations, and how a kernel is started."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from reimpl.optim._triton import INTERPRETED

# Programs of four warps that one processor can have in flight, all of their registers in use.
_PROGRAMS_PER_PROCESSOR = 8

if INTERPRETED:
    # the interpreter has no libdevice

    @triton.jit
    def exp(x):
        return tl.exp(x)

    @triton.jit
    def log(x):
        return tl.log(x)

    @triton.jit
    def expm1(x):
        # float64 leaves enough digits after the subtraction; -0 stays -0
        return tl.where(x == 0, x, (tl.exp(x.to(tl.float64)) - 1.0).to(tl.float32))

    @triton.jit
    def dot(a, b, total):
        # the interpreter takes the bits of bfloat16 for whole numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")

else:
    # within 2 ulp, where tl.exp and tl.log, made of one instruction each, lose digits as the exponent grows

    @triton.jit
    def exp(x):
        return libdevice.exp(x)

    @triton.jit
    def log(x):
        return libdevice.log(x)

    @triton.jit
    def expm1(x):
        return libdevice.expm1(x)

    @triton.jit
    def dot(a, b, total):
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr):
    """The activation's value in float32; NaN passes all of them."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * slope)
    elif ACTIVATION == "sigmoid":
        # the overflow of exp(-x) ends as 1/inf = 0, as it should
        return tl.div_rn(1.0, 1.0 + exp(-x))
    elif ACTIVATION == "tanh":
        # the sign goes in before the division, so that -0 stays -0; Triton 3.6 takes -x for 0 - x, which has no -0
        t = expm1(2 * tl.where(x < 0, x, -1.0 * x))
        return tl.div_rn(tl.where(x < 0, t, -1.0 * t), t + 2)
    else:
        return x


@triton.jit
def through(grad, y, slope, ACTIVATION: tl.constexpr):
    """The gradient before the activation whose value (for ``leaky_relu``: whose sign) is ``y``."""
    if ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        return tl.where(y > 0, grad, grad * slope)
    elif ACTIVATION == "sigmoid":
        return grad * (y * (1 - y))
    elif ACTIVATION == "tanh":
        return grad * (1 - y * y)
    else:
        return grad


@cache
def processors(device: torch.device) -> int:
    """How many processors the device has; the interpreter pretends to two."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def programs_wanted(device: torch.device) -> int:
    """How many small programs fill the device."""
    return _PROGRAMS_PER_PROCESSOR * processors(device)


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: Any) -> None:
    """Start a kernel whose first argument is a tensor, on that tensor's device; nothing for an empty grid."""
    if 0 in grid:
        return
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](first, *args, enable_fp_fusion=True, **options)
    else:
        kernel[grid](first, *args, enable_fp_fusion=True, **options)


def blocks(count: int, size: int) -> int:
    """How many blocks of ``size`` cover ``count``."""
    return -(-count // size)


def power_of_two(count: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two next above ``count``, within limits."""
    return max(least, min(most, 1 << max(0, count - 1).bit_length()))


def laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``, or a copy, with the strides of the dense ``other``."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def dense(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where its numbers do not lie in one piece of memory."""
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(tensor):
        return tensor
    return torch.empty_like(tensor).copy_(tensor)
