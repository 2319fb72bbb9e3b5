"""Writes a traced rule as a Triton kernel and runs it over a table of device addresses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from . import _kernel_cache
from ._trace import Operation, Program

CHUNK = 8_192
"""Numbers that one program works through: enough programs to fill a large GPU with a small network."""
BLOCK = 1_024
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_TEMPLATE = '''\
"""Generated from {title}. Do not edit: the file is written anew when it differs."""
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def power(base, exponent):
    zero = tl.zeros((), tl.float64)  # makes doubles of literals
    return {power}


@triton.jit
def double(x):
    return x + tl.zeros((), tl.float64)


@triton.jit
def single(x):
    return double(x).to(tl.float32).to(tl.float64)

{update}
@triton.jit
def run(addresses, chunks, o, found_inf, n_tensors, HAS_FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr,
        CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    if HAS_FOUND_INF:
        if tl.load(found_inf) != 0:
            return
    c = tl.program_id(0).to(tl.int64)
    i = tl.load(chunks + 3 * c)
    start = tl.load(chunks + 3 * c + 1)
    length = tl.load(chunks + 3 * c + 2).to(tl.int32)
    if tl.load(addresses + n_tensors + i) == 0:
        return
{scalars}
{pointers}
    if length == CHUNK:  # without a mask, loads and stores are 16 bytes wide
        for at in range(0, CHUNK, BLOCK):
            lane = at + tl.arange(0, BLOCK)
{whole}
    else:
        for at in range(0, length, BLOCK):
            lane = at + tl.arange(0, BLOCK)
            live = lane < length
{masked}
'''

_UPDATE = """
@triton.jit
def update(addresses, o, found_inf, n_tensors, HAS_FOUND_INF: tl.constexpr):
    if HAS_FOUND_INF:
        if tl.load(found_inf) != 0:
            return
    i = tl.program_id(0).to(tl.int64)
    if tl.load(addresses + n_tensors + i) == 0:
        return
{scalars}
{stores}

"""

_STEP = """\
    step_address = tl.load(addresses + {step} * n_tensors + i)
    t = tl.full((), 0.0, tl.float64)
    if step_address != 0:
        t = tl.load(step_address.to(tl.pointer_type(tl.float32))).to(tl.float64)"""

_DTYPES = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SUPPORTED_DTYPES = frozenset(_DTYPES)


_SIGNS = {"add": "+", "sub": "-", "mul": "*"}
_COMPARISONS = {"gt": ">", "lt": "<", "eq": "=="}


def _expression(name: str, single: bool, *x: str) -> str:
    match name:
        case "neg":
            return f"-{x[0]}"
        case "add" | "sub" | "mul":
            return f"{x[0]} {_SIGNS[name]} {x[1]}"
        case "div":
            return f"tl.div_rn({x[0]}, {x[1]})" if single else f"{x[0]} / {x[1]}"
        case "fma":
            return f"tl.fma({', '.join(x)})"
        case "abs":
            return f"tl.abs({x[0]})"
        case "gt" | "lt" | "eq":
            return f"{x[0]} {_COMPARISONS[name]} {x[1]}"
        case "select":
            return f"tl.where({', '.join(x)})"
        case "sqrt":
            return f"tl.sqrt_rn({x[0]})" if single else f"tl.sqrt({x[0]})"
        case "max":
            return f"tl.maximum({x[0]}, {x[1]}, propagate_nan=tl.PropagateNan.ALL)"
        case "to_nearer":
            return f"tl.where(tl.abs({x[0]}) < 0.5, {x[0]}, {x[0]} - 1.0)"
        case "nearer":
            return f"tl.where(tl.abs({x[0]}) < 0.5, {x[1]}, {x[2]})"
    raise NotImplementedError(f"no CUDA code for the operation {name!r}")


def source(program: Program, dtype: torch.dtype, title: str) -> str:
    """The Python source of the module that runs ``program`` over tensors of ``dtype``."""
    storage, real = _DTYPES[dtype], "float64" if dtype == torch.float64 else "float32"
    names = list(program.inputs)
    scalars = _scalars(program, real)
    used = {x for operation in program.operations for x in operation[2:]} | set(program.stores.values())
    pointers = []
    for row, name in enumerate(names):
        pointers.append(
            f"{name}_at = tl.load(addresses + {row} * n_tensors + i).to(tl.pointer_type(tl.{storage})) + start"
        )
        pointers.append(f"if ALIGNED:\n        {name}_at = tl.multiple_of({name}_at, 16)")

    def line(operation: Operation) -> str:
        result, name, *operands = operation
        return f"{result} = {_expression(name, real == 'float32', *operands)}"

    def body(load: str, store: str) -> str:
        loads = [f"{n} = tl.load({n}_at + lane{load}).to(tl.{real})" for n in names if n in used]
        stores = [f"tl.store({n}_at + lane, {x}.to(tl.{storage}){store})" for n, x in program.stores.items()]
        return "\n".join(" " * 12 + x for x in [*loads, *map(line, program.operations), *stores])

    return _TEMPLATE.format(
        title=title,
        power=_POWER,
        update=_update(program, scalars) if program.updates else "",
        scalars=scalars,
        pointers="\n".join(f"    {x}" for x in pointers),
        whole=body("", ""),
        masked=body(", mask=live, other=0.0", ", mask=live"),
    )


def _number(row: int) -> str:
    """A pointer to a number of tensor ``i``'s state."""
    return f"tl.load(addresses + {row} * n_tensors + i).to(tl.pointer_type(tl.float32))"


