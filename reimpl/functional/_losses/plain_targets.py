"""Losses of class indices and of class probabilities in few operators, for plain tensors that nothing differentiates.

The modules of kernels have functions of the same names. Dimension 1 holds the classes; what is one number a sample
keeps it, of size 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from reimpl.functional._losses.plain import along
from reimpl.functional._losses.targets import check_range
from reimpl.functional._plain import exponential

_Result = TypeVar("_Result")
Number = Tensor | float
"""A tensor that may be a scalar, or a number for all."""


class Samples:
    """The classes of the samples, which of these are ignored, and the weights of the classes."""

    def __init__(self, indices: Tensor, classes: int, ignore_index: int, weight: Tensor | None) -> None:
        self.indices, self.classes, self.ignore_index, self.weight = indices.unsqueeze(1), classes, ignore_index, weight
        # where it is not known that none is
        self.ignored: Tensor | None = None
        if 0 <= ignore_index < classes:
            self.ignored = self.indices == ignore_index
        elif not indices.is_cpu:
            self._ignore()

    def _ignore(self) -> None:
        self.ignored = self.indices == self.ignore_index
        self.indices = self.indices.masked_fill(self.ignored, 0)

    def attempt(self, work: Callable[[], _Result]) -> _Result:
        """Do what reads or writes at the classes. On the CPU that fails where there is no such class; only then the
        ignored samples are looked for, and the work is done again.

        Raises:
            IndexError: a target is no class.
        """
        try:
            return work()
        except (RuntimeError, IndexError):
            check_range(self.indices, self.classes, self.ignore_index)
            if self.ignored is not None:
                raise
            self._ignore()
            return work()

    def weights(self) -> Tensor | None:
        """The weight of each sample's class, 0 for the samples that are ignored, and ``None`` without weights."""
        if self.weight is None:
            return None
        weights = self.weight.take(self.indices)
        return weights if self.ignored is None else weights.masked_fill_(self.ignored, 0)

    def reduced(self, losses: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor, Number]:
        """The losses, which are written over, their sum or mean, and what the sum was divided by."""
        if self.ignored is not None:
            # sooner done than a choice between numbers and 0
            losses.masked_fill_(self.ignored, 0)
        if reduction == "none":
            return losses.squeeze(1), 1
        total = losses.sum()
        if reduction == "sum":
            return total, 1
        count = self._count() if weights is None else _number(weights.sum())
        return total.fill_(_quotient(total, count)), count

    def _count(self) -> Number:
        """How many samples count."""
        number = self.indices.numel()
        return number if self.ignored is None else number - _number(self.ignored.count_nonzero())

    def shares(self, grad: Tensor, divisor: Number) -> Number:
        """The gradient of each sample's loss, 0 for the samples that are ignored; one for all where it is the same."""
        share = grad.unsqueeze(1) if grad.dim() else _quotient(grad, divisor)
        if self.ignored is None:
            return share
        # after the division: where no sample counts, the divisor is 0
        if isinstance(share, Tensor):
            return share.masked_fill(self.ignored, 0)
        return grad.new_full(self.ignored.shape, share).masked_fill_(self.ignored, 0)


def _readable(scalar: Tensor) -> bool:
    """Whether to go on with Python's number: it lies at hand, and nobody records operators, of which the number would
    become a constant. An operator of two scalars takes ten times as long as Python's."""
    return scalar.is_cpu and torch._C._len_torch_dispatch_stack() == 0


def _number(scalar: Tensor) -> Number:
    return scalar.item() if _readable(scalar) else scalar


def _quotient(scalar: Tensor, divisor: Number) -> Number:
    """``scalar / divisor``; rounded to float32, the quotient in float64 is the one in float32."""
    # Python has no quotient by 0
    return scalar.item() / divisor if _readable(scalar) and divisor else scalar / divisor


def index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Number]:
    """Cross-entropy, probabilities, and what the sum was divided by."""
    samples = Samples(indices, input.shape[1], ignore_index, weight)
    input = input.contiguous()
    probabilities = torch.empty_like(input)
    losses, spread = samples.attempt(lambda: _log_losses(input, samples, probabilities, smoothing != 0))
    weights = samples.weights()
    if weights is not None:
        losses.mul_(weights)
    loss, divisor = samples.reduced(losses, weights, reduction)
    if spread is not None:
        # each by itself: where the weights' sum is 0, the one mean is NaN and the other infinite
        rest, _ = samples.reduced(spread, weights, reduction)
        loss.mul_(1 - smoothing).add_(rest, alpha=smoothing / input.shape[1])
    return loss, probabilities, divisor


