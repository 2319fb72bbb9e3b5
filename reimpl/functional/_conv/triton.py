"""Convolutions by Triton kernels: tiles, grids and layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._conv import triton_kernels as kernels
from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._dispatch import memory_format_of
from reimpl.functional._triton_common import blocks, launch, power_of_two, processors

# Fewer channels than this in a group leave most of a tile idle; the least side of a tile is 16.
_LEAST_CHANNELS = 8
_LEAST_SIDE = 16
# Columns for which a tile gives up width to lie in one tap, which spares it the places of each.
_WIDE_ENOUGH = 32
# The partial sums of a kernel's gradient: each over so many blocks of pixels at least.
_LEAST_BLOCKS = 8
# Places are counted in 32 bits, with room for what a tile reaches beyond.
_MOST = 2**31 - 2**20


@dataclass(frozen=True)
class _Tile:
    """Rows and columns of the result's tiles, the block of what is summed over, and the warps that share one."""

    m: int
    n: int
    k: int
    warps: int

    @cached_property
    def options(self) -> dict[str, int]:
        """The kernels' constants and launch options."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "num_warps": self.warps, "num_stages": 3}


def _tile(rows: int, columns: int, summed: int, parts: int, like: Tensor) -> _Tile:
    return _tile_of(rows, columns, summed, parts, like.dtype != torch.float32, processors(like.device))


@lru_cache(1_024)
def _tile_of(rows: int, columns: int, summed: int, parts: int, wide: bool, wanted: int) -> _Tile:
    """The largest tile that leaves no processor without one; the matrix units want 64 rows and four warps."""
    side, least_m = (128, 64) if wide else (64, 32)
    m, n = power_of_two(rows, _LEAST_SIDE, side), power_of_two(columns, _LEAST_SIDE, side)
    while parts * blocks(rows, m) * blocks(columns, n) < wanted and (m > least_m or n > 32):
        if m > max(n, least_m) or n <= 32:
            m //= 2
        else:
            n //= 2
    k = power_of_two(summed, _LEAST_SIDE, 64 if wide else 32)
    return _Tile(m, n, k, 8 if m * n > 8_192 else 4)


def worth_it(input: Tensor, weight: Tensor, output: tuple[int, int], groups: int) -> bool:
    """Whether groups are wide enough for tiles, and all is countable; for gradients the two swap their parts."""
    if not min(input.numel(), weight.numel(), *output) or max(input.numel(), weight.numel()) >= _MOST:
        return False
    others = weight.shape[0] * weight.shape[1] * groups // input.shape[1]
    return input.shape[0] * output[0] * output[1] < _MOST and _fills(others, input.shape[1], groups)


def worth_it_for_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], groups: int) -> bool:
    """The same for the gradient of the kernel."""
    sizes = grad.numel(), input.numel()
    return min(sizes) > 0 and max(sizes) < _MOST and _fills(grad.shape[1], input.shape[1], groups)


def _fills(outputs: int, channels: int, groups: int) -> bool:
    return groups == 1 or min(outputs, channels) // groups >= _LEAST_CHANNELS


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``C(x, w) + b``, in the layout that PyTorch would give it."""
    groups, kernel = geometry.groups, (weight.shape[2], weight.shape[3])
    output = geometry.output(input.shape[2], input.shape[3], *kernel)
    result = _empty(input, weight, weight.shape[0], output)
    x, filters = (t.contiguous(memory_format=torch.channels_last) for t in (input, weight))
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    pixels = input.shape[0] * output[0] * output[1]
    flat = channels < _LEAST_SIDE
    tile = _tile(pixels, outputs, channels * kernel[0] * kernel[1] if flat else channels, groups, x)
    launch(
        kernels.convolve, (blocks(pixels, tile.m) * blocks(outputs, tile.n), groups), x, filters,
        filters if bias is None else bias.contiguous(), result, *_sizes(x, channels, output, outputs, geometry),
        *_strides(result), HAS_BIAS=bias is not None, FLAT=flat, **_constants(kernel, geometry), **tile.options,
    )  # fmt: skip
    return result


