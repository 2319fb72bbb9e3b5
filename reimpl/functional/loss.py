"""Classification losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional import _losses_plain
from reimpl.functional._dispatch import autocast_disabled, autocast_to_float32, call, opmath_dtype, scalar_type_name
from reimpl.functional._losses_plain import final, runs_plainly
from reimpl.functional._reduction import reduced, resolve
from reimpl.functional._targets import (
    as_batch,
    check_class_indices,
    check_range,
    class_dim,
    classes_that_count,
    counted,
    holds_values,
)
from reimpl.functional.kernels import kernels_for
from reimpl.functional.softmax import log_softmax_composition


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy between logits and target classes or class probabilities.

    .. math::
        \ell_n = -\sum_c w_c\, q_{nc} \log \hat y_{nc}, \qquad \hat y_n = \operatorname{softmax}(x_n), \qquad
        q_{nc} = (1 - \epsilon)\, t_{nc} + \epsilon / C

    with :math:`t` one-hot for class indices. ``"mean"`` divides the sum by the weights of the target classes for
    indices and by the number of samples for probabilities. The first error is
    :math:`\partial \ell_n/\partial x_n = \hat y_n \sum_c w_c q_{nc} - w \odot q_n`, which is :math:`\hat y - t` without
    weights and smoothing.

    Args:
        input: logits, shape :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, \dots)`.
        target: class indices of shape :math:`()`, :math:`(N)` or :math:`(N, d_1, \dots)` in int64 or uint8, or
            probabilities of the shape of ``input``.
        weight: :math:`w`, shape :math:`(C)`.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index: a class index that adds nothing to the loss or its gradient.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: :math:`\epsilon` in [0, 1].

    Raises:
        ValueError: batch sizes differ, or ``reduction`` is unknown.
        RuntimeError: shapes or dtypes do not fit, or ``label_smoothing`` exceeds 1.
        IndexError: a target is no class (checked on the CPU; on CUDA a device assertion).

    Source: F5, F18; N3, N4. PyTorch: :func:`torch.nn.functional.cross_entropy`.
    """
    reduction = resolve(reduction, size_average, reduce)
    # autocast leaves the wide types alone, and plain tensors have no other
    if runs_plainly(input, weight) and input.shape != target.shape:
        return _with_indices(input, target, weight, ignore_index, reduction, label_smoothing, plainly=True)
    input, weight = autocast_to_float32(input, weight)
    with autocast_disabled(input.device):
        if input.shape == target.shape:
            (target,) = autocast_to_float32(target)
            return _with_probabilities(input, target, weight, ignore_index, reduction, label_smoothing)
        return _with_indices(input, target, weight, ignore_index, reduction, label_smoothing, plainly=False)


def _with_indices(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    plainly: bool,
) -> Tensor:
    plainly = plainly and input.numel() > 0
    kernels = None
    if plainly and target.device == input.device and holds_values(target):
        kernels = kernels_for("_losses_numba", input, weight)
    all_count = _check_indices(input, target, weight, ignore_index, smoothing, values=kernels is None)
    logits, indices = as_batch(input, target)
    loss: Tensor
    if kernels:
        loss, _ = _CompiledIndexLoss.apply(logits, indices, ignore_index, weight, smoothing, reduction, kernels)
        return loss.reshape(target.shape) if input.dim() == 1 and reduction == "none" else loss
    if plainly and all_count and weight is None and smoothing == 0:
        loss, _ = _PlainIndexLoss.apply(logits, indices, reduction)
        return loss.reshape(target.shape) if input.dim() == 1 and reduction == "none" else loss
    weight = None if weight is None else weight.reshape(-1)
    loss, _ = call(_IndexLoss, _index_loss, logits, indices, ignore_index, weight, smoothing)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return reduced(loss, reduction, input.dtype, counted(indices, ignore_index, weight, loss.dtype))


def _with_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    _check_probabilities(input, target, weight, ignore_index, smoothing)
    dim = class_dim(input)
    loss, _ = call(_ProbabilityLoss, _probability_loss, input, target, weight, smoothing, dim)
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    return reduced(loss, reduction, dtype)


