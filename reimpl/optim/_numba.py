"""Writes a traced rule as Numba source, compiles it once per machine and runs it over lists of addresses."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import _kernel_cache, _numba_lanes, _numba_ops, _threads
from ._trace import Operation, Program

VERSIONS = (numba.__version__, np.__version__, *(Path(module.__file__).read_text() for module in (_numba_lanes, _numba_ops)))
"""What compiled code depends on beside its source."""
CHUNK = 262_144
"""Numbers that one thread takes at a time: long streams keep the prefetcher going (16 k are 15% slower)."""
SHORT = 64
"""Tensors of so few numbers are fetched while the one before is worked on."""
SERIAL = 131_072
"""Below so many numbers waking a second thread can cost more than it saves (50 µs, where one thread takes as long)."""

_TEMPLATE = '''\
"""Generated from {title}. Do not edit: the file is written anew when it differs."""
import math
from math import pow as power
import numpy as np
from numba import carray, cfunc, njit
from reimpl.optim import _numba_lanes as lanes
from reimpl.optim._numba_ops import {imports}

real = np.{real}
double = float


@njit(inline="always")
def single(x):
    return float(np.float32(x))


@njit(nogil=True, cache=True, error_model="numpy")
def prologue(addresses, o, table):
    last = -1.0
    row = -1
    n = addresses.shape[1]
    for i in range(n):
        prefetch(addresses[{step}, min(i + 8, n - 1)])
        if addresses[1, i] == 0:
            continue
        t = 0.0
        if addresses[{step}, i] != 0:
            step = carray(pointer(addresses[{step}, i]), (1,), np.float32)
            step[0] += np.float32(1.0)
            t = float(step[0])
        table[i, {n_scalars}] = t
{kept}
        if row >= 0 and t == last{same}:
            for k in range({n_scalars}):
                table[i, k] = table[row, k]
        else:
{scalars}
            last = t
        row = i


@njit(nogil=True, cache=True, error_model="numpy")
def update(addresses, table):
    for i in range(addresses.shape[1]):
        if addresses[1, i] != 0:
{updates}


@njit(nogil=True, error_model="numpy")
def element({parameters}):
{body}


@njit(nogil=True, error_model="numpy")
def chunk(n, {starts}):
    whole = n - n % {width} if {width} > 1 else 0
    for i in range(0, whole, {width}):
        at = i * {size}
{ahead}
        element({lanes})
    for i in range(whole, n):
        at = i * {size}
        element({numbers})


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def run(task):
    words = carray(task, (7,), np.int64)
    n_tensors, n_chunks = words[1], words[3]
    addresses = carray(pointer(words[0]), ({n_rows}, n_tensors), np.int64)
    chunks = carray(pointer(words[2]), (n_chunks, 3), np.int64)
    table = carray(pointer(words[4]), (n_tensors, {n_columns}), np.float64)
    while True:
        c = take(words[5])
        if c >= n_chunks:
            return
        i = chunks[c, 0]
        if chunks[c, 2] <= {short}:
            # of many short tensors, the processor cannot guess which memory comes next
            following = chunks[min(c + 2, n_chunks - 1), 0]
            for row in range({n_inputs}):
                for line in range(0, {short} * {size}, 64):
                    prefetch(addresses[row, following] + line)
        if addresses[1, i] != 0:
            offset = chunks[c, 1]
            chunk(chunks[c, 2], {arguments})
'''

_DTYPES = {
    torch.float64: ("float64", 8, ""),
    torch.float32: ("float32", 4, ""),
    torch.bfloat16: ("float32", 2, "_bfloat16"),
    torch.float16: ("float32", 2, "_float16"),
}
SUPPORTED_DTYPES = frozenset(_DTYPES)
import os
AHEAD=int(os.environ.get("AHEAD","0")); MULT=int(os.environ.get("MULT","1"))


def source(program: Program, dtype: torch.dtype, title: str) -> str:
    """The Python source of the module that runs ``program`` over tensors of ``dtype``."""
    real, size, kind = _DTYPES[dtype]
    names = list(program.inputs)
    used = {x for operation in program.operations for x in operation[2:]} | set(program.stores.values())
    loads = [f"{n} = lanes.load{kind}({n}_at, like)" for n in names if n in used]
    scalars = [f"a{k}" for k in range(len(program.scalars))]

    def line(operation: Operation) -> str:
        result, name, *operands = operation
        if name == "div" and operands[1] in scalars and kind:
            # one division less an element; the product's second rounding is 2⁻¹³ or less of the storage's own
            return f"{result} = lanes.mul({operands[0]}, lanes.inverse({operands[1]}))"
        return f"{result} = lanes.{name}({', '.join(operands)})"

    stores = [f"lanes.store{kind}({n}_at, {x})" for n, x in program.stores.items()]
    width = _numba_lanes.LINE // size * MULT
    ahead = [f"prefetch({n}_address + at + {AHEAD + 64*k})" for n in names for k in range(MULT)] if AHEAD else []
    rows = range(len(names))
    # beside the scalars, the table holds the step count and the numbers of the state from before the step
    old = [f"table[row, {len(scalars) + 1 + j}]" for j in range(len(program.kept))]
    return _TEMPLATE.format(
        title=title,
        imports="pointer, prefetch, take",
        n_inputs=len(names),
        short=SHORT,
        size=size,
        n_rows=len(names) + 1 + len(old),
        n_columns=len(scalars) + 1 + len(old),
        kept=_lines(8, [line for j in range(len(old)) for line in _kept(len(names) + 1 + j, len(scalars) + 1 + j, j)]),
        same="".join(f" and k{j} == {cell}" for j, cell in enumerate(old)),
        updates=_lines(12, _updates(program) or ["pass"]),
        real=real,
        step=len(names),
        n_scalars=len(scalars),
        scalars=_lines(12, [f"table[i, {k}] = {code}" for k, code in enumerate(program.scalars)] or ["pass"]),
        parameters=", ".join(["like", *(f"{n}_at" for n in names), *scalars]),
        starts=", ".join([*(f"{n}_address" for n in names), *scalars]),
        width=width,
        ahead=_lines(8, ahead),
        lanes=", ".join(
            [f"lanes.spread(real(0.0), {width})"]
            + [f"{n}_address + at" for n in names]
            + [f"lanes.spread({a}, {width})" for a in scalars]
        ),
        numbers=", ".join(["real(0.0)", *(f"{n}_address + at" for n in names), *scalars]),
        body=_lines(4, [*loads, *map(line, program.operations), *stores]),
        arguments=", ".join(
            [f"addresses[{r}, i] + offset * {size}" for r in rows]
            + [f"real(table[i, {k}])" for k in range(len(scalars))]
        ),
    )


def _number(row: int) -> str:
    return f"carray(pointer(addresses[{row}, i]), (1,), np.float32)"


def _kept(row: int, column: int, j: int) -> list[str]:
    return [f"k{j} = float({_number(row)}[0])", f"table[i, {column}] = k{j}"]


def _updates(program: Program) -> list[str]:
    first = len(program.inputs) + 1
    rows = [(first + j, program.updates[key]) for j, key in enumerate(program.kept) if key in program.updates]
    return [f"number = {_number(row)}\n            number[0] = table[i, {column}]" for row, column in rows]


def _lines(indent: int, lines: list[str]) -> str:
    return "\n".join(" " * indent + line for line in lines)


def _compile(module: ModuleType) -> None:
    """Compile the module's entries, or read them back from the cache, for the only types that they see."""
    module.prologue.compile((numba.int64[:, ::1], numba.float64[::1], numba.float64[:, ::1]))
    module.update.compile((numba.int64[:, ::1], numba.float64[:, ::1]))


