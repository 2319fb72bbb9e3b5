"""Negative log-likelihood, and cross-entropy of class probabilities, by compiled kernels."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._losses import plain_targets as _losses_plain_targets
from reimpl.functional._losses.numba import LEAST_SHARED, finish_words, losses_step, of_samples, shared
from reimpl.functional._node.plan import Address, Plan, Scratch, Word, bits, dense, number_of, run
from reimpl.functional._numba_source import load

_KERNELS = load(Path(__file__).with_name("numba_targets_kernels.py"))
_PICK, _SCATTER, _FORWARD, _BACKWARD = (
    getattr(_KERNELS, name).address for name in ("pick", "scatter", "forward", "backward")
)


@lru_cache(maxsize=256)
def picked_plan(shape: torch.Size, weighted: bool, ignore_index: int, reduction: str, threads: int) -> Plan:
    """Negative log-likelihood of scores of a shape, the classes in dimension 1: log-probabilities, indices and weights
    to a loss."""
    # one number of each sample is read, and all are written
    there, back = shared(shape, 1, threads, LEAST_SHARED * shape[1]), shared(shape, 1, threads)
    (indices, loss), separate = of_samples(shape, reduction), reduction == "none"
    sums = Scratch(2 * there.tasks)
    forward: tuple[Word, ...] = (
        *there.words, 0, Address(0), Address(3) if separate else 0, sums, 0,
        Address(1), Address(2) if weighted else 0, ignore_index,
    )  # fmt: skip
    last: tuple[Word, ...] = () if separate else finish_words(3, sums, there.tasks, reduction)
    # indices, weights, gradient, result
    given = 1 + weighted
    backward: tuple[Word, ...] = (
        *back.words, 0, Address(given + 1), Address(given), int(separate), bits(1.0),
        Address(0), Address(1) if weighted else 0, ignore_index,
    )  # fmt: skip
    return Plan(
        (dense(*shape), indices, dense(shape[1]) if weighted else None),
        (loss,),
        losses_step(_PICK, forward, there.threads, last),
        losses_step(_SCATTER, backward, back.threads),
        saved=(1, 2) if weighted else (1,),
        carried=() if separate else ((20, 12),),
        refusal=12,
    )


def plan_of(key: tuple[Any, ...], input: Tensor, weight: Tensor | None) -> Plan:
    """The plan of a layer and its options for an input."""
    name, ignore_index, *options = key
    if name == "nll_loss":
        return picked_plan(input.shape, weight is not None, ignore_index, *options, torch.get_num_threads())
    return probability_plan(input.shape, weight is not None, *options, torch.get_num_threads())


def picked_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor | float] | None:
    """Negative log-likelihood, and what the sum was divided by; ``None`` where a target is no class."""
    if not input.is_contiguous():
        # sooner than a copy
        return _losses_plain_targets.picked_loss(input, indices, ignore_index, weight, reduction)
    weight = weight if weight is None else weight.contiguous()
    plan = picked_plan(input.shape, weight is not None, ignore_index, reduction, torch.get_num_threads())
    loss = torch.empty(plan.outputs[0].sizes, dtype=torch.float32)
    table = run(plan.forward, (input, indices.contiguous(), weight, loss))
    if table[plan.refusal]:
        return None
    return loss, number_of(table[20]) if plan.carried else 1.0


def picked_loss_gradient(
    grad: Tensor,
    shape: torch.Size,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    divisor: Tensor | float,
) -> Tensor:
    """The gradient of the log-probabilities, which had the shape given."""
    threads, reduction = torch.get_num_threads(), "none" if grad.dim() else "mean"
    plan = picked_plan(shape, weight is not None, ignore_index, reduction, threads)
    weights = () if weight is None else (weight.contiguous(),)
    result = torch.empty(shape, dtype=torch.float32)
    run(plan.backward, (indices.contiguous(), *weights, grad.contiguous(), result), ((12, bits(float(divisor))),))
    return result


@lru_cache(maxsize=256)
def probability_plan(shape: torch.Size, weighted: bool, smoothing: float, reduction: str, threads: int) -> Plan:
    """Cross-entropy of scores of a shape, the classes in dimension 1: logits, targets and weights to loss and
    probabilities."""
    blocks = shared(shape, 1, threads)
    (indices, loss), whole, separate = of_samples(shape, reduction), dense(*shape), reduction == "none"
    sums, smoothed = Scratch(2 * blocks.tasks), bits(max(smoothing, 0.0))
    forward: tuple[Word, ...] = (
        *blocks.words, 0, Address(0), Address(4), blocks.scratch(), blocks.room, Address(1),
        Address(2) if weighted else 0, smoothed, Address(3) if separate else 0, sums,
    )  # fmt: skip
    last: tuple[Word, ...] = () if separate else finish_words(3, sums, blocks.tasks, reduction)
    # probabilities, targets, weights, gradient, result
    given = 2 + weighted
    divisor = float(torch.Size(indices.sizes).numel()) if reduction == "mean" else 1.0
    backward: tuple[Word, ...] = (
        *blocks.words, 0, Address(0), Address(given + 1), blocks.scratch(), blocks.room, Address(1),
        Address(2) if weighted else 0, smoothed, Address(given), int(separate), bits(divisor),
    )  # fmt: skip
    return Plan(
        (whole, whole, dense(shape[1]) if weighted else None),
        (loss, whole),
        losses_step(_FORWARD, forward, blocks.threads, last),
        losses_step(_BACKWARD, backward, blocks.threads),
        saved=(4, 1, 2) if weighted else (4, 1),
    )


def probability_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """Loss and probabilities."""
    input, target = input.contiguous(), target.contiguous()
    weight = weight if weight is None else weight.contiguous()
    plan = probability_plan(input.shape, weight is not None, smoothing, reduction, torch.get_num_threads())
    probabilities, loss = torch.empty_like(input), torch.empty(plan.outputs[0].sizes, dtype=torch.float32)
    run(plan.forward, (input, target, weight, loss, probabilities))
    return loss, probabilities


def probability_loss_gradient(
    grad: Tensor, probabilities: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, divisor: int
) -> Tensor:
    """The gradient of the logits from that of each loss or of their sum."""
    reduction = "none" if grad.dim() else "sum" if divisor == 1 else "mean"
    plan = probability_plan(probabilities.shape, weight is not None, smoothing, reduction, torch.get_num_threads())
    weights = () if weight is None else (weight.contiguous(),)
    result = torch.empty_like(probabilities)
    run(plan.backward, (probabilities, target.contiguous(), *weights, grad.contiguous(), result))
    return result
