"""Writes a traced rule as Numba source, compiles it once per machine and runs it over lists of addresses."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import _numba_ops
from ._trace import Operation, Program

CHUNK = 16_384
"""Numbers that one thread takes at a time: a few streams of them fit the first-level cache many times over."""
SERIAL = 65_536
"""Below so many numbers a second thread costs more than it saves."""

_TEMPLATE = '''\
"""Generated from {title}. Do not edit: the file is written anew when it differs."""
import math
import numba
import numpy as np
from numba import carray, njit
from reimpl.optim._numba_ops import *
from reimpl.optim._numba_ops import {imports}

real = np.{real}


@njit(nogil=True, cache=CACHE, error_model="numpy")
def prologue(addresses, o, table):
    last = -1.0
    row = -1
    for i in range(addresses.shape[1]):
        if addresses[1, i] == 0:
            continue
        t = 0.0
        if addresses[{step}, i] != 0:
            step = carray(pointer(addresses[{step}, i]), (1,), np.float32)
            step[0] += np.float32(1.0)
            t = float(step[0])
        table[i, {n_scalars}] = t
        if row >= 0 and t == last:
            for k in range({n_scalars}):
                table[i, k] = table[row, k]
        else:
{scalars}
            last = t
        row = i


@njit(nogil=True, error_model="numpy")
def chunk({parameters}):
{arrays}
    for i in range(n):
{body}


@njit(nogil=True, cache=CACHE, error_model="numpy")
def run(addresses, chunks, table, counter):
    n_chunks = chunks.shape[0]
    while True:
        c = take(counter)
        if c >= n_chunks:
            return
        i = chunks[c, 0]
        if addresses[1, i] != 0:
            offset = chunks[c, 1]
            chunk(chunks[c, 2], {arguments})
'''

_DTYPES = {
    torch.float64: ("float64", "float64", "{}", "{}"),
    torch.float32: ("float32", "float32", "{}", "{}"),
    torch.bfloat16: ("uint16", "float32", "bfloat16_to_float({})", "float_to_bfloat16({})"),
    torch.float16: ("uint16", "float32", "float16_to_float({})", "float_to_float16({})"),
}
SUPPORTED_DTYPES = frozenset(_DTYPES)


def _expression(operator: str, *x: str) -> str:
    match operator:
        case "neg":
            return f"-{x[0]}"
        case "add" | "sub" | "mul" | "div":
            return f"{x[0]} {dict(add='+', sub='-', mul='*', div='/')[operator]} {x[1]}"
        case "fma":
            return f"hardware_fma({', '.join(x)})" if _numba_ops.HAS_FMA else f"{x[0]} * {x[1]} + {x[2]}"
        case "sqrt":
            return f"math.sqrt({x[0]})"
        case "max":
            return f"{x[1]} if ({x[1]} > {x[0]} or {x[1]} != {x[1]}) else {x[0]}"
        case "to_nearer":
            return f"{x[0]} if abs({x[0]}) < real(0.5) else {x[0]} - real(1.0)"
        case "nearer":
            return f"{x[1]} if abs({x[0]}) < real(0.5) else {x[2]}"
    raise NotImplementedError(f"no CPU code for the operation {operator!r}")


def source(program: Program, dtype: torch.dtype, title: str) -> str:
    """The Python source of the module that runs ``program`` over tensors of ``dtype``."""
    storage, real, load, store = _DTYPES[dtype]
    names = list(program.inputs)
    used = {x for operation in program.operations for x in operation[2:]} | set(program.stores.values())
    loads = [f"{n} = {load.format(f'{n}_[i]')}" for n in names if n in used]
    scalars = [f"a{k}" for k in range(len(program.scalars))]

    def line(operation: Operation) -> str:
        result, operator, *operands = operation
        return f"{result} = {_expression(operator, *operands)}"

    stores = [f"{n}_[i] = {store.format(x)}" for n, x in program.stores.items()]
    size = np.dtype(storage).itemsize
    rows = range(len(names))
    return _TEMPLATE.format(
        title=title,
        imports="hardware_fma, pointer, take",
        real=real,
        step=len(names),
        n_scalars=len(scalars),
        scalars=_lines(12, [f"table[i, {k}] = {code}" for k, code in enumerate(program.scalars)] or ["pass"]),
        parameters=", ".join(["n", *(f"{n}_address" for n in names), *scalars]),
        arrays=_lines(4, [f"{n}_ = carray(pointer({n}_address), (n,), np.{storage})" for n in names]),
        body=_lines(8, [*loads, *map(line, program.operations), *stores]),
        arguments=", ".join(
            [f"addresses[{r}, i] + offset * {size}" for r in rows] + [f"real(table[i, {k}])" for k in range(len(scalars))]
        ),
    )


def _lines(indent: int, lines: list[str]) -> str:
    return "\n".join(" " * indent + line for line in lines)


class Kernel:
    """A compiled rule."""

    def __init__(self, program: Program, dtype: torch.dtype, title: str) -> None:
        module = _load(source(program, dtype, title))
        self._prologue: Callable[..., None] = module.prologue
        self._run: Callable[..., None] = module.run
        self._n_scalars = len(program.scalars)
        self._scalars = eval(f"lambda o, t: [{', '.join(program.scalars)}]")  # our own expressions, from the trace

    def bind(self, addresses: Any, sizes: list[int]) -> Callable[[list[Any]], None]:
        """A function of the group's numbers that steps every tensor whose gradient has an address.

        Args:
            addresses: int64 (inputs + 1, tensors), read at each call: a row for each input of the program (parameter,
                gradient, state), the last one for the step counts; 0 where there is none.
            sizes: how many elements each tensor has.
        """
        chunks = np.array(
            [(i, at, min(CHUNK, n - at)) for i, n in enumerate(sizes) for at in range(0, n, CHUNK)], dtype=np.int64
        ).reshape(-1, 3)
        small = sum(sizes) < SERIAL
        table = np.zeros((len(sizes), self._n_scalars + 1))
        prologue, run = self._prologue, self._run

        def launch(numbers: list[Any]) -> None:
            prologue(addresses, np.array([float(x) for x in numbers]), table)
            if any(isinstance(x, Tensor) for x in numbers):
                self._evaluate(numbers, table)
            counter = np.zeros(1, dtype=np.int64)
            threads = 1 if small else min(torch.get_num_threads(), len(chunks))
            arguments = (addresses, chunks, table, counter.ctypes.data)
            helpers = [_pool(threads - 1).submit(run, *arguments) for _ in range(threads - 1)]
            run(*arguments)
            for helper in helpers:
                helper.result()

        return launch

    def _evaluate(self, numbers: list[Any], table: Any) -> None:
        # arithmetic on a float32 tensor rounds as PyTorch rounds it, so PyTorch does it
        for t in np.unique(table[:, -1]):
            row = [float(x) for x in self._scalars(numbers, float(t))]
            table[table[:, -1] == t, :-1] = row


_POOLS: dict[int, tuple[int, ThreadPoolExecutor]] = {}
_LOCK = threading.Lock()


def _pool(size: int) -> ThreadPoolExecutor:
    """This process's helper threads; a forked child starts its own."""
    with _LOCK:
        present = _POOLS.get(os.getpid())
        if present is None or present[0] < size:
            _POOLS.clear()
            present = _POOLS[os.getpid()] = (size, ThreadPoolExecutor(size, thread_name_prefix="reimpl-fused"))
        return present[1]


