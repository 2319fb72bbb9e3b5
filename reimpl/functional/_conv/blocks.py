"""The three products of a convolution of ordinary tensors on the CPU, over blocks of the batch.

For each block windows are gathered into a matrix and multiplied. The matrix has a window a row, which wants images with
their channels last; few channels and kernels of one tap go to :mod:`reimpl.functional._conv.taps`. Rows of taps share
what is gathered: :mod:`reimpl.functional._conv.strips`.

A window is multiplied in boxes of some taps and channels, whose products are added: sums in one run err 2.5 times as
much as PyTorch's at 1,152 terms and more. What a box has of the padding is left out of its product. Of bfloat16 a
window stays whole, since every product is rounded. Large images go by :mod:`reimpl.functional._conv.bands`.

Measured on two Zen 5 cores at the 3x3 layers of ResNet-18 and AlexNet on CIFAR, batch 64: products run at 440-480
GFLOP/s and are three quarters of the time. Boxes of 512 terms brought up to 5 % over 384 at 512 channels and nothing
elsewhere; blocks of 5 and of 20 MB took up to 10 % longer than those of 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from reimpl.functional._conv import bands, taps
from reimpl.functional._conv.arguments import Geometry, Phase, phase_pairs
from reimpl.functional._conv.layouts import (
    empty_planes,
    planes_of_pixels,
    taps_first,
    taps_first_of_adjoint,
    taps_last,
    transposed,
)
from reimpl.functional._conv.products import bfloat16_is_quick, ordinary, product
from reimpl.functional._conv.regions import Box, Region, partitions, reached
from reimpl.functional._conv.strips import (
    IMAGES_FIRST,
    IMAGES_LAST,
    ROWS_FIRST,
    Strip,
    Windows,
    planned,
    strips,
)
from reimpl.functional._conv.windows import parts, pixels_of
from reimpl.functional._dispatch import opmath_dtype

# Terms of a sum that a product takes in one run: the error of a longer one grows with their number, and PyTorch's
# convolutions sum 192.
_TERMS = 384
# Numbers of a window that the gradient of the kernel multiplies at once, and pixels that it sums in one run: of a
# kernel of one tap PyTorch sums some 100.
_NUMBERS, _PIXELS, _PIXELS_OF_ONE_TAP = 512, 2048, 256
# Bytes of windows that the gradient of a kernel of bfloat16 multiplies at once.
_BYTES_OF_BFLOAT16 = 32 << 20
# Groups are taken one by one: so many at most, of so many channels at least. All in one go is better for others.
_MOST_GROUPS, _LEAST_CHANNELS = 32, 16
# What it costs there to leave a tap's padding out, in channels: the output's gradients are gathered too, and rows of
# taps that would share their numbers do not.
_COST, _COST_OF_SHARED = 25, 50


def fits(geometry: Geometry, outputs: int, channels: int, *tensors: Tensor | None) -> bool:
    """Whether the blocks do for such tensors."""
    groups = geometry.groups
    return (
        geometry.algorithm in (None, "im2col")
        and (groups == 1 or (groups <= _MOST_GROUPS and min(outputs, channels) >= groups * _LEAST_CHANNELS))
        and all(t is None or (t.device.type == "cpu" and t.numel() > 0) for t in tensors)
        and ordinary(*tensors)
    )


def fits_bfloat16(
    geometry: Geometry, outputs: int, channels: int, kernel: tuple[int, int], *tensors: Tensor | None
) -> bool:
    """Whether the blocks do for tensors of bfloat16, whose windows are multiplied whole, so that sums are rounded once.
    Kernels of a tap and few channels are as quick in float32."""
    return (
        geometry.groups <= _MOST_GROUPS
        and geometry.algorithm is None
        and kernel != (1, 1)
        and min(outputs, channels) > geometry.groups * taps.FEW_CHANNELS
        and all(t is None or t.numel() > 0 for t in tensors)
        and bfloat16_is_quick(*tensors)
    )


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: tuple[int, int],
    geometry: Geometry,
    layout: torch.memory_format,
) -> Tensor:
    """``C(x, w) + b``, of height and width ``output``."""
    kernel = _plane(weight)
    row_bytes = _row_bytes(output[1], kernel, weight.shape[1], weight.shape[0], input)
    if cut := bands.of_output(len(input), output[0], row_bytes, input.shape[2], kernel[0], geometry):
        target = empty_planes(input, weight.shape[0], output, layout)
        for band in cut:
            part, seen = target[band.image, :, band.output], input[band.image, :, band.input]
            part.copy_(convolve(seen, weight, bias, _plane(part), band.geometry, layout))
        return target
    if taps.fits(input, kernel, output, geometry):
        return taps.multiply(input, weight.permute(2, 3, 1, 0), bias, output, geometry, layout)
    rows, columns = (list(range(size)) for size in kernel)
    filters = taps_first(weight).chunk(geometry.groups, 3)
    return _multiply(input, [_Factor(filters, rows, columns, output, geometry)], bias, weight.shape[0], output, layout)


def convolve_input(
    grad: Tensor, weight: Tensor, size: tuple[int, int], geometry: Geometry, layout: torch.memory_format
) -> Tensor:
    """``T(g, w)``, the gradient of an input of height and width ``size``."""
    kernel, channels = _plane(weight), geometry.groups * weight.shape[1]
    row_bytes = _row_bytes(size[1], kernel, weight.shape[0] // geometry.groups, channels, grad)
    row_bytes //= prod(geometry.stride)
    if cut := bands.of_input(len(grad), size[0], row_bytes, grad.shape[2], kernel[0], geometry):
        whole = empty_planes(grad, channels, size, layout)
        for band in cut:
            pixels, seen = whole[band.image, :, band.input], grad[band.image, :, band.output]
            pixels.copy_(convolve_input(seen, weight, _plane(pixels), band.geometry, layout))
        return whole
    pairs = list(phase_pairs(_plane(grad), size, kernel, geometry))
    by_taps = taps.fits(grad, kernel, _plane(grad), geometry)
    if by_taps and all(taps.crops_no_more_than_all(grad, part) for *_, part in pairs):
        target = None
        if geometry.stride != (1, 1):
            target = empty_planes(grad, channels, size, layout)
            if sum(down.number * across.number for down, across, _ in pairs) < prod(size):
                target.zero_()
        for down, across, part in pairs:
            rows, columns = _places(down.taps, kernel[0]), _places(across.taps, kernel[1])
            filters = weight.permute(2, 3, 0, 1)[rows][:, columns]
            own = None if target is None else pixels_of(target, down, across, geometry)
            result = taps.multiply(grad, filters, None, (down.number, across.number), part, layout, own)
        return result if target is None else target
    by_group = taps_first_of_adjoint(weight).chunk(geometry.groups, 2)
    factors = []
    for down, across, part in pairs:
        rows, columns = _places(down.taps, kernel[0]), _places(across.taps, kernel[1])
        place = None if geometry.stride == (1, 1) else (down, across, geometry)
        factors.append(_Factor(by_group, rows, columns, (down.number, across.number), part, place))
    return _multiply(grad, factors, None, channels, size, layout)


def _places(taps: tuple[int, int, int], size: int) -> list[int]:
    """Where the taps of a mirrored kernel (first, number, step) stand in the kernel."""
    first, count, step = taps
    return list(range(size - 1 - first, size - 1 - first - count * step, -step))


class _Factor(NamedTuple):
    """A convolution that gives some of the output's pixels."""

    filters: Sequence[Tensor]
    """Of each group, ``(f_h, f_w, C, O)``."""
    rows: list[int]
    columns: list[int]
    """Where its taps stand there."""
    output: tuple[int, int]
    geometry: Geometry
    place: tuple[Phase, Phase, Geometry] | None = None
    """The pixels; ``None`` for all."""

    def strips(self, size: tuple[int, int]) -> tuple[Strip, ...]:
        """The regions of its boxes, for images of ``size``."""
        kernel = len(self.rows), len(self.columns)
        if self.filters[0].dtype is torch.bfloat16:
            return _whole(kernel, self.filters[0].shape[2], self.output, self.geometry)
        return planned(kernel, self.filters[0].shape[2], _TERMS, size, self.output, self.geometry)

    def matrices(self, cut: Sequence[Strip]) -> list[dict[Region, Tensor]]:
        """Of each group the filters of each box, ``(terms, O)``."""
        regions = [region for strip in cut for region in strip.regions]
        return [{region: self._matrix(filters, region.box) for region in regions} for filters in self.filters]

    def _matrix(self, filters: Tensor, box: Box) -> Tensor:
        taps = [filters[k, j, box.channels] for k in self.rows[box.rows] for j in self.columns[box.columns]]
        return taps[0] if len(taps) == 1 else torch.cat(taps)

    def pixels(self, result: Tensor) -> Tensor:
        """Its own among all, ``(N, H, W, O)``."""
        if self.place is None:
            return result
        return pixels_of(result.permute(0, 3, 1, 2), *self.place).permute(0, 2, 3, 1)


