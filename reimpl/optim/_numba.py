"""Writes a traced rule as Numba source, compiles it once per machine and runs it over lists of addresses."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import _kernel_cache, _numba_lanes, _numba_ops, _threads
from ._trace import Operation, Program

_OPERATIONS = (_numba_lanes.__file__, _numba_ops.__file__)
VERSIONS = (numba.__version__, np.__version__, *(Path(file).read_text() for file in _OPERATIONS))
"""What compiled code depends on beside its source."""
CHUNK = 65_536
"""Numbers that one thread takes at a time, of a stretch of its own as long as there are any left."""
SHORT = 64
"""Tensors of so few numbers are fetched while the one before is worked on."""
SERIAL = 131_072
"""Below so many numbers waking a second thread can cost more than it saves (50 µs, where one thread takes as long)."""
STREAM = 8 << 20
"""From so many bytes a tensor-shaped stream on, what is written without being read goes past the caches."""

_TEMPLATE = '''\
"""Generated from {title}. Do not edit: the file is written anew when it differs."""
import math
from math import pow as power
import numpy as np
from numba import carray, cfunc, njit
from reimpl.optim import _numba_lanes as lanes
from reimpl.optim._numba_ops import fence, pointer, prefetch, take

real = np.{real}
double = float


@njit(inline="always")
def single(x):
    return float(np.float32(x))


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def prologue(task):
    words = carray(task, ({n_words},), np.int64)
    n = words[1]
    addresses = carray(pointer(words[0]), ({n_rows}, n), np.int64)
    table = carray(pointer(words[4]), (n, {n_columns}), np.float64)
    o = carray(pointer(words[7]), (words[8],), np.float64)
    last = -1.0
    row = -1
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


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def update(task):
    words = carray(task, ({n_words},), np.int64)
    addresses = carray(pointer(words[0]), ({n_rows}, words[1]), np.int64)
    table = carray(pointer(words[4]), (words[1], {n_columns}), np.float64)
    for i in range(words[1]):
        if addresses[1, i] != 0:
{updates}


{functions}


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def run(task):
    words = carray(task, ({n_words},), np.int64)
    n_tensors, n_chunks = words[1], words[3]
    addresses = carray(pointer(words[0]), ({n_rows}, n_tensors), np.int64)
    chunks = carray(pointer(words[2]), (n_chunks, 3), np.int64)
    table = carray(pointer(words[4]), (n_tensors, {n_columns}), np.float64)
    threads = words[9]
    queue = carray(pointer(words[5]), (1 + 2 * threads,), np.int64)
    seat = take(words[5])
    for turn in range(threads):
        # each thread walks a stretch of memory by itself, then helps with what the others have left
        stretch = 1 + (seat + turn) % threads
        while True:
            c = take(words[5] + 8 * stretch)
            if c >= queue[threads + stretch]:
                break
            i = chunks[c, 0]
            if chunks[c, 2] <= {short}:
                # of many short tensors, the processor cannot guess which memory comes next
                following = chunks[min(c + 2, n_chunks - 1), 0]
                for row in range({n_inputs}):
                    for line in range(0, {short} * {size}, 64):
                        prefetch(addresses[row, following] + line)
            if addresses[1, i] != 0:
                n, offset = chunks[c, 2], chunks[c, 1] * {size}
{dispatch}
    if words[6] != 0:
        fence()
'''

# what a task tells the compiled functions: addresses and lengths of arrays
_WORDS = 10
# one body for a line of numbers and for those left over; what is written past the caches must fill lines
_FUNCTIONS_TEMPLATE = """\
@njit(nogil=True, error_model="numpy")
def element{form}({parameters}):
{body}


@njit(nogil=True, error_model="numpy")
def chunk{form}(n, {starts}):
    first = {first}
    end = n - (n - first) % {width}
    for i in range(first):
        element{form}(real(0.0), {each})
    for i in range(first, end, {width}):
        element{form}(lanes.spread(real(0.0), {width}), {line})
    for i in range(end, n):
        element{form}(real(0.0), {each})