def _check_indices(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, values: bool
) -> bool:
    if smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing:g}")
    _check_floating(input)
    if input.dim() == 0:
        raise ValueError("Expected input to have at least 1 dimension, but got 0")
    return check_class_indices(input, target, weight, ignore_index, values)


def _check_floating(input: Tensor) -> None:
    if not input.is_floating_point():
        kernel = "log_softmax_lastdim_kernel_impl" if input.dim() <= 2 else "log_softmax_kernel_impl"
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{scalar_type_name(input.dtype)}'")


def _check_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float
) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {scalar_type_name(target.dtype)}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    if smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing:g}")
    if input.dim() == 0:
        raise IndexError("Dimension specified as 1 but tensor has no dimensions")
    _check_floating(input)
    classes = input.shape[class_dim(input)]
    if weight is not None and (weight.dim() != 1 or weight.numel() != classes):
        raise RuntimeError(
            f"cross_entropy: weight tensor should be defined either for all {classes} classes or no classes"
            f" but got weight tensor of shape: {list(weight.shape)}"
        )


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector laid along dimension ``dim`` of ``ndim``."""
    return vector.reshape(*(1,) * dim, -1, *(1,) * (ndim - dim - 1))


def _class_weights(weight: Tensor | None, like: Tensor) -> Tensor:
    ones = like.new_ones(like.shape[1])
    return ones if weight is None else weight.to(like.dtype)


def _index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the log-probabilities that it was read from; dimension 1 holds the classes."""
    log_probs = log_softmax_composition(input.to(opmath_dtype(input.dtype)), 1)
    classes, kept = classes_that_count(indices, ignore_index)
    w = _class_weights(weight, log_probs)
    picked = log_probs.gather(1, classes.unsqueeze(1)).squeeze(1) * w[classes]
    loss = -picked
    if smoothing != 0:
        spread = (log_probs * _along(w, 1, input.dim())).sum(1)
        loss = (1 - smoothing) * loss - (smoothing / input.shape[1]) * spread
    return torch.where(kept, loss, 0), log_probs


class _IndexLoss(torch.autograd.Function):
    r"""The log-probabilities are a differentiable output, so that the gradient, which is made from them, can itself
    be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        return _index_loss(input, indices, ignore_index, weight, smoothing)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, indices, ctx.ignore_index, weight, ctx.smoothing = inputs
        ctx.dtype = input.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], indices, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs, indices, weight = ctx.saved_tensors
        total = None
        if grad is not None:
            total = _index_errors(grad, log_probs, indices, ctx.ignore_index, weight, ctx.smoothing)
        grad_input = _through_log_softmax(log_probs, total, grad_log_probs, 1)
        return None if grad_input is None else grad_input.to(ctx.dtype), None, None, None, None


def _index_errors(
    grad: Tensor, log_probs: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float
) -> Tensor:
    """The gradient of the log-probabilities from that of each sample's loss."""
    classes, kept = classes_that_count(indices, ignore_index)
    sample = torch.where(kept, grad, 0).unsqueeze(1)
    total = torch.zeros_like(log_probs).scatter(1, classes.unsqueeze(1), 1)
    total = total * ((1 - smoothing) * -sample)
    if smoothing != 0:
        total = total - (smoothing / log_probs.shape[1]) * sample
    return total * _along(_class_weights(weight, log_probs), 1, log_probs.dim())