def convolve_input(
    grad: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    geometry: Geometry,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """``T(g, w)``: the gradient of the input, of height and width ``size``, in ``layout`` or that of the two."""
    groups, kernel = geometry.groups, (weight.shape[2], weight.shape[3])
    outputs, channels = weight.shape[0] // groups, weight.shape[1]
    result = _empty(grad, weight, groups * channels, size, layout)
    g, filters = (t.contiguous(memory_format=torch.channels_last) for t in (grad, weight))
    s_h, s_w = geometry.stride
    pixels = grad.shape[0] * blocks(size[0], s_h) * blocks(size[1], s_w)
    tile = _tile(pixels, channels, outputs, groups * s_h * s_w, g)
    steps = {f"STEP_{side}": geometry.stride[i] // gcd(geometry.stride[i], geometry.dilation[i]) for i, side in _SIDES}
    launch(
        kernels.convolve_input, (blocks(pixels, tile.m) * blocks(channels, tile.n), groups, s_h * s_w), g, filters,
        result, *_sizes(result, channels, (grad.shape[2], grad.shape[3]), outputs, geometry), *_strides(result),
        **steps, **_constants(kernel, geometry), **tile.options,
    )  # fmt: skip
    return result


def convolve_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``: the gradient of a kernel of height and width ``kernel``."""
    groups = geometry.groups
    g, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, input))
    outputs, channels = grad.shape[1] // groups, input.shape[1] // groups
    length, pixels = kernel[0] * kernel[1] * channels, grad.shape[0] * grad.shape[2] * grad.shape[3]
    # the pixels are shared out, so that small results need no small tiles
    tile = _tile(outputs, length, pixels, processors(g.device), g)
    in_one_tap = gcd(channels, tile.n)
    if in_one_tap >= _WIDE_ENOUGH:
        tile = replace(tile, n=in_one_tap)
    tiles = blocks(outputs, tile.m) * blocks(length, tile.n)
    most = blocks(blocks(pixels, tile.k), _LEAST_BLOCKS)
    per_part = blocks(blocks(pixels, tile.k), max(1, min(most, 2 * processors(g.device) // (tiles * groups)))) * tile.k
    parts = blocks(pixels, per_part)
    partial = g.new_empty((parts, groups * outputs, length), dtype=torch.float32)
    launch(
        kernels.convolve_weight, (tiles, groups, parts), g, x, partial,
        *_sizes(x, channels, (grad.shape[2], grad.shape[3]), outputs, geometry), per_part,
        ONE_TAP=channels % tile.n == 0, **_constants(kernel, geometry), **tile.options,
    )  # fmt: skip
    total = (partial[0] if parts == 1 else partial.sum(0)).to(grad.dtype)
    return total.view(groups * outputs, *kernel, channels).permute(0, 3, 1, 2).contiguous()


_SIDES = ((0, "H"), (1, "W"))


def _empty(
    input: Tensor, weight: Tensor, channels: int, size: tuple[int, int], layout: torch.memory_format | None = None
) -> Tensor:
    layout = layout or memory_format_of(input, weight)
    shape = (input.shape[0], channels, *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def _sizes(x: Tensor, channels: int, output: tuple[int, int], outputs: int, geometry: Geometry) -> tuple[int, ...]:
    """Images, height, width and channels of a group, those of the output, and the padding above and to the left."""
    return x.shape[0], x.shape[2], x.shape[3], channels, *output, outputs, geometry.padding[0], geometry.padding[2]


def _strides(result: Tensor) -> tuple[int, int, int]:
    """From image to image, channel to channel and pixel to pixel."""
    channels, pixels = result.shape[1], result.shape[2] * result.shape[3]
    if result.is_contiguous():
        return channels * pixels, pixels, 1
    return channels * pixels, 1, channels


def _constants(kernel: tuple[int, int], geometry: Geometry) -> dict[str, Any]:
    pairs = {"K": kernel, "S": geometry.stride, "D": geometry.dilation}
    return {f"{name}_{side}": pair[i] for name, pair in pairs.items() for i, side in _SIDES}