os.register_at_fork(after_in_child=lambda: globals().update(_LOCK=threading.Lock()))


def cache_folder() -> Path | None:
    """Where compiled kernels are kept, or ``None`` where no such folder can be written.

    ``REIMPL_CACHE_DIR`` if set, else ``reimpl`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    root = os.environ.get("REIMPL_CACHE_DIR")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reimpl"
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base):
            return base
    except (OSError, RuntimeError):
        return None


def _load(text: str) -> ModuleType:
    """The module of the generated source: compiled code comes from the cache where there is one."""
    versions = f"{numba.__version__} {np.__version__} {sys.version} {Path(_numba_ops.__file__).read_text()}"
    digest = hashlib.sha256(f"{versions}\n{text}".encode()).hexdigest()[:24]
    folder = cache_folder()
    if folder is not None:
        try:
            return _import(_write(folder, digest, text.replace("CACHE", "True")), digest)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"compiled kernels are not kept: {folder} cannot be used ({error})", stacklevel=2)
    module = ModuleType(f"reimpl_kernel_{digest}")
    exec(compile(text.replace("CACHE", "False"), f"<reimpl kernel {digest}>", "exec"), module.__dict__)
    return module


def _write(folder: Path, digest: str, text: str) -> Path:
    """The source's file; what stands there already is trusted only if it is the very same text."""
    path = folder / f"kernel_{digest}.py"
    if path.exists() and path.read_text() == text:
        return path
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    return path


def _import(path: Path, digest: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reimpl_kernel_{digest}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
