"""Activations as Numba compiles them: one pass over memory each way, in blocks that the threads share.

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._pointwise.numba`.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.optim._numba_ops import _bits_to_float, _float_to_bits, pointer, take

_FUSED = {"contract"}
_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
_SIGN = np.uint32(0x80000000)
# ln 2 in two parts, the first of few enough bits that a whole number of it is exact (Cody and Waite)
_PER_LN2, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
# adding it leaves the nearest whole number in the low bits
_ROUND = np.float32(12582912.0)
_ROUND_BITS = np.uint32(0x4B400000)
# (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, to 2^-26 of e^r (Cephes, expf)
_E2, _E3, _E4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_E5, _E6, _E7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)


@njit(inline="always")
def power_of_two(n: Any) -> Any:
    """2^n for a whole number -126 <= n <= 127, given as an unsigned word."""
    return _bits_to_float((n + np.uint32(127)) << np.uint32(23))


@njit(inline="always")
def reduced(x: Any) -> Any:
    """The whole number n (a word) and e^r - 1, for x = n ln 2 + r."""
    shifted = x * _PER_LN2 + _ROUND
    n = shifted - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = ((((_E7 * r + _E6) * r + _E5) * r + _E4) * r + _E3) * r + _E2
    return _float_to_bits(shifted) - _ROUND_BITS, p * (r * r) + r


@njit(inline="always")
def logistic(x: Any) -> Any:
    """1 / (1 + e^-x), over e = e^-|x|, which may be subnormal: its power of two goes in as two factors."""
    size = _bits_to_float(_float_to_bits(x) & ~_SIGN)
    # e^-104 is 0; NaN fails the comparison
    n, p = reduced(-(np.float32(104.0) if size > np.float32(104.0) else size))
    half = np.uint32(np.int32(n) >> np.int32(1))
    e = ((p + _ONE) * power_of_two(half)) * power_of_two(n - half)
    return (e if x < _ZERO else _ONE) / (_ONE + e)


@njit(inline="always")
def hyperbolic_tangent(x: Any) -> Any:
    """-t / (t + 2) with the sign of x, t = e^(-2|x|) - 1."""
    bits = _float_to_bits(x)
    size = _bits_to_float(bits & ~_SIGN)
    # from 20 on the result is 1; NaN fails the comparison
    n, p = reduced(-_TWO * (np.float32(20.0) if size > np.float32(20.0) else size))
    scale = power_of_two(n)
    t = scale * p + (scale - _ONE)
    return _bits_to_float((_float_to_bits(t / (t + _TWO)) & ~_SIGN) | (bits & _SIGN))


@njit(error_model="numpy")
def relu_block(x: Any, d: Any, n: Any) -> None:
    for i in range(n):
        d[i] = _ZERO if x[i] < _ZERO else x[i]


@njit(error_model="numpy")
def relu_gradient(g: Any, y: Any, d: Any, n: Any) -> None:
    for i in range(n):
        d[i] = _ZERO if y[i] <= _ZERO else g[i]


@njit(error_model="numpy")
def leaky_relu_block(x: Any, d: Any, n: Any, slope: Any) -> None:
    for i in range(n):
        d[i] = x[i] if x[i] > _ZERO else x[i] * slope


@njit(error_model="numpy")
def leaky_relu_gradient(g: Any, y: Any, d: Any, n: Any, slope: Any) -> None:
    for i in range(n):
        d[i] = g[i] if y[i] > _ZERO else g[i] * slope


@njit(error_model="numpy", fastmath=_FUSED)
def sigmoid_block(x: Any, d: Any, n: Any) -> None:
    for i in range(n):
        d[i] = logistic(x[i])


@njit(error_model="numpy")
def sigmoid_gradient(g: Any, y: Any, d: Any, n: Any) -> None:
    for i in range(n):
        d[i] = g[i] * ((_ONE - y[i]) * y[i])


@njit(error_model="numpy", fastmath=_FUSED)
def tanh_block(x: Any, d: Any, n: Any) -> None:
    for i in range(n):
        d[i] = hyperbolic_tangent(x[i])


@njit(error_model="numpy", fastmath=_FUSED)
def tanh_gradient(g: Any, y: Any, d: Any, n: Any) -> None:
    for i in range(n):
        d[i] = g[i] * (_ONE - y[i] * y[i])


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def activate(task: Any) -> None:
    """An activation of all numbers, chosen by its place in the list of :mod:`reimpl.functional._pointwise.numba`."""
    w = carray(task, (9,), np.int64)
    counter, count, which, block = w[0], w[1], w[3], w[7]
    slope = carray(task, (9,), np.float64)[2]
    while True:
        first = take(counter) * block
        if first >= count:
            return
        n = min(block, count - first)
        x = carray(pointer(w[4] + 4 * first), (n,), np.float32)
        d = carray(pointer(w[6] + 4 * first), (n,), np.float32)
        if which == 0:
            relu_block(x, d, n)
        elif which == 1:
            leaky_relu_block(x, d, n, np.float32(slope))
        elif which == 2:
            sigmoid_block(x, d, n)
        else:
            tanh_block(x, d, n)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def differentiate(task: Any) -> None:
    """The gradient before an activation, from the gradient after it and what the activation kept."""
    w = carray(task, (9,), np.int64)
    counter, count, which, block = w[0], w[1], w[3], w[7]
    slope = carray(task, (9,), np.float64)[2]
    while True:
        first = take(counter) * block
        if first >= count:
            return
        n = min(block, count - first)
        g = carray(pointer(w[4] + 4 * first), (n,), np.float32)
        y = carray(pointer(w[5] + 4 * first), (n,), np.float32)
        d = carray(pointer(w[6] + 4 * first), (n,), np.float32)
        if which == 0:
            relu_gradient(g, y, d, n)
        elif which == 1:
            leaky_relu_gradient(g, y, d, n, np.float32(slope))
        elif which == 2:
            sigmoid_gradient(g, y, d, n)
        else:
            tanh_gradient(g, y, d, n)
