"""Cross-entropy of class indices for half-width scores on the CPU: in float32, part by part, and rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._losses.cross_entropy import through_scores
from reimpl.functional._losses.plain import in_parts
from reimpl.functional._losses.plain_targets import Samples
from reimpl.functional._plain import exponential, final_on_cpu

# Numbers in a part: of many classes what stays in the cache, of few as many as reductions over these want.
_PART, _MANY_CLASSES, _PART_OF_FEW = 1 << 18, 1 << 10, 1 << 20


class HalfIndexLoss(torch.autograd.Function):
    """The Function of class indices with the sum or mean and without smoothing, which keeps the scores alone."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, reduction: str
    ) -> Tensor:
        wide = None if weight is None else weight.float()
        samples = Samples(indices, input.shape[1], ignore_index, wide)
        losses = samples.attempt(lambda: _losses(input, samples))
        weights = samples.weights()
        if weights is not None:
            losses.mul_(weights)
        loss, divisor = samples.reduced(losses, weights, reduction)
        ctx.ignore_index, ctx.divisor = ignore_index, divisor
        ctx.save_for_backward(input, indices, weight)
        return loss.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, indices, weight = ctx.saved_tensors
        wide = grad.float()
        if final_on_cpu(grad):
            samples = Samples(indices, input.shape[1], ctx.ignore_index, None if weight is None else weight.float())
            gradient = samples.attempt(lambda: _gradient(wide, input, samples, ctx.divisor))
            return gradient, *(None,) * 4
        each = (wide / ctx.divisor).expand(indices.shape)
        return through_scores(each, input, indices, ctx.ignore_index, weight), *(None,) * 4


def _in_float32(input: Tensor, *others: Any) -> Iterator[tuple[Any, ...]]:
    """Parts of the samples, of which the scores come as float32 in memory that is used again."""
    numbers, room = _PART if input.shape[1] >= _MANY_CLASSES else _PART_OF_FEW, None
    for x, *rest in in_parts(input, *others, part=numbers):
        if room is None or room.shape != x.shape:
            room = torch.empty_like(x, dtype=torch.float32)
        yield room.copy_(x), *rest


def _losses(input: Tensor, samples: Samples) -> Tensor:
    r""":math:`-\log \hat y_{n t_n}`."""
    losses = []
    for x, t in _in_float32(input, samples.indices):
        picked = x.sub_(x.amax(1, True)).gather(1, t)
        losses.append(exponential(x, x).sum(1, True).log_().sub_(picked))
    return torch.cat(losses)


def _gradient(grad: Tensor, input: Tensor, samples: Samples, divisor: Tensor | float) -> Tensor:
    share, weights, result = samples.shares(grad, divisor), samples.weights(), torch.empty_like(input)
    if weights is not None:
        share = weights.mul_(share)
    elif not isinstance(share, Tensor) or not share.dim():
        share = torch.full(samples.indices.shape, float(share))
    for y, t, s, d in _in_float32(input, samples.indices, share, result):
        y.sub_(y.amax(1, True))
        total = exponential(y, y).sum(1, True)
        d.copy_(y.mul_(s / total).scatter_add_(1, t, -s))
    return result
