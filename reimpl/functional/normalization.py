"""Batch normalisation."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from reimpl.functional import _norm_plain
from reimpl.functional._dispatch import autocast_disabled, call, memory_format_of, opmath_dtype, scalar_type_name
from reimpl.functional._norm_chain import Chain, like, other_dims, per_channel
from reimpl.functional._plain import ordinary
from reimpl.functional.kernels import kernels_for

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
                move_averages(running_mean, running_var, mean, var, count, momentum)
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
    channels = input.shape[1] if input.dim() > 1 else 0
    if training:
        if prod(input.shape[:1]) * prod(input.shape[2:]) == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{scalar_type_name(input.dtype)}'")
    dtypes = set()
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
        dtypes.add(tensor.dtype)
    if dtypes - {input.dtype}:
        if dtypes - {torch.float32}:
            raise RuntimeError("mixed dtype (CPU): expect parameter to have scalar type of Float")
        if opmath_dtype(input.dtype) == input.dtype:
            raise RuntimeError("mixed dtype (CPU): all inputs must share same datatype.")


def move_averages(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor | int, momentum: float
) -> None:
    """:math:`r \\leftarrow (1 - \\alpha) r + \\alpha v` in place, in the statistics' precision, :math:`v` the mean of
    ``count`` values and their variance divided by ``count - 1``."""
    with torch.no_grad():
        for average, value, factor in ((running_mean, mean, 1.0), (running_var, var, count / (count - 1))):
            value = value.detach()
            if isinstance(factor, Tensor):
                value, factor = value * factor, 1.0
            if average.dtype == value.dtype:
                average.mul_(1 - momentum).add_(value, alpha=momentum * factor)
            else:
                average.copy_(average.to(value.dtype).mul_(1 - momentum).add_(value, alpha=momentum * factor))


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


class _BatchNormTraining(torch.autograd.Function):
    """The derivatives are :class:`~reimpl.functional._norm_chain.Chain`'s.

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
        if _overwritten(input, weight, bias):
            weight, bias = _wide(input, weight, bias)
            return _norm_plain.normalize(input, weight, bias, eps, relu)
        return _normalize_by_batch(input, weight, bias, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, bias, ctx.eps, relu = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, *output[1:], output[0] if relu else None)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, rectified = ctx.saved_tensors
        grad = torch.zeros_like(input) if grad is None else grad
        statistics, wanted = (grad, grad_mean, grad_var, *ctx.saved_tensors), ctx.needs_input_grad[0]
        # what is itself differentiated must be made of differentiable operators
        final = not torch.is_grad_enabled()
        count, grad_input = input.numel() // input.shape[1], None
        kernels = kernels_for("_norm_numba", *statistics) if final else None
        if kernels and kernels.worth_it(input):
            grad_mean, grad_var = (torch.zeros_like(mean) if g is None else g for g in (grad_mean, grad_var))
            of_statistics = (weight, mean, var, grad_mean, grad_var)
            grad_input, sum_g, sums = kernels.backward(grad, input, rectified, *of_statistics, ctx.eps, wanted)
            chain = Chain(sum_g, sums, var, weight, ctx.eps)
        elif final and _overwritten(*statistics):
            errors = _norm_plain.Errors(grad, rectified, input, mean)
            chain = Chain(errors.sum_g, errors.sum_g_centred, var, weight, ctx.eps)
            if wanted:
                slope = _plus(chain.to_var, grad_var).mul_(2 / count)
                grad_input = errors.to_input(chain.scale, slope, _plus(chain.to_mean, grad_mean).div_(count))
        else:
            g, x, dims = _unrectified(grad, rectified).to(mean.dtype), input.to(mean.dtype), other_dims(input)
            centred = x - per_channel(mean, x)
            chain = Chain(g.sum(dims), (g * centred).sum(dims), var, weight, ctx.eps)
            if wanted:
                to_mean, to_var = _plus(chain.to_mean, grad_mean), _plus(chain.to_var, grad_var)
                grad_input = chain.to_input(g, centred, to_mean, to_var, count).to(input.dtype)
        return grad_input, like(chain.to_weight, weight), like(chain.sum_g, ctx.bias_dtype), None, None


