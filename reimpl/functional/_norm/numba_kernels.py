"""Batch normalisation as Numba compiles it: a piece of the batch at a time, so that it stays in the cache.

The batch is cut into rows of memory that hold all channels (an image in planes, a pixel of ``channels_last``), rows
into blocks of channels, and what is left in a block, strip after strip, into chunks, so that memory is walked through
in its own order. A task is a chunk of a block: threads take numbers from a counter. Within a chunk each place of a
strip is summed over the strips in the dtype of the sums, and the places of a channel in float64; large planes go by
whole registers, one by one, and part by part in float64. Chunks are joined by (count, mean, sum of squared deviations).

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._norm.numba`.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.optim._numba_ops import bfloat16_to_float, float_to_bfloat16, pointer, take

# What memory holds and what is summed; the loader puts another pair in the place of this one.
STORED, REAL = np.float32, np.float32

# What stands in the words of the table; of the bits of PHASES: collect sums, apply them.
(COUNTER, PHASES, FIXED, RELU, EPS, CHANNELS, SIZE, ROWS, BLOCK, FOLD, TASKS, CHUNKS, STRIPS, UNIFORM) = range(14)
(SCRATCH, PLACES, PARTIALS, SOURCE, OUTPUT, MEANS, VARIANCES, WEIGHT, BIAS) = range(14, 23)
(ERRORS, TARGET, GRAD_MEANS, GRAD_VARIANCES) = range(23, 27)
# What comes last: running averages forward, sums or gradients of the vectors backward.
(FIRST, SECOND, MOMENTUM, SCALED, WORDS) = range(27, 32)
COLLECT, APPLY = 1, 2
# Of a plane so many numbers are added up in the dtype of the sums: what many more come to leaves no room for the next.
PART = 1 << 14
FORWARD_ROWS, BACKWARD_ROWS = 4, 6

BYTES, REAL_BYTES = np.dtype(STORED).itemsize, np.dtype(REAL).itemsize
ZERO = REAL(0)
# reassociation lets a sum run in several lanes; NaN and infinities keep their meaning
_LANES = {"reassoc", "contract", "nsz"}


@njit(inline="always")
def _same(x: Any) -> Any:
    return x


widen = bfloat16_to_float if BYTES == 2 else _same
narrow = float_to_bfloat16 if BYTES == 2 else _same


@njit(inline="always")
def strip(w: Any, base: Any, j: Any, s: Any) -> Any:
    """Strip ``s`` of block ``j``; the last one of all may be shorter."""
    first = j * w[BLOCK]
    own = min(w[BLOCK], w[CHANNELS] - first)
    rows = min(w[FOLD], w[ROWS] - s * w[FOLD])
    start = (s * w[FOLD] * w[CHANNELS] + first) * w[SIZE]
    return carray(pointer(base + start * BYTES), (rows * own * w[SIZE],), STORED)


@njit(inline="always")
def plane(w: Any, values: Any, c: Any) -> Any:
    """A channel's part of a strip of one row."""
    return values[c * w[SIZE] : (c + 1) * w[SIZE]]


@njit(inline="always")
def vector(w: Any, word: Any) -> Any:
    return carray(pointer(w[word]), (w[CHANNELS],), REAL)


