"""Softmax, its logarithm and cross-entropy as Numba compiles them: a block that stays in the cache at a time.

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._losses.numba`; threads share
the blocks by taking numbers from the counter in it. The classes lie either next to each other (rows; blocks of several
rows where they are short, so that whole registers work on them) or a plane apart (blocks of columns).
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.functional._losses.numba_math import (
    block_of,
    exp_of_negative,
    exps,
    floats,
    largest_of_columns,
    log_of_positive,
    sample_weight,
    shift,
    to_exps,
    total,
    total_of_exps,
    total_of_products,
)
from reimpl.optim._numba_ops import pointer, take

# What is wanted; and the rows below which several are worked on as one.
_SOFTMAX, _LOG_SOFTMAX = 0, 1
_SHORT = 32
# How a loss is smoothed: not at all, alike over the classes, or by their weights.
_BARE, _EVEN, _WEIGHTED = 0, 1, 2


@njit(error_model="numpy")
def softmax_rows(source: Any, result: Any, scratch: Any, n: Any, c: Any, mode: Any) -> None:
    for r in range(n):
        shift(floats(source + r * c * 4, c), floats(result + r * c * 4, c), c)
    y = floats(result, n * c)
    if mode == _SOFTMAX:
        to_exps(y, n * c)
    elif c < _SHORT:
        exps(y, scratch, n * c)
    for r in range(n):
        y = floats(result + r * c * 4, c)
        if mode == _SOFTMAX:
            s = total(y, c)
            for i in range(c):
                y[i] /= s
        else:
            s = total(scratch[r * c :], c) if c < _SHORT else total_of_exps(y, c)
            s = log_of_positive(s)
            for i in range(c):
                y[i] -= s


@njit(error_model="numpy")
def softmax_columns(source: Any, result: Any, scratch: Any, n: Any, c: Any, step: Any, mode: Any) -> None:
    largest, sums = scratch[:n], scratch[n : 2 * n]
    largest_of_columns(source, largest, n, c, step)
    for j in range(n):
        sums[j] = np.float32(0.0)
    for k in range(c):
        x, y = floats(source + k * step, n), floats(result + k * step, n)
        for j in range(n):
            v = x[j] - largest[j]
            e = exp_of_negative(v)
            sums[j] += e
            y[j] = e if mode == _SOFTMAX else v
    if mode != _SOFTMAX:
        for j in range(n):
            sums[j] = log_of_positive(sums[j])
    for k in range(c):
        y = floats(result + k * step, n)
        if mode == _SOFTMAX:
            for j in range(n):
                y[j] /= sums[j]
        else:
            for j in range(n):
                y[j] -= sums[j]


@njit(error_model="numpy")
def powers_of_rows(source: Any, result: Any, facts: Any, n: Any, c: Any, weight: Any, mode: Any) -> None:
    """Of each row the exponentials of what lies below its maximum; the maximum, their sum and, for smoothing, the
    (weighted) sum of the exponents."""
    for r in range(n):
        x, y = floats(source + r * c * 4, c), floats(result + r * c * 4, c)
        facts[r] = shift(x, y, c)
        if mode != _BARE:
            facts[2 * n + r] = total_of_products(y, weight, c) if mode == _WEIGHTED else total(y, c)
    to_exps(floats(result, n * c), n * c)
    for r in range(n):
        facts[n + r] = total(floats(result + r * c * 4, c), c)


@njit(error_model="numpy")
def powers_of_columns(source: Any, result: Any, facts: Any, n: Any, c: Any, step: Any, weight: Any, mode: Any) -> None:
    """:func:`powers_of_rows` of columns."""
    largest, sums, spreads = facts[:n], facts[n : 2 * n], facts[2 * n : 3 * n]
    largest_of_columns(source, largest, n, c, step)
    for j in range(n):
        sums[j] = np.float32(0.0)
        spreads[j] = np.float32(0.0)
    for k in range(c):
        x, y = floats(source + k * step, n), floats(result + k * step, n)
        for j in range(n):
            e = exp_of_negative(x[j] - largest[j])
            sums[j] += e
            y[j] = e
        if mode != _BARE:
            own = weight[k] if mode == _WEIGHTED else np.float32(1.0)
            for j in range(n):
                spreads[j] += (x[j] - largest[j]) * own


@njit(error_model="numpy")
def normalise(result: Any, sums: Any, n: Any, c: Any, inner: Any) -> None:
    """Exponentials to probabilities, and their sums to logarithms of them."""
    if inner == 1:
        for r in range(n):
            y, scale = floats(result + r * c * 4, c), np.float32(1.0) / sums[r]
            for k in range(c):
                y[k] *= scale
    else:
        for k in range(c):
            y = floats(result + k * inner * 4, n)
            for j in range(n):
                y[j] /= sums[j]
    for j in range(n):
        sums[j] = log_of_positive(sums[j])


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def forward(task: Any) -> None:
    """Softmax or its logarithm."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks, mode = w[0], w[3], w[4], w[5], w[6], w[7], w[8]
    source, result = w[9], w[10]
    room = w[12]
    scratch = floats(w[11] + take(counter + 8) * room * 4, room)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at = (first * c * inner + column) * 4
        if inner == 1:
            softmax_rows(source + at, result + at, scratch, n, c, mode)
        else:
            softmax_columns(source + at, result + at, scratch, n, c, inner * 4, mode)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def loss_forward(task: Any) -> None:
    """Each sample's loss and probabilities, and sums over the block."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks = w[0], w[3], w[4], w[5], w[6], w[7]
    source, result = w[9], w[10]
    room = w[12]
    facts = floats(w[11] + take(counter + 8) * room * 4, room)
    targets = carray(pointer(w[13]), (outer * inner,), np.int64)
    weight, has_weight, ignore = floats(w[14], c), w[14] != 0, w[15]
    smoothing = carray(task, (32,), np.float64)[16]
    losses, write = floats(w[17], outer * inner), w[17] != 0
    sums = carray(pointer(w[18]), (3 * tasks,), np.float64)
    mode = _BARE if smoothing == 0 else _WEIGHTED if has_weight else _EVEN
    all_weights = float(total(weight, c)) if has_weight else float(c)
    # steps in bytes from sample to sample, and from class to class
    sample, step = (c * 4, 4) if inner == 1 else (4, inner * 4)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at = (first * c * inner + column) * 4
        if inner == 1:
            powers_of_rows(source + at, result + at, facts, n, c, weight, mode)
        else:
            powers_of_columns(source + at, result + at, facts, n, c, step, weight, mode)
        normalise(result + at, facts[n : 2 * n], n, c, inner)
        loss_sum: Any = 0.0
        weight_sum: Any = 0.0
        rest_sum: Any = 0.0
        for j in range(n):
            index = first * inner + column + j
            target = targets[index]
            factor = sample_weight(target, c, weight, has_weight, ignore)
            loss: Any = 0.0
            rest: Any = 0.0
            if target != ignore:
                if target < 0 or target >= c:
                    w[19] = 1
                    continue
                at_target = floats(source + at + j * sample + target * step, 1)[0]
                loss = float(factor * (facts[n + j] - (at_target - facts[j])))
                if mode != _BARE:
                    loss *= 1 - smoothing
                    rest = smoothing / c * (all_weights * facts[n + j] - facts[2 * n + j])
            if write:
                losses[index] = loss + rest
            loss_sum += loss
            rest_sum += rest
            weight_sum += factor
        sums[2 * number] = loss_sum
        sums[2 * number + 1] = weight_sum
        if smoothing != 0:
            sums[2 * tasks + number] = rest_sum


@njit(error_model="numpy")
def backward_rows(errors: Any, output: Any, result: Any, n: Any, c: Any, mode: Any) -> None:
    if mode == _LOG_SOFTMAX:
        exps(floats(output, n * c), floats(result, n * c), n * c)
    for r in range(n):
        at = r * c * 4
        g, y, d = floats(errors + at, c), floats(output + at, c), floats(result + at, c)
        if mode == _SOFTMAX:
            s = total_of_products(g, y, c)
            for i in range(c):
                d[i] = (g[i] - s) * y[i]
        else:
            s = total(g, c)
            for i in range(c):
                d[i] = g[i] - d[i] * s


@njit(error_model="numpy")
def backward_columns(errors: Any, output: Any, result: Any, sums: Any, n: Any, c: Any, step: Any, mode: Any) -> None:
    for j in range(n):
        sums[j] = np.float32(0.0)
    for k in range(c):
        g, y = floats(errors + k * step, n), floats(output + k * step, n)
        if mode == _SOFTMAX:
            for j in range(n):
                sums[j] += g[j] * y[j]
        else:
            for j in range(n):
                sums[j] += g[j]
    for k in range(c):
        g, y, d = floats(errors + k * step, n), floats(output + k * step, n), floats(result + k * step, n)
        if mode == _SOFTMAX:
            for j in range(n):
                d[j] = (g[j] - sums[j]) * y[j]
        else:
            for j in range(n):
                d[j] = g[j] - exp_of_negative(y[j]) * sums[j]


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def finish(task: Any) -> None:
    """The sum of the blocks' losses or, over the sum of their weights, the mean; and what it was divided by."""
    w = carray(task, (5,), np.int64)
    tasks, mean, in_two = w[1], w[3] & 1, w[3] & 2
    sums = carray(pointer(w[0]), ((3 if in_two else 2) * tasks,), np.float64)
    total: Any = 0.0
    weights: Any = 0.0
    rest: Any = 0.0
    for i in range(tasks):
        total += sums[2 * i]
        weights += sums[2 * i + 1]
        if in_two:
            rest += sums[2 * tasks + i]
    divisor = weights if mean else 1.0
    loss = total / divisor
    if in_two:
        # each by itself: where the weights' sum is 0, the one mean is NaN and the other infinite
        loss += rest / divisor
    carray(pointer(w[2]), (1,), np.float32)[0] = loss
    carray(task, (5,), np.float64)[4] = divisor


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def backward(task: Any) -> None:
    """The gradient of the input of softmax or its logarithm."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks, mode = w[0], w[3], w[4], w[5], w[6], w[7], w[8]
    errors, output, result = w[9], w[10], w[13]
    room = w[12]
    scratch = floats(w[11] + take(counter + 8) * room * 4, room)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at = (first * c * inner + column) * 4
        if inner == 1:
            backward_rows(errors + at, output + at, result + at, n, c, mode)
        else:
            backward_columns(errors + at, output + at, result + at, scratch, n, c, inner * 4, mode)


@njit(error_model="numpy")
def row_back(y: Any, d: Any, c: Any, whole: Any, each: Any, weight: Any, mode: Any) -> None:
    if mode == _WEIGHTED:
        for k in range(c):
            d[k] = y[k] * whole - weight[k] * each
    else:
        for k in range(c):
            d[k] = y[k] * whole - each


@njit(error_model="numpy")
def column_back(y: Any, d: Any, n: Any, factors: Any, own: Any, mode: Any) -> None:
    if mode == _BARE:
        for j in range(n):
            d[j] = y[j] * factors[j]
    else:
        for j in range(n):
            d[j] = y[j] * factors[j] - own * factors[n + j]


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def loss_backward(task: Any) -> None:
    """The gradient of the logits: :math:`\\hat y \\sum_c w_c q_c - w \\odot q`, times the loss's."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks = w[0], w[3], w[4], w[5], w[6], w[7]
    output, result = w[9], w[10]
    room = w[12]
    factors = floats(w[11] + take(counter + 8) * room * 4, room)
    targets = carray(pointer(w[13]), (outer * inner,), np.int64)
    weight, has_weight, ignore = floats(w[14], c), w[14] != 0, w[15]
    numbers = carray(task, (32,), np.float64)
    smoothing, divisor = numbers[16], np.float32(numbers[19])
    grads, one_each = floats(w[17], outer * inner), w[18]
    mode = _BARE if smoothing == 0 else _WEIGHTED if has_weight else _EVEN
    all_weights = float(total(weight, c)) if has_weight else float(c)
    sample, step = (c * 4, 4) if inner == 1 else (4, inner * 4)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at = (first * c * inner + column) * 4
        start = first * inner + column
        for j in range(n):
            target = targets[start + j]
            g = np.float32(0.0) if target == ignore else grads[(start + j) * one_each] / divisor
            own = sample_weight(target, c, weight, has_weight, ignore)
            at_target = g * np.float32((1 - smoothing) * own)
            factors[j] = at_target + g * np.float32(smoothing / c * all_weights)
            factors[n + j] = g * np.float32(smoothing / c)
            factors[2 * n + j] = at_target
        for k in range(n if inner == 1 else c):
            place = at + k * (c if inner == 1 else inner) * 4
            y, d = floats(output + place, c if inner == 1 else n), floats(result + place, c if inner == 1 else n)
            if inner == 1:
                row_back(y, d, c, factors[k], factors[n + k], weight, mode)
            else:
                own = np.float32(1.0) if mode != _WEIGHTED else weight[k]
                column_back(y, d, n, factors, own, mode)
        for j in range(n):
            target = targets[start + j]
            if target != ignore:
                floats(result + at + j * sample + target * step, 1)[0] -= factors[2 * n + j]
