"""Batch normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from reimpl.functional import _norm_plain
from reimpl.functional._dispatch import autocast_disabled, call, memory_format_of, opmath_dtype, scalar_type_name
from reimpl.functional._plain import masked, plain
from reimpl.functional.kernels import kernels_for


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
    _check(input, running_mean, running_var, weight, bias, training, eps)
    x = input.contiguous(memory_format=memory_format_of(input))
    with autocast_disabled(input.device):
        if training and input.numel():
            output, mean, var = call(_BatchNormTraining, _normalize_by_batch, x, weight, bias, eps, relu)
            if running_mean is not None and running_var is not None:
                count = input.numel() // input.shape[1]
                move_averages(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
            return output  # type: ignore[no-any-return]
        zeros = x.new_zeros(x.shape[1] if x.dim() > 1 else 0)
        mean = zeros if running_mean is None else running_mean
        var = zeros if running_var is None else running_var
        return call(_BatchNormInference, _normalize, x, mean, var, weight, bias, eps, relu)  # type: ignore[no-any-return]


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
        if prod(input.shape[:1]) * prod(input.shape[2:]) == 1:
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


def move_averages(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    """:math:`r \\leftarrow (1 - \\alpha) r + \\alpha v` in place, in the statistics' precision."""
    with torch.no_grad():
        for average, value in ((running_mean, mean.detach()), (running_var, var.detach())):
            average.copy_((1 - momentum) * average.to(value.dtype) + momentum * value)


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A number for each channel, laid along dimension 1 of ``like``."""
    return vector.reshape(1, -1, *(1,) * (like.dim() - 2))


def other_dims(input: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [d for d in range(input.dim()) if d != 1]


def _normalize_by_batch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch; the statistics in the accumulation dtype."""
    x, dims = input.to(opmath_dtype(input.dtype)), other_dims(input)
    mean = x.mean(dims)
    centred = x - per_channel(mean, x)
    var = (centred * centred).mean(dims)
    return scaled(centred, var, weight, bias, eps, relu).to(input.dtype), mean, var


