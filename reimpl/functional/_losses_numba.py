"""Softmax, its logarithm and cross-entropy of class indices by compiled kernels."""

from __future__ import annotations

from array import array
from functools import lru_cache
from math import prod
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reimpl.functional._numba_source import load
from reimpl.optim import _threads

_KERNELS = load("_losses_numba_kernels.py")
_FORWARD, _BACKWARD, _LOSS_BACKWARD, _FINISH = (
    kernel.address for kernel in (_KERNELS.forward, _KERNELS.backward, _KERNELS.loss_backward, _KERNELS.finish)
)
_SOFTMAX, _LOG_SOFTMAX, _LOSS = 0, 1, 2
# The kernel reads the loss's words, whatever is asked for.
_NO_LOSS = (0,) * 7
# Numbers a block of rows, which stays in the nearest cache, and one of columns, whose planes are read in long runs.
# Below the third, one thread is done sooner. Rows shorter than the last need room for their exponentials.
_ROWS_BLOCK, _COLUMNS_BLOCK, _LEAST_SHARED, _SHORT = 1 << 12, 1 << 16, 1 << 15, 32
_DOUBLE, _WORD = Struct("d"), Struct("q")


def bits(number: float) -> int:
    """A double's bits as a word of a table."""
    return 0 if number == 0 else _WORD.unpack(_DOUBLE.pack(number))[0]


def number(word: int) -> float:
    """The double whose bits a word is."""
    return _DOUBLE.unpack(_WORD.pack(word))[0]  # type: ignore[no-any-return]


def start(kernel: int, words: tuple[int, ...], tasks: int, numbers: int) -> array[int]:
    """Run the kernel at an address on a table: that of two counters, the counters, and ``words``.

    Returns:
        the table, in which a kernel may have answered.
    """
    table = array("q", (0, 0, 0, *words))
    address = table.buffer_info()[0]
    table[0] = address + 8
    threads = 1 if numbers < _LEAST_SHARED else min(torch.get_num_threads(), tasks)
    _threads.run(kernel, address, threads)
    return table


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
        room = size * max(1, classes) if classes < _SHORT else size
    else:
        size = min(inner, max(64, _COLUMNS_BLOCK // classes))
        tasks = outer * -(-inner // size)
        room = 2 * size
    words = (outer, classes, inner, size, tasks)
    return _Blocks(words, tasks, numbers, room, room * (1 if numbers < _LEAST_SHARED else threads))


def _shared(tensor: Tensor, dim: int) -> _Blocks:
    return _blocks(tensor.shape, dim, torch.get_num_threads())


def _zeros(kind: str, numbers: int) -> array[Any]:
    """Memory for the length of a call, sooner had than a tensor's."""
    return array(kind, bytes(numbers * array(kind).itemsize))


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """Softmax of a tensor with elements along ``dim``, or its logarithm; contiguous."""
    input = input.contiguous()
    output, (words, tasks, numbers, room, needed) = torch.empty_like(input), _shared(input, dim)
    scratch = _zeros("f", needed)
    addresses = (input.data_ptr(), output.data_ptr(), scratch.buffer_info()[0], room)
    start(_FORWARD, (*words, _LOG_SOFTMAX if log else _SOFTMAX, *addresses, *_NO_LOSS), tasks, numbers)
    return output


def softmax_gradient(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient of the input of :func:`softmax`."""
    grad = grad.contiguous()
    result, (words, tasks, numbers, room, needed) = torch.empty_like(output), _shared(output, dim)
    scratch = _zeros("f", needed)
    addresses = (grad.data_ptr(), output.data_ptr(), scratch.buffer_info()[0], room, result.data_ptr())
    start(_BACKWARD, (*words, _LOG_SOFTMAX if log else _SOFTMAX, *addresses), tasks, numbers)
    return result


def index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, float] | None:
    """Loss, log-probabilities, and what the sum was divided by; ``None`` where a target is no class."""
    input, indices = input.contiguous(), indices.contiguous()
    log_probs, (words, tasks, numbers, room, needed) = torch.empty_like(input), _shared(input, 1)
    weight = weight if weight is None else weight.contiguous()
    separate = reduction == "none"
    loss = input.new_empty(indices.shape if separate else ())
    total = array("f", (0.0,))
    scratch, sums = _zeros("f", needed), _zeros("d", 2 * tasks)
    table = start(
        _FORWARD,
        (
            *(*words, _LOSS, input.data_ptr(), log_probs.data_ptr(), scratch.buffer_info()[0], room),
            *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, bits(smoothing)),
            *(loss.data_ptr() if separate else 0, sums.buffer_info()[0], 0, reduction == "mean"),
            *(total.buffer_info()[0] if separate else loss.data_ptr(), 0),
        ),
        tasks,
        numbers,
    )
    if table[19]:
        return None
    _threads.run(_FINISH, table.buffer_info()[0], 1)
    return loss, log_probs, number(table[22])


def index_loss_gradient(
    grad: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    smoothing: float,
    divisor: float,
) -> Tensor:
    """The gradient of the logits from that of each loss or of their sum."""
    grad, indices = grad.contiguous(), indices.contiguous()
    result, (words, tasks, numbers, room, needed) = torch.empty_like(log_probs), _shared(log_probs, 1)
    weight = weight if weight is None else weight.contiguous()
    scratch = _zeros("f", needed)
    words = (
        *(*words, _LOSS, log_probs.data_ptr(), result.data_ptr(), scratch.buffer_info()[0], room),
        *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, bits(smoothing)),
        *(grad.data_ptr(), grad.dim() > 0, bits(divisor)),
    )
    start(_LOSS_BACKWARD, words, tasks, numbers)
    return result
