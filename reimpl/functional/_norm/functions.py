"""Batch normalisation as autograd Functions, and as compositions of differentiable operators."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import memory_format_of, opmath_dtype
from reimpl.functional._norm import plain as _norm_plain
from reimpl.functional._norm.chain import Chain, like, other_dims, per_channel
from reimpl.functional._plain import ordinary
from reimpl.functional.kernels import kernels_for, teach


def normalize_by_batch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch; the statistics in the accumulation dtype."""
    x, dims = input.to(opmath_dtype(input.dtype)), other_dims(input)
    mean = x.mean(dims)
    centred = x - per_channel(mean, x)
    var = (centred * centred).mean(dims)
    return scaled(centred, var, weight, bias, eps, relu).to(input.dtype), mean, var


def normalize(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """Output for a given mean and variance."""
    dtype = opmath_dtype(input.dtype)
    x = input.to(dtype)
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


class BatchNormTraining(torch.autograd.Function):
    """The derivatives are :class:`~reimpl.functional._norm.chain.Chain`'s.

    Mean and variance are differentiable outputs: what depends on them, which is this gradient itself when it is
    differentiated, adds to (4.92) and (4.94).
    """

    generate_vmap_rule = True
    results_differ = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = kernels_for("_norm.numba", input, weight, bias)
        if kernels and kernels.worth_it(input):
            return kernels.forward(input, weight, bias, eps, relu)  # type: ignore[no-any-return]
        if _overwritten(input, weight, bias):
            weight, bias = _wide(input, weight, bias)
            return _norm_plain.normalize(input, weight, bias, eps, relu)
        return normalize_by_batch(input, weight, bias, eps, relu)

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
        # looked at once: a checkpoint unpacks what it has saved a single time
        input, weight, *_ = saved = ctx.saved_tensors
        grad = torch.zeros_like(input) if grad is None else grad
        grad_input, to_weight, to_bias = BatchNormTraining.gradients(
            grad, grad_mean, grad_var, saved, ctx.eps, ctx.needs_input_grad[0]
        )
        return grad_input, like(to_weight, weight), like(to_bias, ctx.bias_dtype), None, None

    @staticmethod
    def gradients(
        grad: Tensor,
        grad_mean: Tensor | None,
        grad_var: Tensor | None,
        saved: tuple[Any, ...],
        eps: float,
        wanted: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of the input (where ``wanted``), and of weight and bias in the statistics' precision."""
        input, weight, mean, var, rectified = saved
        statistics = (grad, grad_mean, grad_var, *saved)
        # what is itself differentiated must be made of differentiable operators
        final = not torch.is_grad_enabled()
        count, grad_input = input.numel() // input.shape[1], None
        kernels = kernels_for("_norm.numba", *statistics) if final else None
        if kernels and kernels.worth_it(input):
            grad_mean, grad_var = (torch.zeros_like(mean) if g is None else g for g in (grad_mean, grad_var))
            of_statistics = (weight, mean, var, grad_mean, grad_var)
            grad_input, sum_g, sums = kernels.backward(grad, input, rectified, *of_statistics, eps, wanted)
            chain = Chain(sum_g, sums, var, weight, eps)
        elif final and _overwritten(*statistics):
            errors = _norm_plain.Errors(grad, rectified, input, mean)
            chain = Chain(errors.sum_g, errors.sum_g_centred, var, weight, eps)
            if wanted:
                slope = _plus(chain.to_var, grad_var).mul_(2 / count)
                grad_input = errors.to_input(chain.scale, slope, _plus(chain.to_mean, grad_mean).div_(count))
        else:
            return composed_gradients(grad, grad_mean, grad_var, saved, eps, wanted)
        return grad_input, chain.to_weight, chain.sum_g


def composed_gradients(
    grad: Tensor, grad_mean: Tensor | None, grad_var: Tensor | None, saved: tuple[Any, ...], eps: float, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """:meth:`BatchNormTraining.gradients` in differentiable operators."""
    input, weight, mean, var, rectified = saved
    g, x, dims = _unrectified(grad, rectified).to(mean.dtype), input.to(mean.dtype), other_dims(input)
    centred, grad_input = x - per_channel(mean, x), None
    chain = Chain(g.sum(dims), (g * centred).sum(dims), var, weight, eps)
    if wanted:
        to_mean, to_var = _plus(chain.to_mean, grad_mean), _plus(chain.to_var, grad_var)
        count = input.numel() // input.shape[1]
        grad_input = chain.to_input(g, centred, to_mean, to_var, count).to(input.dtype)
    return grad_input, chain.to_weight, chain.sum_g


def _plus(value: Tensor, other: Tensor | None) -> Tensor:
    return value if other is None else value + other


def _overwritten(input: Tensor, *others: Tensor | None) -> bool:
    """Whether :mod:`~reimpl.functional._norm.plain` does for such tensors."""
    return ordinary(input, *others) and all(t is None or t.dtype in _norm_plain.DTYPES for t in (input, *others))


def _wide(like: Tensor, *vectors: Tensor | None) -> tuple[Any, ...]:
    """The vectors in the dtype in which those of ``like`` are summed."""
    dtype = opmath_dtype(like.dtype)
    return tuple(v if v is None or v.dtype is dtype else v.to(dtype) for v in vectors)


def _unrectified(grad: Tensor, rectified: Tensor | None) -> Tensor:
    """The gradient before the rectification whose output is ``rectified``, or of what was not rectified."""
    return grad if rectified is None else torch.where(rectified <= 0, 0, grad)


class BatchNormInference(torch.autograd.Function):
    r"""(4.84), (4.85), (4.90) with a mean and variance that do not depend on the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> Tensor:
        kernels = kernels_for("_norm.numba", input, mean, var, weight, bias)
        if kernels and kernels.worth_it(input):
            return kernels.infer(input, mean, var, weight, bias, eps, relu)  # type: ignore[no-any-return]
        if _overwritten(input, mean, var, weight, bias):
            mean, var, weight, bias = _wide(input, mean, var, weight, bias)
            return _norm_plain.normalize_by(input, mean, var, weight, bias, eps, relu)
        return normalize(input, mean, var, weight, bias, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, mean, var, weight, bias, ctx.eps, relu = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, mean, var, weight, output if relu else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, mean, var, weight, rectified = saved = ctx.saved_tensors
        final, eps = not torch.is_grad_enabled(), ctx.eps
        wanted, _, _, *of_vectors = ctx.needs_input_grad[:5]
        sums_wanted = any(of_vectors)
        kernels = kernels_for("_norm.numba", grad, *saved) if final else None
        grad_input = None
        if kernels and kernels.worth_it(input):
            statistics = (weight, mean, var, eps, wanted, sums_wanted)
            grad_input, sum_g, sums = kernels.infer_backward(grad, input, rectified, *statistics)
            chain = Chain(sum_g, sums, var, weight, eps)
        elif final and sums_wanted and _overwritten(grad, *saved):
            mean, var = _wide(input, mean, var)
            errors = _norm_plain.Errors(grad, rectified, input, mean)
            chain = Chain(errors.sum_g, errors.sum_g_centred, var, weight, eps)
            grad_input = errors.scaled(chain.scale) if wanted else None
        else:
            return _infer_backward(ctx, saved, grad)
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


def _infer_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass in operators that can be differentiated, and of what is not plain."""
    input, mean, var, weight, rectified = saved
    x = input.to(opmath_dtype(input.dtype))
    g, (mean, var) = _unrectified(grad, rectified).to(x.dtype), _wide(x, mean, var)
    wanted, _, _, weight_wanted, bias_wanted = ctx.needs_input_grad[:5]
    s = torch.rsqrt(var + ctx.eps)
    grad_input = grad_weight = grad_bias = None
    if wanted:
        scale = s if weight is None else s * weight.to(x.dtype)
        grad_input = (g * per_channel(scale, g)).to(input.dtype).contiguous(memory_format=memory_format_of(input))
    if weight_wanted:
        grad_weight = like(s * (g * (x - per_channel(mean, x))).sum(other_dims(x)), weight)
    if bias_wanted:
        grad_bias = like(g.sum(other_dims(x)), ctx.bias_dtype)
    return grad_input, None, None, grad_weight, grad_bias, None, None


def learn(key: tuple[Any, ...], input: Tensor, *vectors: Tensor | None) -> None:
    """Let the compiled node do, from here on, what kernels have just done to such tensors: running averages (mean and
    variance in evaluation), weight and bias.

    Args:
        key: a name, and: training, :math:`\\epsilon`, rectified, whether there is a weight.
    """
    kernels = kernels_for("_norm.numba", input, *vectors)
    if kernels and kernels.worth_it(input):
        teach(key, kernels, _through, input, *vectors)


def _through(options: Any, grads: Any, saved: Any, numbers: Any, shape: Any) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments from those of output, mean and variance, by differentiable operators."""
    training, eps, relu, weighted = options
    input, *weights, mean, var = saved[: 3 + weighted]
    weight, rectified = weights[0] if weighted else None, saved[-1] if relu else None
    grad = torch.zeros_like(input) if grads[0] is None else grads[0]
    if training:
        _, to_mean, to_var = grads
        kept = (input, weight, mean, var, rectified)
        to_input, to_weight, to_bias = BatchNormTraining.gradients(grad, to_mean, to_var, kept, eps, True)
        return to_input, None, None, to_weight.to(mean.dtype), to_bias.to(mean.dtype)
    tensors, asked = (input, mean, var, weight, rectified), (True, False, False, True, True)
    ctx = SimpleNamespace(needs_input_grad=asked, eps=eps, bias_dtype=mean.dtype)
    return tuple(_infer_backward(ctx, tensors, grad)[:5])