def _plus(value: Tensor, other: Tensor | None) -> Tensor:
    return value if other is None else value + other


def _overwritten(input: Tensor, *others: Tensor | None) -> bool:
    """Whether :mod:`~reimpl.functional._norm_plain` does for such tensors."""
    if input.dim() < 2 or not input.numel() or not ordinary(input, *others):
        return False
    return all(t is None or t.dtype in _norm_plain.DTYPES for t in (input, *others))


def _wide(like: Tensor, *vectors: Tensor | None) -> tuple[Any, ...]:
    """The vectors in the dtype in which those of ``like`` are summed."""
    dtype = opmath_dtype(like.dtype)
    return tuple(v if v is None or v.dtype is dtype else v.to(dtype) for v in vectors)


def _unrectified(grad: Tensor, rectified: Tensor | None) -> Tensor:
    """The gradient before the rectification whose output is ``rectified``, or of what was not rectified."""
    return grad if rectified is None else torch.where(rectified <= 0, 0, grad)


class _BatchNormInference(torch.autograd.Function):
    r"""(4.84), (4.85), (4.90) with a mean and variance that do not depend on the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> Tensor:
        kernels = kernels_for("_norm_numba", input, mean, var, weight, bias)
        if kernels and kernels.worth_it(input):
            return kernels.infer(input, mean, var, weight, bias, eps, relu)  # type: ignore[no-any-return]
        if _overwritten(input, mean, var, weight, bias):
            mean, var, weight, bias = _wide(input, mean, var, weight, bias)
            return _norm_plain.normalize_by(input, mean, var, weight, bias, eps, relu)
        return _normalize(input, mean, var, weight, bias, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, mean, var, weight, bias, ctx.eps, relu = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, mean, var, weight, output if relu else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, weight, rectified = ctx.saved_tensors
        final, eps = not torch.is_grad_enabled(), ctx.eps
        wanted, _, _, *of_vectors = ctx.needs_input_grad[:5]
        sums_wanted = any(of_vectors)
        kernels = kernels_for("_norm_numba", grad, *ctx.saved_tensors) if final else None
        grad_input = None
        if kernels and kernels.worth_it(input):
            statistics = (weight, mean, var, eps, wanted, sums_wanted)
            grad_input, sum_g, sums = kernels.infer_backward(grad, input, rectified, *statistics)
            chain = Chain(sum_g, sums, var, weight, eps)
        elif final and sums_wanted and _overwritten(grad, *ctx.saved_tensors):
            mean, var = _wide(input, mean, var)
            errors = _norm_plain.Errors(grad, rectified, input, mean)
            chain = Chain(errors.sum_g, errors.sum_g_centred, var, weight, eps)
            grad_input = errors.scaled(chain.scale) if wanted else None
        else:
            return _infer_backward(ctx, grad)
        to_weight = like(chain.to_weight, weight) if of_vectors[0] else None
        return (
            grad_input,
            None,
            None,
            to_weight,
            like(chain.sum_g, ctx.bias_dtype) if of_vectors[1] else None,
            None,
            None,
        )


def _infer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass in operators that can be differentiated, and of what is not plain."""
    input, mean, var, weight, rectified = ctx.saved_tensors
    x = input.to(opmath_dtype(input.dtype))
    g, (mean, var) = _unrectified(grad, rectified).to(x.dtype), _wide(x, mean, var)
    if x.dim() < 2:
        return g.to(input.dtype), *(None,) * 6
    wanted, _, _, weight_wanted, bias_wanted = ctx.needs_input_grad[:5]
    s = torch.rsqrt(var + ctx.eps)
    grad_input = grad_weight = grad_bias = None
    if wanted:
        scale = s if weight is None else s * weight.to(x.dtype)
        grad_input = (g * per_channel(scale, g)).to(input.dtype)
    if weight_wanted:
        grad_weight = like(s * (g * (x - per_channel(mean, x))).sum(other_dims(x)), weight)
    if bias_wanted:
        grad_bias = like(g.sum(other_dims(x)), ctx.bias_dtype)
    return grad_input, None, None, grad_weight, grad_bias, None, None