@njit(inline="always")
def span(w: Any, i: Any) -> Any:
    """First strip of chunk ``i``, the one after its last, and how many values a channel has in it."""
    low, high = i * w[STRIPS], min((i + 1) * w[STRIPS], -(-w[ROWS] // w[FOLD]))
    return low, high, (min(high * w[FOLD], w[ROWS]) - low * w[FOLD]) * w[SIZE]


@njit(error_model="numpy")
def total_of(places: Any, w: Any, own: Any, c: Any) -> Any:
    """The sum of a channel's places."""
    if w[FOLD] * w[SIZE] == 1:
        return float(places[c])
    total = 0.0
    for r in range(w[FOLD]):
        start = (r * own + c) * w[SIZE]
        for p in range(start, start + w[SIZE]):
            total += places[p]
    return total


@njit(error_model="numpy")
def put(places: Any, w: Any, own: Any, c: Any, value: Any) -> None:
    """The same number at all places of a channel."""
    if w[UNIFORM] or w[FOLD] * w[SIZE] == 1:
        places[c] = value
        return
    for r in range(w[FOLD]):
        start = (r * own + c) * w[SIZE]
        for p in range(start, start + w[SIZE]):
            places[p] = value


@njit(error_model="numpy", fastmath=_LANES)
def part_sum(x: Any) -> Any:
    total = ZERO
    for p in range(len(x)):
        total += widen(x[p])
    return total


@njit(error_model="numpy", fastmath=_LANES)
def part_squares(x: Any, mean: Any) -> Any:
    total = ZERO
    for p in range(len(x)):
        d = widen(x[p]) - mean
        total += d * d
    return total


@njit(error_model="numpy")
def plane_sum(x: Any) -> Any:
    total = 0.0
    for start in range(0, len(x), PART):
        total += part_sum(x[start : start + PART])
    return total


@njit(error_model="numpy")
def plane_squares(x: Any, mean: Any) -> Any:
    total = 0.0
    for start in range(0, len(x), PART):
        total += part_squares(x[start : start + PART], mean)
    return total


@njit(error_model="numpy")
def wide_total(w: Any, j: Any, i: Any, c: Any) -> Any:
    """A channel's sum over a chunk in float64, for one that is too large for the dtype of the sums."""
    low, high, _ = span(w, i)
    own, total = min(w[BLOCK], w[CHANNELS] - j * w[BLOCK]), 0.0
    for s in range(low, high):
        x = strip(w, w[SOURCE], j, s)
        for start in range(c * w[SIZE], len(x), own * w[SIZE]):
            for p in range(start, start + w[SIZE]):
                total += widen(x[p])
    return total


@njit(error_model="numpy")
def add_moments(w: Any, sums: Any, mean: Any, moments: Any, j: Any, i: Any) -> None:
    """Mean and squared deviations of a chunk, (4.79) and (4.80)."""
    low, high, count = span(w, i)
    first = j * w[BLOCK]
    own = min(w[BLOCK], w[CHANNELS] - first)
    if w[UNIFORM]:
        moments[i, :, first : first + own] = 0.0
        for s in range(low, high):
            x = strip(w, w[SOURCE], j, s)
            for c in range(own):
                moments[i, 0, first + c] += plane_sum(plane(w, x, c))
        for c in range(own):
            if not math.isfinite(moments[i, 0, first + c]):
                moments[i, 0, first + c] = wide_total(w, j, i, c)
            moments[i, 0, first + c] /= count
        for s in range(low, high):
            x = strip(w, w[SOURCE], j, s)
            for c in range(own):
                moments[i, 1, first + c] += plane_squares(plane(w, x, c), REAL(moments[i, 0, first + c]))
        return
    sums[:] = ZERO
    for s in range(low, high):
        x = strip(w, w[SOURCE], j, s)
        for p in range(len(x)):
            sums[p] += widen(x[p])
    for c in range(own):
        total = total_of(sums, w, own, c)
        moments[i, 0, first + c] = (total if math.isfinite(total) else wide_total(w, j, i, c)) / count
        put(mean, w, own, c, REAL(moments[i, 0, first + c]))
    sums[:] = ZERO
    for s in range(low, high):
        x = strip(w, w[SOURCE], j, s)
        for p in range(len(x)):
            d = widen(x[p]) - mean[p]
            sums[p] += d * d
    for c in range(own):
        moments[i, 1, first + c] = total_of(sums, w, own, c)


@njit(error_model="numpy")
def joined(w: Any, moments: Any, c: Any) -> Any:
    """Mean and variance of a channel from those of its chunks."""
    total, count = w[ROWS] * w[SIZE], w[STRIPS] * w[FOLD] * w[SIZE]
    last = w[CHUNKS] - 1
    rest = total - last * count
    mean = moments[last, 0, c] * (rest / total)
    for i in range(last):
        mean += moments[i, 0, c] * (count / total)
    d = moments[last, 0, c] - mean
    squares = moments[last, 1, c] + rest * d * d
    for i in range(last):
        d = moments[i, 0, c] - mean
        squares += moments[i, 1, c] + count * d * d
    return mean, squares / total


@njit(error_model="numpy")
def normalize_plane(x: Any, y: Any, mean: Any, scale: Any, shift: Any, relu: Any) -> None:
    if relu:
        for p in range(len(x)):
            v = (widen(x[p]) - mean) * scale + shift
            y[p] = narrow(ZERO if v <= ZERO else v)
    else:
        for p in range(len(x)):
            y[p] = narrow((widen(x[p]) - mean) * scale + shift)


@njit(error_model="numpy")
def normalize(w: Any, mean: Any, scale: Any, shift: Any, j: Any, i: Any) -> None:
    low, high, _ = span(w, i)
    for s in range(low, high):
        x, y = strip(w, w[SOURCE], j, s), strip(w, w[OUTPUT], j, s)
        if w[UNIFORM]:
            for c in range(len(x) // w[SIZE]):
                normalize_plane(plane(w, x, c), plane(w, y, c), mean[c], scale[c], shift[c], w[RELU])
        elif w[RELU]:
            for p in range(len(x)):
                v = (widen(x[p]) - mean[p]) * scale[p] + shift[p]
                y[p] = narrow(ZERO if v <= ZERO else v)
        else:
            for p in range(len(x)):
                y[p] = narrow((widen(x[p]) - mean[p]) * scale[p] + shift[p])


@njit(inline="always")
def scratch(w: Any, rows: Any) -> Any:
    """This thread's places, ``rows`` numbers each."""
    own = take(w[COUNTER] + 8) * rows * w[PLACES] * REAL_BYTES
    return carray(pointer(w[SCRATCH] + own), (rows, w[PLACES]), REAL)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def forward(task: Any) -> None:
    """Mean, variance and output; where the statistics are fixed, the output alone."""
    w = carray(task, (WORDS,), np.int64)
    eps = carray(task, (WORDS,), np.float64)[EPS]
    means, variances, weight, bias = vector(w, MEANS), vector(w, VARIANCES), vector(w, WEIGHT), vector(w, BIAS)
    moments = carray(pointer(w[PARTIALS]), (w[CHUNKS], 2, w[CHANNELS]), np.float64)
    places = scratch(w, FORWARD_ROWS)
    sums, mean, scale, shift = places[0], places[1], places[2], places[3]
    settled = -1
    while True:
        t = take(w[COUNTER])
        if t >= w[TASKS]:
            return
        j, i = t // w[CHUNKS], t % w[CHUNKS]
        if w[PHASES] & COLLECT:
            add_moments(w, sums, mean, moments, j, i)
        if not w[PHASES] & APPLY:
            continue
        first = j * w[BLOCK]
        own = min(w[BLOCK], w[CHANNELS] - first)
        if j != settled:
            settled = j
            for c in range(own):
                k = first + c
                if not w[FIXED]:
                    m, v = joined(w, moments, k)
                    means[k], variances[k] = REAL(m), REAL(v)
                put(mean, w, own, c, means[k])
                put(scale, w, own, c, REAL(float(weight[k]) / math.sqrt(float(variances[k]) + eps)))
                put(shift, w, own, c, bias[k])
        normalize(w, mean, scale, shift, j, i)


@njit(error_model="numpy", fastmath=_LANES)
def part_error_sums(g: Any, x: Any, y: Any, mean: Any, relu: Any) -> Any:
    total, total_centred = ZERO, ZERO
    if relu:
        for p in range(len(x)):
            e = ZERO if widen(y[p]) <= ZERO else widen(g[p])
            total += e
            total_centred += e * (widen(x[p]) - mean)
    else:
        for p in range(len(x)):
            total += widen(g[p])
            total_centred += widen(g[p]) * (widen(x[p]) - mean)
    return total, total_centred


@njit(error_model="numpy")
def plane_error_sums(g: Any, x: Any, y: Any, mean: Any, relu: Any) -> Any:
    total, total_centred = 0.0, 0.0
    for start in range(0, len(x), PART):
        end = start + PART
        sums = part_error_sums(g[start:end], x[start:end], y[start:end], mean, relu)
        total += sums[0]
        total_centred += sums[1]
    return total, total_centred


@njit(error_model="numpy")
def add_errors(w: Any, one: Any, two: Any, mean: Any, sums: Any, j: Any, i: Any) -> None:
    """The sums of g and g (x - mean) over a chunk."""
    low, high, _ = span(w, i)
    first = j * w[BLOCK]
    own = min(w[BLOCK], w[CHANNELS] - first)
    if w[UNIFORM]:
        sums[i, :, first : first + own] = 0.0
    else:
        one[:] = ZERO
        two[:] = ZERO
    for s in range(low, high):
        g, x, y = strip(w, w[ERRORS], j, s), strip(w, w[SOURCE], j, s), strip(w, w[OUTPUT], j, s)
        if w[UNIFORM]:
            for c in range(own):
                planes = plane(w, g, c), plane(w, x, c), plane(w, y, c)
                total, total_centred = plane_error_sums(*planes, mean[c], w[RELU])
                sums[i, 0, first + c] += total
                sums[i, 1, first + c] += total_centred
        elif w[RELU]:
            for p in range(len(x)):
                e = ZERO if widen(y[p]) <= ZERO else widen(g[p])
                one[p] += e
                two[p] += e * (widen(x[p]) - mean[p])
        else:
            for p in range(len(x)):
                one[p] += widen(g[p])
                two[p] += widen(g[p]) * (widen(x[p]) - mean[p])
    if not w[UNIFORM]:
        for c in range(own):
            sums[i, 0, first + c], sums[i, 1, first + c] = total_of(one, w, own, c), total_of(two, w, own, c)


@njit(error_model="numpy")
def scale_strip(g: Any, y: Any, d: Any, scale: Any, step: Any, relu: Any) -> None:
    """The gradient of the input where the statistics are fixed; ``step`` is 0 for a single factor."""
    if relu:
        for p in range(len(d)):
            e = ZERO if widen(y[p]) <= ZERO else widen(g[p])
            d[p] = narrow(e * scale[p * step])
    else:
        for p in range(len(d)):
            d[p] = narrow(widen(g[p]) * scale[p * step])


@njit(error_model="numpy")
def plane_gradient(g: Any, x: Any, y: Any, d: Any, mean: Any, scale: Any, slope: Any, offset: Any, relu: Any) -> None:
    if relu:
        for p in range(len(d)):
            e = ZERO if widen(y[p]) <= ZERO else widen(g[p])
            d[p] = narrow(e * scale + ((widen(x[p]) - mean) * slope + offset))
    else:
        for p in range(len(d)):
            d[p] = narrow(widen(g[p]) * scale + ((widen(x[p]) - mean) * slope + offset))


@njit(error_model="numpy")
def gradient(w: Any, mean: Any, scale: Any, slope: Any, offset: Any, j: Any, i: Any) -> None:
    """(4.88) over a chunk."""
    low, high, _ = span(w, i)
    for s in range(low, high):
        g, x, y = strip(w, w[ERRORS], j, s), strip(w, w[SOURCE], j, s), strip(w, w[OUTPUT], j, s)
        d = strip(w, w[TARGET], j, s)
        if w[UNIFORM]:
            for c in range(len(d) // w[SIZE]):
                k = plane(w, g, c), plane(w, x, c), plane(w, y, c), plane(w, d, c)
                if w[FIXED]:
                    scale_strip(k[0], k[2], k[3], scale[c : c + 1], 0, w[RELU])
                else:
                    plane_gradient(*k, mean[c], scale[c], slope[c], offset[c], w[RELU])
        elif w[FIXED]:
            scale_strip(g, y, d, scale, 1, w[RELU])
        elif w[RELU]:
            for p in range(len(d)):
                e = ZERO if widen(y[p]) <= ZERO else widen(g[p])
                d[p] = narrow(e * scale[p] + ((widen(x[p]) - mean[p]) * slope[p] + offset[p]))
        else:
            for p in range(len(d)):
                d[p] = narrow(widen(g[p]) * scale[p] + ((widen(x[p]) - mean[p]) * slope[p] + offset[p]))


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def backward(task: Any) -> None:
    """The chain (4.83-4.94), as :class:`reimpl.functional._norm.chain.Chain` derives it."""
    w = carray(task, (WORDS,), np.int64)
    eps = carray(task, (WORDS,), np.float64)[EPS]
    means, variances, weight = vector(w, MEANS), vector(w, VARIANCES), vector(w, WEIGHT)
    grad_means, grad_variances = vector(w, GRAD_MEANS), vector(w, GRAD_VARIANCES)
    sums = carray(pointer(w[PARTIALS]), (w[CHUNKS], 2, w[CHANNELS]), np.float64)
    places = scratch(w, BACKWARD_ROWS)
    one, two, mean, scale, slope, offset = places[0], places[1], places[2], places[3], places[4], places[5]
    count = w[ROWS] * w[SIZE]
    settled = -1
    while True:
        t = take(w[COUNTER])
        if t >= w[TASKS]:
            return
        j, i = t // w[CHUNKS], t % w[CHUNKS]
        first = j * w[BLOCK]
        own = min(w[BLOCK], w[CHANNELS] - first)
        if j != settled:
            for c in range(own):
                put(mean, w, own, c, means[first + c])
        if w[PHASES] & COLLECT:
            add_errors(w, one, two, mean, sums, j, i)
        if w[PHASES] & APPLY and j != settled:
            for c in range(own):
                k = first + c
                s = 1.0 / math.sqrt(float(variances[k]) + eps)
                factor = s * float(weight[k])
                put(scale, w, own, c, REAL(factor))
                if not w[FIXED]:
                    sum_g, sum_g_centred = 0.0, 0.0
                    for n in range(w[CHUNKS]):
                        sum_g += sums[n, 0, k]
                        sum_g_centred += sums[n, 1, k]
                    to_var = float(grad_variances[k]) - 0.5 * factor * s * s * sum_g_centred
                    to_mean = float(grad_means[k]) - factor * sum_g
                    put(slope, w, own, c, REAL(to_var * 2.0 / count))
                    put(offset, w, own, c, REAL(to_mean / count))
        settled = j
        if w[PHASES] & APPLY:
            gradient(w, mean, scale, slope, offset, j, i)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def move_averages(task: Any) -> None:
    """The running averages moved towards the batch's mean and its variance, divided by the number of values less 1."""
    w = carray(task, (WORDS,), np.int64)
    momentum = carray(task, (WORDS,), np.float64)[MOMENTUM]
    means, variances = vector(w, MEANS), vector(w, VARIANCES)
    running_means, running_variances = vector(w, FIRST), vector(w, SECOND)
    count = w[ROWS] * w[SIZE]
    corrected = momentum * (count / (count - 1))
    for c in range(w[CHANNELS]):
        running_means[c] = REAL((1.0 - momentum) * running_means[c] + momentum * means[c])
        running_variances[c] = REAL((1.0 - momentum) * running_variances[c] + corrected * variances[c])


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def add_up(task: Any) -> None:
    """The sums of g and g (x - mean) over all chunks, the second one times 1 / sqrt(var + eps) where ``SCALED``."""
    w = carray(task, (WORDS,), np.int64)
    eps = carray(task, (WORDS,), np.float64)[EPS]
    sums = carray(pointer(w[PARTIALS]), (w[CHUNKS], 2, w[CHANNELS]), np.float64)
    variances = vector(w, VARIANCES)
    for c in range(w[CHANNELS]):
        sum_g, sum_g_centred = 0.0, 0.0
        for i in range(w[CHUNKS]):
            sum_g += sums[i, 0, c]
            sum_g_centred += sums[i, 1, c]
        if w[SECOND]:
            s = REAL(1) / np.sqrt(variances[c] + REAL(eps)) if w[SCALED] else REAL(1)
            vector(w, SECOND)[c] = s * REAL(sum_g_centred)
        if w[FIRST]:
            vector(w, FIRST)[c] = REAL(sum_g)