def _normalize(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """Output for a given mean and variance."""
    dtype = opmath_dtype(input.dtype)
    x = input.to(dtype)
    if x.dim() < 2:
        return input.clone()
    return scaled(x - per_channel(mean.to(dtype), x), var.to(dtype), weight, bias, eps, relu).to(input.dtype)


def scaled(centred: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool) -> Tensor:
    """:math:`\\gamma\\, (x - \\mu)/\\sqrt{\\sigma^2 + \\epsilon} + \\beta`, rectified where asked."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight.to(var.dtype)
    if bias is None:
        output = centred * per_channel(scale, centred)
    else:
        output = torch.addcmul(per_channel(bias.to(var.dtype), centred), centred, per_channel(scale, centred))
    # "<= 0" and not "> 0": NaN fails the comparison and passes through, as PyTorch has it.
    return torch.where(output <= 0, 0, output) if relu else output


@dataclass(frozen=True)
class Chain:
    r"""The derivatives of batch normalisation, (4.83-4.94), from sums over a channel.

    With :math:`g = \partial E/\partial y`, :math:`s = (\sigma^2 + \epsilon)^{-1/2}` and :math:`\hat x = s (x - \mu)`:

    .. math::
        \partial E/\partial \gamma &= \sum g \hat x = s \sum g (x - \mu)                          && (4.84) \\
        \partial E/\partial \beta &= \sum g                                                       && (4.85) \\
        \partial E/\partial \hat x &= g \gamma                                                    && (4.90) \\
        \partial E/\partial \sigma^2 &= \sum \frac{\partial E}{\partial \hat x} (x - \mu)
            \left(-\tfrac12\right) s^3 = -\tfrac12 \gamma s^3 \sum g (x - \mu)                     && (4.92) \\
        \partial E/\partial \mu &= -s \sum \frac{\partial E}{\partial \hat x}
            - \frac{\partial E}{\partial \sigma^2} \frac2m \sum (x - \mu) = -\gamma s \sum g        && (4.94) \\
        \partial E/\partial x &= \frac{\partial E}{\partial \hat x} s
            + \frac{\partial E}{\partial \sigma^2} \frac{2 (x - \mu)}{m}
            + \frac{\partial E}{\partial \mu} \frac1m                                            && (4.88)

    The second sum of (4.94) is left out, since :math:`\sum (x - \mu) = 0`.

    Args:
        sum_g: :math:`\sum g`, channel by channel.
        sum_g_centred: :math:`\sum g (x - \mu)`.
        var: :math:`\sigma^2`.
        weight: :math:`\gamma`, ``None`` for 1.
        eps: :math:`\epsilon`.
    """

    sum_g: Tensor
    sum_g_centred: Tensor
    var: Tensor
    weight: Tensor | None
    eps: float

    @property
    def s(self) -> Tensor:
        r""":math:`(\sigma^2 + \epsilon)^{-1/2}`"""
        return torch.rsqrt(self.var + self.eps)

    def times_weight(self, value: Tensor) -> Tensor:
        """(4.90) for one number a channel."""
        return value if self.weight is None else value * self.weight.to(value.dtype)

    def to_normalized(self, g: Tensor) -> Tensor:
        """(4.90)"""
        return g if self.weight is None else g * per_channel(self.weight.to(g.dtype), g)

    @property
    def to_weight(self) -> Tensor:
        """(4.84)"""
        return self.s * self.sum_g_centred

    @property
    def to_var(self) -> Tensor:
        """(4.92)"""
        s = self.s
        return -0.5 * self.times_weight(s) * s * s * self.sum_g_centred

    @property
    def to_mean(self) -> Tensor:
        """(4.94)"""
        return -self.times_weight(self.s) * self.sum_g

    def to_input(self, g: Tensor, centred: Tensor, to_mean: Tensor, to_var: Tensor, count: Tensor | int) -> Tensor:
        """(4.88), given (4.94) and (4.92) with whatever else depends on the statistics."""
        offset = torch.addcmul(per_channel(to_mean / count, g), centred, per_channel(to_var * (2 / count), g))
        return torch.addcmul(offset, g, per_channel(self.times_weight(self.s), g))


class _BatchNormTraining(torch.autograd.Function):
    """The derivatives are :class:`Chain`'s.

    Mean and variance are differentiable outputs: what depends on them, which is this gradient itself when it is
    differentiated, adds to (4.92) and (4.94).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = kernels_for("_norm_numba", input, weight, bias)
        if kernels and kernels.worth_it(input):
            return kernels.forward(input, weight, bias, eps, relu)  # type: ignore[no-any-return]
        if plain(input, weight, bias) and input.is_contiguous():
            return _norm_plain.normalize(input, weight, bias, eps, relu)
        return _normalize_by_batch(input, weight, bias, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, bias, ctx.eps, relu = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, *output[1:], output[0] if relu else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, rectified = ctx.saved_tensors
        # what is itself differentiated must be made of differentiable operators
        kernels = (
            None
            if torch.is_grad_enabled()
            else kernels_for("_norm_numba", grad, grad_mean, grad_var, *ctx.saved_tensors)
        )
        if kernels and kernels.worth_it(input):
            wanted = ctx.needs_input_grad[0]
            statistics = (weight, mean, var, grad_mean, grad_var)
            grad_input, sum_g, sums = kernels.backward(grad, input, rectified, *statistics, ctx.eps, wanted)
            chain = Chain(sum_g, sums, var, weight, ctx.eps)
            return grad_input, like(chain.to_weight, weight), like(sum_g, ctx.bias_dtype), None, None
        dims, count = other_dims(input), prod(input.shape) // input.shape[1]
        g, centred = _unrectified(grad, rectified).to(mean.dtype), input.to(mean.dtype) - per_channel(mean, input)
        products = g * centred
        chain = Chain(g.sum(dims), products.sum(dims), var, weight, ctx.eps)
        grad_input = None
        if ctx.needs_input_grad[0]:
            to_mean, to_var = grad_mean + chain.to_mean, grad_var + chain.to_var
        final = not torch.is_grad_enabled() and plain(grad, grad_mean, grad_var, *ctx.saved_tensors)
        if ctx.needs_input_grad[0] and final:
            scale, slope, offset = chain.times_weight(chain.s), to_var * (2 / count), to_mean / count
            grad_input = _norm_plain.gradient(g, centred, products, scale, slope, offset)
        elif ctx.needs_input_grad[0]:
            grad_input = chain.to_input(g, centred, to_mean, to_var, count).to(input.dtype)
        return grad_input, like(chain.to_weight, weight), like(chain.sum_g, ctx.bias_dtype), None, None


def _unrectified(grad: Tensor, rectified: Tensor | None) -> Tensor:
    """The gradient before the rectification whose output is ``rectified``, or of what was not rectified."""
    if rectified is None:
        return grad
    if not torch.is_grad_enabled() and plain(grad, rectified):
        return masked(grad, rectified)
    return torch.where(rectified <= 0, 0, grad)


def like(grad: Tensor, target: Tensor | torch.dtype | None) -> Tensor | None:
    """A parameter's gradient in the parameter's dtype; none where there is no parameter."""
    if target is None:
        return None
    return grad.to(target.dtype if isinstance(target, Tensor) else target)


class _BatchNormInference(torch.autograd.Function):
    r"""(4.84), (4.85), (4.90) with a mean and variance that do not depend on the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> Tensor:
        kernels = kernels_for("_norm_numba", input, mean, var, weight, bias)
        if hasattr(kernels, "infer") and kernels.worth_it(input):
            return kernels.infer(input, mean, var, weight, bias, eps, relu)  # type: ignore[no-any-return]
        return _normalize(input, mean, var, weight, bias, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, mean, var, weight, bias, ctx.eps, relu = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, mean, var, weight, output if relu else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, weight, rectified = ctx.saved_tensors
        ready = not torch.is_grad_enabled()
        kernels: Any = kernels_for("_norm_numba", grad, *ctx.saved_tensors) if ready else None
        if hasattr(kernels, "infer_backward") and kernels.worth_it(input):
            wanted, _, _, *of_vectors = ctx.needs_input_grad[:5]
            grad_input, sum_g, sums = kernels.infer_backward(
                grad, input, rectified, weight, mean, var, ctx.eps, wanted, any(of_vectors)
            )
            to_weight = like(Chain(sum_g, sums, var, weight, ctx.eps).to_weight, weight) if of_vectors[0] else None
            to_bias = like(sum_g, ctx.bias_dtype) if of_vectors[1] else None
            return grad_input, None, None, to_weight, to_bias, None, None
        dtype, dims = opmath_dtype(input.dtype), other_dims(input)
        g, s = _unrectified(grad, rectified).to(dtype), torch.rsqrt(var.to(dtype) + ctx.eps)
        scale = s if weight is None else s * weight.to(dtype)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = g.to(input.dtype) if g.dim() < 2 else (g * per_channel(scale, g)).to(input.dtype)
        if ctx.needs_input_grad[3]:
            centred = input.to(dtype) - per_channel(mean.to(dtype), g)
            grad_weight = like(s * (g * centred).sum(dims), weight)
        if ctx.needs_input_grad[4]:
            grad_bias = like(g.sum(dims), ctx.bias_dtype)
        return grad_input, None, None, grad_weight, grad_bias, None, None
