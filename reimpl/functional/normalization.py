"""Batch normalisation."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_disabled, call, memory_format_of, opmath_dtype, scalar_type_name
from reimpl.functional._norm.functions import (
    BatchNormInference,
    BatchNormTraining,
    learn,
    normalize,
    normalize_by_batch,
)
from reimpl.functional._options import check_flags, check_number
from reimpl.functional._traced import traced_batch_norm
from reimpl.functional.kernels import attempt

_VECTORS = "running_mean", "running_var", "weight", "bias"


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalisation :math:`y = \gamma \hat x + \beta`, :math:`\hat x = (x - \mu)/\sqrt{\sigma^2 + \epsilon}`,
    channel by channel.

    In training :math:`\mu = \frac1m \sum x` and :math:`\sigma^2 = \frac1m \sum (x - \mu)^2` are the batch's (4.79 and
    4.80; the note's square in 4.79 is a slip), and the running averages move in place:
    :math:`r \leftarrow (1 - \alpha) r + \alpha\, \mu`, and likewise the variance, there divided by :math:`m - 1`.
    Otherwise :math:`\mu` and :math:`\sigma^2` are the running averages.

    Args:
        input: shape :math:`(N, C, *)`.
        running_mean, running_var, weight, bias: shape :math:`(C)`; float32 is taken beside a half-width ``input``.
        training: normalise by the batch.
        momentum: :math:`\alpha`.
        eps: :math:`\epsilon`, positive in training.

    Returns:
        the shape and dtype of ``input``, ``channels_last`` where it is.

    Raises:
        ValueError: training with a single value a channel, a non-positive ``eps`` or one running average alone.
        RuntimeError: shapes or dtypes do not fit, or a running average requires a gradient.
        IndexError: ``input`` has one dimension, or there are no numbers and ``weight`` or ``bias`` is empty.

    Source: F10; N0 (4.79-4.94), N1, N2, N4. PyTorch: :func:`torch.nn.functional.batch_norm`.
    """
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, relu=False)


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch normalisation and rectification in one, :math:`y = \max(\gamma \hat x + \beta, 0)`.

    The backward pass needs the input and the rectified output, which the next layer keeps in any case; what lies
    between is never stored. Arguments, result and errors are those of :func:`batch_norm`.

    Source: F10, F2; N4 (normalisation before the activation). PyTorch: ``relu(batch_norm(...))``.
    """
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, relu=True)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    check_flags(training)
    if type(eps) is not float:  # which might not be looked up
        _check_options(input, training, momentum, eps)
    key = ("batch_norm", training, eps, relu, weight is not None)
    tensors = (input, running_mean, running_var, weight, bias)
    done: Tensor | None = attempt(key, *tensors, momentum)
    if done is not None:
        return done
    _check_options(input, training, momentum, eps)
    if not input.numel():
        return _of_nothing(input, weight, bias)
    _check(*tensors, training)
    weight, bias = (v if v is None or v.dim() == 1 else v.reshape(-1) for v in (weight, bias))
    x = input.contiguous(memory_format=memory_format_of(input))
    with autocast_disabled(input.device):
        if training:
            output, mean, var = call(
                BatchNormTraining, normalize_by_batch, x, weight, bias, eps, relu, operator=traced_batch_norm
            )
            if running_mean is not None and running_var is not None:
                count = input.numel() // input.shape[1]
                move_averages(running_mean, running_var, mean, var, count, momentum)
            learn(key, x, running_mean, running_var, weight, bias)
            return output  # type: ignore[no-any-return]
        result: Tensor = call(BatchNormInference, normalize, x, running_mean, running_var, weight, bias, eps, relu)
    learn(key, x, running_mean, running_var, weight, bias)
    return result


def _of_nothing(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """PyTorch's result for no numbers, which asks the first of the weights and nothing else."""
    output = input.clone()
    if weight is not None:
        output = output * weight.select(0, 0)
    return output if bias is None else output + bias.select(0, 0)


def _check_options(input: Tensor, training: bool, momentum: float, eps: float) -> None:
    if training:
        if input.shape[0] * prod(input.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    check_number(momentum)
    check_number(eps)


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
) -> None:
    channels = input.shape[1] if input.dim() > 1 else 0
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{scalar_type_name(input.dtype)}'")
    for name, tensor in zip(_VECTORS, (running_mean, running_var, weight, bias), strict=True):
        average = name in _VECTORS[:2]
        if tensor is None:
            if average and not training:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        if tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if average and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )
    if input.dim() < 2:
        raise IndexError("Dimension out of range (expected to be in range of [-1, 0], but got 1)")
    _check_dtypes(input, [tensor for tensor in (weight, bias, running_mean, running_var) if tensor is not None])
    for tensor in (running_mean, running_var):
        if tensor is not None and tensor.dim() != 1:
            raise RuntimeError(f"TensorAccessor expected 1 dims but tensor has {tensor.dim()}")


def _check_dtypes(input: Tensor, vectors: list[Tensor]) -> None:
    """The first vector tells PyTorch whether the dtypes are meant to differ."""
    others = [v.dtype for v in vectors if v.dtype != input.dtype]
    if not others:
        return
    if vectors[0].dtype == input.dtype:
        raise RuntimeError(
            f"expected scalar type {scalar_type_name(input.dtype)} but found {scalar_type_name(others[0])}"
        )
    if any(v.dtype != torch.float32 for v in vectors):
        raise RuntimeError("mixed dtype (CPU): expect parameter to have scalar type of Float")
    if opmath_dtype(input.dtype) == input.dtype:
        raise RuntimeError("mixed dtype (CPU): all inputs must share same datatype.")


def move_averages(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | int,
    momentum: float | Tensor,
) -> None:
    """:math:`r \\leftarrow (1 - \\alpha) r + \\alpha v` in place, in the statistics' precision, :math:`v` the mean of
    ``count`` values and their variance divided by ``count - 1``."""
    with torch.no_grad():
        for average, value, factor in ((running_mean, mean, 1.0), (running_var, var, count / (count - 1))):
            value = value.detach()
            step = momentum * factor
            if isinstance(step, Tensor):
                value, step = value * step, 1.0
            if average.dtype == value.dtype:
                average.mul_(1 - momentum).add_(value, alpha=step)
            else:
                average.copy_(average.to(value.dtype).mul_(1 - momentum).add_(value, alpha=step))
