"""The three products of a depthwise convolution, one filter a channel, on the CPU: a sum over taps of shifted images.

There is nothing to add up over channels, and so no matrix product worth the name. All is done in images with channels
side by side, where one operator multiplies rows of pixels by as many copies of a tap's factors; planes are rearranged
block by block. What follows from shapes alone is found once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry, phase_pairs
from reimpl.functional._conv.layouts import empty_planes, pixels_of_planes, planes_of_pixels
from reimpl.functional._conv.products import unobserved
from reimpl.functional._dispatch import opmath_dtype

Pair = tuple[int, int]
# Measured: bytes of a block's images, padded ones, and the sums for a kernel's gradient: what stays in the caches from
# tap to tap, and leaves few calls.
_BLOCK_BYTES, _PADDED_BYTES, _SUM_BYTES = 4 << 20, 2 << 20, 5 << 19


def fits(geometry: Geometry, *tensors: Tensor | None) -> bool:
    """Whether the sums do for such tensors; for one filter a channel."""
    return (
        geometry.groups > 1
        and geometry.algorithm is None
        and all(t is None or (t.device.type == "cpu" and t.is_floating_point() and t.numel() > 0) for t in tensors)
        and unobserved(*tensors)
    )


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Pair,
    geometry: Geometry,
    layout: torch.memory_format,
) -> Tensor:
    """``C(x, w) + b``, of height and width ``output``; ``weight`` is ``(C, 1, f_h, f_w)``."""
    plan = _of_output(input.shape[1], _plane(input), _plane(weight), output, geometry)
    target = empty_planes(input, input.shape[1], output, layout)
    _add_up(target, input, weight, bias, plan)
    return target


def convolve_input(grad: Tensor, weight: Tensor, size: Pair, geometry: Geometry, layout: torch.memory_format) -> Tensor:
    """``T(g, w)``, the gradient of an input of height and width ``size``."""
    plan = _of_input(grad.shape[1], _plane(grad), _plane(weight), size, geometry)
    target = empty_planes(grad, grad.shape[1], size, layout)
    _add_up(target, grad, weight, None, plan)
    return target


def convolve_weight(grad: Tensor, input: Tensor, kernel: Pair, geometry: Geometry) -> Tensor:
    """``W(g, x)``, the gradient of a kernel of height and width ``kernel``."""
    channels, output, dtype = input.shape[1], _plane(grad), opmath_dtype(grad.dtype)
    room = _room(channels, _plane(input), geometry.padding, geometry.stride[1])
    row, image = geometry.stride[0] * room.row, room.image
    batches = _batches(room, kernel, geometry)
    images, rows = _held(prod(kernel) * channels, output)
    shape = (images, rows, output[1], channels)
    # the sums over places are left to the end: what a thread has just written, it alone reads
    totals = [torch.zeros((*batch.size, *shape), dtype=dtype, device=grad.device) for batch in batches]

    @cache
    def sums(i: int, j: int, count: int, height: int) -> list[tuple[Tensor, Tensor]]:
        size, first = (count, height, *shape[2:]), i * image + j * row
        return [
            (
                total if size == shape else total[:, :, :count, :height],
                padded.as_strided((*batch.size, *size), (*batch.strides, image, row, channels, 1), first + batch.first),
            )
            for total, batch in zip(totals, batches, strict=True)
        ]

    count = input.shape[0]
    most = _most(image, dtype, count, _PADDED_BYTES)
    padded = torch.zeros((most, *room.size), dtype=dtype, device=input.device)
    for start in range(0, count, most):
        part = slice(start, min(start + most, count))
        room.fill(padded, pixels_of_planes(input[part].to(dtype)))
        errors = pixels_of_planes(grad[part].to(dtype))
        for i, some in enumerate(errors.split(images)):
            for j, these in enumerate(some.split(rows, 1)):
                for total, taps in sums(i * images, j * rows, *these.shape[:2]):
                    total.addcmul_(these, taps)
    result = torch.empty((channels, 1, *kernel), dtype=grad.dtype, device=grad.device)
    for k, total in enumerate(totals):
        result[:, 0, :, k :: len(totals)] = total.sum((2, 3, 4)).permute(2, 0, 1)
    return result


def _plane(tensor: Tensor) -> Pair:
    return tensor.shape[2], tensor.shape[3]


def _most(numbers: int, dtype: torch.dtype, count: int, budget: int) -> int:
    """How many images of so many numbers make a block."""
    return min(count, max(1, budget // (numbers * dtype.itemsize)))


@dataclass(frozen=True, eq=False)
class _Room:
    """Where padded images lie, with columns dealt out by the remainder of their number by the stride: so that those
    under a tap lie side by side. Of size ``(N, H, s_w, W / s_w, C)``."""

    size: tuple[int, int, int, int]
    row: int
    """Numbers in a row."""
    image: int
    """Numbers in an image."""
    fills: tuple[tuple[tuple[slice, slice, int, slice], tuple[slice, slice, slice]], ...]
    """Which parts of it, and which pixels belong there."""

    def place(self, row: int, column: int) -> int:
        """Where a padded pixel begins."""
        _, hands, width, channels = self.size
        return row * self.row + (column % hands * width + column // hands) * channels

    def fill(self, padded: Tensor, pixels: Tensor) -> None:
        """Write images between the padding."""
        for to, of in self.fills:
            padded[: len(pixels)][to].copy_(pixels[of])


@lru_cache(maxsize=1024)
def _room(channels: int, size: Pair, padding: tuple[int, int, int, int], hands: int) -> _Room:
    """Of images of such a size and padding, which may be negative, columns dealt out to so many hands."""
    top, bottom, left, right = padding
    height, width = size[0] + top + bottom, size[1] + left + right
    to_rows, of_rows = slice(max(top, 0), height - max(bottom, 0)), slice(max(-top, 0), size[0] - max(-bottom, 0))
    begin, end = max(left, 0), width - max(right, 0)
    fills = []
    for first in range(begin, min(begin + hands, end)):
        number = -(-(end - first) // hands)
        to = slice(None), to_rows, first % hands, slice(first // hands, first // hands + number)
        fills.append((to, (slice(None), of_rows, slice(first - left, end - left, hands))))
    shape = (height, hands, -(-width // hands), channels)
    return _Room(shape, prod(shape[1:]), prod(shape), tuple(fills))


class _Tap(NamedTuple):
    """What a tap sees of an image, which pixels of the result that is for, and the tap's number in the kernel."""

    size: Pair
    first: int
    rows: Pair
    columns: Pair
    number: int


