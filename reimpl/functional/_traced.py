"""Autograd Functions for compilers to trace, where a plain composition's derivative would keep the wrong tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import opmath_dtype
from reimpl.functional._norm.chain import like, other_dims, per_channel
from reimpl.functional._norm.functions import composed_gradients, scaled


class TracedReLU(torch.autograd.Function):
    """The rectifier whose derivative asks its output, which the next layer keeps in any case.

    The composition's derivative asks the input. What a compiler then keeps in its place is a mask of bytes: measured,
    GCC 12 makes Inductor's loop that writes one out of random numbers 90 times as slow as the loop without. So on the
    CPU the mask is not left to be found before the gradient is there, though it would be a quarter of the output.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output = torch.where(input <= 0, 0, input)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        if output.is_cpu:
            # itself in any case, but to a compiler something that the forward pass cannot know
            output = torch.where(grad != grad, output, output)
        return torch.where(output <= 0, 0, grad)


def rectify(input: Tensor) -> Tensor:
    """``max(x, 0)``"""
    return TracedReLU.apply(input)  # type: ignore[no-any-return]


# The part of a batch that is looked at first.
_PART = 8


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Of each channel, in a pass over the whole and one over a part of it.

    With deviations from the mean :math:`s` of the part, :math:`\sigma^2 = \frac1m \sum (x - s)^2 - (\mu - s)^2`. Little
    cancels: a part of the batch that lies apart from the rest widens the whole, :math:`(\mu - s)^2 \le 7 \sigma^2` for
    an eighth.
    """
    dims = other_dims(x)
    near = x[: -(-x.shape[0] // _PART)].mean(dims)
    deviations = x - per_channel(near, x)
    offset, squares = deviations.mean(dims), (deviations * deviations).mean(dims)
    var = squares - offset * offset
    return near + offset, torch.where(var < 0, 0, var)


class TracedBatchNorm(torch.autograd.Function):
    """Batch normalisation by the batch, whose derivative passes over its numbers twice.

    The composition's derivative takes four passes: the mean's part adds up what the variance's part has written out,
    though it adds up to zero. Mean and variance are for the running averages, and not differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = input.to(opmath_dtype(input.dtype))
        mean, var = _mean_and_variance(x)
        output = scaled(x - per_channel(mean, x), var, weight, bias, eps, relu)
        # where it is none, a conversion has Dynamo of torch 2.11 forget the derivative without a word
        output = output if output.dtype == input.dtype else output.to(input.dtype)
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(input, weight, mean, var, output if relu else None)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[0]
        grad_input, to_weight, to_bias = composed_gradients(grad, None, None, saved, ctx.eps, wanted)
        return grad_input, like(to_weight, saved[1]), like(to_bias, ctx.bias_dtype), None, None


def traced_batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch."""
    return TracedBatchNorm.apply(input, weight, bias, eps, relu)  # type: ignore[no-any-return]
