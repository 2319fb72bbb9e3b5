"""Batch normalisation as Numba compiles it: a channel at a time, so that its planes stay in the cache between passes.

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._norm_numba`; threads share the
channels by taking numbers from the counter in it. Sums within a plane are taken in float32 by whole registers, sums
over planes in float64. Small planes go block by block instead, many channels at a time: each place of the block is
summed over the images in float32, and the places of a channel in float64.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.optim._numba_ops import pointer, take

# reassociation lets a sum run in several lanes; NaN and infinities keep their meaning
_LANES = {"reassoc", "contract", "nsz"}


@njit(error_model="numpy", fastmath=_LANES)
def plane_sum(x: Any, n: Any) -> Any:
    total = np.float32(0.0)
    for i in range(n):
        total += x[i]
    return total


@njit(error_model="numpy", fastmath=_LANES)
def plane_squares(x: Any, n: Any, mean: Any) -> Any:
    total = np.float32(0.0)
    for i in range(n):
        d = x[i] - mean
        total += d * d
    return total


@njit(error_model="numpy")
def normalize_plane(x: Any, y: Any, n: Any, mean: Any, scale: Any, shift: Any, relu: Any) -> None:
    if relu:
        for i in range(n):
            v = (x[i] - mean) * scale + shift
            y[i] = np.float32(0.0) if v <= np.float32(0.0) else v
    else:
        for i in range(n):
            y[i] = (x[i] - mean) * scale + shift


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def forward(task: Any) -> None:
    """Mean, variance and output of each channel, (4.79) and (4.80)."""
    w = carray(task, (16,), np.int64)
    counter, channels, count, size, relu = w[0], w[1], w[2], w[3], w[4]
    numbers = carray(task, (16,), np.float64)
    eps = numbers[5]
    source, target = w[6], w[7]
    weight = carray(pointer(w[8]), (channels,), np.float32)
    bias = carray(pointer(w[9]), (channels,), np.float32)
    means = carray(pointer(w[10]), (channels,), np.float32)
    variances = carray(pointer(w[11]), (channels,), np.float32)
    has_weight, has_bias = w[12], w[13]
    step = channels * size * 4
    while True:
        c = take(counter)
        if c >= channels:
            return
        start = source + c * size * 4
        total = 0.0
        for n in range(count):
            total += plane_sum(carray(pointer(start + n * step), (size,), np.float32), size)
        mean = np.float32(total / (count * size))
        total = 0.0
        for n in range(count):
            total += plane_squares(carray(pointer(start + n * step), (size,), np.float32), size, mean)
        var = np.float32(total / (count * size))
        means[c], variances[c] = mean, var
        scale = 1.0 / math.sqrt(float(var) + eps)
        if has_weight:
            scale *= float(weight[c])
        shift = bias[c] if has_bias else np.float32(0.0)
        for n in range(count):
            x = carray(pointer(start + n * step), (size,), np.float32)
            y = carray(pointer(target + c * size * 4 + n * step), (size,), np.float32)
            normalize_plane(x, y, size, mean, np.float32(scale), shift, relu)


@njit(error_model="numpy", fastmath=_LANES)
def error_sums(g: Any, x: Any, y: Any, n: Any, mean: Any, relu: Any) -> Any:
    total = np.float32(0.0)
    total_centred = np.float32(0.0)
    if relu:
        for i in range(n):
            e = np.float32(0.0) if y[i] <= np.float32(0.0) else g[i]
            total += e
            total_centred += e * (x[i] - mean)
    else:
        for i in range(n):
            total += g[i]
            total_centred += g[i] * (x[i] - mean)
    return total, total_centred


@njit(error_model="numpy")
def error_plane(
    g: Any, x: Any, y: Any, d: Any, n: Any, mean: Any, scale: Any, slope: Any, offset: Any, relu: Any
) -> None:
    if relu:
        for i in range(n):
            e = np.float32(0.0) if y[i] <= np.float32(0.0) else g[i]
            d[i] = e * scale + ((x[i] - mean) * slope + offset)
    else:
        for i in range(n):
            d[i] = g[i] * scale + ((x[i] - mean) * slope + offset)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def backward(task: Any) -> None:
    """The chain (4.83-4.94), channel by channel, as :class:`reimpl.functional.normalization.Chain` derives it."""
    w = carray(task, (24,), np.int64)
    counter, channels, count, size, relu = w[0], w[1], w[2], w[3], w[4]
    eps = carray(task, (24,), np.float64)[5]
    errors, source, output, target = w[6], w[7], w[8], w[9]
    weight = carray(pointer(w[10]), (channels,), np.float32)
    has_weight = w[11]
    means = carray(pointer(w[12]), (channels,), np.float32)
    variances = carray(pointer(w[13]), (channels,), np.float32)
    grad_means = carray(pointer(w[14]), (channels,), np.float32)
    grad_variances = carray(pointer(w[15]), (channels,), np.float32)
    sums = carray(pointer(w[16]), (channels,), np.float32)
    sums_centred = carray(pointer(w[17]), (channels,), np.float32)
    wanted = w[18]
    step = channels * size * 4
    while True:
        c = take(counter)
        if c >= channels:
            return
        first = c * size * 4
        mean = means[c]
        sum_g = 0.0
        sum_g_centred = 0.0
        for n in range(count):
            at = first + n * step
            g = carray(pointer(errors + at), (size,), np.float32)
            x = carray(pointer(source + at), (size,), np.float32)
            y = carray(pointer(output + at), (size,), np.float32)
            one, two = error_sums(g, x, y, size, mean, relu)
            sum_g += one
            sum_g_centred += two
        sums[c], sums_centred[c] = np.float32(sum_g), np.float32(sum_g_centred)
        if not wanted:
            continue
        s = 1.0 / math.sqrt(float(variances[c]) + eps)
        scale = s * float(weight[c]) if has_weight else s
        to_var = float(grad_variances[c]) - 0.5 * scale * s * s * sum_g_centred
        to_mean = float(grad_means[c]) - scale * sum_g
        slope, offset = np.float32(to_var * 2.0 / (count * size)), np.float32(to_mean / (count * size))
        for n in range(count):
            at = first + n * step
            g = carray(pointer(errors + at), (size,), np.float32)
            x = carray(pointer(source + at), (size,), np.float32)
            y = carray(pointer(output + at), (size,), np.float32)
            d = carray(pointer(target + at), (size,), np.float32)
            error_plane(g, x, y, d, size, mean, np.float32(scale), slope, offset, relu)


@njit(error_model="numpy")
def spread(values: Any, size: Any, value: Any, c: Any) -> None:
    """The same number at all places of a channel."""
    for i in range(c * size, (c + 1) * size):
        values[i] = value


@njit(error_model="numpy")
def channel_sum(values: Any, size: Any, c: Any) -> Any:
    total = 0.0
    for i in range(c * size, (c + 1) * size):
        total += values[i]
        values[i] = np.float32(0.0)
    return total


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def forward_blocks(task: Any) -> None:
    """:func:`forward` for small planes, some channels together."""
    w = carray(task, (18,), np.int64)
    counter, channels, count, size, relu = w[0], w[1], w[2], w[3], w[4]
    eps = carray(task, (18,), np.float64)[5]
    source, target = w[6], w[7]
    weight = carray(pointer(w[8]), (channels,), np.float32)
    bias = carray(pointer(w[9]), (channels,), np.float32)
    means = carray(pointer(w[10]), (channels,), np.float32)
    variances = carray(pointer(w[11]), (channels,), np.float32)
    has_weight, has_bias, scratch, block = w[12], w[13], w[14], w[15]
    step = channels * size * 4
    while True:
        first = take(counter) * block
        if first >= channels:
            return
        own = min(block, channels - first)
        n_own = own * size
        places = carray(pointer(scratch + 4 * first * 4 * size), (4, n_own), np.float32)
        sums, mean, scale, shift = places[0], places[1], places[2], places[3]
        for i in range(n_own):
            sums[i] = np.float32(0.0)
        for n in range(count):
            x = carray(pointer(source + first * size * 4 + n * step), (n_own,), np.float32)
            for i in range(n_own):
                sums[i] += x[i]
        for c in range(own):
            means[first + c] = np.float32(channel_sum(sums, size, c) / (count * size))
            spread(mean, size, means[first + c], c)
        for n in range(count):
            x = carray(pointer(source + first * size * 4 + n * step), (n_own,), np.float32)
            for i in range(n_own):
                d = x[i] - mean[i]
                sums[i] += d * d
        for c in range(own):
            var = np.float32(channel_sum(sums, size, c) / (count * size))
            variances[first + c] = var
            factor = 1.0 / math.sqrt(float(var) + eps)
            if has_weight:
                factor *= float(weight[first + c])
            spread(scale, size, np.float32(factor), c)
            spread(shift, size, bias[first + c] if has_bias else np.float32(0.0), c)
        for n in range(count):
            x = carray(pointer(source + first * size * 4 + n * step), (n_own,), np.float32)
            y = carray(pointer(target + first * size * 4 + n * step), (n_own,), np.float32)
            if relu:
                for i in range(n_own):
                    v = (x[i] - mean[i]) * scale[i] + shift[i]
                    y[i] = np.float32(0.0) if v <= np.float32(0.0) else v
            else:
                for i in range(n_own):
                    y[i] = (x[i] - mean[i]) * scale[i] + shift[i]


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def backward_blocks(task: Any) -> None:
    """:func:`backward` for small planes, some channels together."""
    w = carray(task, (24,), np.int64)
    counter, channels, count, size, relu = w[0], w[1], w[2], w[3], w[4]
    eps = carray(task, (24,), np.float64)[5]
    errors, source, output, target = w[6], w[7], w[8], w[9]
    weight = carray(pointer(w[10]), (channels,), np.float32)
    has_weight = w[11]
    means = carray(pointer(w[12]), (channels,), np.float32)
    variances = carray(pointer(w[13]), (channels,), np.float32)
    grad_means = carray(pointer(w[14]), (channels,), np.float32)
    grad_variances = carray(pointer(w[15]), (channels,), np.float32)
    sums = carray(pointer(w[16]), (channels,), np.float32)
    sums_centred = carray(pointer(w[17]), (channels,), np.float32)
    wanted, scratch, block = w[18], w[19], w[20]
    step = channels * size * 4
    while True:
        first = take(counter) * block
        if first >= channels:
            return
        own = min(block, channels - first)
        n_own = own * size
        places = carray(pointer(scratch + 5 * first * 4 * size), (5, n_own), np.float32)
        one, two, mean, scale, slope = places[0], places[1], places[2], places[3], places[4]
        for i in range(n_own):
            one[i] = np.float32(0.0)
            two[i] = np.float32(0.0)
        for c in range(own):
            spread(mean, size, means[first + c], c)
        for n in range(count):
            at = first * size * 4 + n * step
            g = carray(pointer(errors + at), (n_own,), np.float32)
            x = carray(pointer(source + at), (n_own,), np.float32)
            y = carray(pointer(output + at), (n_own,), np.float32)
            if relu:
                for i in range(n_own):
                    e = np.float32(0.0) if y[i] <= np.float32(0.0) else g[i]
                    one[i] += e
                    two[i] += e * (x[i] - mean[i])
            else:
                for i in range(n_own):
                    one[i] += g[i]
                    two[i] += g[i] * (x[i] - mean[i])
        offset = one
        for c in range(own):
            k = first + c
            sum_g, sum_g_centred = channel_sum(one, size, c), channel_sum(two, size, c)
            sums[k], sums_centred[k] = np.float32(sum_g), np.float32(sum_g_centred)
            s = 1.0 / math.sqrt(float(variances[k]) + eps)
            factor = s * float(weight[k]) if has_weight else s
            to_var = float(grad_variances[k]) - 0.5 * factor * s * s * sum_g_centred
            to_mean = float(grad_means[k]) - factor * sum_g
            spread(scale, size, np.float32(factor), c)
            spread(slope, size, np.float32(to_var * 2.0 / (count * size)), c)
            spread(offset, size, np.float32(to_mean / (count * size)), c)
        if not wanted:
            continue
        for n in range(count):
            at = first * size * 4 + n * step
            g = carray(pointer(errors + at), (n_own,), np.float32)
            x = carray(pointer(source + at), (n_own,), np.float32)
            y = carray(pointer(output + at), (n_own,), np.float32)
            d = carray(pointer(target + at), (n_own,), np.float32)
            if relu:
                for i in range(n_own):
                    e = np.float32(0.0) if y[i] <= np.float32(0.0) else g[i]
                    d[i] = e * scale[i] + ((x[i] - mean[i]) * slope[i] + offset[i])
            else:
                for i in range(n_own):
                    d[i] = g[i] * scale[i] + ((x[i] - mean[i]) * slope[i] + offset[i])
