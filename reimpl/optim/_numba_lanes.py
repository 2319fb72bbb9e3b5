"""Numba operations of the generated CPU kernels, each on one number or on as many as fill a line of the cache."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, register_model

from ._numba_ops import HAS_FMA, HAS_HALF, float16_to_float, float_to_float16, pointer

LINE = 64
"""Bytes of a line of the cache; as many numbers as their storage packs into one are worked on together."""
_WORD = ir.IntType(32)
_HALF_WORD = ir.IntType(16)


class Lanes(types.Type):  # type: ignore[misc]
    """Several numbers of one type, or the outcomes of comparing them, as one LLVM vector."""

    def __init__(self, element: types.Type, count: int) -> None:
        self.element, self.count = element, count
        super().__init__(f"lanes({element}, {count})")


@register_model(Lanes)
class _LanesModel(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        element = ir.IntType(1) if fe_type.element == types.boolean else dmm.lookup(fe_type.element).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, fe_type.count))


def _with_element(kind: ir.Type, element: ir.Type) -> ir.Type:
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _constant(kind: ir.Type, value: Any) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _constant_of(kind: ir.Type, values: list[int]) -> ir.Constant:
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def _named(kind: ir.Type) -> str:
    return f"v{kind.count}{kind.element.intrinsic_name}" if isinstance(kind, ir.VectorType) else kind.intrinsic_name


def _call(builder: Any, name: str, *args: Any) -> Any:
    kind = args[0].type
    form = ir.FunctionType(kind, [kind] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, form, f"llvm.{name}.{_named(kind)}"), args)


def _unary(emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any) -> Any:
        return a(a), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _binary(emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        return a(a, a), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _ternary(emit: Callable[..., Any]) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        return a(a, a, a), lambda context, builder, signature, args: emit(builder, *args)

    return operation


def _comparison(sign: str) -> Any:
    @intrinsic
    def operation(typingctx: Any, a: Any, b: Any) -> Any:
        outcome = Lanes(types.boolean, a.count) if isinstance(a, Lanes) else types.boolean
        return outcome(a, a), lambda context, builder, signature, args: builder.fcmp_ordered(sign, *args)

    return operation


def _absolute(builder: Any, a: Any) -> Any:
    return _call(builder, "fabs", a)


def _is_small(builder: Any, weight: Any) -> Any:
    return builder.fcmp_ordered("<", _absolute(builder, weight), _constant(weight.type, 0.5))


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    chosen = builder.or_(builder.fcmp_ordered(">", b, a), builder.fcmp_unordered("uno", b, b))
    return builder.select(chosen, b, a)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "fma", a, b, c) if HAS_FMA else builder.fadd(builder.fmul(a, b), c)


def _to_nearer(builder: Any, weight: Any) -> Any:
    below = builder.fsub(weight, _constant(weight.type, 1.0))
    return builder.select(_is_small(builder, weight), weight, below)


add = _binary(lambda builder, a, b: builder.fadd(a, b))
sub = _binary(lambda builder, a, b: builder.fsub(a, b))
mul = _binary(lambda builder, a, b: builder.fmul(a, b))
div = _binary(lambda builder, a, b: builder.fdiv(a, b))
max = _binary(_maximum)
neg = _unary(lambda builder, a: builder.fneg(a))
sqrt = _unary(lambda builder, a: _call(builder, "sqrt", a))
abs = _unary(_absolute)
to_nearer = _unary(_to_nearer)
fma = _ternary(_fma)
nearer = _ternary(lambda builder, weight, a, b: builder.select(_is_small(builder, weight), a, b))
gt, lt, eq = map(_comparison, (">", "<", "=="))
inverse = _unary(lambda builder, a: builder.fdiv(_constant(a.type, 1.0), a))


@intrinsic
def select(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds, and ``b`` elsewhere."""
    return a(condition, a, a), lambda context, builder, signature, args: builder.select(*args)


@intrinsic(prefer_literal=True)
def spread(typingctx: Any, x: Any, count: Any) -> Any:
    """``count`` times the number ``x``."""
    lanes = Lanes(x, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(lanes)
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), args[0], ir.Constant(_WORD, 0))
        return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_WORD, kind.count), [0] * kind.count))

    return lanes(x, count), codegen


