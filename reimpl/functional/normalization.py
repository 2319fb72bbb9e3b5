"""Batch normalisation."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_disabled, call, memory_format_of, opmath_dtype, scalar_type_name


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

    Source: F10; N0 (4.79-4.94), N1, N2, N4. PyTorch: :func:`torch.nn.functional.batch_norm`.
    """
    _check(input, running_mean, running_var, weight, bias, training, eps)
    x = input.contiguous(memory_format=memory_format_of(input))
    with autocast_disabled(input.device):
        if training and input.numel():
            output, mean, var = call(_BatchNormTraining, _normalize_by_batch, x, weight, bias, eps)
            if running_mean is not None and running_var is not None:
                count = input.numel() // input.shape[1]
                _move(running_mean, mean, momentum)
                _move(running_var, var * (count / (count - 1)), momentum)
            return output  # type: ignore[no-any-return]
        zeros = x.new_zeros(x.shape[1])
        mean = zeros if running_mean is None else running_mean
        var = zeros if running_var is None else running_var
        return call(_BatchNormInference, _normalize, x, mean, var, weight, bias, eps)  # type: ignore[no-any-return]


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    averages = {"running_mean": running_mean, "running_var": running_var}
    if training:
        if input.dim() < 2 or (input.numel() and input.numel() == input.shape[1]):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{scalar_type_name(input.dtype)}'")
    channels = input.shape[1] if input.dim() > 1 else 0
    for name, tensor in (averages | {"weight": weight, "bias": bias}).items():
        if tensor is None and name in averages and not training:
            raise RuntimeError(f"{name} must be defined in evaluation mode")
        if tensor is not None and tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor is not None and name in averages and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. "
                "This input cannot have requires_grad True."
            )
    dtypes = {t.dtype for t in (running_mean, running_var, weight, bias) if t is not None}
    if dtypes - {input.dtype}:
        if dtypes - {torch.float32}:
            raise RuntimeError("mixed dtype (CPU): expect parameter to have scalar type of Float")
        if opmath_dtype(input.dtype) == input.dtype:
            raise RuntimeError("mixed dtype (CPU): all inputs must share same datatype.")


def _move(average: Tensor, value: Tensor, momentum: float) -> None:
    with torch.no_grad():
        value = value.detach()
        average.copy_((1 - momentum) * average.to(value.dtype) + momentum * value)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(1, -1, *(1,) * (like.dim() - 2))


def _other_dims(input: Tensor) -> list[int]:
    return [d for d in range(input.dim()) if d != 1]


def _normalize_by_batch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch; the statistics in the accumulation dtype."""
    x, dims = input.to(opmath_dtype(input.dtype)), _other_dims(input)
    mean = x.mean(dims)
    centred = x - _per_channel(mean, x)
    var = (centred * centred).mean(dims)
    return _scale(centred, var, weight, bias, eps).to(input.dtype), mean, var


def _normalize(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Output for a given mean and variance."""
    dtype = opmath_dtype(input.dtype)
    x = input.to(dtype)
    return _scale(x - _per_channel(mean.to(dtype), x), var.to(dtype), weight, bias, eps).to(input.dtype)


def _scale(centred: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(var.dtype)
    if bias is None:
        return centred * _per_channel(scale, centred)
    return torch.addcmul(_per_channel(bias.to(var.dtype), centred), centred, _per_channel(scale, centred))


class _BatchNormTraining(torch.autograd.Function):
    r"""The chain (4.83-4.94), with :math:`g = \partial E/\partial y` and :math:`s = (\sigma^2 + \epsilon)^{-1/2}`.

    .. math::
        \partial E/\partial \gamma &= \sum g \hat x = s \sum g (x - \mu)                          && (4.84) \\
        \partial E/\partial \beta &= \sum g                                                       && (4.85) \\
        \partial E/\partial \hat x &= g \gamma                                                    && (4.90) \\
        \partial E/\partial \sigma^2 &= -\tfrac12 \gamma s^3 \sum g (x - \mu)                     && (4.92) \\
        \partial E/\partial \mu &= -\gamma s \sum g                                               && (4.94) \\
        \partial E/\partial x &= g \gamma s
            + \partial E/\partial \sigma^2 \cdot 2 (x - \mu)/m + \partial E/\partial \mu \cdot 1/m && (4.88)

    The second sum of (4.94) is :math:`\propto \sum (x - \mu) = 0` and is left out. Mean and variance are differentiable
    outputs: what depends on them, which is this gradient itself when it is differentiated, adds to (4.92) and (4.94).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _normalize_by_batch(input, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, bias, ctx.eps = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var = ctx.saved_tensors
        dims, count = _other_dims(input), prod(input.shape) // input.shape[1]
        g, centred = grad.to(mean.dtype), input.to(mean.dtype) - _per_channel(mean, input)
        s = torch.rsqrt(var + ctx.eps)
        scale = s if weight is None else s * weight.to(s.dtype)
        sum_g, sum_g_centred = g.sum(dims), (g * centred).sum(dims)
        grad_input = None
        if ctx.needs_input_grad[0]:
            to_var = grad_var - 0.5 * scale * s * s * sum_g_centred
            to_mean = grad_mean - scale * sum_g
            offset = torch.addcmul(
                _per_channel(to_mean / count, input), centred, _per_channel(to_var * (2 / count), input)
            )
            grad_input = torch.addcmul(offset, g, _per_channel(scale, input)).to(input.dtype)
        return grad_input, _like(s * sum_g_centred, weight), _like(sum_g, ctx.bias_dtype), None


def _like(grad: Tensor, target: Tensor | torch.dtype | None) -> Tensor | None:
    """A parameter's gradient in the parameter's dtype; none where there is no parameter."""
    if target is None:
        return None
    return grad.to(target.dtype if isinstance(target, Tensor) else target)


class _BatchNormInference(torch.autograd.Function):
    r"""(4.84), (4.85), (4.90) with a mean and variance that do not depend on the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        return _normalize(input, mean, var, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, mean, var, weight, bias, ctx.eps = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, mean, var, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, weight = ctx.saved_tensors
        dtype, dims = opmath_dtype(input.dtype), _other_dims(input)
        g, s = grad.to(dtype), torch.rsqrt(var.to(dtype) + ctx.eps)
        scale = s if weight is None else s * weight.to(dtype)
        grad_input = (g * _per_channel(scale, g)).to(input.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[3]:
            centred = input.to(dtype) - _per_channel(mean.to(dtype), g)
            grad_weight = _like(s * (g * centred).sum(dims), weight)
        if ctx.needs_input_grad[4]:
            grad_bias = _like(g.sum(dims), ctx.bias_dtype)
        return grad_input, None, None, grad_weight, grad_bias, None
