"""The order of numbers in memory that a convolution's matrices want: transposed planes, pixels and kernels."""

from __future__ import annotations

from math import gcd, prod

import torch
from torch import Tensor

# Matrices that the transposition of one large one is shared out to.
_SHARES = 8
# Planes so many bytes apart crowd into one place of the cache when they are written pixel by pixel.
_CLASHING = 4096
# Rows of so many numbers may be copied one by one.
_LONG_ROW = 16


def transposed(matrices: Tensor) -> Tensor:
    """``(N, A, B)`` as ``(N, B, A)``, dense.

    PyTorch copies between such orders number by number, at 4-20 GB/s on two Zen 5 cores. Its shuffle of channels, which
    takes ``A`` groups of ``B`` to ``B`` groups of ``A``, has vector instructions for float32: 15-80 GB/s. That way
    bfloat16, too, takes a quarter of the time.
    """
    n, a, b = matrices.shape
    if not matrices.is_contiguous():
        return matrices.transpose(1, 2).contiguous()
    if matrices.dtype is torch.bfloat16:
        return transposed(matrices.float()).bfloat16()
    if matrices.dtype is not torch.float32:
        return matrices.transpose(1, 2).contiguous()
    channels = matrices.as_strided((n, a * b, 1, 1), (a * b, 1, a * b, a * b))
    return torch.channel_shuffle(channels, a).view(n, b, a)


def pixels_of_planes(planes: Tensor) -> Tensor:
    """``(N, C, H, W)`` as ``(N, H, W, C)`` with dense channels: as it is, where they are, else rearranged."""
    if planes.stride(1) == 1:
        return planes.permute(0, 2, 3, 1)
    if not planes.is_contiguous():
        if planes.dtype is not torch.float32 or planes.stride(3) != 1:
            return planes.permute(0, 2, 3, 1).contiguous()
        planes = planes.contiguous()
    n, c, h, w = planes.shape
    return transposed(planes.view(n, c, h * w)).view(n, h, w, c)


def planes_of_pixels(pixels: Tensor, layout: torch.memory_format) -> Tensor:
    """``(N, H, W, C)`` as ``(N, C, H, W)``, in runs of memory for a layout if not in its order.

    The channels of a pixel lie side by side, in the order of the shape or with rows first.
    """
    n, h, w, c = pixels.shape
    if layout is torch.channels_last:
        return pixels.permute(0, 3, 1, 2)
    rows = pixels.transpose(0, 1)
    if w >= _LONG_ROW and rows.is_contiguous():
        return transposed(rows.view(h * n, w, c)).view(h, n, c, w).permute(1, 2, 0, 3)
    pixels = pixels.contiguous()
    if not planes_clash((h, w), pixels.dtype):
        return transposed(pixels.view(n, h * w, c)).view(n, c, h, w)
    return transposed(pixels.view(n * h, w, c)).view(n, h, c, w).transpose(1, 2)


def planes_clash(size: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether planes of such a size are written slowly pixel by pixel."""
    return prod(size) * dtype.itemsize >= _CLASHING


def empty_planes(like: Tensor, channels: int, size: tuple[int, int], layout: torch.memory_format) -> Tensor:
    """Planes for what comes of the batch ``like``."""
    shape = like.shape[0], channels, *size
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def taps_first(weight: Tensor) -> Tensor:
    """A kernel ``(O, C, f_h, f_w)`` as ``(f_h, f_w, C, O)``, dense."""
    outputs, channels, *kernel = weight.shape
    shares = gcd(outputs, _SHARES)
    if not weight.is_contiguous():
        return weight.permute(2, 3, 1, 0).contiguous()
    turned = transposed(weight.view(shares, outputs // shares, channels * prod(kernel)))
    return turned.view(shares, channels, *kernel, -1).permute(2, 3, 1, 0, 4).reshape(*kernel, channels, outputs)


def taps_first_of_adjoint(weight: Tensor) -> Tensor:
    """A kernel ``(O, C, f_h, f_w)`` as ``(f_h, f_w, O, C)``, dense."""
    outputs, channels, *kernel = weight.shape
    if not weight.is_contiguous():
        return weight.permute(2, 3, 0, 1).contiguous()
    return transposed(weight.view(1, outputs * channels, prod(kernel))).view(*kernel, outputs, channels)


def taps_last(turned: Tensor) -> Tensor:
    """The reverse for a gradient, ``(O, f_h, f_w, C)``, which becomes ``(O, C, f_h, f_w)``, dense."""
    outputs, *kernel, channels = turned.shape
    return transposed(turned.view(outputs, prod(kernel), channels)).view(outputs, channels, *kernel)
