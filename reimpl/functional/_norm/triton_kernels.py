"""Batch normalisation as Triton kernels: each pass over memory by programs that share a channel's numbers in parts.

A tile is ROWS numbers of each of COLUMNS channels: 1 where the planes lie one after the other, some where the channels
are last. Each place of a tile has sums of its own, merged at the end of the part: so the partial sums are short. The
second kernel of a pass merges the parts by itself, which saves a third.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from reimpl.functional._triton_common import through


@triton.jit
def _places(rows, size, stride_n, stride_s):
    """Where the numbers of a channel lie, counted over all images."""
    return (rows // size).to(tl.int64) * stride_n + (rows % size) * stride_s


@triton.jit
def moments(
    x,
    partial,
    channels,
    count,
    per_part,
    size,
    stride_n,
    stride_c,
    stride_s,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean and sum of squared deviations of each part of each channel, by Welford's recurrence in every place.

    The mean is that of what lies above the channel's first number, so that it rounds like the deviations.
    """
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    origin = tl.load(x + c * stride_c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    part = tl.program_id(1)
    first = part * per_part
    last = tl.minimum(first + per_part, count)
    lane = tl.arange(0, ROWS)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    seen = 0.0
    for at in range(first, last, ROWS):
        rows = at + lane
        live = (rows < last)[:, None] & (c < channels)[None, :]
        where = _places(rows, size, stride_n, stride_s)[:, None] + (c * stride_c)[None, :]
        v = tl.load(x + where, mask=live, other=0.0).to(tl.float32) - origin
        seen += 1.0
        before = v - mean
        moved = mean + before * (1.0 / seen)
        squares = tl.where(live, squares + before * (v - moved), squares)
        mean = tl.where(live, moved, mean)
    numbers = tl.maximum((last - first - lane + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    whole = tl.sum(mean * numbers, 0) / (last - first).to(tl.float32)
    apart = mean - whole[None, :]
    squares += apart * apart * numbers
    out = partial + part * channels + c
    tl.store(out, whole, mask=c < channels)
    tl.store(out + tl.num_programs(1) * channels, tl.sum(squares, 0), mask=c < channels)


@triton.jit
def _merged(
    partial,
    parts,
    c,
    channels,
    count,
    per_part,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Mean above the channel's first number, and variance, of whole channels."""
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for at in range(0, parts, PARTS):
        p = at + tl.arange(0, PARTS)
        live = (p < parts)[:, None] & (c < channels)[None, :]
        own = tl.minimum(per_part, count - p * per_part).to(tl.float32)[:, None]
        total += tl.load(partial + p[:, None] * channels + c[None, :], mask=live, other=0.0) * own
    mean = tl.div_rn(tl.sum(total, 0), tl.zeros([COLUMNS], tl.float32) + count)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for at in range(0, parts, PARTS):
        p = at + tl.arange(0, PARTS)
        live = (p < parts)[:, None] & (c < channels)[None, :]
        own = tl.minimum(per_part, count - p * per_part).to(tl.float32)[:, None]
        place = partial + p[:, None] * channels + c[None, :]
        apart = tl.load(place, mask=live, other=0.0) - mean[None, :]
        squares = tl.load(place + parts * channels, mask=live, other=0.0)
        total += tl.where(live, squares + apart * apart * own, 0.0)
    return mean, tl.div_rn(tl.sum(total, 0), tl.zeros([COLUMNS], tl.float32) + count)


@triton.jit
def _vector(pointer, c, live, otherwise, GIVEN: tl.constexpr):
    """A number for each channel, ``otherwise`` where there is none."""
    if GIVEN:
        return tl.load(pointer + c, mask=live, other=0.0).to(tl.float32)
    else:
        return tl.zeros_like(c).to(tl.float32) + otherwise


@triton.jit
def normalize(
    x,
    y,
    partial,
    means,
    variances,
    weight,
    bias,
    eps,
    parts,
    channels,
    count,
    per_part,
    size,
    stride_n,
    stride_c,
    stride_s,
    TRAINING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(x - mean) scale + shift, by the moments that the parts give, or by given ones."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    known = c < channels
    if TRAINING:
        mean, var = _merged(partial, parts, c, channels, count, per_part, PARTS, COLUMNS)
        mean += tl.load(x + c * stride_c, mask=known, other=0.0).to(tl.float32)
        if part == 0:
            tl.store(means + c, mean, mask=known)
            tl.store(variances + c, var, mask=known)
    else:
        mean = _vector(means, c, known, 0.0, True)
        var = _vector(variances, c, known, 1.0, True)
    scale = tl.div_rn(_vector(weight, c, known, 1.0, HAS_WEIGHT), tl.sqrt_rn(var + eps))
    shift = _vector(bias, c, known, 0.0, HAS_BIAS)
    first = part * per_part
    last = tl.minimum(first + per_part, count)
    for at in range(first, last, ROWS):
        rows = at + tl.arange(0, ROWS)
        live = (rows < last)[:, None] & known[None, :]
        where = _places(rows, size, stride_n, stride_s)[:, None] + (c * stride_c)[None, :]
        v = tl.load(x + where, mask=live).to(tl.float32)
        v = (v - mean[None, :]) * scale[None, :] + shift[None, :]
        if RELU:
            v = tl.where(v <= 0, 0.0, v)
        tl.store(y + where, v.to(y.dtype.element_ty), mask=live)


@triton.jit
def error_sums(
    grad,
    x,
    y,
    means,
    partial,
    channels,
    count,
    per_part,
    size,
    stride_n,
    stride_c,
    stride_s,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of g and g (x - mean) over each part of each channel."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    known = c < channels
    first = part * per_part
    last = tl.minimum(first + per_part, count)
    mean = _vector(means, c, known, 0.0, True)
    plain = tl.zeros([ROWS, COLUMNS], tl.float32)
    centred = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(first, last, ROWS):
        rows = at + tl.arange(0, ROWS)
        live = (rows < last)[:, None] & known[None, :]
        where = _places(rows, size, stride_n, stride_s)[:, None] + (c * stride_c)[None, :]
        g = tl.load(grad + where, mask=live, other=0.0).to(tl.float32)
        v = tl.load(x + where, mask=live, other=0.0).to(tl.float32)
        if RELU:
            g = through(g, tl.load(y + where, mask=live, other=0.0).to(tl.float32), 0.0, "relu")
        plain += g
        centred += tl.where(live, g * (v - mean[None, :]), 0.0)
    out = partial + part * channels + c
    tl.store(out, tl.sum(plain, 0), mask=known)
    tl.store(out + tl.num_programs(1) * channels, tl.sum(centred, 0), mask=known)


@triton.jit
def _totals(partial, parts, c, channels, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    plain = tl.zeros([PARTS, COLUMNS], tl.float32)
    centred = tl.zeros([PARTS, COLUMNS], tl.float32)
    for at in range(0, parts, PARTS):
        p = at + tl.arange(0, PARTS)
        live = (p < parts)[:, None] & (c < channels)[None, :]
        place = partial + p[:, None] * channels + c[None, :]
        plain += tl.load(place, mask=live, other=0.0)
        centred += tl.load(place + parts * channels, mask=live, other=0.0)
    return tl.sum(plain, 0), tl.sum(centred, 0)


@triton.jit
def gradient(
    grad,
    x,
    y,
    result,
    partial,
    means,
    variances,
    weight,
    grad_means,
    grad_variances,
    sums,
    sums_centred,
    eps,
    parts,
    channels,
    count,
    per_part,
    size,
    stride_n,
    stride_c,
    stride_s,
    TRAINING: tl.constexpr,
    SUMMED: tl.constexpr,
    WANTED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The chain (4.83-4.94), as :class:`reimpl.functional._norm.chain.Chain` derives it."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    known = c < channels
    if SUMMED:
        sum_g, sum_g_centred = _totals(partial, parts, c, channels, PARTS, COLUMNS)
        if part == 0:
            tl.store(sums + c, sum_g, mask=known)
            tl.store(sums_centred + c, sum_g_centred, mask=known)
    if WANTED:
        s = tl.div_rn(1.0, tl.sqrt_rn(_vector(variances, c, known, 1.0, True) + eps))
        scale = s * _vector(weight, c, known, 1.0, HAS_WEIGHT)
        first = part * per_part
        last = tl.minimum(first + per_part, count)
        if TRAINING:
            mean = _vector(means, c, known, 0.0, True)
            share = tl.div_rn(1.0, tl.zeros([COLUMNS], tl.float32) + count)
            to_var = _vector(grad_variances, c, known, 0.0, True) - 0.5 * scale * s * s * sum_g_centred
            slope = to_var * 2.0 * share
            offset = (_vector(grad_means, c, known, 0.0, True) - scale * sum_g) * share
        for at in range(first, last, ROWS):
            rows = at + tl.arange(0, ROWS)
            live = (rows < last)[:, None] & known[None, :]
            where = _places(rows, size, stride_n, stride_s)[:, None] + (c * stride_c)[None, :]
            g = tl.load(grad + where, mask=live).to(tl.float32)
            if RELU:
                g = through(g, tl.load(y + where, mask=live).to(tl.float32), 0.0, "relu")
            d = g * scale[None, :]
            if TRAINING:
                v = tl.load(x + where, mask=live).to(tl.float32)
                d += (v - mean[None, :]) * slope[None, :] + offset[None, :]
            tl.store(result + where, d.to(result.dtype.element_ty), mask=live)
