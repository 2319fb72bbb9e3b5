"""Pooling as Triton kernels: an output, or on the way back an input, to each lane, in the order of memory.

A batch of planes is (outer, rows, columns, inner), with the images and channels as the outer dimension where the planes
lie one after the other, and with the channels as the inner one where they are last.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from reimpl.functional._dispatch import memory_format_of
from reimpl.functional._triton_common import blocks, launch, power_of_two
from reimpl.functional._windows import Windows

_BLOCK = 256
# Numbers of a tile where one program's lanes add up whole planes.
_TILE = 2_048
# Places in a plane, and numbers of a batch, are counted in 32 bits.
_MOST = 2**31 - _TILE


@triton.jit
def _decoded(count, height, width, inner, BLOCK: tl.constexpr):
    """The places of a block, which of them exist, and their outer index, row, column and inner index."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixel = at // inner
    row = pixel // width
    return at, at < count, row // height, row % height, pixel % width, at % inner


@triton.jit
def _max_forward(
    x,
    y,
    places,
    count,
    height,
    width,
    out_height,
    out_width,
    inner,
    pad_h,
    pad_w,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    D_H: tl.constexpr,
    D_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, live, outer, i, j, c = _decoded(count, out_height, out_width, inner, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], -1, tl.int32)
    for k in range(K_H):
        h = i * S_H - pad_h + k * D_H
        for m in range(K_W):
            w = j * S_W - pad_w + m * D_W
            inside = live & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            v = tl.load(x + ((outer * height + h) * width + w) * inner + c, mask=inside, other=0.0).to(tl.float32)
            # the first element stands until a larger one comes; of several NaN the last
            better = inside & ((v > best) | (v != v) | (place < 0))
            best = tl.where(better, v, best)
            place = tl.where(better, h * width + w, place)
    tl.store(y + at, best.to(y.dtype.element_ty), mask=live)
    tl.store(places + at, place.to(tl.int64), mask=live)


