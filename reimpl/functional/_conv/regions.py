"""A convolution's windows in boxes of taps and channels, and the outputs that each box has numbers for.

A tap at a kernel's edge falls into the padding for a row or a column of the outputs, which of an image of 4 x 4 is a
quarter: those are left out of its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.layouts import pixels_of_planes

# Measured: rows of taps are better taken one by one, but where together they have so few numbers.
_TOGETHER = 256
# What a box costs beside its products, in terms of a sum: gathering, and adding what comes of it.
_COST = 40


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


def partitions(kernel: tuple[int, int], channels: int, most: int) -> list[list[Box]]:
    """The ways to cut a window into boxes of at most ``most`` numbers, of about one size, that are worth a thought."""
    row, taps, every = kernel[1] * channels, [_evenly(size, 1) for size in kernel], slice(0, channels)
    ways = [[Box(k, j, c) for k in taps[0] for j in taps[1] for c in _evenly(channels, most)]]
    if channels <= most:
        ways.append([Box(k, j, every) for k in taps[0] for j in _evenly(kernel[1], most // channels)])
    if row <= most:
        ways.append([Box(k, slice(0, kernel[1]), every) for k in _evenly(kernel[0], max(1, _TOGETHER // row))])
    return ways


def _evenly(count: int, most: int) -> list[slice]:
    """``range(count)`` in parts of at most ``most``, which differ by 1."""
    number = -(-count // most)
    return [slice(count * k // number, count * (k + 1) // number) for k in range(number)]


@dataclass(frozen=True, eq=False)
class Region:
    """A box, and the outputs for which one of its taps, at least, lies in the image."""

    box: Box
    down: slice
    across: slice
    geometry: Geometry
    size: tuple[int, int] = field(init=False)
    """Rows and columns of outputs."""
    terms: int = field(init=False)
    """Numbers of the box."""
    reads: tuple[slice, slice] = field(init=False)
    """The rows and columns of the image that are read, those of the padding too."""

    def __post_init__(self) -> None:
        size = self.down.stop - self.down.start, self.across.stop - self.across.start
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "terms", prod(self.box.sizes))
        reads = self._reads(0, self.down, self.box.rows), self._reads(1, self.across, self.box.columns)
        object.__setattr__(self, "reads", reads)

    def _reads(self, dim: int, outputs: slice, taps: slice) -> slice:
        stride, dilation = self.geometry.stride[dim], self.geometry.dilation[dim]
        before = self.geometry.padding[2 * dim]
        first = outputs.start * stride + taps.start * dilation - before
        return slice(first, (outputs.stop - 1) * stride + (taps.stop - 1) * dilation - before + 1)


@lru_cache(maxsize=1024)
def planned(
    kernel: tuple[int, int],
    channels: int,
    most: int,
    size: tuple[int, int],
    output: tuple[int, int],
    geometry: Geometry,
) -> tuple[Region, ...]:
    """The boxes of a window and their regions, cut in the quickest way; the largest region first.

    A region costs its outputs times the terms of its box, and some more.
    """
    ways = [reached(boxes, size, output, geometry) for boxes in partitions(kernel, channels, most)]
    best = min(ways, key=lambda way: sum(prod(region.size) * (region.terms + _COST) for region in way))
    return tuple(sorted(best, key=lambda region: -prod(region.size)))


def reached(boxes: Sequence[Box], size: tuple[int, int], output: tuple[int, int], geometry: Geometry) -> list[Region]:
    """The boxes that reach outputs, with these."""
    found = []
    for box in boxes:
        down = _outputs(0, box.rows, size, output, geometry)
        across = _outputs(1, box.columns, size, output, geometry)
        if down.start < down.stop and across.start < across.stop:
            found.append(Region(box, down, across, geometry))
    return found


def _outputs(dim: int, taps: slice, size: tuple[int, int], output: tuple[int, int], geometry: Geometry) -> slice:
    """The outputs ``i`` for which ``0 <= i s + k d - p < size`` for the last of ``taps`` and for the first."""
    stride, dilation, before = geometry.stride[dim], geometry.dilation[dim], geometry.padding[2 * dim]
    first = -(((taps.stop - 1) * dilation - before) // stride)
    last = (size[dim] - 1 + before - taps.start * dilation) // stride
    return slice(max(0, first), min(output[dim], last + 1))


class Windows:
    """Makes matrices of the windows of a batch, block by block, in memory of its own.

    A matrix holds the boxes of a region's windows, a window a row, ``(N·rows·columns, terms)``, or with the batch as
    the last of the three. It is valid until the next: memory that is asked for anew for each block is taken from the
    system each time, which takes as long as the products.
    """

    def __init__(self, input: Tensor, blocks: list[slice], cut: Sequence[Region], batch_last: bool = False) -> None:
        self.count, self._batch_last = 0, batch_last
        most = max(part.stop - part.start for part in blocks)
        self._room = input.new_empty(most * max([0, *(prod(region.size) * region.terms for region in cut)]))
        channels, *size = input.shape[1:]
        top, bottom, left, right = margins(cut, (size[0], size[1]))
        self._origin = top, left
        self._padded = self._inner = None
        if batch_last or top or bottom or left or right:
            padded = size[0] + top + bottom, size[1] + left + right
            if batch_last:
                self._padded = input.new_empty(*padded, most, channels).permute(2, 0, 1, 3)
            else:
                self._padded = input.new_empty(most, *padded, channels)
            for dim, (before, after) in enumerate(((top, bottom), (left, right)), 1):
                self._padded.narrow(dim, 0, before).zero_()
                self._padded.narrow(dim, padded[dim - 1] - after, after).zero_()
            self._inner = self._padded.narrow(1, top, size[0]).narrow(2, left, size[1])

    def load(self, planes: Tensor) -> None:
        """Take a block of images, ``(N, C, H, W)``."""
        self.count = len(planes)
        self._pixels = pixels_of_planes(planes)
        if self._padded is not None and self._inner is not None:
            self._inner[: self.count].copy_(self._pixels)
            self._pixels = self._padded[: self.count]

    def rows(self, region: Region, offset: int = 0) -> Tensor:
        """The matrix of a region; ``offset`` is the first channel of its group."""
        pixels = self._pixels
        sizes, strides, first = _reading(region, self.count, pixels.stride()[:3], self._origin, self._batch_last)
        rows = pixels.as_strided(sizes, strides, first + offset + pixels.storage_offset())
        if not rows.is_contiguous():
            rows = self._room.as_strided(sizes, dense(sizes)).copy_(rows)
        return rows.view(-1, region.terms)


@lru_cache(maxsize=4096)
def _reading(
    region: Region, count: int, pixel: tuple[int, ...], origin: tuple[int, int], batch_last: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Where in memory the windows of a region stand: sizes, strides and the first number."""
    n, h, w = pixel
    (s_h, s_w), (d_h, d_w) = region.geometry.stride, region.geometry.dilation
    first = (region.reads[0].start + origin[0]) * h + (region.reads[1].start + origin[1]) * w
    outputs = [(count, n), (region.size[0], h * s_h), (region.size[1], w * s_w)]
    if batch_last:
        outputs = [*outputs[1:], outputs[0]]
    taps = zip(region.box.sizes, (h * d_h, w * d_w, 1), strict=True)
    sizes, strides = zip(*outputs, *taps, strict=True)
    return sizes, strides, first + region.box.channels.start


@lru_cache(maxsize=4096)
def dense(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of dense numbers."""
    return tuple(prod(sizes[k + 1 :]) for k in range(len(sizes)))


def margins(cut: Sequence[Region], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns of zeros around the image that regions read: top, bottom, left, right."""
    reads = [region.reads for region in cut]
    return (
        max([0, *(-down.start for down, _ in reads)]),
        max([0, *(down.stop - size[0] for down, _ in reads)]),
        max([0, *(-across.start for _, across in reads)]),
        max([0, *(across.stop - size[1] for _, across in reads)]),
    )
