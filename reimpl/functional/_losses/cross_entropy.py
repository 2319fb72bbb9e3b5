"""Cross-entropy as autograd Functions, and as compositions: of class indices, and of class probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import in_its_own_right, opmath_dtype
from reimpl.functional._losses import plain_targets as _losses_plain_targets
from reimpl.functional._losses.plain import final_worker
from reimpl.functional._losses.pointwise import laid_out
from reimpl.functional._losses.targets import check_range, classes_that_count
from reimpl.functional.softmax import log_softmax_composition

OF_INDICES = ("_losses.numba", _losses_plain_targets)
OF_PROBABILITIES = ("_losses.numba_targets", _losses_plain_targets)


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector laid along dimension ``dim`` of ``ndim``."""
    return vector.reshape(*(1,) * dim, -1, *(1,) * (ndim - dim - 1))


def _class_weights(weight: Tensor | None, like: Tensor) -> Tensor:
    ones = like.new_ones(like.shape[1])
    return ones if weight is None else weight.to(like.dtype)


def index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the log-probabilities; dimension 1 holds the classes."""
    log_probs = log_softmax_composition(input.to(opmath_dtype(input.dtype)), 1)
    classes, kept = classes_that_count(indices, ignore_index)
    w = _class_weights(weight, log_probs)
    picked = log_probs.gather(1, classes.unsqueeze(1)).squeeze(1) * w[classes]
    loss = -picked
    if smoothing != 0:
        spread = (log_probs * _along(w, 1, input.dim())).sum(1)
        loss = (1 - smoothing) * loss - (smoothing / input.shape[1]) * spread
    return torch.where(kept, loss, 0), log_probs


class IndexLoss(torch.autograd.Function):
    """The log-probabilities are a differentiable output, so that the gradient, which is made from them, can itself be
    differentiated."""

    generate_vmap_rule = True
    results_differ = True

    @staticmethod
    def forward(
        input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        return index_loss(input, indices, ignore_index, weight, smoothing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, indices, ctx.ignore_index, weight, ctx.smoothing = inputs
        ctx.dtype, ctx.wide = input.dtype, output[1].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_to_keep(input, output[1]), indices, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, indices, weight = ctx.saved_tensors
        log_probs, total = _log_probabilities(kept, ctx.wide, 1), grad_log_probs
        if grad is not None:
            errors = _index_errors(grad, log_probs, indices, ctx.ignore_index, weight, ctx.smoothing)
            total = errors if total is None else total + errors
        return _through_softmax(torch.exp(log_probs), total, None, 1, ctx.dtype), None, None, None, None


def through_scores(
    grad: Tensor, input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None
) -> Tensor | None:
    """The gradient of half-width scores from that of each sample's loss, by differentiable operators."""
    log_probs = log_softmax_composition(input.to(grad.dtype), 1)
    errors = _index_errors(grad, log_probs, indices, ignore_index, weight, 0.0)
    return _through_softmax(torch.exp(log_probs), errors, None, 1, input.dtype)


def _to_keep(input: Tensor, log_probs: Tensor) -> Tensor:
    """Which of the two the backward pass is to read: scores of half the width take half the room."""
    return log_probs if log_probs.dtype == input.dtype else input


