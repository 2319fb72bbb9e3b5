"""Softmax, its logarithm and cross-entropy of class indices by compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reimpl.functional._node.plan import (
    COUNTERS,
    Address,
    Launch,
    Layout,
    Plan,
    Scratch,
    Step,
    Word,
    bits,
    dense,
    number_of,
    run,
    step,
)
from reimpl.functional._numba_source import load

_KERNELS = load(Path(__file__).with_name("numba_kernels.py"))
_FORWARD, _BACKWARD, _LOSS_FORWARD, _LOSS_BACKWARD, FINISH = (
    getattr(_KERNELS, name).address for name in ("forward", "backward", "loss_forward", "loss_backward", "finish")
)
# Numbers a block of rows, which stays in the nearest cache, and one of columns, whose planes are read in long runs.
# Rows shorter than the third need room for their exponentials, others for a few facts about each.
_ROWS_BLOCK, _COLUMNS_BLOCK, _SHORT, _FACTS = 1 << 12, 1 << 16, 32, 3
# Up to so many numbers a thread, which its own cache then holds, each thread takes one block of rows, and mostly the
# one that it takes in the other pass too.
_NEAR = 1 << 16
# Below so many numbers one thread is done sooner. The same in both passes: what the other core wrote is slow to read.
LEAST_SHARED = 1 << 15


class Blocks(NamedTuple):
    """How a contiguous tensor is shared out: the kernels' words for it, how many blocks, threads, and numbers of
    scratch memory a thread."""

    words: tuple[int, ...]
    tasks: int
    threads: int
    room: int

    def scratch(self) -> Scratch:
        """The threads' scratch memory."""
        return Scratch((self.room * self.threads + 1) // 2)


def losses_step(kernel: int, words: Sequence[Word], threads: int, last: Sequence[Word] = ()) -> Step:
    """The step of a kernel that has its words from the third on, and where there are ``last`` words :data:`FINISH`."""
    launches = [Launch(kernel, (COUNTERS, 0, 0, *words), threads), *([Launch(FINISH, last, 1)] if last else ())]
    return step(*launches)


def shared(shape: tuple[int, ...], dim: int, threads: int, least: int = LEAST_SHARED) -> Blocks:
    """How a contiguous tensor of a shape is shared out to at most so many threads, the classes in dimension ``dim``;
    to one where it has fewer numbers than ``least``."""
    outer, classes, inner = prod(shape[:dim]), prod(shape[dim : dim + 1]), prod(shape[dim + 1 :])
    numbers = outer * classes * inner
    threads = threads if numbers >= least else 1
    if inner == 1:
        size = -(-outer // threads) if numbers <= _NEAR * threads and threads > 1 else max(1, _ROWS_BLOCK // classes)
        size = min(outer, size)
        tasks = -(-outer // size)
        room = size * (max(_FACTS, classes) if classes < _SHORT else _FACTS)
    else:
        size = min(inner, max(64, _COLUMNS_BLOCK // classes))
        tasks = outer * -(-inner // size)
        room = _FACTS * size
    return Blocks((outer, classes, inner, size, tasks), tasks, min(threads, tasks), room)


@lru_cache(maxsize=256)
def _softmax_plan(shape: torch.Size, dim: int, log: bool, threads: int) -> Plan:
    blocks = shared(shape, dim, threads)
    # forward: input, output; backward: output, gradient, result
    forward: tuple[Word, ...] = (*blocks.words, int(log), Address(0), Address(1), blocks.scratch(), blocks.room)
    backward: tuple[Word, ...] = (
        *blocks.words,
        int(log),
        Address(1),
        Address(0),
        blocks.scratch(),
        blocks.room,
        Address(2),
    )  # fmt: skip
    return Plan(
        (dense(*shape),),
        (dense(*shape),),
        losses_step(_FORWARD, forward, blocks.threads),
        losses_step(_BACKWARD, backward, blocks.threads),
        saved=(1,),
    )


def plan_of(key: tuple[Any, ...], input: Tensor, weight: Tensor | None = None) -> Plan:
    """The plan of a layer and its options for an input."""
    name, *options = key
    if name == "cross_entropy":
        return index_plan(input.shape, weight is not None, *options, torch.get_num_threads())
    return _softmax_plan(input.shape, options[0] % max(input.dim(), 1), name == "log_softmax", torch.get_num_threads())


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """Softmax of a tensor with elements along ``dim``, or its logarithm; contiguous."""
    input = input.contiguous()
    output = torch.empty_like(input)
    run(_softmax_plan(input.shape, dim, log, torch.get_num_threads()).forward, (input, output))
    return output


def softmax_gradient(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient of the input of :func:`softmax`."""
    result = torch.empty_like(output)
    plan = _softmax_plan(output.shape, dim, log, torch.get_num_threads())
    run(plan.backward, (output, grad.contiguous(), result))
    return result


def of_samples(shape: tuple[int, ...], reduction: str) -> tuple[Layout, Layout]:
    """The layouts of class indices and of a loss for scores of a shape, the classes in dimension 1."""
    samples = (shape[0], *shape[2:])
    return dense(*samples, dtype=torch.int64), dense(*samples) if reduction == "none" else dense()


def finish_words(loss: int, sums: Scratch, tasks: int, reduction: str, in_two: bool = False) -> tuple[Word, ...]:
    """The words of the kernel that writes the sum or mean of all losses; the last is what the sum is divided by.

    Args:
        in_two: whether behind the blocks' sums of losses and of weights there are those of the losses' other part.
    """
    return (sums, tasks, Address(loss), int(reduction == "mean") + 2 * in_two, 0)


@lru_cache(maxsize=256)
def index_plan(
    shape: torch.Size, weighted: bool, ignore_index: int, smoothing: float, reduction: str, threads: int
) -> Plan:
    """Cross-entropy of scores of a shape, the classes in dimension 1: logits, indices and weights to loss and
    probabilities."""
    blocks = shared(shape, 1, threads)
    (indices, loss), whole, separate = of_samples(shape, reduction), dense(*shape), reduction == "none"
    smooth = smoothing != 0
    sums, options = Scratch((2 + smooth) * blocks.tasks), (ignore_index, bits(smoothing))
    forward: tuple[Word, ...] = (
        *blocks.words, 0, Address(0), Address(4), blocks.scratch(), blocks.room,
        Address(1), Address(2) if weighted else 0, *options,
        Address(3) if separate else 0, sums, 0,
    )  # fmt: skip
    last: tuple[Word, ...] = () if separate else finish_words(3, sums, blocks.tasks, reduction, smooth)
    # probabilities, indices, weights, gradient, result
    given = 2 + weighted
    backward: tuple[Word, ...] = (
        *blocks.words, 0, Address(0), Address(given + 1), blocks.scratch(), blocks.room,
        Address(1), Address(2) if weighted else 0, *options,
        Address(given), int(separate), bits(1.0),
    )  # fmt: skip
    return Plan(
        (whole, indices, dense(shape[1]) if weighted else None),
        (loss, whole),
        losses_step(_LOSS_FORWARD, forward, blocks.threads, last),
        losses_step(_LOSS_BACKWARD, backward, blocks.threads),
        saved=(4, 1, 2) if weighted else (4, 1),
        carried=() if separate else ((24, 19),),
        refusal=19,
    )


def index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, float] | None:
    """Loss, probabilities, and what the sum was divided by; ``None`` where a target is no class."""
    input, indices = input.contiguous(), indices.contiguous()
    weight = weight if weight is None else weight.contiguous()
    plan = index_plan(input.shape, weight is not None, ignore_index, smoothing, reduction, torch.get_num_threads())
    probabilities, loss = torch.empty_like(input), torch.empty(plan.outputs[0].sizes, dtype=torch.float32)
    table = run(plan.forward, (input, indices, weight, loss, probabilities))
    if table[plan.refusal]:
        return None
    return loss, probabilities, number_of(table[24]) if plan.carried else 1.0


def index_loss_gradient(
    grad: Tensor,
    probabilities: Tensor,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    smoothing: float,
    divisor: float,
) -> Tensor:
    """The gradient of the logits from that of each loss or of their sum."""
    threads, reduction = torch.get_num_threads(), "none" if grad.dim() else "mean"
    plan = index_plan(probabilities.shape, weight is not None, ignore_index, smoothing, reduction, threads)
    weights = () if weight is None else (weight.contiguous(),)
    result = torch.empty_like(probabilities)
    tensors = (probabilities, indices.contiguous(), *weights, grad.contiguous(), result)
    run(plan.backward, tensors, ((19, bits(divisor)),))
    return result
