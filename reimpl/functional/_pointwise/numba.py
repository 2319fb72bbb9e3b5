"""Activations by compiled kernels, over tensors whose numbers lie densely in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reimpl.functional._numba_source import load, run
from reimpl.functional._plain import laid_out_alike

_KERNELS = load(Path(__file__).with_name("numba_kernels.py"))
# A thread is not woken for fewer numbers.
_GRAIN = 1 << 14
# Below so many numbers PyTorch's own operators are as good.
_LEAST_NUMBERS = 1 << 10
ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh")
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def worth_it(*tensors: Tensor) -> bool:
    """Whether the tensors lie densely and alike, and there is enough of them."""
    return tensors[0].numel() >= _LEAST_NUMBERS and laid_out_alike(*tensors)


def _run(kernel: Any, name: str, slope: float, given: Tensor, kept: Tensor, out: Tensor | None) -> Tensor:
    result = torch.empty_like(given) if out is None else out
    count = given.numel()
    # one block a thread, the same in the forward and the backward pass: it lies in that core's cache
    tasks = min(torch.get_num_threads(), count // _GRAIN) or 1
    block = -(-count // tasks // 16) * 16
    bits = int(np.float64(slope).view(np.int64)) if slope else 0
    words = (count, bits, _NUMBERS[name], given.data_ptr(), kept.data_ptr(), result.data_ptr(), block)
    run(kernel, words, tasks)
    return result


def forward(name: str, input: Tensor, slope: float = 0.0, out: Tensor | None = None) -> Tensor:
    """One of :data:`ACTIVATIONS` of the input, into ``out`` (which may be the input itself) where given."""
    return _run(_KERNELS.activate, name, slope, input, input, out)


def backward(name: str, grad: Tensor, kept: Tensor, slope: float = 0.0, out: Tensor | None = None) -> Tensor:
    """The gradient of the input, given that of the output and the output (:func:`leaky_relu`'s input will do too)."""
    return _run(_KERNELS.differentiate, name, slope, grad, kept, out)