def _scalars(program: Program, real: str) -> str:
    """Statements that compute the scalars of tensor ``i``."""
    first = len(program.inputs)
    options = sorted({int(code.split("]")[0]) for s in program.scalars for code in s.split("o[")[1:]})
    lines = [f"o{k} = tl.load(o + {k})" for k in options]
    lines += [f"k{j} = tl.load({_number(first + 1 + j)}).to(tl.float64)" for j in range(len(program.kept))]
    for k, code in enumerate(program.scalars):
        for option in options:
            code = code.replace(f"o[{option}]", f"o{option}")
        lines.append(f"a{k} = (tl.zeros((), tl.float64) + {code}).to(tl.{real})")
    return "\n".join([_STEP.format(step=first), *(f"    {line}" for line in lines)])


def _update(program: Program, scalars: str) -> str:
    """A kernel that stores the new numbers of each tensor's state, once the others have read the old ones."""
    rows = [(len(program.inputs) + 1 + j, program.updates.get(key)) for j, key in enumerate(program.kept)]
    stores = [f"    tl.store({_number(row)}, a{k}.to(tl.float32))" for row, k in rows if k is not None]
    return _UPDATE.format(scalars=scalars, stores="\n".join(stores))


# the interpreter has no libdevice; exp2 of the logarithm is as near as it gets
_POWER = (
    "tl.exp2((exponent + zero) * tl.log2(base + zero))"
    if INTERPRETED
    else "libdevice.pow(base + zero, exponent + zero)"
)


class Kernel:
    """A compiled rule."""

    counts_steps = False

    def __init__(self, program: Program, dtype: torch.dtype, title: str) -> None:
        module = _kernel_cache.load(source(program, dtype, title), (triton.__version__, str(INTERPRETED)))
        self._run: Any = module.run
        self._update: Any = module.update if program.updates else None
        self._program, self._n_inputs = program, len(program.inputs)

    def next_program(self, numbers: list[Any], state: dict[str, Tensor]) -> Program:
        """What the next step is going to do to a tensor: the same at every step."""
        return self._program

    def bind(
        self, addresses: Any, sizes: list[int], device: torch.device
    ) -> Callable[[list[Any], Tensor | None], None]:
        """As ``bind`` of the CPU's kernels; ``GradScaler``'s flag, the function's second argument, is read here."""
        chunks = torch.tensor(
            [(i, at, min(CHUNK, n - at)) for i, n in enumerate(sizes) for at in range(0, n, CHUNK)], dtype=torch.int64
        )
        n_chunks, chunks = len(chunks), chunks.to(device)
        table = _Mirror(np.zeros_like(addresses), device)
        options = _Mirror(np.zeros(0), device)
        run, update, n_inputs = self._run, self._update, self._n_inputs

        def launch(numbers: list[Any], found_inf: Tensor | None) -> None:
            aligned = not (addresses[:n_inputs] & 15).any()
            table.update(addresses)
            on_host = [0.0 if isinstance(x, Tensor) and x.is_cuda else float(x) for x in numbers]
            options.update(np.array(on_host))
            for i, x in enumerate(numbers):
                if isinstance(x, Tensor) and x.is_cuda:
                    options.there[i].copy_(x)
            flag = {"found_inf": chunks if found_inf is None else found_inf, "HAS_FOUND_INF": found_inf is not None}
            if n_chunks:
                run[(n_chunks,)](
                    table.there, chunks, options.there, n_tensors=len(sizes), ALIGNED=aligned, CHUNK=CHUNK,
                    BLOCK=BLOCK, enable_fp_fusion=False, **flag,
                )  # fmt: skip
            if update is not None:
                update[(len(sizes),)](table.there, options.there, n_tensors=len(sizes), enable_fp_fusion=False, **flag)

        return launch


class _Mirror:
    """An array on the host and its copy on the device, sent again only when it changed."""

    def __init__(self, array: Any, device: torch.device) -> None:
        self._array, self._device = array, device
        self.there = torch.from_numpy(array.copy()).to(device)
        self._captured: list[Tensor] = []

    def update(self, array: Any) -> None:
        """Send ``array`` unless the device has it already."""
        if array.shape == self._array.shape and (array == self._array).all():
            return
        self._array = array.copy()
        host = torch.from_numpy(self._array)
        if self._device.type == "cuda":
            host = host.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                # a replay copies from this very buffer again
                self._captured.append(host)
        if self.there.shape != host.shape:
            self.there = torch.empty_like(host, device=self._device)
        self.there.copy_(host, non_blocking=True)
