"""Losses of yes-or-no labels: binary cross-entropy of probabilities and of logits, and with labels that are unknown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import (
    autocast_enabled,
    autocast_to_float32,
    call,
    opmath_dtype,
    scalar_type_name,
    transforming,
)
from reimpl.functional._losses.pointwise import Pointwise, laid_out, pointwise_loss, suits
from reimpl.functional._losses.reduction import reduced, resolve
from reimpl.functional._losses.targets import (
    check_constant,
    check_no_truth_values,
    check_real_weight,
    check_unit_interval,
)
from reimpl.functional.activation import logistic, minus_log_sigmoid

# PyTorch's guards: a logarithm is at least -100, and x(1 - x), which divides the gradient, at least 1e-12.
_LEAST_LOG = -100.0
_LEAST_SPREAD = 1e-12


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Binary cross-entropy :math:`\ell_i = -w_i [t_i \log x_i + (1 - t_i) \log(1 - x_i)]` of probabilities.

    Logarithms below -100 count as -100, and the gradient :math:`w (x - t)/(x (1 - x))` takes at least
    :math:`10^{-12}` below, as in PyTorch.

    Args:
        input: probabilities, any shape.
        target: probabilities (0 and 1 for labels), of the shape and dtype of ``input``.
        weight: :math:`w`, a shape that broadcasts to that of ``input``; it has no gradient.
        size_average, reduce: deprecated, as in PyTorch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: the shapes differ, or ``reduction`` is unknown.
        RuntimeError: the dtypes differ, a number lies outside [0, 1] (checked on the CPU; NaN does), or autocast is on
            where PyTorch calls the function unsafe (CUDA).
        NotImplementedError: the dtype is not floating-point.

    Source: F5; N3, N4. PyTorch: :func:`torch.nn.functional.binary_cross_entropy`.
    """
    reduction = resolve(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size ({input.size()}) "
            "is deprecated. Please ensure they have the same size."
        )
    if weight is None and input.device.type == "cpu" and suits(input, target):
        return pointwise_loss(input, target, _PROBABILITIES, reduction)
    if weight is not None:
        weight = weight.expand(torch.broadcast_shapes(target.size(), weight.size()))
    if input.device.type == "cuda" and autocast_enabled(input.device):
        raise RuntimeError(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\n"
            "Many models use a sigmoid layer right before the binary cross entropy layer.\n"
            "In this case, combine the two layers using torch.nn.functional.binary_cross_entropy_with_logits\n"
            "or torch.nn.BCEWithLogitsLoss.  binary_cross_entropy_with_logits and BCEWithLogits are\n"
            "safe to autocast."
        )
    input, target, weight = autocast_to_float32(input, target, weight)
    if input.dtype != target.dtype:
        found, expected = scalar_type_name(target.dtype), scalar_type_name(input.dtype)
        raise RuntimeError(f"Found dtype {found} but expected {expected}")
    if not input.is_floating_point():
        raise NotImplementedError(f"\"binary_cross_entropy\" not implemented for '{scalar_type_name(input.dtype)}'")
    check_constant(weight, "weight", "binary_cross_entropy")
    _check_broadcast(input, weight, input.shape)
    check_unit_interval(input, "input")
    check_unit_interval(target, "target")
    check_real_weight(weight, input)
    return reduced(call(_OfProbabilities, _of_probabilities, input, target, weight), reduction, input.dtype)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy of the logistic sigmoid of logits, in one piece that never takes a logarithm of 0.

    .. math::
        \ell_i = w_i [(1 - t_i) x_i + (1 + (q_i - 1) t_i) \log(1 + e^{-x_i})]

    With :math:`q = 1` the first error is :math:`\partial \ell_i/\partial x_i = w_i (\sigma(x_i) - t_i)`.

    Args:
        input: logits, any shape.
        target: probabilities (0 and 1 for labels), of the shape of ``input``; the result has its dtype.
        weight: :math:`w`, and ``pos_weight``: :math:`q`, the weight of the positive labels, in shapes that broadcast
            with that of ``input``; they have no gradient, but under ``torch.func``.
        size_average, reduce: deprecated, as in PyTorch.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: the shapes differ, or ``reduction`` is unknown.
        RuntimeError: a weight does not broadcast or wants a gradient, or ``target`` is not floating-point.
        NotImplementedError: ``input`` is not floating-point, or ``target`` is boolean.

    Source: F5, F18; N3, N4. PyTorch: :func:`torch.nn.functional.binary_cross_entropy_with_logits`.
    """
    reduction = resolve(reduction, size_average, reduce)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    if weight is None and pos_weight is None and suits(input, target):
        return pointwise_loss(input, target, _LOGITS, reduction)
    input, target, weight, pos_weight = autocast_to_float32(input, target, weight, pos_weight)
    if not input.is_floating_point():
        kernel = f"log_sigmoid_{input.device.type}"
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{scalar_type_name(input.dtype)}'")
    check_no_truth_values(target)
    if not (target.is_floating_point() or target.is_complex()):
        result = scalar_type_name(torch.promote_types(input.dtype, target.dtype))
        wanted = scalar_type_name(target.dtype)
        raise RuntimeError(f"result type {result} can't be cast to the desired output type {wanted}")
    if pos_weight is not None:
        check_no_truth_values(pos_weight, target)
        check_real_weight(pos_weight, target)
    _check_broadcast(pos_weight, target, input.shape)
    _check_broadcast(target, weight, input.shape)
    check_real_weight(weight, target)
    return reduced(_losses_of_logits(input, target, weight, pos_weight), reduction, target.dtype)


def _losses_of_logits(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
    of_weights = any(t is not None and t.requires_grad for t in (weight, pos_weight)) and torch.is_grad_enabled()
    if target.is_complex() or (of_weights and transforming()):
        return _of_logits(input, target, weight, pos_weight)  # which PyTorch differentiates by everything
    check_constant(weight, "weight", "binary_cross_entropy_with_logits")
    check_constant(pos_weight, "pos_weight", "binary_cross_entropy_with_logits")
    return call(_OfLogits, _of_logits, input, target, weight, pos_weight)  # type: ignore[no-any-return]


def _check_broadcast(first: Tensor | None, second: Tensor | None, shape: torch.Size) -> None:
    """Raise PyTorch's ``RuntimeError`` where weights, one of the two, do not broadcast to the shape of the other."""
    if first is not None and second is not None:
        together = torch.broadcast_tensors(first.detach(), second.detach())[0].shape
        if together != shape:
            raise RuntimeError(f"output with shape {list(shape)} doesn't match the broadcast shape {list(together)}")


