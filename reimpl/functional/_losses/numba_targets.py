"""Negative log-likelihood, and cross-entropy of class probabilities, by compiled kernels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from reimpl.functional._losses import plain_targets as _losses_plain_targets
from reimpl.functional._losses.numba import bits, shared, start, sum_of_blocks, zeros
from reimpl.functional._numba_source import load

_KERNELS = load(Path(__file__).with_name("numba_targets_kernels.py"))
_PICK, _SCATTER, _FORWARD, _BACKWARD = (
    getattr(_KERNELS, name).address for name in ("pick", "scatter", "forward", "backward")
)


def picked_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor | float] | None:
    """Negative log-likelihood, and what the sum was divided by; ``None`` where a target is no class."""
    if not input.is_contiguous():
        # sooner than a copy
        return _losses_plain_targets.picked_loss(input, indices, ignore_index, weight, reduction)
    indices = indices.contiguous()
    weight = weight if weight is None else weight.contiguous()
    words, tasks, _, _, _ = shared(input, 1)
    separate = reduction == "none"
    loss = torch.empty(indices.shape if separate else (), dtype=torch.float32)
    sums = zeros("d", 2 * tasks)
    table = start(
        _PICK,
        (
            *(*words, 0, input.data_ptr(), loss.data_ptr() if separate else 0, sums.buffer_info()[0], 0),
            *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index),
        ),
        tasks,
        indices.numel(),
    )
    if table[12]:
        return None
    return loss, 1.0 if separate else sum_of_blocks(loss, sums, reduction)


def picked_loss_gradient(
    grad: Tensor,
    shape: torch.Size,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    divisor: Tensor | float,
) -> Tensor:
    """The gradient of the log-probabilities, which had the shape given."""
    grad, indices = grad.contiguous(), indices.contiguous()
    weight = weight if weight is None else weight.contiguous()
    result = torch.empty(shape, dtype=torch.float32)
    words, tasks, numbers, _, _ = shared(result, 1)
    words = (
        *(*words, 0, result.data_ptr(), grad.data_ptr(), grad.dim() > 0, bits(float(divisor))),
        *(indices.data_ptr(), 0 if weight is None else weight.data_ptr(), ignore_index),
    )
    start(_SCATTER, words, tasks, numbers)
    return result


def probability_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """Loss and probabilities."""
    input, target = input.contiguous(), target.contiguous()
    probabilities, (words, tasks, numbers, room, needed) = torch.empty_like(input), shared(input, 1)
    weight = weight if weight is None else weight.contiguous()
    separate = reduction == "none"
    loss = input.new_empty((input.shape[0], *input.shape[2:]) if separate else ())
    scratch, sums = zeros("f", needed), zeros("d", 2 * tasks)
    words = (
        *(*words, 0, input.data_ptr(), probabilities.data_ptr(), scratch.buffer_info()[0], room, target.data_ptr()),
        *(0 if weight is None else weight.data_ptr(), bits(max(smoothing, 0.0))),
        *(loss.data_ptr() if separate else 0, sums.buffer_info()[0]),
    )
    start(_FORWARD, words, tasks, numbers)
    if not separate:
        sum_of_blocks(loss, sums, reduction)
    return loss, probabilities


def probability_loss_gradient(
    grad: Tensor, probabilities: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, divisor: int
) -> Tensor:
    """The gradient of the logits from that of each loss or of their sum."""
    grad, target = grad.contiguous(), target.contiguous()
    result, (words, tasks, numbers, room, needed) = torch.empty_like(probabilities), shared(probabilities, 1)
    weight = weight if weight is None else weight.contiguous()
    scratch = zeros("f", needed)
    words = (
        *(*words, 0, probabilities.data_ptr(), result.data_ptr(), scratch.buffer_info()[0], room, target.data_ptr()),
        *(0 if weight is None else weight.data_ptr(), bits(max(smoothing, 0.0))),
        *(grad.data_ptr(), grad.dim() > 0, bits(float(divisor))),
    )
    start(_BACKWARD, words, tasks, numbers)
    return result