def _log_losses(input: Tensor, samples: Samples, probabilities: Tensor, smooth: bool) -> tuple[Tensor, Tensor | None]:
    r""":math:`-\log \hat y_{n t_n}` and, for smoothing, :math:`-\sum_c w_c \log \hat y_{nc}`; writes :math:`\hat y`."""
    losses, spreads = [], []
    weight = None if samples.weight is None or not smooth else _along_classes(samples.weight, input)
    parts = input.shape[1] if weight is None else weight.sum()
    for x, t, y in along(1, input, samples.indices, probabilities):
        torch.sub(x, x.amax(1, True), out=y)
        picked = y.gather(1, t)
        spread = None
        if smooth:
            spread = (y if weight is None else y * weight).sum(1, True)
        total = exponential(y, y).sum(1, True)
        y.div_(total)
        total.log_()
        if spread is not None:
            spreads.append((total * parts).sub_(spread))
        losses.append(total.sub_(picked))
    return _joined(losses), _joined(spreads) if smooth else None


def index_loss_gradient(
    grad: Tensor,
    probabilities: Tensor,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    smoothing: float,
    divisor: Number,
) -> Tensor:
    """The gradient of the logits from that of each loss or of their sum."""
    samples = Samples(indices, probabilities.shape[1], ignore_index, weight)
    return samples.attempt(lambda: _index_gradient(grad, probabilities, samples, smoothing, divisor))


def _index_gradient(grad: Tensor, probabilities: Tensor, samples: Samples, smoothing: float, divisor: Number) -> Tensor:
    share, weights = samples.shares(grad, divisor), samples.weights()
    at_target = share if weights is None else weights.mul_(share)
    whole, each = at_target, None
    if smoothing != 0:
        at_target = at_target * (1 - smoothing)
        each = share * (smoothing / samples.classes)
        whole = at_target + each * (samples.classes if samples.weight is None else samples.weight.sum())
    result, minus = torch.empty_like(probabilities), -at_target
    weight = None if each is None or samples.weight is None else _along_classes(samples.weight, probabilities)
    for y, d, t, w, m, e in along(1, probabilities, result, samples.indices, whole, minus, each):
        torch.mul(y, w, out=d)
        if e is not None:
            d.sub_(e if weight is None else e * weight)
        if isinstance(m, Tensor):
            d.scatter_add_(1, t, m if m.dim() else m.expand_as(t))
        else:
            d.scatter_(1, t, m, reduce="add")
    return result


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts along dimension 0 as one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _along_classes(weight: Tensor, like: Tensor) -> Tensor:
    """The weights of the classes along dimension 1."""
    return weight.reshape(-1, *(1,) * (like.dim() - 2))


def picked_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Number]:
    """Negative log-likelihood, and what the sum was divided by."""
    samples = Samples(indices, input.shape[1], ignore_index, weight)
    losses = samples.attempt(lambda: input.gather(1, samples.indices)).neg_()
    weights = samples.weights()
    return samples.reduced(losses if weights is None else losses.mul_(weights), weights, reduction)


def picked_loss_gradient(
    grad: Tensor,
    shape: torch.Size,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    divisor: Number,
) -> Tensor:
    """The gradient of the log-probabilities, which had the shape given."""
    # samples that are ignored for a class write to its numbers, and nobody else does
    column = ignore_index if 0 <= ignore_index < shape[1] else None
    samples = Samples(indices, shape[1], ignore_index if column is None else -1, weight)

    def scattered() -> Tensor:
        minus, weights, result = -samples.shares(grad, divisor), samples.weights(), grad.new_zeros(*shape)
        if weights is not None:
            minus = weights.mul_(minus)
        if isinstance(minus, Tensor) and not minus.dim():
            minus = minus.expand_as(samples.indices)
        result.scatter_(1, samples.indices, minus)
        if column is not None:
            result.select(1, column).zero_()
        return result

    return samples.attempt(scattered)


def probability_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor]:
    r"""Cross-entropy :math:`-\sum_c q_c (x_c - m) + \log(\sum_c e^{x_c - m}) \sum_c q_c`, and probabilities."""
    input = input.contiguous()
    probabilities, losses = torch.empty_like(input), []
    for x, t, y in along(1, input, target, probabilities):
        torch.sub(x, x.amax(1, True), out=y)
        q = _smoothed(t, weight, smoothing)
        loss = (q * y).sum(1, True).neg_()
        total = exponential(y, y).sum(1, True)
        y.div_(total)
        losses.append(loss.addcmul_(q.sum(1, True), total.log_()))
    of_each = _joined(losses)
    if reduction == "none":
        return of_each.squeeze(1), probabilities
    return of_each.mean() if reduction == "mean" else of_each.sum(), probabilities


def probability_loss_gradient(
    grad: Tensor, probabilities: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, divisor: int
) -> Tensor:
    """The gradient of the logits from that of each loss or of their sum."""
    share = grad / divisor if divisor != 1 else grad
    columns = (share.unsqueeze(1),) if share.dim() else ()
    result = torch.empty_like(probabilities)
    for y, t, d, *given in along(1, probabilities, target, result, *columns):
        g = given[0] if given else share
        q = _smoothed(t, weight, smoothing)
        torch.mul(y, q.sum(1, True).mul_(g), out=d)
        d.addcmul_(q, g, value=-1)
    return result


def _smoothed(target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    if smoothing > 0:
        target = (target * (1 - smoothing)).add_(smoothing / target.shape[1])
    return target if weight is None else target * _along_classes(weight, target)
