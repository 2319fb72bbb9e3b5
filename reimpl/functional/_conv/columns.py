"""Matrices of the windows of planes with a tap a row, and all about them that follows from shapes alone, found once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.layouts import transposed
from reimpl.functional._conv.regions import Box, partitions
from reimpl.functional._conv.windows import Run, dense, parts

# Windows of at most so many numbers go image by image: measured at 27.
_FEW_TERMS = 64
# Measured: bytes of windows and values in a block, of few numbers a window and of more.
_BYTES_OF_FEW, _BYTES = 32 << 20, 10 << 20


@dataclass(frozen=True, eq=False)
class Columns:
    """Makes matrices of the windows of a batch, block by block; for one group.

    A matrix holds a box of each window, a tap a row, ``(C·f_h·f_w, N·H'·W')``, or one of each image, ``(N, C·f_h·f_w,
    H'·W')``. Where windows are some columns apart, columns are first dealt out to as many planes, which is a
    transposition, so that runs of numbers are copied.
    """

    boxes: tuple[Box, ...]
    blocks: tuple[slice, ...]
    by_image: bool
    pads: tuple[int, int, int, int] | None
    hands: int
    recipes: dict[int, tuple[_Recipe, ...]]
    """By the number of images, for each box."""

    def matrices(self, input: Tensor) -> Iterator[tuple[slice, Iterator[Tensor]]]:
        """The blocks and the matrices of each, one for each box, valid until the next."""
        most = max((prod(recipe.shape) for recipe in self.recipes[self.blocks[0].stop]), default=0)
        room = input.new_empty(most)
        for part in self.blocks:
            yield part, self._of_block(input if len(self.blocks) == 1 else input[part], room)

    def _of_block(self, planes: Tensor, room: Tensor) -> Iterator[Tensor]:
        if self.pads is not None:
            planes = torch.constant_pad_nd(planes, self.pads).contiguous()
        if self.hands > 1:
            planes = transposed(planes.reshape(len(planes), -1, self.hands))
        offset = int(planes.storage_offset())
        for shape, strides, runs in self.recipes[len(planes)]:
            if len(runs) == 1 and runs[0].lies:
                yield planes.as_strided(shape, strides, offset + runs[0].first)
                continue
            for run in runs:
                run.copy(planes, offset, room)
            yield room.as_strided(shape, strides)


class _Recipe(NamedTuple):
    """How a matrix is made."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    runs: tuple[Run, ...]


@lru_cache(maxsize=1024)
def columns(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    kernel: tuple[int, int],
    outputs: int,
    output: tuple[int, int],
    geometry: Geometry,
    most: int | None,
) -> Columns:
    """Of the windows of an input of such a shape and strides, for products with ``outputs`` filters: in boxes of at
    most ``most`` terms, or whole and of all images."""
    count, channels, *size = shape
    if most is None:
        boxes = [Box(slice(0, kernel[0]), slice(0, kernel[1]), slice(0, channels))]
    else:
        boxes = partitions(kernel, channels, most)[-1]
    terms = max(prod(box.sizes) for box in boxes)
    by_image = most is not None and len(boxes) == 1 and terms <= _FEW_TERMS
    row, values = terms * dtype.itemsize, outputs * dtype.itemsize
    budget = max(_BYTES_OF_FEW if terms <= _FEW_TERMS else _BYTES, outputs * row)
    blocks = tuple(parts(count, prod(output) * (row + values), torch.device("cpu"), budget=budget))

    hands = geometry.stride[1] if kernel[1] > 1 else 1
    height, width = geometry.padded(size[0], size[1])
    spare = -width % hands
    pads = None
    if spare or any(geometry.padding):
        top, bottom, left, right = geometry.padding
        pads = (left, right + spare, top, bottom)
        size, strides = [height, width + spare], dense((count, channels, height, width + spare))
    if hands > 1:
        size[1] //= hands
        per_hand = channels * prod(size)
        strides = (hands * per_hand, per_hand, *dense((channels, *size)))
    else:
        strides = (strides[0], 0, *strides[1:])

    def recipe(images: int, box: Box) -> _Recipe:
        area = prod(output)
        shape = (images, prod(box.sizes), area) if by_image else (prod(box.sizes), images * area)
        return _Recipe(shape, dense(shape), tuple(_runs(box, images, hands, strides, output, geometry, by_image)))

    counts = {part.stop - part.start for part in blocks}
    recipes = {images: tuple(recipe(images, box) for box in boxes) for images in counts}
    return Columns(tuple(boxes), blocks, by_image, pads, hands, recipes)


def _runs(
    box: Box,
    count: int,
    hands: int,
    strides: tuple[int, ...],
    output: tuple[int, int],
    geometry: Geometry,
    by_image: bool,
) -> Iterator[Run]:
    """Where the numbers of a box stand in planes dealt out, ``(N, hands, C, H, W / hands)`` of such strides."""
    n, hand, c, h, w = strides
    (s_h, s_w), (d_h, d_w) = geometry.stride, geometry.dilation
    (rows, columns, channels), area = box.sizes, prod(output)
    # how far apart the matrix has taps, and images
    tap, image = (area, prod(box.sizes) * area) if by_image else (count * area, area)
    # taps so many columns apart find their numbers in one plane
    period = hands // gcd(hands, d_w)
    for k in range(min(period, columns)):
        place, owner = divmod((box.columns.start + k) * d_w, hands)
        dims = (
            (channels, c, rows * columns * tap),
            (rows, h * d_h, columns * tap),
            (len(range(k, columns, period)), w * (period * d_w // hands), period * tap),
            (count, n, image),
            (output[0], h * s_h, output[1]),
            (output[1], w * (s_w // hands), 1),
        )
        first = box.channels.start * c + box.rows.start * d_h * h + owner * hand + place * w
        taken, lying, wanted = zip(*dims, strict=True)
        yield Run(taken, lying, first, wanted, k * tap)
