"""Pooling as Triton kernels: an output, or on the way back an input, to each lane, in the order of memory.

A batch of planes is (outer, rows, columns, inner), with the images and channels as the outer dimension where the planes
lie one after the other, and with the channels as the inner one where they are last.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from reimpl.functional._dispatch import memory_format_of
from reimpl.functional._pooling.windows import Windows
from reimpl.functional._triton_common import blocks, launch, power_of_two

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
def _adaptive_bounds(i, windows, size):
    """First element of an adaptive window, and the one after its last."""
    return i * size // windows, ((i + 1) * size + windows - 1) // windows


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
    ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, live, outer, i, j, c = _decoded(count, out_height, out_width, inner, BLOCK)
    if ADAPTIVE:
        top, bottom = _adaptive_bounds(i, out_height, height)
        left, right = _adaptive_bounds(j, out_width, width)
    else:
        top, bottom, left, right = i * S_H - pad_h, height, j * S_W - pad_w, width
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.full([BLOCK], -1, tl.int32)
    for k in range(K_H):
        h = top + k * D_H
        for m in range(K_W):
            w = left + m * D_W
            inside = live & (h >= 0) & (h < bottom) & (w >= 0) & (w < right)
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
    ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each input adds up the gradients of the windows over it that chose it: no two programs write to one place."""
    at, live, outer, h, w, c = _decoded(count, height, width, inner, BLOCK)
    if ADAPTIVE:
        # that an element lies in a window reads the same with the two lengths exchanged
        lowest, rightmost = _adaptive_bounds(h, height, out_height)[1] - 1, _adaptive_bounds(w, width, out_width)[1] - 1
    else:
        lowest, rightmost = (h + pad_h) // S_H, (w + pad_w) // S_W
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(OVER_H):
        i = lowest - k
        for m in range(OVER_W):
            j = rightmost - m
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
    top, bottom = _adaptive_bounds(i, out_height, height)
    left, right = _adaptive_bounds(j, out_width, width)
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


@dataclass(frozen=True)
class Lines:
    """Where windows lie: those of a kernel, and how they count, or (without them) those of a grid."""

    windows: Windows | None
    include_pad: bool = True
    divisor: int | None = None


def bounds(windows: Windows, plane: tuple[int, int], include_pad: bool = True, divisor: int | None = None) -> Lines:
    """The windows of a kernel; the kernels read the plane off the tensors."""
    return Lines(windows, include_pad, divisor)


def adaptive(output: tuple[int, int], plane: tuple[int, int]) -> Lines:
    """Those of a grid."""
    return Lines(None)


def worth_it(input: Tensor) -> bool:
    """Whether there is anything to do, and no more than the kernels can count."""
    return 0 < input.numel() < _MOST


def worth_spreading(grad: Tensor, plane: tuple[int, int]) -> bool:
    """The same for what the gradient goes to."""
    return grad.numel() > 0 and prod(grad.shape[:-2]) * prod(plane) < _MOST


def _layout(tensor: Tensor, layout: torch.memory_format | None = None) -> tuple[Tensor, torch.memory_format, int]:
    """The tensor, or a copy where its planes lie scattered, its layout, and the inner dimension of that."""
    layout = layout or memory_format_of(tensor)
    inner = tensor.shape[1] if layout is torch.channels_last else 1
    return tensor.contiguous(memory_format=layout), layout, inner


def _empty(like: Tensor, plane: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype) -> Tensor:
    return torch.empty((*like.shape[:-2], *plane), dtype=dtype, device=like.device, memory_format=layout)


def _grid(result: Tensor) -> tuple[int]:
    return (blocks(result.numel(), _BLOCK),)


def _sides(**pairs: tuple[int, int]) -> dict[str, int]:
    return {f"{name}_{side}": pair[i] for name, pair in pairs.items() for i, side in enumerate("HW")}


def _longest(plane: tuple[int, int], output: tuple[int, int]) -> tuple[int, int]:
    """Bounds of the numbers of elements in an adaptive window."""
    rows, columns = (
        size // count if size % count == 0 else min(size, size // count + 2)
        for size, count in zip(plane, output, strict=True)
    )
    return rows, columns