"""

# what a number is worked on as, its bytes in memory, the ending of its loads and stores, how many make a line
_DTYPES = {
    torch.float64: ("float64", 8, "", 8),
    torch.float32: ("float32", 4, "", 16),
    torch.bfloat16: ("float32", 2, "_bfloat16", 32),
    torch.float16: ("float32", 2, "_float16", 32 if _numba_ops.HAS_HALF else 1),
}
SUPPORTED_DTYPES = frozenset(_DTYPES)
_COMPARISONS = {"gt": ">", "lt": "<", "eq": "=="}
_PAST, _EXACT = "_past", "_exact"
_SIMPLE = ("0.0", "1.0", "-1.0")


def _functions(program: Program, dtype: torch.dtype, form: str) -> str:
    """``element``, the rule for a line of numbers or for one, and ``chunk``, the loop; ``form`` ends their names."""
    _, size, kind, width = _DTYPES[dtype]
    names, scalars = program.inputs, [f"a{k}" for k in range(len(program.scalars))]
    # what the compiler knows, it needs not compute with
    values = [f"real({code})" if code in _SIMPLE else a for a, code in zip(scalars, program.scalars, strict=True)]

    def line(operation: Operation) -> str:
        result, name, *operands = operation
        if name == "div" and operands[1] in scalars and kind:
            # one division less an element; the product's second rounding is 2⁻¹³ or less of the storage's own
            return f"{result} = lanes.mul({operands[0]}, lanes.inverse({operands[1]}))"
        return f"{result} = lanes.{name}({', '.join(operands)})"

    past = program.written_blindly if form.endswith(_PAST) else []
    unrounded = _exact(program) if dtype == torch.bfloat16 else set()

    def store(name: str, x: str) -> str:
        way = _PAST if name in past else _EXACT if x in unrounded else ""
        return f"lanes.store{way}{kind}({name}_at, {x})"

    stores = [store(name, x) for name, x in program.stores.items()]
    loads = [f"{name} = lanes.load{kind}({name}_at, like)" for name in names if name in program.read]
    places = [f"{name}_start + i * {size}" for name in names]
    return _FUNCTIONS_TEMPLATE.format(
        form=form,
        parameters=", ".join(["like", *(f"{name}_at" for name in names), *scalars]),
        starts=", ".join([*(f"{name}_start" for name in names), *scalars]),
        body=_lines(4, [*loads, *map(line, program.operations), *stores]),
        width=width,
        first=f"min(n, (-{past[0]}_start) % {_numba_lanes.LINE} // {size})" if past else "0",
        each=", ".join([*places, *values]),
        line=", ".join([*places, *(f"lanes.spread({a}, {width})" for a in values)]),
    )


def _exact(program: Program) -> set[str]:
    """What a program only chooses among its inputs and simple numbers: nothing is to be rounded."""
    exact = {*program.inputs, *(f"a{k}" for k, code in enumerate(program.scalars) if code in _SIMPLE)}
    for result, name, *operands in program.operations:
        if name == "select" and exact.issuperset(operands[1:]):
            exact.add(result)
    return exact


def _dispatch(program: Program, dtype: torch.dtype, arguments: str) -> tuple[list[str], list[str]]:
    """The functions for each outcome of the program's choice, and the lines that call the right one."""
    functions, lines = [], []

    def add(branch: Program, form: str, indent: str) -> None:
        functions.append(_functions(branch, dtype, form))
        call = f"chunk{form}({arguments})"
        # state that the step itself creates is written once: not worth another loop
        if len(branch.written_blindly) != 1 or branch.created:
            lines.append(indent + call)
            return
        functions.append(_functions(branch, dtype, form + _PAST))
        past = f"chunk{form}{_PAST}({arguments})"
        row = program.inputs.index(branch.written_blindly[0])
        lines.extend(
            [
                f"{indent}if words[6] != 0 and addresses[{row}, i] % {dtype.itemsize} == 0:",
                f"{indent}    {past}",
                f"{indent}else:",
                f"{indent}    {call}",
            ]
        )

    if program.choice is None:
        add(program, "", "")
        return functions, lines
    result, name, *operands = program.choice
    sides = [f"real(table[i, {x[1:]}])" for x in operands]
    for holds, header in ((True, f"if {sides[0]} {_COMPARISONS[name]} {sides[1]}:"), (False, "else:")):
        lines.append(header)
        add(program.assuming(result, holds), f"_{int(holds)}", "    ")
    return functions, lines


