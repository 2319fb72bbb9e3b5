"""Activations by compiled kernels, over tensors whose numbers lie densely in memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._node.plan import COUNTERS, Address, Launch, Layout, Number, Plan, Share, Word, bits, run, step
from reimpl.functional._numba_source import load
from reimpl.functional._plain import laid_out_alike

_KERNELS = load(Path(__file__).with_name("numba_kernels.py"))
# A thread is not woken for fewer numbers.
_GRAIN = 1 << 14
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh")
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_ALL_THREADS = 1 << 20


@cache
def _plan(name: str, of_input: bool, grain: int) -> Plan:
    """One of :data:`ACTIVATIONS`, whose gradient is told from its output or else ``of_input``: one block a thread, the
    same in the forward and the backward pass, since it lies in that core's cache."""
    leaky = name == "leaky_relu"
    # input, input, output; backward: what is kept, the gradient, the result
    forward: tuple[Word, ...] = (Number(0) if leaky else 0, _NUMBERS[name], Address(0), Address(0), Address(1))
    backward: tuple[Word, ...] = (0, _NUMBERS[name], Address(1), Address(0), Address(2))
    there, back = (
        step(Launch(kernel.address, (COUNTERS, Share.COUNT, *words, Share.BLOCK), _ALL_THREADS), grain=grain)
        for kernel, words in ((_KERNELS.activate, forward), (_KERNELS.differentiate, backward))
    )
    any_layout = Layout(torch.float32, (), ())
    carried = ((2, 2),) if leaky else ()
    return Plan((any_layout,), (any_layout,), there, back, saved=(0 if of_input else 1,), carried=carried)


def plan_of(key: tuple[Any, ...], input: Tensor) -> Plan:
    """The plan of an activation."""
    return _plan(*key, _GRAIN)


def worth_it(*tensors: Tensor) -> bool:
    """Whether there are numbers, and they lie densely and alike."""
    return tensors[0].numel() > 0 and laid_out_alike(*tensors)


def forward(name: str, input: Tensor, slope: float = 0.0, out: Tensor | None = None) -> Tensor:
    """One of :data:`ACTIVATIONS` of the input, into ``out`` (which may be the input itself) where given."""
    result = torch.empty_like(input) if out is None else out
    run(_plan(name, False, _GRAIN).forward, (input, result), numbers=(slope,))
    return result


def backward(name: str, grad: Tensor, kept: Tensor, slope: float = 0.0, out: Tensor | None = None) -> Tensor:
    """The gradient of the input, given that of the output and the output (:func:`leaky_relu`'s input will do too)."""
    result = torch.empty_like(grad) if out is None else out
    plan = _plan(name, False, _GRAIN)
    run(plan.backward, (kept, grad, result), [(at, bits(slope)) for _, at in plan.carried])
    return result
