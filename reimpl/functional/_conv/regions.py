"""A convolution's windows in boxes of taps and channels, and the outputs that each box has numbers for.

A tap at a kernel's edge falls into the padding for a row or a column of the outputs, which of an image of 4 x 4 is a
quarter: those are left out of its products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from reimpl.functional._conv.arguments import Geometry

# Measured: rows of taps are better taken one by one, but where together they have so few numbers.
_TOGETHER = 256


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

    def __post_init__(self) -> None:
        size = self.down.stop - self.down.start, self.across.stop - self.across.start
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "terms", prod(self.box.sizes))

    @property
    def place(self) -> tuple[int, int]:
        """The row of the image at which the first output's box begins: whole strides and the rest."""
        stride = self.geometry.stride[0]
        first = self.box.rows.start * self.geometry.dilation[0] - self.geometry.padding[0]
        whole, rest = divmod(self.down.start * stride + first, stride)
        return int(whole), int(rest)


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