_FUNCTIONS: dict[str, Any] = {
    "power": operator.pow,
    "single": lambda x: x.float() if isinstance(x, Tensor) else float(np.float32(x)),
    "double": lambda x: x,
}


class Kernel:
    """A compiled rule."""

    counts_steps = True

    def __init__(self, program: Program, dtype: torch.dtype, title: str) -> None:
        module = _kernel_cache.load(source(program, dtype, title), VERSIONS, _compile)
        self._prologue: Callable[..., None] = module.prologue
        self._update: Callable[..., None] | None = module.update if program.updates else None
        self._run: int = module.run.address
        self._n_scalars, self._n_kept = len(program.scalars), len(program.kept)
        arguments = ", ".join(["o", "t", *(f"k{j}" for j in range(self._n_kept))])
        self._scalars = eval(f"lambda {arguments}: [{', '.join(program.scalars)}]", _FUNCTIONS)

    def bind(
        self, addresses: Any, sizes: list[int], device: torch.device
    ) -> Callable[[list[Any], Tensor | None], None]:
        """A function of the group's numbers (and of nothing else on the CPU) that steps every tensor with a gradient.

        Args:
            addresses: int64 (inputs + 1 + kept, tensors), read at each call: a row for each input of the program
                (parameter, gradient, state), one for the step counts, and one for each of the state's other numbers; 0
                where there is none.
            sizes: how many elements each tensor has.
            device: the CPU.
        """
        total = sum(sizes)
        few, most = total < SERIAL, min(CHUNK, max(SERIAL // 8, total // 16))
        chunks = np.array(
            [(i, at, min(most, n - at)) for i, n in enumerate(sizes) for at in range(0, n, most)], dtype=np.int64
        ).reshape(-1, 3)
        table = np.zeros((len(sizes), self._n_scalars + 1 + self._n_kept))
        counter = np.zeros(1, dtype=np.int64)
        task = np.array(
            [
                addresses.ctypes.data,
                len(sizes),
                chunks.ctypes.data,
                len(chunks),
                table.ctypes.data,
                counter.ctypes.data,
                0,
            ]
        )
        prologue, update, run = self._prologue, self._update, self._run

        def launch(numbers: list[Any], found_inf: Tensor | None) -> None:
            prologue(addresses, np.array([float(x) for x in numbers]), table)
            if any(isinstance(x, Tensor) for x in numbers):
                self._evaluate(numbers, table)
            if update is not None:
                update(addresses, table)
            counter[0] = 0
            _threads.run(run, task.ctypes.data, 1 if few else min(torch.get_num_threads(), len(chunks)))

        return launch

    def _evaluate(self, numbers: list[Any], table: Any) -> None:
        # arithmetic on a float32 tensor rounds as PyTorch rounds it, so PyTorch does it
        known = table[:, self._n_scalars :]
        for arguments in np.unique(known, axis=0):
            row = [float(x) for x in self._scalars(numbers, *map(float, arguments))]
            table[(known == arguments).all(axis=1), : self._n_scalars] = row