def largest(input: Tensor, lines: Lines, output: tuple[int, int], step: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest number of each window, whose elements are ``step`` apart, and its place ``row * width + column``."""
    x, layout, inner = _layout(input)
    plane, windows = (x.shape[-2], x.shape[-1]), lines.windows
    kernel = _longest(plane, output) if windows is None else windows.kernel
    stride, padding = ((1, 1), (0, 0)) if windows is None else (windows.stride, windows.padding)
    values, places = (_empty(x, output, layout, dtype) for dtype in (x.dtype, torch.int64))
    launch(
        _max_forward, _grid(values), x, values, places, values.numel(), *plane, *output, inner, *padding,
        **_sides(K=kernel, S=stride, D=step), ADAPTIVE=windows is None, BLOCK=_BLOCK,
    )  # fmt: skip
    return values, places


def scatter(grad: Tensor, places: Tensor, plane: tuple[int, int], lines: Lines, layout: torch.memory_format) -> Tensor:
    """The gradient, in that layout, of what :func:`largest` was taken of."""
    places, layout, inner = _layout(places, layout)
    grad, windows = grad.contiguous(memory_format=layout), lines.windows
    result, output = _empty(grad, plane, layout, grad.dtype), (grad.shape[-2], grad.shape[-1])
    over, stride, padding = _longest(output, plane), (1, 1), (0, 0)
    if windows is not None:
        stride, padding = windows.stride, windows.padding
        over_h, over_w = (
            d * (k - 1) // s + 1 for d, k, s in zip(windows.dilation, windows.kernel, stride, strict=True)
        )
        over = over_h, over_w
    launch(
        _max_backward, _grid(result), grad, places, result, result.numel(), *plane, *output, inner, *padding,
        **_sides(S=stride, OVER=over), ADAPTIVE=windows is None, BLOCK=_BLOCK,
    )  # fmt: skip
    return result


def means(input: Tensor, lines: Lines, output: tuple[int, int]) -> Tensor:
    """The mean of each window."""
    x, layout, inner = _layout(input)
    result = _empty(x, output, layout, x.dtype)
    if lines.windows is None and output == (1, 1):
        _means_of_planes(x, result, inner)
    else:
        _average(x, result, inner, lines, back=False)
    return result


def spread(grad: Tensor, lines: Lines, plane: tuple[int, int], layout: torch.memory_format) -> Tensor:
    """The gradient, in that layout, of what :func:`means` was taken of."""
    grad, layout, inner = _layout(grad, layout)
    result = _empty(grad, plane, layout, grad.dtype)
    _average(grad, result, inner, lines, back=True)
    return result


def _average(x: Tensor, result: Tensor, inner: int, lines: Lines, back: bool) -> None:
    here, there = (x.shape[-2], x.shape[-1]), (result.shape[-2], result.shape[-1])
    if lines.windows is None:
        launch(
            _adaptive, _grid(result), x, result, result.numel(), *here, *there, inner,
            **_sides(MOST=_longest(here, there)), BACKWARD=back, BLOCK=_BLOCK,
        )  # fmt: skip
        return
    windows, sizes = lines.windows, (*there, *here) if back else (*here, *there)
    launch(
        _average_backward if back else _average_forward, _grid(result), x, result, result.numel(), *sizes, inner,
        *windows.padding, lines.divisor or 0, **_sides(K=windows.kernel, S=windows.stride),
        INCLUDE_PAD=lines.include_pad, BLOCK=_BLOCK,
    )  # fmt: skip


def _means_of_planes(x: Tensor, result: Tensor, inner: int) -> None:
    size, count = prod(x.shape[-2:]), result.numel()
    rows = power_of_two(count if inner == 1 else inner, 1, 32)
    width = power_of_two(size, 1, _TILE // rows)
    programs = blocks(count, rows) if inner == 1 else count // inner * blocks(inner, rows)
    launch(_plane_means, (programs,), x, result, count, size, inner, PLANES=inner == 1, ROWS=rows, WIDTH=width)