def _multiply(
    input: Tensor,
    factors: list[_Factor],
    bias: Tensor | None,
    channels: int,
    size: tuple[int, int],
    layout: torch.memory_format,
) -> Tensor:
    """What ``factors`` make of ``input``: planes of ``channels`` and ``size``."""
    cuts = [factor.strips(_plane(input)) for factor in factors]
    matrices = [factor.matrices(cut) for factor, cut in zip(factors, cuts, strict=True)]
    numbers = max((prod(s.size) * (s.terms + channels) for cut in cuts for s in cut), default=1)
    blocks = list(parts(input.shape[0], numbers * input.element_size(), input.device))
    windows = Windows(input, blocks, [strip for cut in cuts for strip in cut])
    target = empty_planes(input, channels, size, layout) if len(blocks) > 1 else None
    for part in blocks:
        windows.load(input[part])
        values = [_sums(windows, *row, bias) for row in zip(factors, cuts, matrices, strict=True)]
        if len(factors) == 1 and factors[0].place is None:
            result = values[0]
        else:
            result = input.new_zeros(part.stop - part.start, *size, channels)
            for factor, own in zip(factors, values, strict=True):
                factor.pixels(result).copy_(own)
        planes = planes_of_pixels(result, layout)
        if target is None:
            return planes.contiguous(memory_format=layout)
        target[part].copy_(planes)
    assert target is not None
    return target


