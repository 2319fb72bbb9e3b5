"""The windows of a batch of images as matrices, in which boxes that are some rows of taps apart share their numbers.

What a row of taps sees of the outputs below is what the next row sees of the outputs above. With the rows of windows
outermost, each box has a run of them, and they are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.layouts import pixels_of_planes
from reimpl.functional._conv.regions import Region, partitions, reached
from reimpl.functional._conv.windows import Run

# What a box costs beside its products, in terms of a sum: gathering, and adding what comes of it.
_COST = 40
ROWS_FIRST, IMAGES_FIRST, IMAGES_LAST = "mnj", "nmj", "mjn"
"""Orders of windows in a matrix: rows of windows (m), images (n), windows of a row (j)."""


@dataclass(frozen=True, eq=False)
class Strip:
    """Regions of boxes that differ in their rows alone, by whole strides; the largest first."""

    regions: tuple[Region, ...]
    order: str
    """Of the windows; with images first there is one region."""
    first: int = field(init=False)
    """The row of the image at which windows begin, in strides."""
    size: tuple[int, int] = field(init=False)
    """Rows and columns of windows."""

    def __post_init__(self) -> None:
        starts = [region.place[0] for region in self.regions]
        stop = max(start + region.size[0] for start, region in zip(starts, self.regions, strict=True))
        object.__setattr__(self, "first", min(starts))
        object.__setattr__(self, "size", (stop - min(starts), self.regions[0].size[1]))

    @property
    def terms(self) -> int:
        """Numbers of a window."""
        return self.regions[0].terms


def strips(cut: Sequence[Region], order: str) -> tuple[Strip, ...]:
    """Regions in strips, the largest region first."""
    found: dict[tuple[int, ...], list[Region]] = {}
    for region in sorted(cut, key=lambda region: -prod(region.size)):
        rows, columns, channels = region.box
        key = region.place[1], rows.stop - rows.start, columns.start, columns.stop, channels.start, channels.stop
        found.setdefault(key, []).append(region)
    return tuple(Strip(tuple(regions), order) for regions in found.values())


@lru_cache(maxsize=1024)
def planned(
    kernel: tuple[int, int],
    channels: int,
    most: int,
    size: tuple[int, int],
    output: tuple[int, int],
    geometry: Geometry,
) -> tuple[Strip, ...]:
    """The boxes of a window and their regions, cut in the quickest way; the largest region first.

    A region costs its outputs times the terms of its box, and some more.
    """
    ways = [reached(boxes, size, output, geometry) for boxes in partitions(kernel, channels, most)]
    best = min(ways, key=lambda way: sum(prod(region.size) * (region.terms + _COST) for region in way))
    return strips(best, ROWS_FIRST if kernel[0] > 1 else IMAGES_FIRST)


class Windows:
    """Makes matrices of the windows of a batch, block by block, in memory of its own.

    Memory that is asked for anew for each block is taken from the system each time, which takes as long as the
    products.
    """

    def __init__(self, input: Tensor, blocks: list[slice], cut: Sequence[Strip]) -> None:
        self.count = 0
        most = max(part.stop - part.start for part in blocks)
        self._room = input.new_empty(most * max([0, *(prod(strip.size) * strip.terms for strip in cut)]))

    def load(self, planes: Tensor) -> None:
        """Take a block of images, ``(N, C, H, W)``."""
        self.count, self._pixels = len(planes), pixels_of_planes(planes)

    def matrices(self, strip: Strip, offset: int = 0) -> Iterator[tuple[Region, Tensor]]:
        """The matrix of each region, a window a row, ``(N·rows·columns, terms)``, valid until the next strip's.

        ``offset`` is the first channel of the group.
        """
        pixels, room = self._pixels, self._room
        runs, zeros, firsts = _filling(strip, self.count, pixels.shape[1:3], pixels.stride()[:3])
        offset += int(pixels.storage_offset())
        if len(runs) == 1 and not zeros and runs[0].lies:
            room, firsts = pixels, tuple(offset + runs[0].first + first for first in firsts)
        else:
            for sizes, strides, first in zeros:
                room.as_strided(sizes, strides, first).zero_()
            for run in runs:
                run.copy(pixels, offset, room)
        for region, first in zip(strip.regions, firsts, strict=True):
            yield region, room.as_strided((self.count * prod(region.size), strip.terms), (strip.terms, 1), first)


class _Filling(NamedTuple):
    """How a matrix is made."""

    runs: tuple[Run, ...]
    zeros: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    """Sizes, strides and the first number of what lies in the padding."""
    firsts: tuple[int, ...]
    """Where the windows of each region begin."""


@lru_cache(maxsize=1024)
def _filling(strip: Strip, count: int, size: tuple[int, int], pixel: tuple[int, int, int]) -> _Filling:
    """The matrix of a strip from pixels ``(N, H, W, C)`` whose strides ``pixel`` has."""
    region, extent = strip.regions[0], dict(zip("nmj", (count, *strip.size), strict=True))
    place, places = strip.terms, {}
    for axis in reversed(strip.order):
        places[axis], place = place, place * extent[axis]
    (s_h, s_w), (d_h, d_w) = region.geometry.stride, region.geometry.dilation
    rows, columns, channels = region.box.sizes
    n, h, w = pixel
    top = strip.first * s_h + region.place[1]
    left = region.across.start * s_w + region.box.columns.start * d_w - region.geometry.padding[2]
    wanted, runs, zeros = (places["n"], places["m"], places["j"], channels, 1), [], []

    def part(row: int, down: slice, across: slice, taps: slice) -> tuple[tuple[int, ...], int]:
        """Sizes and the first number of some windows' taps of a row."""
        first = (row * columns + taps.start) * channels + down.start * places["m"] + across.start * places["j"]
        return (count, *(each.stop - each.start for each in (down, across, taps)), channels), first

    for row in range(rows):
        begin = top + row * d_h
        down = _inside(begin, s_h, strip.size[0], size[0])
        empty = [(each, slice(0, strip.size[1]), slice(0, columns)) for each in _around(down, strip.size[0])]
        for across, taps in _alike(left, s_w, strip.size[1], d_w, columns, size[1]):
            first = (begin + down.start * s_h) * h + (left + across.start * s_w + taps.start * d_w) * w
            taken, target = part(row, down, across, taps)
            lying = n, h * s_h, w * s_w, w * d_w, 1
            runs.append(Run(taken, lying, first + region.box.channels.start, wanted, target))
            empty += [(down, across, each) for each in _around(taps, columns)]
        zeros += [part(row, *each) for each in empty]
    return _Filling(
        tuple(run for run in runs if prod(run.sizes)),
        tuple((sizes, wanted, first) for sizes, first in zeros if prod(sizes)),
        tuple((each.place[0] - strip.first) * places["m"] for each in strip.regions),
    )


def _alike(first: int, step: int, count: int, apart: int, taps: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Runs of ``count`` windows, which begin ``step`` apart at ``first``, with the same of their taps in the image."""
    inside = [_inside(first + k * step, apart, taps, size) for k in range(count)]
    start = 0
    for k in range(1, count + 1):
        if k == count or inside[k] != inside[start]:
            yield slice(start, k), inside[start]
            start = k


def _around(part: slice, count: int) -> tuple[slice, slice]:
    """What of ``range(count)`` lies before and behind a part."""
    return slice(0, part.start), slice(part.stop, count)


def _inside(first: int, step: int, count: int, size: int) -> slice:
    """Which of ``count`` places ``first``, ``first + step``, … lie in ``range(size)``."""
    start = min(count, max(0, -(first // step)))
    return slice(start, max(start, min(count, (size - 1 - first) // step + 1)))
