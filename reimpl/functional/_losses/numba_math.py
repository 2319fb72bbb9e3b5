"""For the Numba kernels of the losses: exponential and logarithm in single precision as LLVM instructions that
vectorise, and loops over a row of numbers.

Reductions after Cody and Waite, polynomials of Cephes (S. L. Moshier's ``expf`` and ``logf``), errors of about one ulp.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from reimpl.optim._numba_ops import HAS_FMA, pointer

# reassociation lets a sum run in several lanes; NaN and infinities keep their meaning
_LANES = {"reassoc", "contract", "nsz"}
_F32, _I32 = ir.FloatType(), ir.IntType(32)
# Added to a small number, it leaves the nearest integer in the low bits.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_SQRT_HALF_BITS = 0x3F3504F3
_LEAST_NORMAL = 2.0**-126


def _f(value: float) -> Any:
    return ir.Constant(_F32, value)


def _i(value: int) -> Any:
    return ir.Constant(_I32, value)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fma(a, b, c) if HAS_FMA else builder.fadd(builder.fmul(a, b), c)


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = _f(coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(builder, value, x, _f(coefficient))
    return value


@intrinsic
def exp_of_negative(typingctx: Any, x: Any) -> Any:
    """:math:`e^x` of :math:`x \\le 0` or NaN; subnormal results are right."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,) = args
        # half the least subnormal, and below, is 0
        x = builder.select(builder.fcmp_ordered("<", x, _f(-104.0)), _f(-104.0), x)
        rounded = _fma(builder, x, _f(1.44269504088896341), _f(_ROUND))
        n = builder.fsub(rounded, _f(_ROUND))
        r = _fma(builder, n, _f(-0.693359375), x)
        r = _fma(builder, n, _f(2.12194440e-4), r)
        value = _fma(builder, _polynomial(builder, r, _EXP), builder.fmul(r, r), r)
        value = builder.fadd(value, _f(1.0))
        # 2^n in two factors, since n may lie below the least exponent
        exponent = builder.sub(builder.bitcast(rounded, _I32), _i(_ROUND_BITS))
        half = builder.ashr(exponent, _i(1))
        for part in (half, builder.sub(exponent, half)):
            factor = builder.bitcast(builder.shl(builder.add(part, _i(127)), _i(23)), _F32)
            value = builder.fmul(value, factor)
        return value

    return types.float32(types.float32), codegen


@intrinsic
def log_of_positive(typingctx: Any, x: Any) -> Any:
    """:math:`\\log x` of a positive finite number; NaN stays, and of 0 it is less than -100."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (given,) = args
        small = builder.fcmp_ordered("<", given, _f(_LEAST_NORMAL))
        x = builder.select(small, builder.fmul(given, _f(2.0**23)), given)
        bits = builder.bitcast(x, _I32)
        exponent = builder.ashr(builder.sub(bits, _i(_SQRT_HALF_BITS)), _i(23))
        mantissa = builder.bitcast(builder.sub(bits, builder.shl(exponent, _i(23))), _F32)
        exponent = builder.sub(exponent, builder.select(small, _i(23), _i(0)))
        n = builder.sitofp(exponent, _F32)
        f = builder.fsub(mantissa, _f(1.0))
        square = builder.fmul(f, f)
        tail = builder.fmul(builder.fmul(_polynomial(builder, f, _LOG), square), f)
        tail = _fma(builder, n, _f(-2.12194440e-4), tail)
        tail = _fma(builder, square, _f(-0.5), tail)
        value = _fma(builder, n, _f(0.693359375), builder.fadd(f, tail))
        return builder.select(builder.fcmp_unordered("uno", given, given), given, value)

    return types.float32(types.float32), codegen


@intrinsic
def ordered(typingctx: Any, x: Any) -> Any:
    """A number's bits as an integer of the same order, with NaN beyond the infinities: maxima of integers vectorise."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        return builder.xor(bits, builder.lshr(builder.ashr(bits, _i(31)), _i(1)))

    return types.int32(types.float32), codegen


@intrinsic
def unordered(typingctx: Any, bits: Any) -> Any:
    """The number of an :func:`ordered` integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.xor(args[0], builder.lshr(builder.ashr(args[0], _i(31)), _i(1)))
        return builder.bitcast(bits, _F32)

    return types.float32(types.int32), codegen


@njit(error_model="numpy")
def floats(address: Any, n: Any) -> Any:
    return carray(pointer(address), (n,), np.float32)


@njit(error_model="numpy")
def shift(x: Any, y: Any, n: Any) -> Any:
    """y = x - max x, and NaN all over where there is one; the maximum."""
    m = ordered(x[0])
    for i in range(n):
        b = ordered(x[i])
        m = b if b > m else m
    largest = unordered(m)
    for i in range(n):
        y[i] = x[i] - largest
    return largest


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
def largest_of_columns(source: Any, largest: Any, n: Any, c: Any, step: Any) -> None:
    x = floats(source, n)
    for j in range(n):
        largest[j] = x[j]
    for k in range(1, c):
        x = floats(source + k * step, n)
        for j in range(n):
            b, m = ordered(x[j]), ordered(largest[j])
            largest[j] = unordered(b if b > m else m)
