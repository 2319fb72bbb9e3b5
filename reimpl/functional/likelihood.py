"""Losses of class probabilities: negative log-likelihood, the notes' guarded cross-entropy, and the 0/1 loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import (
    autocast_to_float32,
    call,
    in_its_own_right,
    opmath_dtype,
    scalar_type_name,
)
from reimpl.functional._losses import plain_targets as _losses_plain_targets
from reimpl.functional._losses.plain import final_worker, worker
from reimpl.functional._losses.reduction import reduced, resolve
from reimpl.functional._losses.targets import (
    as_batch,
    check_class_indices,
    check_range,
    check_unit_interval,
    class_dim,
    classes_that_count,
    counted,
)
from reimpl.functional._options import integer
from reimpl.functional._plain import ordinary
from reimpl.functional.kernels import attempt, teach

_WORKERS = ("_losses.numba_targets", _losses_plain_targets)


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood :math:`\ell_n = -w_{t_n} x_{n t_n}` of log-probabilities :math:`x`.

    ``"mean"`` divides the sum by the weights of the target classes.

    Args:
        input: log-probabilities, shape :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, \dots)`.
        target: class indices of shape :math:`()`, :math:`(N)` or :math:`(N, d_1, \dots)` in int64 (or uint8, but for
            planes).
        weight: :math:`w`, shape :math:`(C)`; it has no gradient.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index: a class index that adds nothing to the loss or its gradient.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: batch sizes differ, ``input`` has no dimension, or ``reduction`` is unknown.
        RuntimeError: shapes or dtypes do not fit; the text is PyTorch's.
        IndexError: a target is no class (checked on the CPU; on CUDA a device assertion).
        NotImplementedError: the dtype is not floating-point.

    Source: F5, F6; N2, N3. PyTorch: :func:`torch.nn.functional.nll_loss`.
    """
    reduction = resolve(reduction, size_average, reduce)
    if type(ignore_index) is not int:
        ignore_index = integer(ignore_index)
    key = ("nll_loss", ignore_index, reduction)
    done: Tensor | None = attempt(key, input, target, weight)
    if done is not None:
        return done
    ignore_index = integer(ignore_index)
    input, weight = autocast_to_float32(input, weight)
    if input.dim() == 0:
        raise ValueError("Expected 1 or more dimensions (got 0)")
    works = None
    if input.numel() and ordinary(target) and target.device == input.device:
        works = worker(*_WORKERS, input, weight)
    check_class_indices(input, target, weight, ignore_index, values=works is None)
    batch, indices = as_batch(input, target)
    weight = None if weight is None else weight.reshape(-1)
    if works:
        loss: Tensor = _WorkedPickedNegative.apply(batch, indices, ignore_index, weight, reduction, works)
        teach(key, works, _through_picks, batch, weight)
        return loss.reshape(()) if input.dim() == 1 else loss
    if not input.is_floating_point():
        kernel = "nll_loss2d_forward_out_frame" if input.dim() > 2 else "nll_loss_out_frame"
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{scalar_type_name(input.dtype)}'")
    if batch.shape[1]:
        losses = call(_PickedNegative, _picked_negative, batch, indices, ignore_index, weight)
    else:
        losses, weight = batch.sum(1), None  # of samples that are all ignored
    if reduction == "none":
        return (losses.reshape(()) if input.dim() == 1 else losses).contiguous()  # type: ignore[no-any-return]
    losses = losses.to(opmath_dtype(input.dtype))
    return reduced(losses, reduction, input.dtype, counted(indices, ignore_index, weight, losses.dtype))


def cross_entropy_of_probabilities(input: Tensor, target: Tensor, eps: float = 1e-7, reduction: str = "mean") -> Tensor:
    r"""Cross-entropy of probabilities, kept finite by a small number.

    .. math:: \ell_n = -\sum_c t_{nc} \log(y_{nc} + \epsilon)

    ``"mean"`` divides by the number of samples. Below :math:`y \approx \epsilon` the loss levels off at
    :math:`-\log \epsilon`; :func:`cross_entropy`, which takes logits, needs no such guard.

    Args:
        input: probabilities, shape :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, \dots)`.
        target: class indices, or one-hot rows or probabilities of the shape of ``input``.
        eps: :math:`\epsilon`.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: batch sizes differ, ``eps`` is negative, or ``reduction`` is unknown.
        RuntimeError: shapes or dtypes do not fit, or a probability lies outside [0, 1] (checked on the CPU).
        IndexError: a target is no class.
        NotImplementedError: the dtype is not floating-point.

    Source: F5; N3. PyTorch has none.
    """
    reduction = resolve(reduction)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    (input,) = autocast_to_float32(input)
    if not input.is_floating_point():
        kernel = "cross_entropy_of_probabilities"
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{scalar_type_name(input.dtype)}'")
    # A softmax may round to a little over 1.
    check_unit_interval(input, "input", slack=4 * torch.finfo(input.dtype).eps)
    dim = class_dim(input)
    if target.shape == input.shape:
        if not target.is_floating_point():
            target = target.to(input.dtype)
        losses = call(_GuardedLoss, _guarded_loss, input, target, eps).sum(dim)
    else:
        check_class_indices(input, target, None, ignore_index=-1)
        batch, indices = as_batch(input, target)
        picked = batch.gather(1, indices.unsqueeze(1)).squeeze(1)
        losses = call(_GuardedLoss, _guarded_loss, picked, None, eps).reshape(target.shape)
    return reduced(losses, reduction, input.dtype)


