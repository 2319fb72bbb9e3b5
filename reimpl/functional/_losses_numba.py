"""Softmax, its logarithm and cross-entropy of class indices by compiled kernels."""

from __future__ import annotations

from array import array
from math import prod
from struct import Struct

import torch
from torch import Tensor

from reimpl.functional._numba_source import load
from reimpl.optim import _threads

_KERNELS = load("_losses_numba_kernels.py")
_SOFTMAX, _LOG_SOFTMAX, _LOSS = 0, 1, 2
# Numbers a block: its two or three operands stay in the nearest cache. Below the second, one thread is done sooner.
_BLOCK, _LEAST_SHARED = 1 << 12, 1 << 15
_WORDS = 32
_DOUBLE, _WORD = Struct("d"), Struct("q")


def bits(number: float) -> int:
    """A double's bits as a word of a table."""
    return 0 if number == 0 else _WORD.unpack(_DOUBLE.pack(number))[0]  # type: ignore[no-any-return]


def start(kernel: int, words: tuple[int, ...], tasks: int, numbers: int) -> array[int]:
    """Run the kernel at an address on a table: that of two counters, the counters, and ``words``.

    Returns:
        the table, in which a kernel may have answered.
    """
    table = array("q", (0, 0, 0, *words, *(0,) * (_WORDS - 3 - len(words))))
    address = table.buffer_info()[0]
    table[0] = address + 8
    threads = 1 if numbers < _LEAST_SHARED else min(torch.get_num_threads(), tasks)
    _threads.run(kernel, address, threads)
    return table


class _Blocks:
    """How a contiguous tensor is shared out: ``(outer, classes, inner)``, the size of a block, and how many."""

    def __init__(self, shape: torch.Size, dim: int) -> None:
        self.outer, self.classes, self.inner = prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :])
        if self.inner == 1:
            self.size = max(1, _BLOCK // self.classes)
            self.tasks = -(-self.outer // self.size)
            self.room = self.size * self.classes
        else:
            self.size = min(self.inner, max(64, 2 * _BLOCK // self.classes))
            self.tasks = self.outer * -(-self.inner // self.size)
            self.room = 2 * self.size
        self.numbers = self.outer * self.classes * self.inner

    def scratch(self, like: Tensor) -> Tensor:
        """Room for each thread."""
        threads = 1 if self.numbers < _LEAST_SHARED else torch.get_num_threads()
        return like.new_empty(threads * self.room)

    def words(self, mode: int) -> tuple[int, ...]:
        return (self.outer, self.classes, self.inner, self.size, self.tasks, mode)


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """Softmax of a tensor with elements along ``dim``, or its logarithm; contiguous."""
    input = input.contiguous()
    output, blocks = torch.empty_like(input), _Blocks(input.shape if input.dim() else torch.Size((1,)), dim)
    scratch = blocks.scratch(input)
    addresses = (input.data_ptr(), output.data_ptr(), scratch.data_ptr(), blocks.room)
    mode = _LOG_SOFTMAX if log else _SOFTMAX
    start(_KERNELS.forward.address, (*blocks.words(mode), *addresses), blocks.tasks, blocks.numbers)
    return output


def softmax_gradient(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """The gradient of the input of :func:`softmax`."""
    grad = grad.contiguous()
    result, blocks = torch.empty_like(output), _Blocks(output.shape if output.dim() else torch.Size((1,)), dim)
    scratch = blocks.scratch(output)
    addresses = (grad.data_ptr(), output.data_ptr(), scratch.data_ptr(), blocks.room, result.data_ptr())
    mode = _LOG_SOFTMAX if log else _SOFTMAX
    start(_KERNELS.backward.address, (*blocks.words(mode), *addresses), blocks.tasks, blocks.numbers)
    return result


def index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Loss, log-probabilities, and what the sum was divided by; ``None`` where a target is no class."""
    input, indices = input.contiguous(), indices.contiguous()
    log_probs, blocks = torch.empty_like(input), _Blocks(input.shape, 1)
    weight = weight if weight is None else weight.contiguous()
    separate = reduction == "none"
    loss, divisor = input.new_empty(indices.shape if separate else ()), input.new_empty(())
    scratch, sums = blocks.scratch(input), array("d", bytes(16 * blocks.tasks))
    words = (
        *(*blocks.words(_LOSS), input.data_ptr(), log_probs.data_ptr(), scratch.data_ptr(), blocks.room),
        *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, bits(smoothing)),
        *(loss.data_ptr() if separate else 0, sums.buffer_info()[0], 0, reduction == "mean"),
        *(divisor.data_ptr() if separate else loss.data_ptr(), divisor.data_ptr()),
    )
    table = start(_KERNELS.forward.address, words, blocks.tasks, blocks.numbers)
    if table[19]:
        return None
    _threads.run(_KERNELS.finish.address, table.buffer_info()[0], 1)
    return loss, log_probs, divisor


def index_loss_gradient(
    grad: Tensor,
    log_probs: Tensor,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    smoothing: float,
    divisor: Tensor,
) -> Tensor:
    """The gradient of the logits from that of each loss or of their sum."""
    grad, indices = grad.contiguous(), indices.contiguous()
    result, blocks = torch.empty_like(log_probs), _Blocks(log_probs.shape, 1)
    weight = weight if weight is None else weight.contiguous()
    scratch = blocks.scratch(grad)
    words = (
        *(*blocks.words(_LOSS), log_probs.data_ptr(), result.data_ptr(), scratch.data_ptr(), blocks.room),
        *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index, bits(smoothing)),
        *(grad.data_ptr(), grad.dim() > 0, divisor.data_ptr()),
    )
    start(_KERNELS.loss_backward.address, words, blocks.tasks, blocks.numbers)
    return result