class _Sum(NamedTuple):
    """A sum over taps, and which pixels of the result it gives: every so many, from the first."""

    size: Pair
    first: Pair
    steps: Pair
    row_step: int
    """Numbers between the rows under one tap."""
    taps: tuple[_Tap, ...]
    whole: bool
    """Whether the first tap is for all pixels."""

    def pixels(self, images: Tensor) -> Tensor:
        """Those of ``(N, H, W, C)`` that it gives."""
        if self.steps == (1, 1):
            return images
        return images[:, self.first[0] :: self.steps[0], self.first[1] :: self.steps[1]]


class _Plan(NamedTuple):
    """Sums over the taps of images, and whether they give all pixels of the result."""

    room: _Room
    sums: tuple[_Sum, ...]
    complete: bool
    width: int
    """The largest of the sums'."""


def _sum(
    size: Pair, first: Pair, steps: Pair, stride: Pair, plane: Pair, room: _Room, taps: Iterable[tuple[int, int, int]]
) -> _Sum:
    """Of taps given by the row and column of what they see first, in the padding or not, and their numbers."""
    found = []
    for row, column, number in taps:
        (top, bottom), (left, right) = (
            (max(0, -(start // s)), min(n, (length - 1 - start) // s + 1))
            for start, s, n, length in zip((row, column), stride, size, plane, strict=True)
        )
        if top < bottom and left < right:
            place = room.place(row + top * stride[0], column + left * stride[1])
            found.append(_Tap((bottom - top, right - left), place, (top, bottom), (left, right), number))
    found.sort(key=lambda tap: tap.size != size)
    whole = bool(found) and found[0].size == size
    return _Sum(size, first, steps, stride[0] * room.row, tuple(found), whole)


def _plan(room: _Room, sums: Sequence[_Sum], result: Pair) -> _Plan:
    complete = sum(prod(each.size) for each in sums) == prod(result)
    return _Plan(room, tuple(sums), complete, max((each.size[1] for each in sums), default=0))


@lru_cache(maxsize=1024)
def _of_output(channels: int, size: Pair, kernel: Pair, output: Pair, geometry: Geometry) -> _Plan:
    """One sum, over taps of the input."""
    room = _room(channels, size, (0, 0, 0, 0), geometry.stride[1])
    (d_h, d_w), (top, _, left, _) = geometry.dilation, geometry.padding
    taps = [(i * d_h - top, j * d_w - left, i * kernel[1] + j) for i in range(kernel[0]) for j in range(kernel[1])]
    return _plan(room, [_sum(output, (0, 0), (1, 1), geometry.stride, size, room, taps)], output)


@lru_cache(maxsize=1024)
def _of_input(channels: int, errors: Pair, kernel: Pair, size: Pair, geometry: Geometry) -> _Plan:
    """For the pixels of each residue by the stride a sum, over taps of the output's gradient."""
    room, sums = _room(channels, errors, (0, 0, 0, 0), 1), []
    for down, across, part in phase_pairs(errors, size, kernel, geometry):
        (top, _, left, _), (d_h, d_w) = part.padding, part.dilation
        # the taps' numbers are those of the mirrored kernel
        rows, columns = (
            [k - 1 - first - i * step for i in range(count)]
            for k, (first, count, step) in zip(kernel, (down.taps, across.taps), strict=True)
        )
        taps = [
            (i * d_h - top, j * d_w - left, k * kernel[1] + m)
            for i, k in enumerate(rows)
            for j, m in enumerate(columns)
        ]
        first = (down.first, across.first)
        sums.append(_sum((down.number, across.number), first, geometry.stride, (1, 1), errors, room, taps))
    return _plan(room, sums, size)


def _add_up(target: Tensor, planes: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> None:
    """Write sums over taps of ``planes`` with the factors of a kernel into ``target``."""
    dtype, room = opmath_dtype(planes.dtype), plan.room
    # a whole row of pixels of them
    factors = weight.to(dtype).flatten(1).t().unsqueeze(1).expand(-1, plan.width, -1).contiguous().unbind()
    offset = None if bias is None else bias.to(dtype)
    result, count = target.permute(0, 2, 3, 1), len(planes)
    most = _most(max(room.image, result[0].numel()), dtype, count, _BLOCK_BYTES)
    direct = result.is_contiguous() and target.dtype is dtype
    images = None if direct else torch.empty((most, *result.shape[1:]), dtype=dtype, device=target.device)
    dealt = None if room.size[1] == 1 else torch.empty((most, *room.size), dtype=dtype, device=planes.device)
    for start in range(0, count, most):
        part = slice(start, min(start + most, count))
        seen = pixels_of_planes(planes[part].to(dtype))
        if dealt is not None:
            room.fill(dealt, seen)
            seen = dealt[: len(seen)]
        elif not seen.is_contiguous():
            seen = seen.contiguous()
        into = result[part] if images is None else images[: len(seen)]
        if not plan.complete:
            into.zero_()
        for each in plan.sums:
            _add_up_one(each.pixels(into), seen, each, room, factors, offset)
        if images is not None:
            target[part].copy_(planes_of_pixels(into, torch.contiguous_format))


def _add_up_one(
    pixels: Tensor, seen: Tensor, sums: _Sum, room: _Room, factors: Sequence[Tensor], offset: Tensor | None
) -> None:
    """One of the sums for one block."""
    count, channels, begin = len(seen), room.size[-1], seen.storage_offset()
    strides, taps = (room.image, sums.row_step, channels, 1), sums.taps
    # pixels that lie apart are written once
    apart = len(taps) > 1 and not pixels.is_contiguous()
    total = torch.empty_like(pixels, memory_format=torch.contiguous_format) if apart else pixels
    if not sums.whole:
        total.zero_() if offset is None else total.copy_(offset.expand_as(total))
    for k, (size, first, rows, columns, number) in enumerate(taps):
        tap = seen.as_strided((count, *size, channels), strides, begin + first)
        factor, into = factors[number], total
        if size != sums.size:
            into = total[:, rows[0] : rows[1], columns[0] : columns[1]]
        if size[1] != len(factor):
            factor = factor[: size[1]]
        if k or not sums.whole:
            into.addcmul_(tap, factor)
        elif offset is None:
            torch.mul(tap, factor, out=into)
        else:
            torch.addcmul(offset, tap, factor, out=into)
    if apart:
        pixels.copy_(total)


class _Batch(NamedTuple):
    """Taps of a kernel that lie at equal distances in padded images: their numbers, strides, and the first's place."""

    size: Pair
    strides: Pair
    first: int


def _batches(room: _Room, kernel: Pair, geometry: Geometry) -> list[_Batch]:
    (d_h, d_w), hands = geometry.dilation, geometry.stride[1]
    period = hands // gcd(hands, d_w)
    step = period * d_w // hands * room.size[-1]
    return [
        _Batch((kernel[0], len(range(k, kernel[1], period))), (d_h * room.row, step), room.place(0, k * d_w))
        for k in range(min(period, kernel[1]))
    ]


def _held(numbers: int, output: Pair) -> Pair:
    """Images and rows of them for which sums are kept, of so many numbers a pixel."""
    rows = max(1, _SUM_BYTES // (numbers * output[1] * 4))
    return (1, rows) if rows < output[0] else (rows // output[0], output[0])
