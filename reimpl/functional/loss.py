"""Cross-entropy of logits: its arguments, and who does the work."""

from __future__ import annotations

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_disabled, autocast_to_float32, call, scalar_type_name
from reimpl.functional._losses.cross_entropy import (
    OF_INDICES,
    OF_PROBABILITIES,
    IndexLoss,
    ProbabilityLoss,
    WorkedIndexLoss,
    WorkedProbabilityLoss,
    index_loss,
    probability_loss,
    through_worked_loss,
)
from reimpl.functional._losses.half import HalfIndexLoss
from reimpl.functional._losses.plain import half_runs_plainly, worker
from reimpl.functional._losses.reduction import reduced, resolve
from reimpl.functional._losses.targets import as_batch, check_class_indices, class_dim, counted
from reimpl.functional._options import check_number, integer
from reimpl.functional._plain import ordinary
from reimpl.functional.kernels import attempt, teach


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
        target: class indices of shape :math:`()` (or :math:`(1)`), :math:`(N)` or :math:`(N, d_1, \dots)` in int64 or
            uint8, or probabilities of the shape of ``input``.
        weight: :math:`w`, shape :math:`(C)`.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index: a class index that adds nothing to the loss or its gradient.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: :math:`\epsilon` in [0, 1].

    Raises:
        ValueError: batch sizes differ, or ``reduction`` is unknown.
        RuntimeError: shapes or dtypes do not fit, or ``label_smoothing`` exceeds 1.
        IndexError: a target is no class (checked on the CPU; on CUDA a device assertion), or ``input`` is a scalar.

    Source: F5, F18; N3, N4. PyTorch: :func:`torch.nn.functional.cross_entropy`.
    """
    reduction = resolve(reduction, size_average, reduce)
    if type(ignore_index) is not int:
        ignore_index = integer(ignore_index)
    done: Tensor | None = attempt(("cross_entropy", ignore_index, label_smoothing, reduction), input, target, weight)
    if done is not None:
        return done
    ignore_index = integer(ignore_index)
    check_number(label_smoothing)
    label_smoothing = float(label_smoothing)
    input, weight = autocast_to_float32(input, weight)
    # a negative number smooths nothing, as in PyTorch, and NaN no more
    smoothing = label_smoothing if label_smoothing > 0 else 0.0
    if input.shape == target.shape:
        (target,) = autocast_to_float32(target)
        return _with_probabilities(input, target, weight, ignore_index, reduction, smoothing)
    return _with_indices(input, target, weight, ignore_index, reduction, smoothing)


def _with_indices(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    works, by_parts = None, False
    if input.numel() and ordinary(target) and target.device == input.device:
        works = worker(*OF_INDICES, input, weight)
        by_parts = works is None and smoothing == 0 and half_runs_plainly(input, weight)
    _check_indices(input, target, weight, ignore_index, smoothing, values=works is None and not by_parts)
    logits, indices = as_batch(input, target)
    weight = None if weight is None else weight.reshape(-1)
    loss: Tensor
    if works:
        loss, _ = WorkedIndexLoss.apply(logits, indices, ignore_index, weight, smoothing, reduction, works)
        key = ("cross_entropy", ignore_index, smoothing, reduction)
        teach(key, works, through_worked_loss, logits, weight)
        return loss.reshape(()) if input.dim() == 1 else loss
    if by_parts:
        loss = HalfIndexLoss.apply(logits, indices, ignore_index, weight, reduction)
        return loss.reshape(()) if input.dim() == 1 else loss
    with autocast_disabled(input.device):
        if logits.shape[1]:
            loss, _ = call(IndexLoss, index_loss, logits, indices, ignore_index, weight, smoothing)
        else:
            loss, weight = logits.sum(1), None  # of samples that are all ignored
        if reduction == "none":
            loss = loss.reshape(() if input.dim() == 1 else target.shape)
        count = counted(indices, ignore_index, weight, loss.dtype)
        if smoothing != 0:
            # PyTorch adds the means of two parts, of which the first has no weights left in its sum either
            count = count.masked_fill(count == 0, torch.nan)
        return reduced(loss, reduction, input.dtype, count)


def _with_probabilities(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    _check_probabilities(input, target, weight, ignore_index, smoothing)
    loss: Tensor
    if input.numel() and _fixed_and_alike(input, target, weight):
        works = worker(*OF_PROBABILITIES, input, target, weight)
        if works:
            logits, probabilities = (input, target) if input.dim() > 1 else (input.unsqueeze(0), target.unsqueeze(0))
            loss, _ = WorkedProbabilityLoss.apply(logits, probabilities, weight, smoothing, reduction, works)
            key = ("cross_entropy", ignore_index, smoothing, reduction)
            teach(key, works, through_worked_loss, logits, weight)
            return loss.reshape(()) if input.dim() == 1 else loss
    dim = class_dim(input)
    with autocast_disabled(input.device):
        loss, _ = call(ProbabilityLoss, probability_loss, input, target, weight, smoothing, dim)
        dtype = torch.promote_types(input.dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
        # PyTorch divides by the quotient of the numbers of logits and of classes
        return reduced(loss, reduction, dtype, None if input.shape[dim] else loss.new_zeros(()))


def _fixed_and_alike(input: Tensor, *others: Tensor | None) -> bool:
    """Whether the others need no gradient, and are of the input's dtype and device."""
    return all(
        t is None or (not t.requires_grad and t.dtype is input.dtype and t.device == input.device) for t in others
    )


def _check_indices(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, values: bool
) -> None:
    if smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing:g}")
    _check_floating(input)
    if input.dim() == 0:
        raise IndexError("Dimension out of range (expected to be in range of [-1, 0], but got 1)")
    check_class_indices(input, target, weight, ignore_index, values)


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
    if input.dim() == 0:
        raise IndexError("Dimension specified as 1 but tensor has no dimensions")
    if smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing:g}")
    _check_floating(input)
    classes = input.shape[class_dim(input)]
    if weight is not None and (weight.dim() != 1 or weight.numel() != classes):
        raise RuntimeError(
            f"cross_entropy: weight tensor should be defined either for all {classes} classes or no classes"
            f" but got weight tensor of shape: {list(weight.shape)}"
        )
