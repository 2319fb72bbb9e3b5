"""Numba intrinsics of the convolution kernels, in whole vector registers: a tile of products, and a transposition."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FEATURES = llvm.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx") else 4
"""Single-precision numbers in a register."""
ROWS, WIDTH = (8, 2 * LANES) if LANES == 16 or not _FEATURES.get("avx") else (6, 2 * LANES)
"""Size of the tile whose sums stay in registers: 8 x 2 of 32 registers, or 6 x 2 of 16, and room for the operands."""
NARROW_ROWS = 2 * ROWS
"""Rows of a tile of LANES columns, whose sums fill as many registers. They come in pairs, of which the second row is as
far behind the first in all, so that their addresses too fit in registers."""

_I64, _F32 = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)


def _fma(builder: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, (_VECTOR,) * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def _at(builder: Any, kind: Any, address: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, kind: Any, address: Any) -> Any:
    return builder.load(_at(builder, kind, address), align=4)


def _plus(builder: Any, address: Any, offset: int) -> Any:
    return builder.add(address, ir.Constant(_I64, offset)) if offset else address


def _broadcast(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), mask)


def _opaque(builder: Any, value: Any) -> Any:
    """The number, of which the optimiser knows nothing: it would count each row's address up in a register of its own,
    and has none left."""
    return builder.asm(ir.FunctionType(_I64, (_I64,)), "", "=r,0", [value], False)


class _Loop:
    """A counted loop in the IR that carries values: ``with`` its body, then ``results``."""

    def __init__(self, builder: Any, count: Any, carried: list[Any]) -> None:
        self.builder, self.count, self.start = builder, count, carried

    def __enter__(self) -> list[Any]:
        builder = self.builder
        before = builder.block
        self.body = builder.append_basic_block("body")
        self.after = builder.append_basic_block("after")
        zero = ir.Constant(_I64, 0)
        builder.cbranch(builder.icmp_signed(">", self.count, zero), self.body, self.after)
        self.before = before
        builder.position_at_end(self.body)
        self.index = builder.phi(_I64)
        self.index.add_incoming(zero, before)
        self.phis = []
        for value in self.start:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.phis.append(phi)
        return self.phis

    def close(self, values: list[Any]) -> list[Any]:
        builder = self.builder
        following = builder.add(self.index, ir.Constant(_I64, 1))
        last = builder.block
        self.index.add_incoming(following, last)
        for phi, value in zip(self.phis, values, strict=True):
            phi.add_incoming(value, last)
        builder.cbranch(builder.icmp_signed("<", following, self.count), self.body, self.after)
        builder.position_at_end(self.after)
        results = []
        for start, value in zip(self.start, values, strict=True):
            phi = builder.phi(start.type)
            phi.add_incoming(start, self.before)
            phi.add_incoming(value, last)
            results.append(phi)
        return results

    def __exit__(self, *_: Any) -> None:
        pass


def _sums(
    builder: Any,
    vectors: int,
    rows: list[Any],
    b_base: Any,
    runs: Any,
    n_runs: Any,
    a_step: Any,
    b_step: Any,
    apart: Any = None,
) -> list[Any]:
    """Sums over runs (offset of a, offset of b, length) of a[row] times the vectors of b; ``apart`` from each row is
    another, if given."""
    fma = _fma(builder)
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    number = 1 if apart is None else 2
    outer = _Loop(builder, n_runs, [zero] * (len(rows) * vectors * number))
    with outer as totals:
        entry = builder.add(runs, builder.mul(outer.index, ir.Constant(_I64, 24)))
        a_offset, b_offset, length = (_load(builder, _I64, _plus(builder, entry, 8 * k)) for k in range(3))
        inner = _Loop(builder, length, [a_offset, builder.add(b_base, b_offset), *totals])
        with inner as (a, b, *acc):
            offsets = [a] if apart is None else [a, _opaque(builder, builder.add(a, apart))]
            columns = [_load(builder, _VECTOR, _plus(builder, b, 4 * LANES * v)) for v in range(vectors)]
            values: list[Any] = []
            for row in rows:
                for offset in offsets:
                    factor, done = _broadcast(builder, _load(builder, _F32, builder.add(row, offset))), len(values)
                    values += [builder.call(fma, [factor, columns[v], acc[done + v]]) for v in range(vectors)]
            results = inner.close([builder.add(a, a_step), builder.add(b, b_step), *values])
        return outer.close(results[2:])


def _multiply(vectors: int, more: bool, pairs: bool = False) -> Any:
    """c[row] = bias + Σ a[row + t] b[t] over all runs: rows at addresses from tables, ``vectors`` times LANES columns.

    There are ROWS of them or, in ``pairs``, NARROW_ROWS; one may be there twice. With ``more``, c[row] += Σ, and
    ``bias`` is not read.
    """

    @intrinsic
    def multiply(
        typingctx: Any,
        a_base: Any,
        a_table: Any,
        b_base: Any,
        runs: Any,
        n_runs: Any,
        b_step: Any,
        bias: Any,
        c_base: Any,
        c_table: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a_base, a_table, b_base, runs, n_runs, b_step, bias, c_base, c_table = args
            height, apart = ROWS, None
            if pairs:
                height = NARROW_ROWS
                first, second = (_load(builder, _I64, _plus(builder, a_table, offset)) for offset in (0, 8))
                apart = builder.sub(second, first)
            used = range(0, height, 2 if pairs else 1)
            rows = [builder.add(a_base, _load(builder, _I64, _plus(builder, a_table, 8 * j))) for j in used]
            sums = _sums(builder, vectors, rows, b_base, runs, n_runs, ir.Constant(_I64, 4), b_step, apart)
            targets = [builder.add(c_base, _load(builder, _I64, _plus(builder, c_table, 8 * j))) for j in range(height)]
            places = [_plus(builder, target, 4 * LANES * v) for target in targets for v in range(vectors)]
            biases = [_plus(builder, bias, 4 * LANES * v) for v in range(vectors)] * height
            # a row may stand in the tile twice: all are read before the first is written
            starts = [_load(builder, _VECTOR, start) for start in (places if more else biases)]
            for value, start, place in zip(sums, starts, places, strict=True):
                builder.store(builder.fadd(value, start), _at(builder, _VECTOR, place), align=4)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 9), codegen

    return multiply


multiply_tile, multiply_more_tile = (_multiply(WIDTH // LANES, more) for more in (False, True))
multiply_narrow_tile, multiply_more_narrow_tile = (_multiply(1, more) for more in (False, True))
multiply_narrow_pairs, multiply_more_narrow_pairs = (_multiply(1, more, pairs=True) for more in (False, True))


def _accumulate(vectors: int) -> Any:
    """c[row] += Σ a[row a_row + t a_step] b[t b_step] over all runs: ROWS rows, ``vectors`` times LANES columns."""

    @intrinsic
    def accumulate(
        typingctx: Any,
        a_base: Any,
        a_row: Any,
        b_base: Any,
        runs: Any,
        n_runs: Any,
        a_step: Any,
        b_step: Any,
        c_base: Any,
        c_step: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a_base, a_row, b_base, runs, n_runs, a_step, b_step, c_base, c_step = args
            rows = [builder.add(a_base, builder.mul(a_row, ir.Constant(_I64, j))) for j in range(ROWS)]
            sums = _sums(builder, vectors, rows, b_base, runs, n_runs, a_step, b_step)
            target = c_base
            for j in range(ROWS):
                for v in range(vectors):
                    address = _plus(builder, target, 4 * LANES * v)
                    value = builder.fadd(_load(builder, _VECTOR, address), sums[vectors * j + v])
                    builder.store(value, _at(builder, _VECTOR, address), align=4)
                target = builder.add(target, c_step)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 9), codegen

    return accumulate


accumulate_tile, accumulate_narrow_tile = _accumulate(WIDTH // LANES), _accumulate(1)
# there are registers for this one where LANES is 16
accumulate_broad_tile = _accumulate(3)


@intrinsic
def transpose_block(typingctx: Any, source: Any, source_step: Any, target: Any, table: Any) -> Any:
    """Move LANES rows of LANES numbers, ``source_step`` apart, to columns, whose addresses are ``target + table``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_step, target, table = args
        rows, address = [], source
        for _ in range(LANES):
            rows.append(_load(builder, _VECTOR, address))
            address = builder.add(address, source_step)
        for j, column in enumerate(_transposed(builder, rows)):
            place = builder.add(target, _load(builder, _I64, _plus(builder, table, 8 * j)))
            builder.store(column, _at(builder, _VECTOR, place), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


@intrinsic
def untranspose_block(typingctx: Any, source: Any, source_step: Any, target: Any, target_step: Any) -> Any:
    """Move LANES rows of LANES numbers, ``source_step`` apart, to columns that are ``target_step`` apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_step, target, target_step = args
        rows, address = [], source
        for _ in range(LANES):
            rows.append(_load(builder, _VECTOR, address))
            address = builder.add(address, source_step)
        for column in _transposed(builder, rows):
            builder.store(column, _at(builder, _VECTOR, target), align=4)
            target = builder.add(target, target_step)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), codegen


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Exchange blocks of 1, 2, 4, ... across the diagonal."""
    index = ir.VectorType(ir.IntType(32), LANES)
    step = 1
    while step < LANES:
        low = [k if not k & step else LANES + k - step for k in range(LANES)]
        high = [k + step if not k & step else LANES + k for k in range(LANES)]
        result = list(rows)
        for j in range(LANES):
            if not j & step:
                for place, picks in ((j, low), (j + step, high)):
                    result[place] = builder.shuffle_vector(rows[j], rows[j + step], ir.Constant(index, picks))
        rows, step = result, 2 * step
    return rows


@intrinsic
def interleave_three(typingctx: Any, source: Any, source_step: Any, target: Any) -> Any:
    """Write LANES numbers of three planes, ``source_step`` apart, by turns: the three first, the three second, ..."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, source_step, target = args
        planes, index = [], ir.VectorType(ir.IntType(32), LANES)
        for _ in range(3):
            planes.append(_load(builder, _VECTOR, source))
            source = builder.add(source, source_step)
        for part in range(3):
            # the place and the plane of each number; the third plane's come in last
            numbers = [divmod(LANES * part + k, 3) for k in range(LANES)]
            two = [place + LANES * plane if plane < 2 else 0 for place, plane in numbers]
            three = [LANES + place if plane == 2 else k for k, (place, plane) in enumerate(numbers)]
            mixed = builder.shuffle_vector(planes[0], planes[1], ir.Constant(index, two))
            mixed = builder.shuffle_vector(mixed, planes[2], ir.Constant(index, three))
            builder.store(mixed, _at(builder, _VECTOR, _plus(builder, target, 4 * LANES * part)), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 3), codegen


@intrinsic
def move_vector(typingctx: Any, source: Any, target: Any) -> Any:
    """Copy LANES numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(_load(builder, _VECTOR, args[0]), _at(builder, _VECTOR, args[1]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def move_number(typingctx: Any, source: Any, target: Any) -> Any:
    """Copy one number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(_load(builder, _F32, args[0]), _at(builder, _F32, args[1]), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
