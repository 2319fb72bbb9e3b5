"""Convolution's three products as Triton kernels: matrix products whose operands are gathered from the planes.

Planes have their channels last, and kernels are (outputs, rows, columns, channels). A program works through one tile of
the result; float32 is multiplied in float32, the half-width types on the matrix units, and all sums are float32.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from reimpl.functional._triton_common import dot


@triton.jit
def _tile(columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of a program's tile; neighbours share the rows, which are the larger operand."""
    tiles = tl.cdiv(columns, BLOCK_N)
    m = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return m, tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _split_pixels(m, height, width):
    """Image, row and column."""
    image = m // (height * width)
    pixel = m % (height * width)
    return image, pixel // width, pixel % width


@triton.jit
def convolve(
    x,
    weight,
    bias,
    y,
    images,
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    pad_h,
    pad_w,
    stride_n,
    stride_c,
    stride_p,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    D_H: tl.constexpr,
    D_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output pixels by outputs; ``channels`` and ``outputs`` are a group's, the strides those of ``y``.

    FLAT takes taps and channels together, for channels that are fewer than a block.
    """
    group, all_channels = tl.program_id(1), channels * tl.num_programs(1)
    m, n = _tile(outputs, BLOCK_M, BLOCK_N)
    image, i, j = _split_pixels(m, out_height, out_width)
    exists = m < images * out_height * out_width
    top, left = i * S_H - pad_h, j * S_W - pad_w
    base = x + group * channels + ((image * height + top) * width + left) * all_channels
    length = K_H * K_W * channels
    filters = weight + (group * outputs + n) * length
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FLAT:
        for at in range(0, length, BLOCK_K):
            k = at + tl.arange(0, BLOCK_K)
            down, right = k // channels // K_W * D_H, k // channels % K_W * D_W
            h, w = top[:, None] + down[None, :], left[:, None] + right[None, :]
            inside = exists[:, None] & (k < length)[None, :] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = (down * width + right) * all_channels + k % channels
            a = tl.load(base[:, None] + place[None, :], mask=inside, other=0.0)
            b = tl.load(filters[None, :] + k[:, None], mask=(n < outputs)[None, :] & (k < length)[:, None], other=0.0)
            total = dot(a, b, total)
    else:
        blocks = tl.cdiv(channels, BLOCK_K)
        for step in range(K_H * K_W * blocks):
            tap = step // blocks
            c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
            down, right = tap // K_W * D_H, tap % K_W * D_W
            h, w = top + down, left + right
            inside = exists & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = (down * width + right) * all_channels + c
            a = tl.load(base[:, None] + place[None, :], mask=inside[:, None] & (c < channels)[None, :], other=0.0)
            there = (n < outputs)[None, :] & (c < channels)[:, None]
            b = tl.load(filters[None, :] + (tap * channels + c)[:, None], mask=there, other=0.0)
            total = dot(a, b, total)
    if HAS_BIAS:
        total += tl.load(bias + group * outputs + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    place = image.to(tl.int64) * stride_n + (i * out_width + j) * stride_p
    place = place[:, None] + ((group * outputs + n) * stride_c)[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=exists[:, None] & (n < outputs)[None, :])


@triton.jit
def _taps(residue, pad, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr):
    """First tap over the pixels of a residue by the stride, and how many there are, STEP apart."""
    first = K
    for k in tl.static_range(STEP):
        first = tl.where((residue + pad - k * D) % S == 0, tl.minimum(first, k), first)
    return first, (K - first + STEP - 1) // STEP


@triton.jit
def convolve_input(
    grad,
    weight,
    result,
    images,
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    pad_h,
    pad_w,
    stride_n,
    stride_c,
    stride_p,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    D_H: tl.constexpr,
    D_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Input pixels by channels. Those of one residue by the stride lie under the same taps: axis 2 of the grid."""
    group, all_outputs = tl.program_id(1), outputs * tl.num_programs(1)
    residue_h, residue_w = tl.program_id(2) // S_W, tl.program_id(2) % S_W
    rows, columns = (height - residue_h + S_H - 1) // S_H, (width - residue_w + S_W - 1) // S_W
    first_h, taps_h = _taps(residue_h, pad_h, K_H, S_H, D_H, STEP_H)
    first_w, taps_w = _taps(residue_w, pad_w, K_W, S_W, D_W, STEP_W)
    m, n = _tile(channels, BLOCK_M, BLOCK_N)
    image, h, w = _split_pixels(m, rows, columns)
    exists = m < images * rows * columns
    h, w = residue_h + h * S_H, residue_w + w * S_W
    blocks = tl.cdiv(outputs, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(taps_h * taps_w * blocks):
        tap = step // blocks
        o = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        k_h, k_w = first_h + tap // taps_w * STEP_H, first_w + tap % taps_w * STEP_W
        # both divide without rest
        i, j = (h + pad_h - k_h * D_H) // S_H, (w + pad_w - k_w * D_W) // S_W
        inside = exists & (i >= 0) & (i < out_height) & (j >= 0) & (j < out_width)
        place = ((image * out_height + i) * out_width + j) * all_outputs
        place = place[:, None] + (group * outputs + o)[None, :]
        a = tl.load(grad + place, mask=inside[:, None] & (o < outputs)[None, :], other=0.0)
        place = (((group * outputs + o) * K_H + k_h) * K_W + k_w)[:, None] * channels + n[None, :]
        b = tl.load(weight + place, mask=(o < outputs)[:, None] & (n < channels)[None, :], other=0.0)
        total = dot(a, b, total)
    place = image.to(tl.int64) * stride_n + (h * width + w) * stride_p
    place = place[:, None] + ((group * channels + n) * stride_c)[None, :]
    tl.store(result + place, total.to(result.dtype.element_ty), mask=exists[:, None] & (n < channels)[None, :])


@triton.jit
def convolve_weight(
    grad,
    x,
    partial,
    images,
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    pad_h,
    pad_w,
    per_part,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    D_H: tl.constexpr,
    D_W: tl.constexpr,
    ONE_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Outputs by taps and channels, summed over a part of the output pixels: axis 2 of the grid.

    ONE_TAP says that a tile's columns are of one tap.
    """
    group, groups, part = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    length = K_H * K_W * channels
    m, n = _tile(length, BLOCK_M, BLOCK_N)
    tap = n // channels
    if ONE_TAP:
        tap = tl.program_id(0) % tl.cdiv(length, BLOCK_N) * BLOCK_N // channels
    down, right = tap // K_W * D_H - pad_h, tap % K_W * D_W - pad_w
    c = group * channels + n % channels
    first = part * per_part
    last = tl.minimum(first + per_part, images * out_height * out_width)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(first, last, BLOCK_K):
        p = at + tl.arange(0, BLOCK_K)
        image, i, j = _split_pixels(p, out_height, out_width)
        place = p[None, :] * (groups * outputs) + (group * outputs + m)[:, None]
        a = tl.load(grad + place, mask=(m < outputs)[:, None] & (p < last)[None, :], other=0.0)
        if ONE_TAP:
            h, w = i * S_H + down, j * S_W + right
            inside = ((p < last) & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            place = ((image * height + h) * width + w)[:, None]
        else:
            h, w = (i * S_H)[:, None] + down[None, :], (j * S_W)[:, None] + right[None, :]
            inside = (p < last)[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = ((image * height)[:, None] + h) * width + w
        place = place * (groups * channels) + c[None, :]
        b = tl.load(x + place, mask=inside & (n < length)[None, :], other=0.0)
        total = dot(a, b, total)
    place = ((part * groups + group) * outputs + m)[:, None] * length + n[None, :]
    tl.store(partial + place, total, mask=(m < outputs)[:, None] & (n < length)[None, :])
