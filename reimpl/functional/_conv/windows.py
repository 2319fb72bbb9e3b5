"""The windows of a batch of images as matrices, and the parts of the batch for which they are made at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv.arguments import Geometry, Phase

# Measured: some 10 MB of rows a product is fastest on CPU caches; CUDA wants few, large products.
_ROW_BYTES_CPU = 10 << 20
_ROW_BYTES_OTHER = 512 << 20
# Planes that are a multiple of so many bytes apart crowd into few sets of the cache.
_CLASHING = 1024


def window_rows(input: Tensor, kernel: tuple[int, int], output: tuple[int, int], geometry: Geometry) -> Tensor:
    """The windows of ``input`` as rows ``(groups, N·H'·W', f_h·f_w·C/groups)``."""
    top, bottom, left, right = geometry.padding
    planes = input.permute(0, 2, 3, 1)
    if any(geometry.padding):
        planes = pad_constant(planes, (0, 0, left, right, top, bottom))
    count, groups = input.shape[0], geometry.groups
    channels = input.shape[1] // groups
    planes = planes.contiguous()
    n, h, w, c = planes.stride()
    (s_h, s_w), (d_h, d_w) = geometry.stride, geometry.dilation
    windows = planes.as_strided(
        (groups, count, *output, *kernel, channels),
        (c * channels, n, h * s_h, w * s_w, h * d_h, w * d_w, c),
    )
    return windows.reshape(groups, count * output[0] * output[1], prod(kernel) * channels)


class Box(NamedTuple):
    """A part of a window: rows of taps, taps of a row, channels."""

    rows: slice
    columns: slice
    channels: slice

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of each."""
        rows, columns, channels = (part.stop - part.start for part in self)
        return rows, columns, channels


def boxes(kernel: tuple[int, int], channels: int, most: int) -> list[Box]:
    """A window in parts of at most ``most`` numbers, of about one size, and in the longest runs of memory."""
    row, taps = kernel[1] * channels, [_evenly(size, 1) for size in kernel]
    if row <= most:
        return [Box(k, slice(0, kernel[1]), slice(0, channels)) for k in _evenly(kernel[0], most // row)]
    if channels <= most:
        return [Box(k, j, slice(0, channels)) for k in taps[0] for j in _evenly(kernel[1], most // channels)]
    return [Box(k, j, c) for k in taps[0] for j in taps[1] for c in _evenly(channels, most)]


def _evenly(count: int, most: int) -> list[slice]:
    """``range(count)`` in parts of at most ``most``, which differ by 1."""
    number = -(-count // most)
    return [slice(count * k // number, count * (k + 1) // number) for k in range(number)]


class Gatherer:
    """Makes matrices of the windows of a batch, block by block, in memory of its own; for one group.

    A matrix holds a box of each window, a window a row, ``(N·H'·W', f_h·f_w·C)``, or a tap a row,
    ``(C·f_h·f_w, N·H'·W')``. It is valid until the next: memory that is asked for anew for each block is taken from the
    system each time, which takes as long as the products.
    """

    def __init__(
        self,
        input: Tensor,
        kernel: tuple[int, int],
        output: tuple[int, int],
        geometry: Geometry,
        boxes: list[Box],
        taps_as_rows: bool,
        size: int,
    ) -> None:
        self.input, self.kernel, self.output, self.geometry = input, kernel, output, geometry
        self.boxes, self.taps_as_rows = boxes, taps_as_rows
        self._matrix = input.new_empty(size * prod(output) * max(prod(box.sizes) for box in boxes))
        self._planes = self._staged = None
        if not self._read_in_place():
            self._planes = self._new_planes(size)
            self._staged = self._new_stage(size)

    def _read_in_place(self) -> bool:
        """Whether the windows can be copied out of the input as it is."""
        dense = self.input.stride(3 if self.taps_as_rows else 1) == 1
        return not any(self.geometry.padding) and (dense or self.kernel == (1, 1))

    def _new_planes(self, size: int) -> Tensor:
        """Padded images, in the order in which they are read."""
        height, width = self.geometry.padded(self.input.shape[2], self.input.shape[3])
        if self.taps_as_rows:
            return self.input.new_zeros(size, self.input.shape[1], height, width)
        return self.input.new_zeros(size, height, width, self.input.shape[1]).permute(0, 3, 1, 2)

    def _new_stage(self, size: int) -> Tensor | None:
        """Planes a little apart, where their distance would put all channels of a pixel into one place of the cache."""
        _, channels, height, width = self.input.shape
        apart = self.input.stride(1) * self.input.element_size()
        if self.taps_as_rows or self.input.stride(3) != 1 or apart % _CLASHING:
            return None
        room = self.input.new_empty(size, channels, height * width + _CLASHING // 16)
        return room[..., : height * width].view(size, channels, height, width)

    def __call__(self, part: slice) -> Iterator[Tensor]:
        """The matrices of the images of ``part``, one for each box."""
        planes = self.input[part]
        if self._planes is not None:
            planes = self._pad(planes, self._planes[: len(planes)])
        return (self._gather(planes, box) for box in self.boxes)

    def _gather(self, planes: Tensor, box: Box) -> Tensor:
        n, c, h, w = planes.stride()
        (s_h, s_w), (d_h, d_w) = self.geometry.stride, self.geometry.dilation
        *taps, channels = box.sizes
        first = box.rows.start * d_h * h + box.columns.start * d_w * w + box.channels.start * c
        pixels = (len(planes), *self.output), (n, h * s_h, w * s_w)
        window = [(tuple(taps), (h * d_h, w * d_w)), ((channels,), (c,))]
        order = [*window[::-1], pixels] if self.taps_as_rows else [pixels, *window]
        sizes, strides = (sum(column, ()) for column in zip(*order, strict=True))
        windows = planes.as_strided(sizes, strides, planes.storage_offset() + first)
        length = prod(pixels[0]) if self.taps_as_rows else prod(box.sizes)
        if windows.is_contiguous():
            return windows.view(-1, length)
        return self._matrix[: windows.numel()].view(sizes).copy_(windows).view(-1, length)

    def _pad(self, planes: Tensor, target: Tensor) -> Tensor:
        """The images within their padding, of which the zeros stay from block to block."""
        return fill_padded(target, planes, self.geometry, self._staged)


def fill_padded(target: Tensor, planes: Tensor, geometry: Geometry, staged: Tensor | None = None) -> Tensor:
    """Write images between the padding of ``target``, by way of ``staged``."""
    inner = target
    for dim, before, after in ((2, *geometry.padding[:2]), (3, *geometry.padding[2:])):
        inner = inner.narrow(dim, max(before, 0), target.shape[dim] - max(before, 0) - max(after, 0))
        planes = planes.narrow(dim, max(-before, 0), inner.shape[dim])
    if staged is not None:
        planes = staged[: len(planes), :, : planes.shape[2], : planes.shape[3]].copy_(planes)
    inner.copy_(planes)
    return target


def parts(count: int, bytes_per_sample: int, device: torch.device, least: int = 0) -> Iterator[slice]:
    """Slices of the batch whose rows fit the device's budget, or ``least`` bytes: the kernel is read once a slice."""
    budget = max(least, _ROW_BYTES_CPU if device.type == "cpu" else _ROW_BYTES_OTHER)
    size = int(max(1, budget // max(1, bytes_per_sample)))  # while tracing, sizes are tensors
    if size < count:
        size = 1 << size.bit_length() - 1  # so that batches, powers of two as a rule, leave no small rest
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