def _log_probabilities(kept: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    """The log-probabilities, of the dtype that they had, from what :func:`_to_keep` chose."""
    return kept if kept.dtype == dtype else log_softmax_composition(kept.to(dtype), dim)


def _index_errors(
    grad: Tensor, like: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float
) -> Tensor:
    """The gradient of the log-probabilities (shaped ``like`` them) from that of each sample's loss."""
    classes, kept = classes_that_count(indices, ignore_index)
    sample = torch.where(kept, grad, 0).unsqueeze(1)
    total = torch.zeros_like(like).scatter(1, classes.unsqueeze(1), 1)
    total = total * ((1 - smoothing) * -sample)
    if smoothing != 0:
        total = total - (smoothing / like.shape[1]) * sample
    return total * _along(_class_weights(weight, like), 1, like.dim())


class WorkedIndexLoss(torch.autograd.Function):
    """:class:`IndexLoss` with the sum or mean, in place or by a kernel, which also checks the targets."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        indices: Tensor,
        ignore_index: int,
        weight: Tensor | None,
        smoothing: float,
        reduction: str,
        worker: Any,
    ) -> tuple[Tensor, Tensor]:
        results = worker.index_loss(input, indices, ignore_index, weight, smoothing, reduction)
        if results is None:
            check_range(indices, input.shape[1], ignore_index)
        loss, probabilities, ctx.divisor = results
        ctx.options, ctx.dtype = (ignore_index, smoothing), input.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probabilities, indices, weight)
        return in_its_own_right(loss), probabilities

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_probabilities: Tensor | None) -> tuple[Tensor | None, ...]:
        probabilities, indices, weight = saved = ctx.saved_tensors
        ignore_index, smoothing = ctx.options
        if grad is not None and grad_probabilities is None:
            worker = final_worker(*OF_INDICES, grad, probabilities, weight)
            if worker:
                options = (ignore_index, weight, smoothing, ctx.divisor)
                return worker.index_loss_gradient(grad, probabilities, indices, *options), *(None,) * 6
        grads = grad, grad_probabilities
        return _through_index_loss(ctx.options, grads, saved, ctx.divisor, ctx.dtype), *(None,) * 6


def _through_index_loss(options: Any, grads: Any, saved: Any, divisor: Any, dtype: torch.dtype) -> Tensor | None:
    (ignore_index, smoothing), (grad, grad_probabilities), (probabilities, indices, weight) = options, grads, saved
    total = None
    if grad is not None:
        each = (grad / divisor).expand(indices.shape)
        total = _index_errors(each, probabilities, indices, ignore_index, weight, smoothing)
    return _through_softmax(probabilities, total, grad_probabilities, 1, dtype)


def _through_probability_loss(smoothing: float, grads: Any, saved: Any, divisor: int) -> Tensor | None:
    (grad, grad_probabilities), (probabilities, target, weight) = grads, saved
    total = None
    if grad is not None:
        each = (grad / divisor).expand(target.select(1, 0).shape).unsqueeze(1)
        total = -each * _smoothed_targets(target, weight, smoothing, 1, probabilities.dtype)
    return _through_softmax(probabilities, total, grad_probabilities, 1, probabilities.dtype)


def through_worked_loss(options: Any, grads: Any, saved: Any, numbers: Any, shape: Any) -> Tensor | None:
    """The gradient of the logits by differentiable operators, for the compiled node."""
    (ignore_index, smoothing, reduction), (probabilities, target) = options, saved[:2]
    saved = (*saved, None)[:3]
    if target.is_floating_point():
        divisor = probabilities.numel() // shape[1] if reduction == "mean" else 1
        return _through_probability_loss(smoothing, grads, saved, divisor)
    divisor = numbers[0] if numbers else 1.0
    return _through_index_loss((ignore_index, smoothing), grads, saved, divisor, probabilities.dtype)


def _through_softmax(
    probabilities: Tensor, total: Tensor | None, grad_probabilities: Tensor | None, dim: int, dtype: torch.dtype
) -> Tensor | None:
    """Gradient of the logits from that of the log-probabilities and that of the probabilities."""
    if grad_probabilities is not None:
        through = grad_probabilities * probabilities
        total = through if total is None else total + through
    return None if total is None else (total - probabilities * total.sum(dim, keepdim=True)).to(dtype)


def _smoothed_targets(target: Tensor, weight: Tensor | None, smoothing: float, dim: int, dtype: torch.dtype) -> Tensor:
    q = target.to(dtype)
    if smoothing > 0:
        q = q * (1 - smoothing) + smoothing / max(1, target.shape[dim])
    return q if weight is None else q * _along(_as_wide(weight, dtype), dim, target.dim())


def _as_wide(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.is_complex() else weight.to(dtype)


def probability_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, dim: int
) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the log-probabilities; dimension ``dim`` holds the classes."""
    dtype = opmath_dtype(torch.promote_types(input.dtype, target.dtype))
    log_probs = log_softmax_composition(input.to(dtype), dim)
    return -(log_probs * _smoothed_targets(target, weight, smoothing, dim, dtype)).sum(dim), log_probs


class ProbabilityLoss(torch.autograd.Function):
    generate_vmap_rule = True
    results_differ = True

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, dim: int
    ) -> tuple[Tensor, Tensor]:
        return probability_loss(input, target, weight, smoothing, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, target, weight, ctx.smoothing, ctx.dim = inputs
        ctx.dtype, ctx.wide = input.dtype, output[1].dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(_to_keep(input, output[1]), target, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, target, weight = ctx.saved_tensors
        dim, dtype = ctx.dim, ctx.wide
        log_probs = _log_probabilities(kept, dtype, dim)
        total = grad_target = grad_weight = None
        if grad is not None:
            sample = -grad.unsqueeze(dim)
            total = sample * _smoothed_targets(target, weight, ctx.smoothing, dim, dtype)
            if ctx.needs_input_grad[1]:
                grad_target = sample * log_probs * (1 - ctx.smoothing)
                if weight is not None:
                    grad_target = grad_target * _along(_as_wide(weight, dtype), dim, target.dim())
                grad_target = grad_target.to(target.dtype)
            if weight is not None and ctx.needs_input_grad[2]:
                others = [d for d in range(target.dim()) if d != dim]
                grad_weight = sample * log_probs * _smoothed_targets(target, None, ctx.smoothing, dim, dtype)
                grad_weight = (grad_weight.sum(others) if others else grad_weight).to(weight.dtype)
        if grad_log_probs is not None:
            total = grad_log_probs if total is None else total + grad_log_probs
        grad_input = _through_softmax(torch.exp(log_probs), total, None, dim, ctx.dtype)
        return None if grad_input is None else laid_out(grad_input), grad_target, grad_weight, None, None


class WorkedProbabilityLoss(torch.autograd.Function):
    """:class:`ProbabilityLoss` of fixed targets and weights with the sum or mean, in place or by a kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        smoothing: float,
        reduction: str,
        worker: Any,
    ) -> tuple[Tensor, Tensor]:
        loss, probabilities = worker.probability_loss(input, target, weight, smoothing, reduction)
        ctx.divisor = input.numel() // input.shape[1] if reduction == "mean" else 1
        ctx.smoothing = smoothing
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probabilities, target, weight)
        return in_its_own_right(loss), probabilities

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_probabilities: Tensor | None) -> tuple[Tensor | None, ...]:
        probabilities, target, weight = saved = ctx.saved_tensors
        if grad is not None and grad_probabilities is None:
            worker = final_worker(*OF_PROBABILITIES, grad, probabilities, target, weight)
            if worker:
                options = (weight, ctx.smoothing, ctx.divisor)
                return worker.probability_loss_gradient(grad, probabilities, target, *options), *(None,) * 5
        grads = grad, grad_probabilities
        return _through_probability_loss(ctx.smoothing, grads, saved, ctx.divisor), *(None,) * 5