def source(program: Program, dtype: torch.dtype, title: str) -> str:
    """The Python source of the module that runs ``program`` over tensors of ``dtype``."""
    real, size, _, _ = _DTYPES[dtype]
    names = list(program.inputs)
    scalars = range(len(program.scalars))
    # beside the scalars, the table holds the step count and the numbers of the state from before the step
    old = [f"table[row, {len(scalars) + 1 + j}]" for j in range(len(program.kept))]
    arguments = ["n", *(f"addresses[{r}, i] + offset" for r in range(len(names)))]
    functions, calls = _dispatch(program, dtype, ", ".join([*arguments, *(f"real(table[i, {k}])" for k in scalars)]))
    return _TEMPLATE.format(
        title=title,
        n_words=_WORDS,
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
        functions="\n\n".join(functions),
        dispatch=_lines(16, calls),
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


def _queue(lengths: Any, threads: int) -> Any:
    """0, the first chunk of each thread's stretch, and where each ends: stretches of about as many numbers."""
    ends = np.cumsum(lengths)
    cuts = np.searchsorted(ends, lengths.sum() * np.arange(1, threads) / threads)
    return np.array([0, 0, *cuts, *cuts, len(lengths)], dtype=np.int64)


_FUNCTIONS: dict[str, Any] = {
    "power": operator.pow,
    "single": lambda x: x.float() if isinstance(x, Tensor) else float(np.float32(x)),
    "double": lambda x: x,
}


class Kernel:
    """A compiled rule."""

    counts_steps = True

    def __init__(self, program: Program, dtype: torch.dtype, title: str) -> None:
        module = _kernel_cache.load(source(program, dtype, title), VERSIONS)
        self._prologue = _threads.callable_at(module.prologue.address)
        self._update = _threads.callable_at(module.update.address) if program.updates else None
        self._run: int = module.run.address
        self._program, self._size = program, dtype.itemsize
        self._n_scalars, self._n_kept = len(program.scalars), len(program.kept)
        arguments = ", ".join(["o", "t", *(f"k{j}" for j in range(self._n_kept))])
        self._scalars = eval(f"lambda {arguments}: [{', '.join(program.scalars)}]", _FUNCTIONS)

    def next_program(self, numbers: list[Any], state: dict[str, Tensor]) -> Program:
        """What the next step is going to do to a tensor in this state."""
        if self._program.choice is None:
            return self._program
        result, name, *operands = self._program.choice
        step = float(state["step"]) + 1.0 if "step" in state else 0.0
        scalars = self._scalars(numbers, step, *(float(state[key]) for key in self._program.kept))
        return self._program.assuming(result, getattr(operator, name)(*(float(scalars[int(x[1:])]) for x in operands)))

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
        task = np.array(
            [
                addresses.ctypes.data,
                len(sizes),
                chunks.ctypes.data,
                len(chunks),
                table.ctypes.data,
                0,
                total * self._size >= STREAM,
                0,
                0,
                0,
            ]
        )
        assert len(task) == _WORDS
        prologue, update, run, place = self._prologue, self._update, self._run, task.ctypes.data
        last: list[Any] | None = None
        options, tensors = np.zeros(0), False
        full = queue = np.zeros(0, dtype=np.int64)

        def launch(numbers: list[Any], found_inf: Tensor | None) -> None:
            nonlocal last, options, tensors, full, queue
            if numbers is not last or tensors:
                tensors = any(isinstance(x, Tensor) for x in numbers)
                options = np.array([float(x) for x in numbers])
                task[7:9] = options.ctypes.data, len(options)
                last = numbers
            prologue(place)
            if tensors:
                self._evaluate(numbers, table)
            if update is not None:
                update(place)
            threads = 1 if few else max(1, min(torch.get_num_threads(), len(chunks)))
            if len(full) != 1 + 2 * threads:
                full = _queue(chunks[:, 2], threads)
                queue = full.copy()
                task[5], task[9] = queue.ctypes.data, threads
            queue[:] = full
            _threads.run(run, place, threads)

        return launch

    def _evaluate(self, numbers: list[Any], table: Any) -> None:
        # arithmetic on a float32 tensor rounds as PyTorch rounds it, so PyTorch does it
        known = table[:, self._n_scalars :]
        for arguments in np.unique(known, axis=0):
            row = [float(x) for x in self._scalars(numbers, *map(float, arguments))]
            table[(known == arguments).all(axis=1), : self._n_scalars] = row
