"""Softmax, its logarithm and cross-entropy as Numba compiles them: a block that stays in the cache at a time.

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._losses_numba`; threads share
the blocks by taking numbers from the counter in it. The classes lie either next to each other (rows; blocks of several
rows where they are short, so that whole registers work on them) or a plane apart (blocks of columns).
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.functional._losses_numba_math import exp_of_negative, log_of_positive, ordered, unordered
from reimpl.optim._numba_ops import pointer, take

# reassociation lets a sum run in several lanes; NaN and infinities keep their meaning
_LANES = {"reassoc", "contract", "nsz"}
# What is wanted; and the rows below which several are worked on as one.
_SOFTMAX, _LOG_SOFTMAX, _LOSS = 0, 1, 2
_SHORT = 32


@njit(error_model="numpy")
def floats(address: Any, n: Any) -> Any:
    return carray(pointer(address), (n,), np.float32)


@njit(error_model="numpy")
def shift(x: Any, y: Any, n: Any) -> None:
    """y = x - max x, and NaN all over where there is one."""
    m = ordered(x[0])
    for i in range(n):
        b = ordered(x[i])
        m = b if b > m else m
    largest = unordered(m)
    for i in range(n):
        y[i] = x[i] - largest


@njit(error_model="numpy")
def exps(x: Any, y: Any, n: Any) -> None:
    for i in range(n):
        y[i] = exp_of_negative(x[i])


@njit(error_model="numpy")
def to_exps(x: Any, n: Any) -> None:
    """In place: called on one array twice, :func:`exps` would find that they overlap, and not vectorise."""
    for i in range(n):
        x[i] = exp_of_negative(x[i])


@njit(error_model="numpy", fastmath=_LANES)
def total(x: Any, n: Any) -> Any:
    s = np.float32(0.0)
    for i in range(n):
        s += x[i]
    return s


@njit(error_model="numpy", fastmath=_LANES)
def total_of_exps(x: Any, n: Any) -> Any:
    s = np.float32(0.0)
    for i in range(n):
        s += exp_of_negative(x[i])
    return s


@njit(error_model="numpy", fastmath=_LANES)
def total_of_products(x: Any, y: Any, n: Any) -> Any:
    s = np.float32(0.0)
    for i in range(n):
        s += x[i] * y[i]
    return s


@njit(error_model="numpy")
def sample_weight(target: Any, classes: Any, weight: Any, has_weight: Any, ignore: Any) -> Any:
    """The weight of a sample, 0 if it is ignored or its target is no class."""
    if target == ignore or target < 0 or target >= classes:
        return np.float32(0.0)
    return weight[target] if has_weight else np.float32(1.0)


@njit(error_model="numpy")
def block_of(task: Any, outer: Any, inner: Any, block: Any) -> Any:
    """The rows of a task, or its image and its columns: where it begins, and how many there are."""
    if inner == 1:
        first = task * block
        return first, 0, min(block, outer - first)
    blocks = (inner + block - 1) // block
    column = (task % blocks) * block
    return task // blocks, column, min(block, inner - column)


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
    x = floats(source, n)
    for j in range(n):
        largest[j] = x[j]
        sums[j] = np.float32(0.0)
    for k in range(1, c):
        x = floats(source + k * step, n)
        for j in range(n):
            b, m = ordered(x[j]), ordered(largest[j])
            largest[j] = unordered(b if b > m else m)
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


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def forward(task: Any) -> None:
    """Softmax or its logarithm, and with ``_LOSS`` each sample's loss and sums over the block."""
    w = carray(task, (32,), np.int64)
    counter, outer, c, inner, block, tasks, mode = w[0], w[3], w[4], w[5], w[6], w[7], w[8]
    source, result = w[9], w[10]
    room = w[12]
    scratch = floats(w[11] + take(counter + 8) * room * 4, room)
    targets = carray(pointer(w[13]), (outer * inner,), np.int64)
    weight, has_weight, ignore = floats(w[14], c), w[14] != 0, w[15]
    smoothing = carray(task, (32,), np.float64)[16]
    losses, write = floats(w[17], outer * inner), w[17] != 0
    sums = carray(pointer(w[18]), (2 * tasks,), np.float64)
    # steps in bytes from sample to sample, and from class to class
    sample, step = (c * 4, 4) if inner == 1 else (4, inner * 4)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at = (first * c * inner + column) * 4
        if inner == 1:
            softmax_rows(source + at, result + at, scratch, n, c, mode)
        else:
            softmax_columns(source + at, result + at, scratch, n, c, step, mode)
        if mode != _LOSS:
            continue
        loss_sum: Any = 0.0
        weight_sum: Any = 0.0
        for j in range(n):
            index = first * inner + column + j
            target = targets[index]
            factor = sample_weight(target, c, weight, has_weight, ignore)
            if target != ignore and (target < 0 or target >= c):
                w[19] = 1
                continue
            loss = np.float32(0.0)
            place = result + at + j * sample
            if target != ignore:
                loss = -factor * floats(place + target * step, 1)[0]
                if smoothing != 0:
                    spread = 0.0
                    for k in range(c):
                        u = float(floats(place + k * step, 1)[0])
                        spread += u * float(weight[k]) if has_weight else u
                    loss = np.float32((1 - smoothing) * loss - smoothing / c * spread)
            if write:
                losses[index] = loss
            loss_sum += loss
            weight_sum += factor
        sums[2 * number] = loss_sum
        sums[2 * number + 1] = weight_sum


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def finish(task: Any) -> None:
    """The loss of all from the sums of the blocks; what it was divided by goes into the table."""
    w = carray(task, (32,), np.int64)
    tasks, mean = w[7], w[20]
    sums = carray(pointer(w[18]), (2 * tasks,), np.float64)
    losses, weights = 0.0, 0.0
    for i in range(tasks):
        losses += sums[2 * i]
        weights += sums[2 * i + 1]
    divisor = weights if mean else 1.0
    carray(task, (32,), np.float64)[22] = divisor
    floats(w[21], 1)[0] = losses / divisor


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
    all_weights = float(c)
    if has_weight:
        all_weights = 0.0
        for k in range(c):
            all_weights += float(weight[k])
    sample, step = (c * 4, 4) if inner == 1 else (4, inner * 4)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        first, column, n = block_of(number, outer, inner, block)
        at = (first * c * inner + column) * 4
        start = first * inner + column
        for j in range(n):
            kept = targets[start + j] != ignore
            own = sample_weight(targets[start + j], c, weight, has_weight, ignore)
            g = grads[(start + j) * one_each] / divisor
            factors[j] = (
                g * np.float32((1 - smoothing) * own + smoothing / c * all_weights) if kept else np.float32(0.0)
            )
        if inner == 1:
            y, d = floats(output + at, n * c), floats(result + at, n * c)
            exps(y, d, n * c)
            for j in range(n):
                d = floats(result + at + j * c * 4, c)
                for k in range(c):
                    d[k] *= factors[j]
        else:
            for k in range(c):
                y, d = floats(output + at + k * step, n), floats(result + at + k * step, n)
                for j in range(n):
                    d[j] = exp_of_negative(y[j]) * factors[j]
        for j in range(n):
            target = targets[start + j]
            if target == ignore:
                continue
            own = sample_weight(target, c, weight, has_weight, ignore)
            g = grads[(start + j) * one_each] / divisor
            place = result + at + j * sample
            floats(place + target * step, 1)[0] -= g * np.float32((1 - smoothing) * own)
            if smoothing != 0:
                for k in range(c):
                    share = smoothing / c * (float(weight[k]) if has_weight else 1.0)
                    floats(place + k * step, 1)[0] -= g * np.float32(share)
