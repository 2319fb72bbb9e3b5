"""The windows of a batch of images as matrices, and the parts of the batch for which they are made at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv_arguments import Geometry, Phase
from reimpl.functional._dispatch import is_batched

# Measured: 2-16 MB of rows a product is fastest on CPU caches; CUDA wants few, large products.
_ROW_BYTES_CPU = 8 << 20
_ROW_BYTES_OTHER = 512 << 20
# Measured: rows of fewer pixels are padded faster once the channels are last.
_LONG_ROW = 16


def window_rows(input: Tensor, kernel: tuple[int, int], output: tuple[int, int], geometry: Geometry) -> Tensor:
    """A window a row: ``(groups, N·H'·W', f_h·f_w·C/groups)``, gathered from pixels with their channels last."""
    (s_h, s_w), (d_h, d_w), groups = geometry.stride, geometry.dilation, geometry.groups
    planes = _pixels(input, geometry)
    if kernel != (1, 1) or is_batched(input):
        planes = planes.contiguous()
    n, h, w, c = planes.stride()
    count, channels = input.shape[0], input.shape[1] // groups
    windows = planes.as_strided(
        (groups, count, *output, *kernel, channels),
        (c * channels, n, h * s_h, w * s_w, h * d_h, w * d_w, c),
    )
    return windows.reshape(groups, count * output[0] * output[1], prod(kernel) * channels)


def _pixels(input: Tensor, geometry: Geometry) -> Tensor:
    """The padded images with their channels last."""
    pixels, (top, bottom, left, right) = input.permute(0, 2, 3, 1), geometry.padding
    if not any(geometry.padding):
        return pixels
    if input.is_contiguous() and input.shape[3] >= _LONG_ROW:
        return pad_constant(input, (left, right, top, bottom)).permute(0, 2, 3, 1)
    return pad_constant(pixels, (0, 0, left, right, top, bottom))


def tap_rows(input: Tensor, kernel: tuple[int, int], output: tuple[int, int], geometry: Geometry) -> Tensor:
    """A tap a row: ``(C·f_h·f_w, N·H'·W')``, gathered from planes; for one group."""
    (s_h, s_w), (d_h, d_w), (top, bottom, left, right) = geometry.stride, geometry.dilation, geometry.padding
    planes = pad_constant(input, (left, right, top, bottom)) if any(geometry.padding) else input
    n, c, h, w = planes.stride()
    count, channels = input.shape[:2]
    taps = planes.as_strided((channels, *kernel, count, *output), (c, h * d_h, w * d_w, n, h * s_h, w * s_w))
    return taps.reshape(channels * prod(kernel), count * prod(output))


def parts(count: int, bytes_per_sample: int, device: torch.device, least: int = 0) -> Iterator[slice]:
    """Slices of the batch whose rows fit the device's budget, or ``least`` bytes: the kernel is read once a slice."""
    budget = max(least, _ROW_BYTES_CPU if device.type == "cpu" else _ROW_BYTES_OTHER)
    size = max(1, budget // max(1, bytes_per_sample))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def every(tensor: Tensor, dim: int, start: int, count: int, step: int) -> Tensor:
    """``count`` elements of a dimension, ``step`` apart; ``narrow``, unlike a whole slice, works in every vmap."""
    run = tensor.narrow(dim, start, (count - 1) * step + 1)
    return run if step == 1 else run[(slice(None),) * dim + (slice(None, None, step),)]


def pixels_of(planes: Tensor, down: Phase, across: Phase, geometry: Geometry) -> Tensor:
    """The pixels of two phases in a batch of planes."""
    rows = every(planes, 2, down.first, down.number, geometry.stride[0])
    return every(rows, 3, across.first, across.number, geometry.stride[1])