def _sums(
    windows: Windows,
    factor: _Factor,
    cut: Sequence[Strip],
    matrices: list[dict[Region, Tensor]],
    bias: Tensor | None,
) -> Tensor:
    """The pixels of one factor, ``(N, rows, columns, O)``."""
    groups = len(matrices)
    biases = [None] * groups if bias is None else bias.chunk(groups)
    totals = []
    for group, (own, offset) in enumerate(zip(matrices, biases, strict=True)):
        total = None
        for strip in cut:
            for region, rows in windows.matrices(strip, group * factor.filters[0].shape[2]):
                whole = total is None and region.size == factor.output
                values = _pixels(product(rows, own[region], offset if whole else None), strip, region, windows.count)
                if whole:
                    total = values
                    continue
                if total is None:
                    total = _constant(windows, factor, offset)
                total[:, region.down, region.across].add_(values)
        totals.append(_constant(windows, factor, offset) if total is None else total)
    return totals[0] if groups == 1 else torch.cat(totals, 3)


def _pixels(values: Tensor, strip: Strip, region: Region, count: int) -> Tensor:
    """A product's rows as pixels, ``(N, rows, columns, O)``."""
    rows, columns = region.size
    if strip.order == ROWS_FIRST and count > 1:
        return values.view(rows, count, columns, -1).transpose(0, 1)
    return values.view(count, rows, columns, -1)


def _constant(windows: Windows, factor: _Factor, bias: Tensor | None) -> Tensor:
    """The bias, or 0, everywhere."""
    filters = factor.filters[0]
    values = filters.new_zeros(windows.count, *factor.output, filters.shape[3])
    return values if bias is None else values.add_(bias)


