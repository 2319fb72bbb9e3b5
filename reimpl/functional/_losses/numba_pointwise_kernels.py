"""Losses number by number as Numba compiles them: squared error and the binary cross-entropies, and their gradients.

The table of words is written in :mod:`reimpl.functional._losses.numba_pointwise`; threads share blocks by taking
numbers from the counter in it. Sums within a block are taken in float32 by whole registers, sums over blocks in
float64.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.functional._losses.numba_math import exp_of_negative, log_of_positive
from reimpl.optim._numba_ops import pointer, take

_LANES = {"reassoc", "contract", "nsz"}
_SQUARE, _PROBABILITY, _LOGIT = 0, 1, 2
# PyTorch's guards, as in reimpl.functional.binary
_LEAST_LOG = np.float32(-100.0)
_LEAST_SPREAD = np.float32(1e-12)
_LEAST = np.float32(2.0**-126)
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)


@njit(error_model="numpy")
def log1p(u: Any) -> Any:
    """log(1 + u) for u in [-1, 1]: the logarithm of the rounded sum, and what the rounding left out."""
    w = _ONE + u
    lost = (_ONE - w) + u if u <= _ONE else _ZERO
    return log_of_positive(w) + lost / (_LEAST if w < _LEAST else w)


@njit(error_model="numpy")
def of_probability(x: Any, t: Any) -> Any:
    yes, no = log_of_positive(x), log1p(-x)
    yes = _LEAST_LOG if yes < _LEAST_LOG else yes
    no = _LEAST_LOG if no < _LEAST_LOG else no
    return (t - _ONE) * no - t * yes


@njit(error_model="numpy")
def of_logit(x: Any, t: Any) -> Any:
    tail = log1p(exp_of_negative(-abs(x)))
    return (_ONE - t) * x + (tail + (-x if x < _ZERO else _ZERO))


@njit(error_model="numpy", fastmath=_LANES)
def sum_of_squares(x: Any, t: Any, n: Any) -> Any:
    s = _ZERO
    for i in range(n):
        d = x[i] - t[i]
        s += d * d
    return s


@njit(error_model="numpy", fastmath=_LANES)
def sum_of_probabilities(x: Any, t: Any, n: Any) -> Any:
    s = _ZERO
    for i in range(n):
        s += of_probability(x[i], t[i])
    return s


@njit(error_model="numpy", fastmath=_LANES)
def sum_of_logits(x: Any, t: Any, n: Any) -> Any:
    s = _ZERO
    for i in range(n):
        s += of_logit(x[i], t[i])
    return s


@njit(error_model="numpy")
def outside(x: Any, n: Any) -> Any:
    """How many numbers do not lie in [0, 1]."""
    count = np.int32(0)
    for i in range(n):
        count += np.int32(not (x[i] >= _ZERO and x[i] <= _ONE))
    return count


@njit(error_model="numpy")
def write_losses(x: Any, t: Any, y: Any, n: Any, kind: Any) -> None:
    if kind == _SQUARE:
        for i in range(n):
            d = x[i] - t[i]
            y[i] = d * d
    elif kind == _PROBABILITY:
        for i in range(n):
            y[i] = of_probability(x[i], t[i])
    else:
        for i in range(n):
            y[i] = of_logit(x[i], t[i])


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def forward(task: Any) -> None:
    """The losses, or the sum of each block."""
    w = carray(task, (16,), np.int64)
    counter, numbers, block, tasks, kind = w[0], w[3], w[4], w[5], w[6]
    sums = carray(pointer(w[10]), (tasks,), np.float64)
    while True:
        number = take(counter)
        if number >= tasks:
            return
        at = number * block
        n = min(block, numbers - at)
        x = carray(pointer(w[7] + at * 4), (n,), np.float32)
        t = carray(pointer(w[8] + at * 4), (n,), np.float32)
        if kind == _PROBABILITY and outside(x, n) + outside(t, n) > 0:
            w[11] = 1
            continue
        if w[9] != 0:
            write_losses(x, t, carray(pointer(w[9] + at * 4), (n,), np.float32), n, kind)
        elif kind == _SQUARE:
            sums[number] = sum_of_squares(x, t, n)
        elif kind == _PROBABILITY:
            sums[number] = sum_of_probabilities(x, t, n)
        else:
            sums[number] = sum_of_logits(x, t, n)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def finish(task: Any) -> None:
    """The sum of the blocks over the divisor."""
    w = carray(task, (16,), np.int64)
    sums = carray(pointer(w[10]), (w[5],), np.float64)
    total = 0.0
    for i in range(w[5]):
        total += sums[i]
    carray(pointer(w[12]), (1,), np.float32)[0] = total / w[13]


@njit(error_model="numpy")
def write_gradient(x: Any, t: Any, d: Any, n: Any, kind: Any, g: Any) -> None:
    if kind == _SQUARE:
        for i in range(n):
            d[i] = (x[i] - t[i]) * (_TWO * g)
    elif kind == _PROBABILITY:
        for i in range(n):
            spread = (_ONE - x[i]) * x[i]
            d[i] = g * (x[i] - t[i]) / (_LEAST_SPREAD if spread < _LEAST_SPREAD else spread)
    else:
        for i in range(n):
            e = exp_of_negative(-abs(x[i]))
            d[i] = ((e if x[i] < _ZERO else _ONE) / (_ONE + e) - t[i]) * g


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def backward(task: Any) -> None:
    """The gradient of the input from that of the sum or mean."""
    w = carray(task, (16,), np.int64)
    counter, numbers, block, tasks, kind = w[0], w[3], w[4], w[5], w[6]
    g = np.float32(carray(pointer(w[10]), (1,), np.float32)[0] / np.float32(w[11]))
    while True:
        number = take(counter)
        if number >= tasks:
            return
        at = number * block
        n = min(block, numbers - at)
        x = carray(pointer(w[7] + at * 4), (n,), np.float32)
        t = carray(pointer(w[8] + at * 4), (n,), np.float32)
        write_gradient(x, t, carray(pointer(w[9] + at * 4), (n,), np.float32), n, kind, g)
