"""The windows of a batch of images as matrices, and the parts of the batch for which they are made at a time."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv_arguments import Geometry, Phase

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


class Gatherer:
    """Makes matrices of the windows of a batch, block by block, in memory of its own; for one group.

    A matrix has a window a row, ``(N·H'·W', f_h·f_w·C)``, or a tap a row, ``(C·f_h·f_w, N·H'·W')``. It is valid until
    the next: memory that is asked for anew for each block is taken from the system each time, which takes as long as
    the products.
    """

    def __init__(
        self,
        input: Tensor,
        kernel: tuple[int, int],
        output: tuple[int, int],
        geometry: Geometry,
        taps_as_rows: bool,
        size: int,
    ) -> None:
        self.input, self.kernel, self.output, self.geometry = input, kernel, output, geometry
        self.taps_as_rows = taps_as_rows
        self._matrix = input.new_empty(size * prod(output) * prod(kernel) * input.shape[1])
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

    def __call__(self, part: slice) -> Tensor:
        """The matrix of the images of ``part``."""
        planes = self.input[part]
        if self._planes is not None:
            planes = self._pad(planes, self._planes[: len(planes)])
        n, c, h, w = planes.stride()
        (s_h, s_w), (d_h, d_w) = self.geometry.stride, self.geometry.dilation
        pixels = (len(planes), *self.output), (n, h * s_h, w * s_w)
        taps = self.kernel, (h * d_h, w * d_w)
        channels = (planes.shape[1],), (c,)
        order = (channels, taps, pixels) if self.taps_as_rows else (pixels, taps, channels)
        sizes, strides = (sum(column, ()) for column in zip(*order, strict=True))
        windows = planes.as_strided(sizes, strides)
        length = prod(pixels[0]) if self.taps_as_rows else prod(self.kernel) * planes.shape[1]
        if windows.is_contiguous():
            return windows.view(-1, length)
        return self._matrix[: windows.numel()].view(sizes).copy_(windows).view(-1, length)

    def _pad(self, planes: Tensor, target: Tensor) -> Tensor:
        """The images within their padding, of which the zeros stay from block to block."""
        inner = target
        for dim, before, after in ((2, *self.geometry.padding[:2]), (3, *self.geometry.padding[2:])):
            inner = inner.narrow(dim, max(before, 0), target.shape[dim] - max(before, 0) - max(after, 0))
            planes = planes.narrow(dim, max(-before, 0), inner.shape[dim])
        if self._staged is not None:
            stage = self._staged[: len(planes), :, : planes.shape[2], : planes.shape[3]]
            planes = stage.copy_(planes)
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
