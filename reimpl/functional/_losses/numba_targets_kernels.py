"""Negative log-likelihood and cross-entropy of class probabilities as Numba compiles them, and their gradients.

The tables of words are written in :mod:`reimpl.functional._losses.numba_targets`; blocks are those of
:mod:`reimpl.functional._losses.numba_kernels`.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.functional._losses.numba_math import (
    block_of,
    exp_of_negative,
    floats,
    largest_of_columns,
    log_of_positive,
    sample_weight,
    shift,
    to_exps,
    total,
)
from reimpl.optim._numba_ops import pointer, take

# reassociation lets a sum run in several lanes; NaN and infinities keep their meaning
_LANES = {"reassoc", "contract", "nsz"}


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def pick(task: Any) -> None:
    """What lies at the classes, and sums over the block."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks = w[0], w[3], w[4], w[5], w[6], w[7]
    source, losses, write = floats(w[9], outer * c * inner), floats(w[10], outer * inner), w[10] != 0
    sums = carray(pointer(w[11]), (2 * tasks,), np.float64)
    targets = carray(pointer(w[13]), (outer * inner,), np.int64)
    weight, has_weight, ignore = floats(w[14], c), w[14] != 0, w[15]
    sample, step = (c, 1) if inner == 1 else (1, inner)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at, start = first * c * inner + column, first * inner + column
        loss_sum: Any = 0.0
        weight_sum: Any = 0.0
        for j in range(n):
            target = targets[start + j]
            loss = np.float32(0.0)
            if target != ignore:
                if target < 0 or target >= c:
                    w[12] = 1
                    continue
                factor = sample_weight(target, c, weight, has_weight, ignore)
                loss = -factor * source[at + j * sample + target * step]
                loss_sum += loss
                weight_sum += factor
            if write:
                losses[start + j] = loss
        sums[2 * number] = loss_sum
        sums[2 * number + 1] = weight_sum


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def scatter(task: Any) -> None:
    """The gradient: 0 but at the classes."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks = w[0], w[3], w[4], w[5], w[6], w[7]
    result, grads, one_each = w[9], floats(w[10], outer * inner), w[11]
    divisor = np.float32(carray(task, (32,), np.float64)[12])
    targets = carray(pointer(w[13]), (outer * inner,), np.int64)
    weight, has_weight, ignore = floats(w[14], c), w[14] != 0, w[15]
    sample, step = (c, 1) if inner == 1 else (1, inner)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at, start = first * c * inner + column, first * inner + column
        for k in range(1 if inner == 1 else c):
            length = n * c if inner == 1 else n
            d = floats(result + (at + k * inner) * 4, length)
            for j in range(length):
                d[j] = np.float32(0.0)
        for j in range(n):
            target = targets[start + j]
            if target != ignore:
                factor = sample_weight(target, c, weight, has_weight, ignore)
                share = -(grads[(start + j) * one_each] / divisor) * factor
                floats(result + (at + j * sample + target * step) * 4, 1)[0] = share


@njit(error_model="numpy")
def wanted(t: Any, own: Any, keep: Any, share: Any) -> Any:
    """A smoothed, weighted probability."""
    return (t * keep + share) * own


@njit(error_model="numpy", fastmath=_LANES)
def total_wanted(t: Any, c: Any, weight: Any, has_weight: Any, keep: Any, share: Any) -> Any:
    s, one = np.float32(0.0), np.float32(1.0)
    if has_weight:
        for k in range(c):
            s += wanted(t[k], weight[k], keep, share)
    else:
        for k in range(c):
            s += wanted(t[k], one, keep, share)
    return s


@njit(error_model="numpy", fastmath=_LANES)
def total_of_wanted(t: Any, v: Any, c: Any, weight: Any, has_weight: Any, keep: Any, share: Any) -> Any:
    s, one = np.float32(0.0), np.float32(1.0)
    if has_weight:
        for k in range(c):
            s += wanted(t[k], weight[k], keep, share) * v[k]
    else:
        for k in range(c):
            s += wanted(t[k], one, keep, share) * v[k]
    return s


@njit(error_model="numpy")
def loss_of_row(x: Any, t: Any, y: Any, c: Any, weight: Any, has_weight: Any, keep: Any, share: Any) -> Any:
    shift(x, y, c)
    whole = total_wanted(t, c, weight, has_weight, keep, share)
    loss = total_of_wanted(t, y, c, weight, has_weight, keep, share)
    to_exps(y, c)
    s = total(y, c)
    scale = np.float32(1.0) / s
    for k in range(c):
        y[k] *= scale
    return log_of_positive(s) * whole - loss


@njit(error_model="numpy")
def losses_of_columns(
    x: Any, t: Any, y: Any, facts: Any, n: Any, c: Any, step: Any, weight: Any, has_weight: Any, keep: Any, share: Any
) -> None:
    """The losses of columns at the addresses given, into the first third of ``facts``."""
    losses, sums, wholes = facts[:n], facts[n : 2 * n], facts[2 * n : 3 * n]
    largest_of_columns(x, losses, n, c, step)
    for j in range(n):
        sums[j] = np.float32(0.0)
        wholes[j] = np.float32(0.0)
    for k in range(c):
        source, result = floats(x + k * step, n), floats(y + k * step, n)
        for j in range(n):
            v = source[j] - losses[j]
            result[j] = v
            sums[j] += exp_of_negative(v)
    for j in range(n):
        losses[j] = np.float32(0.0)
    for k in range(c):
        target, result = floats(t + k * step, n), floats(y + k * step, n)
        own = weight[k] if has_weight else np.float32(1.0)
        for j in range(n):
            q = wanted(target[j], own, keep, share)
            wholes[j] += q
            losses[j] -= q * result[j]
            result[j] = exp_of_negative(result[j]) / sums[j]
    for j in range(n):
        losses[j] += log_of_positive(sums[j]) * wholes[j]


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def forward(task: Any) -> None:
    """Cross-entropy of class probabilities: each sample's loss, probabilities, and sums over the block."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks = w[0], w[3], w[4], w[5], w[6], w[7]
    source, result, targets = w[9], w[10], w[13]
    room = w[12]
    facts = floats(w[11] + take(counter + 8) * room * 4, room)
    weight, has_weight = floats(w[14], c), w[14] != 0
    smoothing = carray(task, (32,), np.float64)[15]
    keep, share = np.float32(1 - smoothing), np.float32(smoothing / c)
    losses, write = floats(w[16], outer * inner), w[16] != 0
    sums = carray(pointer(w[17]), (2 * tasks,), np.float64)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at, start = (first * c * inner + column) * 4, first * inner + column
        if inner == 1:
            for j in range(n):
                row = at + j * c * 4
                x, t, y = floats(source + row, c), floats(targets + row, c), floats(result + row, c)
                facts[j] = loss_of_row(x, t, y, c, weight, has_weight, keep, share)
        else:
            losses_of_columns(
                source + at, targets + at, result + at, facts, n, c, inner * 4, weight, has_weight, keep, share
            )
        loss_sum: Any = 0.0
        for j in range(n):
            loss_sum += facts[j]
            if write:
                losses[start + j] = facts[j]
        sums[2 * number] = loss_sum
        sums[2 * number + 1] = float(n)