def masked_multilabel_loss(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    r"""Binary cross-entropy over the labels that are known: unknown ones ("?") add nothing, whatever the logits.

    Args:
        input: logits, any shape, such as (samples, tasks).
        target: labels or probabilities of that shape.
        mask: boolean, of that shape, true where the label is known. Without it the unknown labels are those that are
            NaN.
        reduction: ``"none"``, ``"mean"`` (over the known labels; NaN if there are none) or ``"sum"``.
        pos_weight: see :func:`binary_cross_entropy_with_logits`.

    Raises:
        ValueError: a shape differs from that of ``input``, or ``reduction`` is unknown.
        TypeError: ``mask`` is not boolean.

    Source: F16; N4 (multi-task learning). PyTorch has none.
    """
    reduction = resolve(reduction)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    for name, other in (("target", target), ("mask", mask)):
        if other is not None and other.shape != input.shape:
            raise ValueError(f"{name} must have the shape of input, {list(input.shape)}, got {list(other.shape)}")
    known = ~torch.isnan(target) if mask is None else mask
    # Chosen before the loss and again after it: a NaN where nothing is known reaches neither the sum nor a gradient.
    losses = binary_cross_entropy_with_logits(
        torch.where(known, input, 0), torch.where(known, target, 0), pos_weight=pos_weight, reduction="none"
    )
    wide = torch.where(known, losses, 0).to(opmath_dtype(losses.dtype))
    return reduced(wide, reduction, losses.dtype, known.to(wide.dtype).sum())


def _times(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight.to(values.dtype)


def _guarded_logs(input: Tensor) -> tuple[Tensor, Tensor]:
    """log x and log(1 - x), each at least -100."""
    yes, no = torch.log(input), torch.log1p(-input)
    return torch.where(yes < _LEAST_LOG, _LEAST_LOG, yes), torch.where(no < _LEAST_LOG, _LEAST_LOG, no)


def _value(input: Tensor, target: Tensor) -> Tensor:
    yes, no = _guarded_logs(input)
    return (target - 1) * no - target * yes


def _of_probabilities(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """The loss with PyTorch's gradient at every order: at the guards a parabola of that slope and curvature."""
    dtype = opmath_dtype(input.dtype)
    x, t = input.to(dtype), target.to(dtype)
    guarded = x.detach() * (1 - x.detach()) < _LEAST_SPREAD
    inner = torch.where(guarded, 0.5, x)
    away = (t - 1) * torch.log1p(-inner) - t * torch.log(inner)
    parabola = ((x - t).square() - (x.detach() - t).square()) / (2 * _LEAST_SPREAD)
    return _times(torch.where(guarded, _value(x.detach(), t) + parabola, away), weight)


class _OfProbabilities(torch.autograd.Function):
    r""":math:`\bar x = w \bar\ell (x - t)/(x (1 - x))`, :math:`\bar t = w \bar\ell (\log(1 - x) - \log x)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        dtype = opmath_dtype(input.dtype)
        return laid_out(_times(_value(input.to(dtype), target.to(dtype)), weight), input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight = ctx.saved_tensors
        x, t, grad = input.to(grad.dtype), target.to(grad.dtype), _times(grad, weight)
        grad_input = grad_target = None
        if ctx.needs_input_grad[0]:
            spread = (1 - x) * x
            slope = (x - t) / torch.where(spread < _LEAST_SPREAD, _LEAST_SPREAD, spread)
            grad_input = laid_out((grad * slope).to(input.dtype), input)
        if ctx.needs_input_grad[1]:
            grad_target = laid_out((grad * (torch.log1p(-x) - torch.log(x))).to(target.dtype), input, input)
        return grad_input, grad_target, None


def _positive_weight(target: Tensor, pos_weight: Tensor | None) -> Tensor | float:
    return 1.0 if pos_weight is None else (pos_weight.to(target.dtype) - 1) * target + 1


def _of_logits(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
    dtype = opmath_dtype(torch.promote_types(input.dtype, target.dtype))
    x, t = input if target.is_complex() else input.to(dtype), target.to(dtype)
    return _times((1 - t) * x + _positive_weight(t, pos_weight) * minus_log_sigmoid(x), weight)


class _OfLogits(torch.autograd.Function):
    r""":math:`\bar x = w \bar\ell [1 - t - (1 + (q - 1) t)\, \sigma(-x)]`,
    :math:`\bar t = w \bar\ell [(q - 1) \log(1 + e^{-x}) - x]`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
        return laid_out(_of_logits(input, target, weight, pos_weight), target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # of plain losses no weights are kept
        input, target, weight, pos_weight = (*ctx.saved_tensors, None)[:4]
        x, t, grad = input.to(grad.dtype), target.to(grad.dtype), _times(grad, weight)
        grad_input = grad_target = None
        if ctx.needs_input_grad[0]:
            grad_input = (grad * (1 - t - _positive_weight(t, pos_weight) * logistic(-x))).to(input.dtype)
            grad_input = laid_out(grad_input, input if pos_weight is None else pos_weight, target)
        if ctx.needs_input_grad[1]:
            slope = -x
            if pos_weight is not None:
                # of an infinite x no difference of infinities
                slope = pos_weight.to(x.dtype) * minus_log_sigmoid(x) - minus_log_sigmoid(-x)
            grad_target = (grad * slope).to(target.dtype)
            # PyTorch's logarithm of the sigmoid is contiguous
            grad_target = laid_out(grad_target, input) if pos_weight is None else laid_out(grad_target)
        return grad_input, grad_target, None, None


def _write_of_probabilities(input: Tensor, target: Tensor, output: Tensor) -> None:
    least, yes = input.new_full((), _LEAST_LOG), torch.log(input)
    torch.maximum(yes, least, out=yes)
    # the output may take the place of the input
    no = torch.log1p(torch.neg(input, out=output), out=output)
    torch.lerp(torch.maximum(no, least, out=no), yes, target, out=output).neg_()


def _write_gradient_of_probabilities(input: Tensor, target: Tensor, output: Tensor, grad: Tensor) -> None:
    spread = (1 - input).mul_(input)
    torch.maximum(spread, input.new_full((), _LEAST_SPREAD), out=spread)
    torch.sub(input, target, out=output).mul_(grad).div_(spread)


def _write_of_logits(input: Tensor, target: Tensor, output: Tensor) -> None:
    rest, negative = torch.sub(1, target).mul_(input), torch.neg(input)
    torch.maximum(negative, input.new_zeros(()), out=negative)
    torch.abs(input, out=output).neg_().exp_().log1p_().add_(negative).add_(rest)


def _write_gradient_of_logits(input: Tensor, target: Tensor, output: Tensor, grad: Tensor) -> None:
    # an overflow of exp(-x) ends as 1/inf = 0, as it should
    torch.neg(input, out=output).exp_().add_(1).reciprocal_().sub_(target).mul_(grad)


_PROBABILITIES = Pointwise(
    "binary_cross_entropy",
    _write_of_probabilities,
    _write_gradient_of_probabilities,
    _OfProbabilities,
    probabilities=True,
)
_LOGITS = Pointwise("binary_cross_entropy_with_logits", _write_of_logits, _write_gradient_of_logits, _OfLogits)