def zero_one_loss(input: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    r"""0/1 loss :math:`\ell_n = [\operatorname{argmax}_c x_{nc} \ne t_n]`: 1 for each sample put in the wrong class.

    It has no useful derivative, so a surrogate is minimised in its place: the negative log-likelihood goes on
    improving where this one is 0 already. Of equal scores the first class is taken.

    Args:
        input: scores, shape :math:`(C)`, :math:`(N, C)` or :math:`(N, C, d_1, \dots)`.
        target: class indices of the shape of ``input`` without its classes.
        ignore_index: a class index that is not counted.
        reduction: ``"none"``, ``"mean"`` (over the samples that count) or ``"sum"``.

    Returns:
        floating-point, of the dtype of ``input``; it does not require a gradient.

    Raises:
        ValueError: batch sizes differ, ``input`` has no dimension, or ``reduction`` is unknown.
        RuntimeError: shapes or dtypes do not fit.
        IndexError: a target is no class.

    Source: F6; N2 §8.1.2. PyTorch has none.
    """
    reduction = resolve(reduction)
    if input.dim() == 0:
        raise ValueError("Expected 1 or more dimensions (got 0)")
    check_class_indices(input, target, None, ignore_index)
    dtype = input.dtype if input.is_floating_point() else torch.get_default_dtype()
    batch, indices = as_batch(input.detach(), target)
    classes, kept = classes_that_count(indices, ignore_index)
    wrong = ((batch.argmax(1) != classes) & kept).to(opmath_dtype(dtype))
    if reduction == "none":
        wrong = wrong.reshape(target.shape)
    return reduced(wrong, reduction, dtype, counted(indices, ignore_index, None, wrong.dtype))


def _picked_negative(input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
    classes, kept = classes_that_count(indices, ignore_index)
    picked = input.gather(1, classes.unsqueeze(1)).squeeze(1)
    if weight is not None:
        picked = picked * weight[classes]
    return torch.where(kept, -picked, 0)


class _PickedNegative(torch.autograd.Function):
    r""":math:`\bar x_{n t_n} = -w_{t_n} \bar\ell_n`, and 0 for every other class."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None) -> Tensor:
        return _picked_negative(input, indices, ignore_index, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, indices, ctx.ignore_index, weight = inputs
        ctx.classes = input.shape[1]
        ctx.save_for_backward(indices, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, weight = ctx.saved_tensors
        return _scattered(grad, indices, ctx.classes, ctx.ignore_index, weight), None, None, None


def _scattered(grad: Tensor, indices: Tensor, classes: int, ignore_index: int, weight: Tensor | None) -> Tensor:
    targets, kept = classes_that_count(indices, ignore_index)
    picked = torch.where(kept, -grad if weight is None else -grad * weight[targets], 0).unsqueeze(1)
    return grad.new_zeros((grad.shape[0], classes, *grad.shape[1:])).scatter(1, targets.unsqueeze(1), picked)


class _WorkedPickedNegative(torch.autograd.Function):
    """:class:`_PickedNegative` with the sum or mean, in place or by a kernel, which also checks the targets."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        indices: Tensor,
        ignore_index: int,
        weight: Tensor | None,
        reduction: str,
        worker: Any,
    ) -> Tensor:
        results = worker.picked_loss(input, indices, ignore_index, weight, reduction)
        if results is None:
            check_range(indices, input.shape[1], ignore_index)
        loss: Tensor = in_its_own_right(results[0])
        ctx.shape, ctx.ignore_index, ctx.divisor = input.shape, ignore_index, results[1]
        ctx.save_for_backward(indices, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, weight = saved = ctx.saved_tensors
        works = final_worker(*_WORKERS, grad, weight)
        if works:
            options = (ctx.ignore_index, weight, ctx.divisor)
            return works.picked_loss_gradient(grad, ctx.shape, indices, *options), *(None,) * 5
        return _through_picks((ctx.ignore_index,), (grad,), saved, (ctx.divisor,), ctx.shape), *(None,) * 5


def _through_picks(options: Any, grads: Any, saved: Any, numbers: Any, shape: Any) -> Tensor:
    """The gradient of the log-probabilities from that of each loss, or of their sum over a number."""
    (grad,), (indices, *weights) = grads, saved
    each = (grad / numbers[0] if numbers else grad).expand(indices.shape)
    return _scattered(each, indices, shape[1], options[0], weights[0] if weights else None)


def _guarded_loss(input: Tensor, target: Tensor | None, eps: float) -> Tensor:
    loss = -torch.log(input.to(opmath_dtype(input.dtype)) + eps)
    return loss if target is None else target.to(loss.dtype) * loss


class _GuardedLoss(torch.autograd.Function):
    r""":math:`\bar y = -t \bar z/(y + \epsilon)`, :math:`t = 1` without targets, and :math:`\bar t = -\bar z \log(y +
    \epsilon)`. Half-width tensors are kept as they are; what is wide is made again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor | None, eps: float) -> Tensor:
        return _guarded_loss(input, target, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, target, ctx.eps = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        input, target = ctx.saved_tensors
        wide, grad_target = input.to(grad.dtype), None
        grad_input = -grad / (wide + ctx.eps)
        if target is not None:
            grad_input = grad_input * target.to(grad.dtype)
            if ctx.needs_input_grad[1]:
                grad_target = (grad * _guarded_loss(wide, None, ctx.eps)).to(target.dtype)
        return grad_input.to(input.dtype), grad_target, None
