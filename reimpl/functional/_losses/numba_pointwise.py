"""Squared error and the binary cross-entropies by compiled kernels."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._losses.numba import LEAST_SHARED
from reimpl.functional._node.plan import COUNTERS, Address, Launch, Plan, Scratch, Word, dense, run, step
from reimpl.functional._numba_source import load

_KERNELS = load(Path(__file__).with_name("numba_pointwise_kernels.py"))
_FORWARD, _FINISH, _BACKWARD = (kernel.address for kernel in (_KERNELS.forward, _KERNELS.finish, _KERNELS.backward))
_KINDS = {"mse_loss": 0, "binary_cross_entropy": 1, "binary_cross_entropy_with_logits": 2}
_BLOCK = 1 << 12


@lru_cache(maxsize=256)
def pointwise_plan(kind: str, shape: torch.Size, reduction: str, threads: int) -> Plan:
    """The loss of contiguous tensors with elements; backward does a gradient that is one number alone."""
    numbers, separate = shape.numel(), reduction == "none"
    tasks, divisor = -(-numbers // _BLOCK), numbers if reduction == "mean" else 1
    threads = min(threads, tasks) if numbers >= LEAST_SHARED else 1
    common: tuple[Word, ...] = (COUNTERS, 0, 0, numbers, _BLOCK, tasks, _KINDS[kind], Address(0), Address(1))
    forward: tuple[Word, ...] = (*common, Address(2) if separate else 0, Scratch(tasks), 0, Address(2), divisor)
    # input, target, gradient, result
    backward: tuple[Word, ...] = (*common, Address(3), Address(2), divisor)
    whole = dense(*shape)
    return Plan(
        (whole, whole),
        (whole if separate else dense(),),
        step(Launch(_FORWARD, forward, threads), *(() if separate else (Launch(_FINISH, None, 1),))),
        step(Launch(_BACKWARD, backward, threads)),
        saved=(0, 1),
        refusal=11,
    )


def plan_of(key: tuple[Any, ...], input: Tensor) -> Plan | None:
    """The plan of a layer and its reduction for an input, where the gradient is one number."""
    name, reduction = key
    return None if reduction == "none" else pointwise_plan(name, input.shape, reduction, torch.get_num_threads())


def losses(kind: str, input: Tensor, target: Tensor, reduction: str) -> Tensor | None:
    """The losses of contiguous tensors with elements, their sum or mean; ``None`` where a probability is none."""
    plan = pointwise_plan(kind, input.shape, reduction, torch.get_num_threads())
    result = torch.empty_like(input) if reduction == "none" else input.new_empty(())
    table = run(plan.forward, (input, target, result))
    return None if table[plan.refusal] else result


def gradient(kind: str, grad: Tensor, input: Tensor, target: Tensor, divisor: int) -> Tensor:
    """The gradient of the input from that of the losses' sum over ``divisor``, or of each of them."""
    plan = pointwise_plan(kind, input.shape, "sum" if divisor == 1 else "mean", torch.get_num_threads())
    result = torch.empty_like(input)
    common = grad if grad.dim() == 0 else grad.new_ones(())
    run(plan.backward, (input, target, common, result))
    return result if common is grad else result.mul_(grad)
