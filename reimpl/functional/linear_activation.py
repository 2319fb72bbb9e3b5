"""The affine map and an activation in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_disabled, autocast_to_lower, call, scalar_type_name
from reimpl.functional.activation import FROM_OUTPUT, relu, sigmoid, tanh
from reimpl.functional.kernels import kernels_for
from reimpl.functional.linear import affine, affine_gradients, linear

ACTIVATIONS = tuple(FROM_OUTPUT)
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "sigmoid": sigmoid, "tanh": tanh}


def linear_activation(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu") -> Tensor:
    r"""A layer of a network, :math:`y = f(x W^\top + b)`, with :math:`f` an activation whose derivative is a function
    of its value.

    With :math:`u = x W^\top + b` and the error :math:`\delta = \partial E/\partial u = \bar y f'(u)`: :math:`f'` is 1
    where :math:`y > 0` (relu), :math:`y (1 - y)` (sigmoid) or :math:`1 - y^2` (tanh), so that :math:`u` is never kept;
    then :math:`\bar x = \delta W`, :math:`\bar W = \delta^\top x`, :math:`\bar b = \sum \delta`.

    Args:
        input: shape :math:`(*, \text{in})`.
        weight: shape :math:`(\text{out}, \text{in})`.
        bias: shape :math:`(\text{out},)`.
        activation: ``"relu"``, ``"sigmoid"`` or ``"tanh"``.

    Returns:
        shape :math:`(*, \text{out})`.

    Raises:
        ValueError: no such activation.
        NotImplementedError: the tensors are complex.
        RuntimeError: shapes or dtypes do not fit, as for :func:`reimpl.functional.linear`.

    Source: F1, F2, F17; N3, the layer equation and its errors. PyTorch: ``relu(linear(...))``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, but got {activation!r}")
    if weight.dim() != 2:
        raise RuntimeError(f"Expected a weight of shape (out, in), but got weight of size {list(weight.shape)}")
    if input.is_complex():
        raise NotImplementedError(f"\"linear_activation\" not implemented for '{scalar_type_name(input.dtype)}'")
    input, weight, bias = autocast_to_lower(input, weight, bias)
    if input.is_cpu and kernels_for("_pointwise.numba", input, weight, bias):
        # quicker one by one: the compiled node does the second
        return _FUNCTIONS[activation](linear(input, weight, bias))
    with autocast_disabled(input.device):
        return call(_LinearActivation, _composition, input, weight, bias, activation)  # type: ignore[no-any-return]


def _composition(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    u = linear(input, weight, bias)
    if activation == "relu":
        # "<= 0" and not "> 0": NaN fails the comparison and passes through, as PyTorch has it.
        return torch.where(u <= 0, 0, u)
    if activation == "sigmoid":
        return sigmoid(u)
    # no branch overflows, and small values keep their digits; |u| by where, since it has a derivative of 1 at 0
    negative = u < 0
    decayed = torch.expm1(-2 * torch.where(negative, -u, u))
    value = -decayed / (2 + decayed)
    return torch.where(negative, -value, value)


class _LinearActivation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        output: Tensor = FROM_OUTPUT[activation].forward(affine(input, weight, bias))
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.activation = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(input, weight, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, y = ctx.saved_tensors
        error = FROM_OUTPUT[ctx.activation].error(grad, y)
        with autocast_disabled(grad.device):
            return *affine_gradients(ctx, error, input, weight), None