@njit(error_model="numpy")
def row_back(y: Any, t: Any, d: Any, c: Any, g: Any, weight: Any, has_weight: Any, keep: Any, share: Any) -> None:
    whole, one = g * total_wanted(t, c, weight, has_weight, keep, share), np.float32(1.0)
    if has_weight:
        for k in range(c):
            d[k] = y[k] * whole - g * wanted(t[k], weight[k], keep, share)
    else:
        for k in range(c):
            d[k] = y[k] * whole - g * wanted(t[k], one, keep, share)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def backward(task: Any) -> None:
    """The gradient of the logits: :math:`\\hat y \\sum_c q_c - q`, times the loss's."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks = w[0], w[3], w[4], w[5], w[6], w[7]
    output, result, targets = w[9], w[10], w[13]
    room, step = w[12], inner * 4
    facts = floats(w[11] + take(counter + 8) * room * 4, room)
    weight, has_weight = floats(w[14], c), w[14] != 0
    numbers = carray(task, (32,), np.float64)
    smoothing, divisor = numbers[15], np.float32(numbers[18])
    keep, share = np.float32(1 - smoothing), np.float32(smoothing / c)
    grads, one_each = floats(w[16], outer * inner), w[17]
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at, start = (first * c * inner + column) * 4, first * inner + column
        if inner == 1:
            for j in range(n):
                row, g = at + j * c * 4, grads[(start + j) * one_each] / divisor
                y, t, d = floats(output + row, c), floats(targets + row, c), floats(result + row, c)
                row_back(y, t, d, c, g, weight, has_weight, keep, share)
            continue
        shares, wholes = facts[:n], facts[n : 2 * n]
        for j in range(n):
            shares[j] = grads[(start + j) * one_each] / divisor
            wholes[j] = np.float32(0.0)
        for k in range(c):
            t = floats(targets + at + k * step, n)
            own = weight[k] if has_weight else np.float32(1.0)
            for j in range(n):
                wholes[j] += wanted(t[j], own, keep, share)
        for k in range(c):
            plane = at + k * step
            y, t, d = floats(output + plane, n), floats(targets + plane, n), floats(result + plane, n)
            own = weight[k] if has_weight else np.float32(1.0)
            for j in range(n):
                d[j] = shares[j] * (y[j] * wholes[j] - wanted(t[j], own, keep, share))
