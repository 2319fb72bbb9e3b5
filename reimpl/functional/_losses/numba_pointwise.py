"""Squared error and the binary cross-entropies by compiled kernels."""

from __future__ import annotations

from array import array
from pathlib import Path

import torch
from torch import Tensor

from reimpl.functional._losses.numba import start
from reimpl.functional._numba_source import load
from reimpl.optim import _threads

_KERNELS = load(Path(__file__).with_name("numba_pointwise_kernels.py"))
_FORWARD, _FINISH, _BACKWARD = (kernel.address for kernel in (_KERNELS.forward, _KERNELS.finish, _KERNELS.backward))
_KINDS = {"square": 0, "probability": 1, "logit": 2}
_BLOCK = 1 << 12


def losses(kind: str, input: Tensor, target: Tensor, reduction: str) -> Tensor | None:
    """The losses of contiguous tensors with elements, their sum or mean; ``None`` where a probability is none."""
    numbers = input.numel()
    tasks = -(-numbers // _BLOCK)
    separate = reduction == "none"
    result = torch.empty_like(input) if separate else input.new_empty(())
    sums = array("d", bytes(8 * tasks))
    words = (
        *(numbers, _BLOCK, tasks, _KINDS[kind], input.data_ptr(), target.data_ptr()),
        *(result.data_ptr() if separate else 0, sums.buffer_info()[0], 0),
        *(result.data_ptr(), numbers if reduction == "mean" else 1),
    )
    table = start(_FORWARD, words, tasks, numbers)
    if table[11]:
        return None
    if not separate:
        _threads.run(_FINISH, table.buffer_info()[0], 1)
    return result


def gradient(kind: str, grad: Tensor, input: Tensor, target: Tensor, divisor: int) -> Tensor:
    """The gradient of the input from that of the losses' sum over ``divisor``, or of each of them."""
    numbers = input.numel()
    tasks = -(-numbers // _BLOCK)
    result = torch.empty_like(input)
    common = grad if grad.dim() == 0 else grad.new_ones(())
    words = (
        *(numbers, _BLOCK, tasks, _KINDS[kind], input.data_ptr(), target.data_ptr()),
        *(result.data_ptr(), common.data_ptr(), divisor),
    )
    start(_BACKWARD, words, tasks, numbers)
    return result if common is grad else result.mul_(grad)
