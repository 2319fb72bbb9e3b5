"""Batch normalisation in training as operators of PyTorch, for compiled code that calls the library's own kernels.

Without kernels compilers do better with the composition, which they fuse with what stands around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import opmath_dtype
from reimpl.functional._norm_chain import like
from reimpl.functional._norm_functions import BatchNormTraining
from reimpl.functional.kernels import in_compiled_code


def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch, by the operator."""
    return _batch_norm(input, weight, bias, eps, relu)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "reimpl::batch_norm",
    mutates_args=(),
    schema="(Tensor input, Tensor? weight, Tensor? bias, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
)
@in_compiled_code
def _batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return BatchNormTraining.forward(input, weight, bias, eps, relu)


@_batch_norm.register_fake
def _(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input), _vector(input), _vector(input)


@torch.library.custom_op(
    "reimpl::batch_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor input, Tensor? weight, Tensor mean, Tensor var, "
    "Tensor? rectified, float eps, bool wanted) -> (Tensor, Tensor, Tensor)",
)
@in_compiled_code
def _batch_norm_backward(
    grad: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    rectified: Tensor | None,
    eps: float,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the input (empty unless wanted), of the weight and of the bias."""
    saved = (input, weight, mean, var, rectified)
    grad_input, to_weight, to_bias = BatchNormTraining.gradients(grad, grad_mean, grad_var, saved, eps, wanted)
    return input.new_empty(0) if grad_input is None else grad_input, to_weight, to_bias


@_batch_norm_backward.register_fake
def _(grad: Tensor, grad_mean: Tensor, grad_var: Tensor, input: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(input) if others[-1] else input.new_empty(0), _vector(input), _vector(input)


def _vector(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=opmath_dtype(input.dtype))


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        # what is itself differentiated must be made of differentiable operators
        return BatchNormTraining.backward(ctx, grad, grad_mean, grad_var)
    input, weight, mean, var, rectified = ctx.saved_tensors
    grads = (
        torch.zeros_like(t) if g is None else g
        for g, t in zip((grad, grad_mean, grad_var), (input, mean, var), strict=True)
    )
    wanted, of_weight, of_bias = ctx.needs_input_grad[:3]
    to_input, to_weight, to_bias = _batch_norm_backward(
        *grads, input, weight, mean, var, rectified, ctx.eps, wanted
    )  # fmt: skip
    return (
        to_input if wanted else None,
        like(to_weight, weight) if of_weight else None,
        like(to_bias, ctx.bias_dtype) if of_bias else None,
        None,
        None,
    )


_batch_norm.register_autograd(_differentiate, setup_context=BatchNormTraining.setup_context)
