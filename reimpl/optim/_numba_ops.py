"""Numba intrinsics of the generated CPU kernels: addresses, a shared counter, fences, float16 in integers."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

_FEATURES = llvm.get_host_cpu_features()
HAS_FMA = bool(_FEATURES.get("fma", False)) or llvm.get_process_triple().startswith(("aarch64", "arm64"))
"""Whether the processor multiplies and adds with one rounding, as PyTorch's vectorised kernels then do."""

HAS_HALF = bool(_FEATURES.get("f16c", False)) or llvm.get_process_triple().startswith(("aarch64", "arm64"))
"""Whether the processor converts float16 itself; else it is done in integers, element by element."""


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """The address as an untyped pointer, for ``numba.carray``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.voidptr(address), codegen


@njit(inline="always")
def floats(address: Any, n: Any) -> Any:
    """So many float32 at the address."""
    return carray(pointer(address), (n,), np.float32)


@njit(inline="always")
def ints(address: Any, n: Any) -> Any:
    """So many int32 at the address."""
    return carray(pointer(address), (n,), np.int32)


@njit(inline="always")
def longs(address: Any, n: Any) -> Any:
    """So many int64 at the address."""
    return carray(pointer(address), (n,), np.int64)


@intrinsic
def take(typingctx: Any, address: Any) -> Any:
    """Add one to the 64-bit counter at the address, atomically, and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        counter = builder.inttoptr(args[0], word.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(word, 1), "monotonic")

    return types.int64(address), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Begin to bring the line at the address into the cache; the address need not be valid."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        form = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], form)
        read, keep, data = ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)
        builder.call(function, [builder.inttoptr(args[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.none(address), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Wait until everything that this thread has written can be seen, also what went past the caches."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def _bits_to_float(typingctx: Any, bits: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _float_to_bits(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@njit(inline="always")
def bfloat16_to_float(bits: Any) -> Any:
    """The float32 of the same value."""
    return _bits_to_float(types.uint32(bits) << types.uint32(16))


@njit(inline="always")
def float_to_bfloat16(x: Any) -> Any:
    """Round to nearest, ties to even.

    NaN stays NaN if the low half of its bits is 0: so it is with those that the processor makes, and with what a
    bfloat16 was widened to.
    """
    bits = _float_to_bits(x)
    odd = (bits >> types.uint32(16)) & types.uint32(1)
    return types.uint16((bits + types.uint32(0x7FFF) + odd) >> types.uint32(16))


@njit(inline="always")
def float16_to_float(bits: Any) -> Any:
    """The float32 of the same value, subnormals too (Giesen's scaling by 2¹¹²)."""
    word = types.uint32(bits)
    magnitude = _bits_to_float((word & types.uint32(0x7FFF)) << types.uint32(13)) * _bits_to_float(
        types.uint32(0x77800000)
    )
    result = _float_to_bits(magnitude)
    if (word & types.uint32(0x7C00)) == types.uint32(0x7C00):
        result |= types.uint32(0x7F800000)
    return _bits_to_float(result | ((word & types.uint32(0x8000)) << types.uint32(16)))


@njit(inline="always")
def float_to_float16(x: Any) -> Any:
    """Round to nearest, ties to even; overflow to infinity; NaN stays NaN."""
    bits = _float_to_bits(x)
    sign = (bits >> types.uint32(16)) & types.uint32(0x8000)
    magnitude = bits & types.uint32(0x7FFFFFFF)
    if magnitude > types.uint32(0x7F800000):
        half = types.uint32(0x7E00)
    elif magnitude >= types.uint32(0x477FF000):
        half = types.uint32(0x7C00)
    elif magnitude < types.uint32(0x38800000):
        # adding ½ moves a subnormal's bits to the bottom of the word, rounded as floats round
        half = _float_to_bits(_bits_to_float(magnitude) + types.float32(0.5)) - types.uint32(0x3F000000)
    else:
        odd = (magnitude >> types.uint32(13)) & types.uint32(1)
        half = (magnitude - types.uint32(0x38000000) + types.uint32(0xFFF) + odd) >> types.uint32(13)
    return types.uint16(half | sign)
