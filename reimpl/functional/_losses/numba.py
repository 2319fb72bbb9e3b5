"""Softmax, its logarithm and cross-entropy of class indices by compiled kernels."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reimpl.functional._numba_source import load
from reimpl.optim import _threads

_KERNELS = load(Path(__file__).with_name("numba_kernels.py"))
_FORWARD, _BACKWARD, _LOSS_FORWARD, _LOSS_BACKWARD = (
    getattr(_KERNELS, name).address for name in ("forward", "backward", "loss_forward", "loss_backward")
)
# Numbers a block of rows, which stays in the nearest cache, and one of columns, whose planes are read in long runs.
# Below the third, one thread is done sooner. Rows shorter than the fourth need room for their exponentials, others for
# a few facts about each.
_ROWS_BLOCK, _COLUMNS_BLOCK, _LEAST_SHARED, _SHORT, _FACTS = 1 << 12, 1 << 16, 1 << 15, 32, 3
_DOUBLE, _WORD = Struct("d"), Struct("q")


def bits(number: float) -> int:
    """A double's bits as a word of a table."""
    return 0 if number == 0 else _WORD.unpack(_DOUBLE.pack(number))[0]


def start(kernel: int, words: tuple[int, ...], tasks: int, numbers: int) -> array[int]:
    """Run the kernel at an address on a table: that of two counters, the counters, and ``words``.

    Returns:
        the table, in which a kernel may have answered.
    """
    table = array("q", (0, 0, 0, *words))
    address = table.buffer_info()[0]
    table[0] = address + 8
    if numbers < _LEAST_SHARED:
        _alone(kernel)(address)
    else:
        _threads.run(kernel, address, min(torch.get_num_threads(), tasks))
    return table


@cache
def _alone(kernel: int) -> Callable[[int], None]:
    """The kernel at an address as a function."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)


class _Blocks(NamedTuple):
    """How a contiguous tensor is shared out: the kernels' words for it, how many blocks, numbers, and numbers of
    scratch memory for all threads."""

    words: tuple[int, ...]
    tasks: int
    numbers: int
    room: int
    scratch: int


@lru_cache(maxsize=256)
def _blocks(shape: torch.Size, dim: int, threads: int) -> _Blocks:
    outer, classes, inner = prod(shape[:dim]), prod(shape[dim : dim + 1]), prod(shape[dim + 1 :])
    numbers = outer * classes * inner
    if inner == 1:
        size = min(outer, max(1, _ROWS_BLOCK // classes))
        tasks = -(-outer // size)
        room = size * (max(_FACTS, classes) if classes < _SHORT else _FACTS)
    else:
        size = min(inner, max(64, _COLUMNS_BLOCK // classes))
        tasks = outer * -(-inner // size)
        room = _FACTS * size
    words = (outer, classes, inner, size, tasks)
    return _Blocks(words, tasks, numbers, room, room * (1 if numbers < _LEAST_SHARED else threads))


def shared(tensor: Tensor, dim: int) -> _Blocks:
    """How a contiguous tensor is shared out, the classes in dimension ``dim``."""
    return _blocks(tensor.shape, dim, torch.get_num_threads())


def zeros(kind: str, numbers: int) -> array[Any]:
    """Memory for the length of a call, sooner had than a tensor's."""
    return array(kind, bytes(numbers * array(kind).itemsize))


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """Softmax of a tensor with elements along ``dim``, or its logarithm; contiguous."""
    input = input.contiguous()
    output, (words, tasks, numbers, room, needed) = torch.empty_like(input), shared(input, dim)
    scratch = zeros("f", needed)
    addresses = (input.data_ptr(), output.data_ptr(), scratch.buffer_info()[0], room)
    start(_FORWARD, (*words, log, *addresses), tasks, numbers)
    return output


def softmax_gradient(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient of the input of :func:`softmax`."""
    grad = grad.contiguous()
    result, (words, tasks, numbers, room, needed) = torch.empty_like(output), shared(output, dim)
    scratch = zeros("f", needed)
    addresses = (grad.data_ptr(), output.data_ptr(), scratch.buffer_info()[0], room, result.data_ptr())
    start(_BACKWARD, (*words, log, *addresses), tasks, numbers)
    return result


def index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, float] | None:
    """Loss, probabilities, and what the sum was divided by; ``None`` where a target is no class."""
    input, indices = input.contiguous(), indices.contiguous()
    probabilities, (words, tasks, numbers, room, needed) = torch.empty_like(input), shared(input, 1)
    weight = weight if weight is None else weight.contiguous()
    separate = reduction == "none"
    loss = torch.empty(indices.shape if separate else (), dtype=torch.float32)
    scratch, sums = zeros("f", needed), zeros("d", 2 * tasks)
    table = start(
        _LOSS_FORWARD,
        (
            *(*words, 0, input.data_ptr(), probabilities.data_ptr(), scratch.buffer_info()[0], room),
            *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, bits(smoothing)),
            *(loss.data_ptr() if separate else 0, sums.buffer_info()[0], 0),
        ),
        tasks,
        numbers,
    )
    if table[19]:
        return None
    return loss, probabilities, 1.0 if separate else sum_of_blocks(loss, sums, reduction)


def sum_of_blocks(loss: Tensor, sums: array[float], reduction: str) -> float:
    """Write the sum or mean of all losses; of ``sums``, every other number is one of losses, the others of weights.

    Returns:
        what the sum was divided by.
    """
    divisor = sum(sums[1::2]) if reduction == "mean" else 1.0
    total = sum(sums[::2])
    if divisor:
        loss.fill_(total / divisor)
    else:
        loss.fill_(total).div_(divisor)
    return divisor


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
    grad, indices = grad.contiguous(), indices.contiguous()
    result, (words, tasks, numbers, room, needed) = torch.empty_like(probabilities), shared(probabilities, 1)
    weight = weight if weight is None else weight.contiguous()
    scratch = zeros("f", needed)
    words = (
        *(*words, 0, probabilities.data_ptr(), result.data_ptr(), scratch.buffer_info()[0], room),
        *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, bits(smoothing)),
        *(grad.data_ptr(), grad.dim() > 0, bits(divisor)),
    )
    start(_LOSS_BACKWARD, words, tasks, numbers)
    return result