def _loader(storage: ir.Type | None, widen: Callable[..., Any]) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any, like: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = context.get_value_type(like)
            held = _with_element(kind, storage) if storage is not None else kind
            return widen(builder, builder.load(_place(builder, args[0], held), align=_width(held)), kind)

        return like(address, like), codegen

    return load


def _storer(narrow: Callable[..., Any], *, streams: bool = False) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            held = narrow(builder, args[1])
            past = streams and isinstance(held.type, ir.VectorType)
            written = builder.store(
                held, _place(builder, args[0], held.type), align=LINE if past else _width(held.type)
            )
            if past:
                written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_WORD, 1)]))
            return context.get_dummy_value()

        return types.none(address, value), codegen

    return store


def _place(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _width(kind: ir.Type) -> int:
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return {"half": 2, "i16": 2, "float": 4, "double": 8}[str(element)]


def _permuted(builder: Any, x: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(x, x, _constant_of(ir.VectorType(_WORD, len(order)), order))


def _widen_bfloat16(builder: Any, bits: Any, kind: ir.Type) -> Any:
    words = _with_element(kind, _WORD)
    if not isinstance(kind, ir.VectorType):
        return builder.bitcast(builder.shl(builder.zext(bits, words), _constant(words, 16)), kind)
    # the even places first and then the odd ones: two operations for a line
    pairs = ir.VectorType(_WORD, kind.count // 2)
    both = builder.bitcast(bits, pairs)
    evens, odds = builder.shl(both, _constant(pairs, 16)), builder.and_(both, _constant(pairs, 0xFFFF0000))
    order = _constant_of(words, list(range(kind.count)))
    return builder.bitcast(builder.shuffle_vector(evens, odds, order), kind)


def _half(builder: Any, x: Any, place: int) -> Any:
    """The low (0) or the high (1) half of each number, in the order of memory."""
    bits = builder.bitcast(x, _with_element(x.type, _WORD))
    halves = _with_element(x.type, _HALF_WORD)
    if not isinstance(x.type, ir.VectorType):
        return builder.trunc(builder.lshr(bits, _constant(bits.type, 16 * place)), halves)
    both = builder.bitcast(bits, ir.VectorType(_HALF_WORD, 2 * halves.count))
    order = [2 * (i // 2 + (i % 2) * (halves.count // 2)) + place for i in range(halves.count)]
    return _permuted(builder, both, order)


def _narrow_bfloat16(builder: Any, x: Any) -> Any:
    low, high = _half(builder, x, 0), _half(builder, x, 1)
    halves = high.type
    # up where the low half is beyond the middle, or on it beside an odd high half
    beyond = _call(builder, "uadd.sat", low, builder.and_(high, _constant(halves, 1)))
    up = builder.icmp_unsigned(">", beyond, _constant(halves, 0x8000))
    return builder.add(high, builder.zext(up, halves))


def _narrow_float16(builder: Any, x: Any) -> Any:
    return builder.fptrunc(x, _with_element(x.type, ir.HalfType()))


load = _loader(None, lambda builder, x, kind: x)
store = _storer(lambda builder, x: x)
store_past = _storer(lambda builder, x: x, streams=True)
load_bfloat16 = _loader(_HALF_WORD, _widen_bfloat16)
store_bfloat16 = _storer(_narrow_bfloat16)
store_past_bfloat16 = _storer(_narrow_bfloat16, streams=True)
store_exact_bfloat16 = _storer(lambda builder, x: _half(builder, x, 1))
if HAS_HALF:
    load_float16 = _loader(ir.HalfType(), lambda builder, x, kind: builder.fpext(x, kind))
    store_float16 = _storer(_narrow_float16)
    store_past_float16 = _storer(_narrow_float16, streams=True)
else:

    @njit
    def load_float16(address: Any, like: Any) -> Any:
        return float16_to_float(carray(pointer(address), (1,), np.uint16)[0])

    @njit
    def store_float16(address: Any, x: Any) -> None:
        carray(pointer(address), (1,), np.uint16)[0] = float_to_float16(x)

    store_past_float16 = store_float16
