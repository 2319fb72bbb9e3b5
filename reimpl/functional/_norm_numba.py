"""Batch normalisation in training by compiled kernels, over planes that lie in memory one after the other."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reimpl.functional._numba_source import load, run

_KERNELS = load("_norm_numba_kernels.py")
# Below so many numbers, or in planes that leave most of a register idle, PyTorch's own operators are as good.
_LEAST_NUMBERS, _LEAST_PLANE = 1 << 14, 4
# Smaller planes go in blocks of about so many numbers an image: their sums and factors stay in the nearest cache.
_SMALL_PLANE, _BLOCK = 128, 512


def worth_it(input: Tensor) -> bool:
    """Whether the input is laid out in planes, and there is enough of it."""
    return input.is_contiguous() and input.numel() >= _LEAST_NUMBERS and prod(input.shape[2:]) >= _LEAST_PLANE


def _bits(number: float) -> int:
    return int(np.array(number, np.float64).view(np.int64))


def _address(tensor: Tensor | None, other: Tensor) -> int:
    """Where a vector is; some readable place where there is none."""
    return other.data_ptr() if tensor is None else tensor.data_ptr()


def _run(whole: Any, blocks: Any, words: list[int], rows: int, input: Tensor) -> None:
    """Run ``whole`` channel by channel, or ``blocks`` with room for ``rows`` numbers a place of one image."""
    channels, size = input.shape[1], prod(input.shape[2:])
    if size >= _SMALL_PLANE:
        run(whole, [*words, 0, 0, 0, 0, 0], channels)
        return
    block = max(1, min(_BLOCK // size, -(-channels // torch.get_num_threads())))
    scratch = input.new_empty(rows * channels * size)
    run(blocks, [*words, scratch.data_ptr(), block, 0, 0, 0], -(-channels // block))


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch."""
    count, channels = input.shape[:2]
    weight, bias = (v if v is None else v.contiguous() for v in (weight, bias))
    output, mean, var = input.new_empty(input.shape), input.new_empty(channels), input.new_empty(channels)
    words = [
        *(channels, count, prod(input.shape[2:]), int(relu), _bits(eps), input.data_ptr(), output.data_ptr()),
        *(_address(weight, mean), _address(bias, mean), mean.data_ptr(), var.data_ptr()),
        *(int(weight is not None), int(bias is not None)),
    ]
    _run(_KERNELS.forward, _KERNELS.forward_blocks, words, 4, input)
    return output, mean, var


def backward(
    grad: Tensor,
    input: Tensor,
    rectified: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    eps: float,
    wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradient of the input (``None`` unless ``wanted``), and the sums of g and g (x - μ)."""
    count, channels = input.shape[:2]
    grad, grad_mean, grad_var = grad.contiguous(), grad_mean.contiguous(), grad_var.contiguous()
    weight = weight if weight is None else weight.contiguous()
    result = input.new_empty(input.shape) if wanted else None
    sum_g, sum_g_centred = input.new_empty(channels), input.new_empty(channels)
    words = [
        *(channels, count, prod(input.shape[2:]), int(rectified is not None), _bits(eps)),
        *(grad.data_ptr(), input.data_ptr(), _address(rectified, input), _address(result, input)),
        *(_address(weight, mean), int(weight is not None), mean.data_ptr(), var.data_ptr()),
        *(grad_mean.data_ptr(), grad_var.data_ptr(), sum_g.data_ptr(), sum_g_centred.data_ptr(), int(wanted)),
    ]
    _run(_KERNELS.backward, _KERNELS.backward_blocks, words, 5, input)
    return result, sum_g, sum_g_centred