@triton.jit
def _max_backward(
    grad,
    places,
    result,
    count,
    height,
    width,
    out_height,
    out_width,
    inner,
    pad_h,
    pad_w,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    OVER_H: tl.constexpr,
    OVER_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each input adds up the gradients of the windows over it that chose it: no two programs write to one place."""
    at, live, outer, h, w, c = _decoded(count, height, width, inner, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(OVER_H):
        i = (h + pad_h) // S_H - k
        for m in range(OVER_W):
            j = (w + pad_w) // S_W - m
            inside = live & (i >= 0) & (i < out_height) & (j >= 0) & (j < out_width)
            where = ((outer * out_height + i) * out_width + j) * inner + c
            chosen = inside & (tl.load(places + where, mask=inside, other=-1) == h * width + w)
            total += tl.load(grad + where, mask=chosen, other=0.0).to(tl.float32)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=live)


@triton.jit
def _covered(i, size, kernel, stride, pad, INCLUDE_PAD: tl.constexpr):
    """How many elements a window counts along one dimension."""
    start = i * stride - pad
    if INCLUDE_PAD:
        return tl.minimum(start + kernel, size + pad) - start
    else:
        return tl.minimum(start + kernel, size) - tl.maximum(start, 0)


@triton.jit
def _average_forward(
    x,
    y,
    count,
    height,
    width,
    out_height,
    out_width,
    inner,
    pad_h,
    pad_w,
    divisor,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, live, outer, i, j, c = _decoded(count, out_height, out_width, inner, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K_H):
        h = i * S_H - pad_h + k
        for m in range(K_W):
            w = j * S_W - pad_w + m
            inside = live & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            where = ((outer * height + h) * width + w) * inner + c
            total += tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
    area = _covered(i, height, K_H, S_H, pad_h, INCLUDE_PAD) * _covered(j, width, K_W, S_W, pad_w, INCLUDE_PAD)
    area = tl.where(divisor != 0, divisor, area).to(tl.float32)
    tl.store(y + at, tl.div_rn(total, area).to(y.dtype.element_ty), mask=live)


@triton.jit
def _average_backward(
    grad,
    result,
    count,
    height,
    width,
    out_height,
    out_width,
    inner,
    pad_h,
    pad_w,
    divisor,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, live, outer, h, w, c = _decoded(count, height, width, inner, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range((K_H - 1) // S_H + 1):
        i = (h + pad_h) // S_H - k
        above = live & (i >= 0) & (i < out_height) & (h + pad_h - i * S_H < K_H)
        rows = _covered(i, height, K_H, S_H, pad_h, INCLUDE_PAD)
        for m in range((K_W - 1) // S_W + 1):
            j = (w + pad_w) // S_W - m
            inside = above & (j >= 0) & (j < out_width) & (w + pad_w - j * S_W < K_W)
            area = rows * _covered(j, width, K_W, S_W, pad_w, INCLUDE_PAD)
            area = tl.where(inside, tl.where(divisor != 0, divisor, area), 1).to(tl.float32)
            where = ((outer * out_height + i) * out_width + j) * inner + c
            total += tl.div_rn(tl.load(grad + where, mask=inside, other=0.0).to(tl.float32), area)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=live)


@triton.jit
def _adaptive(
    x,
    y,
    count,
    height,
    width,
    out_height,
    out_width,
    inner,
    MOST_H: tl.constexpr,
    MOST_W: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Means over windows from floor(i h/m) up to ceil((i + 1) h/m), at most MOST long.

    That an element lies in a window reads the same with the two lengths exchanged, so that the way back is the same
    walk, over windows of gradients, each divided by the area of its own window.
    """
    at, live, outer, i, j, c = _decoded(count, out_height, out_width, inner, BLOCK)
    top, bottom = i * height // out_height, ((i + 1) * height + out_height - 1) // out_height
    left, right = j * width // out_width, ((j + 1) * width + out_width - 1) // out_width
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(MOST_H):
        h = top + k
        for m in range(MOST_W):
            w = left + m
            inside = live & (h < bottom) & (w < right)
            v = tl.load(x + ((outer * height + h) * width + w) * inner + c, mask=inside, other=0.0).to(tl.float32)
            if BACKWARD:
                rows = ((h + 1) * out_height + height - 1) // height - h * out_height // height
                columns = ((w + 1) * out_width + width - 1) // width - w * out_width // width
                v = tl.div_rn(v, (rows * columns).to(tl.float32))
            total += v
    if not BACKWARD:
        total = tl.div_rn(total, ((bottom - top) * (right - left)).to(tl.float32))
    tl.store(y + at, total.to(y.dtype.element_ty), mask=live)


@triton.jit
def _plane_means(x, y, count, size, inner, PLANES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The mean of each plane."""
    if PLANES:
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        base = r * size
        live = r < count
    else:
        in_image = tl.cdiv(inner, ROWS)
        image = tl.program_id(0) // in_image
        c = (tl.program_id(0) % in_image) * ROWS + tl.arange(0, ROWS)
        base = image * size * inner + c
        r = image * inner + c
        live = c < inner
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for at in range(0, size, WIDTH):
        s = at + tl.arange(0, WIDTH)
        there = live[:, None] & (s < size)[None, :]
        total += tl.load(x + base[:, None] + s[None, :] * inner, mask=there, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 1), tl.zeros([ROWS], tl.float32) + size)
    tl.store(y + r, mean.to(y.dtype.element_ty), mask=live)


def worth_it(input: Tensor) -> bool:
    """Whether there is anything to do, and no more than the kernels can count."""
    return 0 < input.numel() < _MOST


def _layout(tensor: Tensor) -> tuple[Tensor, torch.memory_format, int]:
    """The tensor, or a copy where its planes lie scattered, its layout, and the inner dimension of that."""
    layout = memory_format_of(tensor)
    inner = tensor.shape[1] if layout is torch.channels_last else 1
    return tensor.contiguous(memory_format=layout), layout, inner


def _empty(like: Tensor, plane: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype) -> Tensor:
    return torch.empty((*like.shape[:-2], *plane), dtype=dtype, device=like.device, memory_format=layout)


def _grid(result: Tensor) -> tuple[int]:
    return (blocks(result.numel(), _BLOCK),)


def _tiling(windows: Windows, dilated: bool) -> dict[str, int]:
    names = {"K": windows.kernel, "S": windows.stride} | ({"D": windows.dilation} if dilated else {})
    return {f"{name}_{side}": pair[i] for name, pair in names.items() for i, side in enumerate("HW")}


def max_pool2d(input: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """The maxima of the windows, and their places ``row * width + column``, in the layout of ``input``."""
    x, layout, inner = _layout(input)
    values, places = (_empty(x, windows.output, layout, dtype) for dtype in (x.dtype, torch.int64))
    launch(
        _max_forward, _grid(values), x, values, places, values.numel(), *x.shape[-2:], *windows.output, inner,
        *windows.padding, **_tiling(windows, True), BLOCK=_BLOCK,
    )  # fmt: skip
    return values, places


def max_pool2d_backward(grad: Tensor, places: Tensor, plane: tuple[int, int], windows: Windows) -> Tensor:
    """The gradient of an input of height and width ``plane``."""
    places, layout, inner = _layout(places)
    grad = grad.contiguous(memory_format=layout)
    result = _empty(grad, plane, layout, grad.dtype)
    spans = [d * (k - 1) // s + 1 for d, k, s in zip(windows.dilation, windows.kernel, windows.stride, strict=True)]
    launch(
        _max_backward, _grid(result), grad, places, result, result.numel(), *plane, *windows.output, inner,
        *windows.padding, S_H=windows.stride[0], S_W=windows.stride[1], OVER_H=spans[0], OVER_W=spans[1], BLOCK=_BLOCK,
    )  # fmt: skip
    return result


def avg_pool2d(input: Tensor, windows: Windows, include_pad: bool, override: int | None) -> Tensor:
    """The means of the windows."""
    x, layout, inner = _layout(input)
    result = _empty(x, windows.output, layout, x.dtype)
    launch(
        _average_forward, _grid(result), x, result, result.numel(), *x.shape[-2:], *windows.output, inner,
        *windows.padding, override or 0, INCLUDE_PAD=include_pad, **_tiling(windows, False), BLOCK=_BLOCK,
    )  # fmt: skip
    return result


def avg_pool2d_backward(
    grad: Tensor, plane: tuple[int, int], windows: Windows, include_pad: bool, override: int | None
) -> Tensor:
    """The gradient of an input of height and width ``plane``."""
    grad, layout, inner = _layout(grad)
    result = _empty(grad, plane, layout, grad.dtype)
    launch(
        _average_backward, _grid(result), grad, result, result.numel(), *plane, *windows.output, inner,
        *windows.padding, override or 0, INCLUDE_PAD=include_pad, **_tiling(windows, False), BLOCK=_BLOCK,
    )  # fmt: skip
    return result


def _longest(length: int, windows: int) -> int:
    """A bound of the number of elements in an adaptive window."""
    return length // windows if length % windows == 0 else min(length, length // windows + 2)


def _adapted(x: Tensor, plane: tuple[int, int], layout: torch.memory_format, inner: int, backward: bool) -> Tensor:
    result, size = _empty(x, plane, layout, x.dtype), (x.shape[-2], x.shape[-1])
    launch(
        _adaptive, _grid(result), x, result, result.numel(), *size, *plane, inner, MOST_H=_longest(size[0], plane[0]),
        MOST_W=_longest(size[1], plane[1]), BACKWARD=backward, BLOCK=_BLOCK,
    )  # fmt: skip
    return result


def adaptive_avg_pool2d(input: Tensor, sizes: tuple[int, int]) -> Tensor:
    """The means over a grid of windows that cover the input."""
    x, layout, inner = _layout(input)
    if sizes != (1, 1):
        return _adapted(x, sizes, layout, inner, False)
    result, size = _empty(x, sizes, layout, x.dtype), prod(x.shape[-2:])
    count = result.numel()
    rows = power_of_two(count if inner == 1 else inner, 1, 32)
    width = power_of_two(size, 1, _TILE // rows)
    programs = blocks(count, rows) if inner == 1 else count // inner * blocks(inner, rows)
    launch(_plane_means, (programs,), x, result, count, size, inner, PLANES=inner == 1, ROWS=rows, WIDTH=width)
    return result


def adaptive_avg_pool2d_backward(grad: Tensor, plane: tuple[int, int]) -> Tensor:
    """The gradient of an input of height and width ``plane``."""
    grad, layout, inner = _layout(grad)
    return _adapted(grad, plane, layout, inner, True)