def convolve_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``, the gradient of a kernel of height and width ``kernel``."""
    groups, output = geometry.groups, _plane(grad)
    channels, outputs = input.shape[1] // groups, grad.shape[1] // groups
    whole = grad.dtype is torch.bfloat16
    by_taps = not whole and taps.fits(input, kernel, output, geometry, for_weight=True)
    values = 0 if by_taps and kernel == (1, 1) else grad.shape[1]
    row_bytes = _row_bytes(output[1], kernel, channels, values, grad, None if by_taps else _NUMBERS)
    if cut := bands.of_output(len(grad), output[0], row_bytes, input.shape[2], kernel[0], geometry):
        total = grad.new_zeros(grad.shape[1], channels, *kernel, dtype=opmath_dtype(grad.dtype))
        for band in cut:
            errors, seen = grad[band.image, :, band.output], input[band.image, :, band.input]
            total.add_(convolve_weight(errors, seen, kernel, band.geometry))
        return total.to(grad.dtype)
    if by_taps:
        return taps.multiply_weight(grad, input, kernel, geometry)
    boxes = (
        _whole(kernel, channels, output, geometry)
        if whole
        else _cut_for_weight(kernel, channels, _plane(input), output, geometry)
    )
    order = boxes[0].order if boxes else IMAGES_FIRST
    pixels = _PIXELS_OF_ONE_TAP if kernel == (1, 1) else _PIXELS
    if whole:
        # each product is rounded
        pixels = _BYTES_OF_BFLOAT16 // (2 * channels * prod(kernel))
    blocks = list(parts(input.shape[0], prod(output), input.device, budget=pixels))
    windows = Windows(input, blocks, boxes)
    turned = grad.new_zeros(grad.shape[1], *kernel, channels, dtype=opmath_dtype(grad.dtype))
    for part in blocks:
        windows.load(input[part])
        errors = _errors(grad[part], order)
        for group in range(groups):
            own = slice(group * outputs, (group + 1) * outputs)
            for region, rows in (pair for strip in boxes for pair in windows.matrices(strip, group * channels)):
                left = errors[own, region.down, region.across] if order == IMAGES_LAST else errors[own]
                box = turned[own, region.box.rows, region.box.columns, region.box.channels]
                box.add_(product(left.reshape(outputs, -1), rows).view(outputs, *region.box.sizes))
    return taps_last(turned).to(grad.dtype)


def _errors(grad: Tensor, order: str) -> Tensor:
    """The output's gradients by channel, ``(O, H', W', N)`` with images last, else their windows in ``order``."""
    count, outputs, *plane = grad.shape
    if order == IMAGES_LAST:
        return transposed(grad.reshape(1, count, -1)).view(outputs, *plane, count)
    return grad.permute((1, 2, 0, 3) if order == ROWS_FIRST else (1, 0, 2, 3)).contiguous()


@lru_cache(maxsize=256)
def _whole(kernel: tuple[int, int], channels: int, output: tuple[int, int], geometry: Geometry) -> tuple[Strip, ...]:
    """A window in one piece."""
    box = Box(slice(0, kernel[0]), slice(0, kernel[1]), slice(0, channels))
    return strips([Region(box, slice(0, output[0]), slice(0, output[1]), geometry)], IMAGES_FIRST)


@lru_cache(maxsize=256)
def _cut_for_weight(
    kernel: tuple[int, int], channels: int, size: tuple[int, int], output: tuple[int, int], geometry: Geometry
) -> tuple[Strip, ...]:
    """A window in boxes, with their regions where it pays to leave the padding out."""
    single = reached(partitions(kernel, channels, channels)[0], size, output, geometry)
    taken = sum(prod(region.size) for region in single)
    cost = _COST_OF_SHARED if geometry.stride[0] == 1 else _COST
    if taken * (channels + cost) < prod(kernel) * prod(output) * channels:
        return strips(single, IMAGES_LAST)
    boxes = partitions(kernel, channels, max(channels, _NUMBERS))[-1]
    whole = [Region(box, slice(0, output[0]), slice(0, output[1]), geometry) for box in boxes]
    return strips(whole, ROWS_FIRST if kernel[0] > 1 else IMAGES_FIRST)


def _row_bytes(
    width: int, kernel: tuple[int, int], channels: int, values: int, like: Tensor, most: int | None = _TERMS
) -> int:
    """Of a row of windows, of which at most so many terms are gathered at once, and of what comes of it."""
    terms = channels * prod(kernel)
    # pixels themselves are multiplied where they lie
    most = terms if most is None or like.dtype is torch.bfloat16 else most
    gathered = 0 if kernel == (1, 1) else min(terms, most)
    return width * (gathered + values) * like.element_size()


def _plane(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[2], tensor.shape[3]