class _PlainIndexLoss(torch.autograd.Function):
    """:class:`_IndexLoss` with the sum or mean, in place, where all samples count alike."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
        log_probs = _losses_plain.log_softmax(input, 1)
        ctx.divisor = indices.numel() if reduction == "mean" else 1
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_probs, indices)
        return _losses_plain.picked_negative(log_probs, indices, reduction), log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs, indices = ctx.saved_tensors
        if grad is not None and grad_log_probs is None and final(grad):
            return _losses_plain.index_gradient(grad, log_probs, indices, ctx.divisor), None, None
        total = None
        if grad is not None:
            total = _index_errors((grad / ctx.divisor).expand(indices.shape), log_probs, indices, -100, None, 0.0)
        return _through_log_softmax(log_probs, total, grad_log_probs, 1), None, None


class _CompiledIndexLoss(torch.autograd.Function):
    """:class:`_IndexLoss` with the sum or mean, by a kernel, which also checks the targets."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        indices: Tensor,
        ignore_index: int,
        weight: Tensor | None,
        smoothing: float,
        reduction: str,
        kernels: Any,
    ) -> tuple[Tensor, Tensor]:
        results = kernels.index_loss(input, indices, ignore_index, weight, smoothing, reduction)
        if results is None:
            check_range(indices, input.shape[1], ignore_index)
        loss, log_probs, ctx.divisor = results
        ctx.ignore_index, ctx.smoothing = ignore_index, smoothing
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_probs, indices, weight)
        return loss, log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs, indices, weight = ctx.saved_tensors
        kernels = None
        if grad is not None and grad_log_probs is None and not torch.is_grad_enabled():
            kernels = kernels_for("_losses_numba", grad, log_probs, weight)
        total = None
        if kernels:
            options = (ctx.ignore_index, weight, ctx.smoothing, ctx.divisor)
            return kernels.index_loss_gradient(grad, log_probs, indices, *options), *(None,) * 6
        if grad is not None:
            losses_grad = (grad / ctx.divisor).expand(indices.shape)
            total = _index_errors(losses_grad, log_probs, indices, ctx.ignore_index, weight, ctx.smoothing)
        return _through_log_softmax(log_probs, total, grad_log_probs, 1), *(None,) * 6


def _through_log_softmax(log_probs: Tensor, first: Tensor | None, second: Tensor | None, dim: int) -> Tensor | None:
    """Gradient of the logits from (the sum of) two gradients of the log-probabilities."""
    if first is None or second is None:
        grad = second if first is None else first
    else:
        grad = first + second
    return None if grad is None else grad - torch.exp(log_probs) * grad.sum(dim, keepdim=True)


def _smoothed_targets(target: Tensor, weight: Tensor | None, smoothing: float, dim: int, dtype: torch.dtype) -> Tensor:
    q = target.to(dtype)
    if smoothing > 0:
        q = q * (1 - smoothing) + smoothing / target.shape[dim]
    return q if weight is None else q * _along(weight.to(dtype), dim, target.dim())


def _probability_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, dim: int
) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the log-probabilities; dimension ``dim`` holds the classes."""
    dtype = opmath_dtype(torch.promote_types(input.dtype, target.dtype))
    log_probs = log_softmax_composition(input.to(dtype), dim)
    return -(log_probs * _smoothed_targets(target, weight, smoothing, dim, dtype)).sum(dim), log_probs


class _ProbabilityLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, dim: int
    ) -> tuple[Tensor, Tensor]:
        return _probability_loss(input, target, weight, smoothing, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, target, weight, ctx.smoothing, ctx.dim = inputs
        ctx.dtype = input.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], target, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_log_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        log_probs, target, weight = ctx.saved_tensors
        dim, dtype = ctx.dim, log_probs.dtype
        total = grad_target = grad_weight = None
        if grad is not None:
            sample = -grad.unsqueeze(dim)
            total = sample * _smoothed_targets(target, weight, ctx.smoothing, dim, dtype)
            if ctx.needs_input_grad[1]:
                grad_target = sample * log_probs * (1 - ctx.smoothing)
                if weight is not None:
                    grad_target = grad_target * _along(weight.to(dtype), dim, target.dim())
                grad_target = grad_target.to(target.dtype)
            if weight is not None and ctx.needs_input_grad[2]:
                others = [d for d in range(target.dim()) if d != dim]
                grad_weight = sample * log_probs * _smoothed_targets(target, None, ctx.smoothing, dim, dtype)
                grad_weight = (grad_weight.sum(others) if others else grad_weight).to(weight.dtype)
        grad_input = _through_log_softmax(log_probs, total, grad_log_probs, dim)
        grad_input = None if grad_input is None else grad_input.to(ctx.dtype)
        return grad_input, grad_target, grad_weight, None, None
