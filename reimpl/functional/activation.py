"""Elementwise activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import call, opmath_dtype


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    r"""Rectified linear unit :math:`y = \max(x, 0)`, with derivative 0 at 0.

    Args:
        input: any shape, a real dtype.
        inplace: write the result into ``input`` and return it.

    Returns:
        the shape, dtype and strides of ``input``.

    Raises:
        NotImplementedError: ``input`` is boolean or complex.

    Source: F2; N1, N3. PyTorch: :func:`torch.nn.functional.relu`.
    """
    if input.dtype == torch.bool:
        raise NotImplementedError("Boolean inputs not supported for relu")
    if input.is_complex():
        raise NotImplementedError("clamp is not supported for complex types")
    output: Tensor = call(_ReLU, _rectify, input)
    return input.copy_(output) if inplace else output


def sigmoid(input: Tensor) -> Tensor:
    r"""Logistic sigmoid :math:`y = 1/(1 + e^{-x})`, with :math:`y' = y(1 - y) \le 1/4`.

    Computed as :math:`e^x/(1 + e^x)` for negative :math:`x`, so that neither side overflows.

    Args:
        input: any shape; integers are taken in the default floating-point dtype.

    Returns:
        the shape and strides of ``input``.

    Source: F2; N1, N2, N3. PyTorch: :func:`torch.sigmoid`.
    """
    if not (input.is_floating_point() or input.is_complex()):
        input = input.to(torch.get_default_dtype())
    return call(_Sigmoid, _logistic, input)  # type: ignore[no-any-return]


def _rectify(input: Tensor) -> Tensor:
    # "<= 0" and not "> 0": NaN fails the comparison and passes through, as PyTorch has it.
    return torch.where(input <= 0, 0, input)


class _ReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        # Several times faster than the composition's choice; its derivative, shared out at 0, is not called for.
        return torch.maximum(input, input.new_zeros(()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return torch.where(output <= 0, 0, grad)


def _logistic(input: Tensor) -> Tensor:
    if input.is_complex():
        return 1 / (1 + torch.exp(-input))
    x = input.to(opmath_dtype(input.dtype))
    decay = torch.exp(torch.where(x >= 0, -x, x))
    return (torch.where(x >= 0, 1, decay) / (1 + decay)).to(input.dtype)


class _Sigmoid(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return _logistic(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        y = output.to(opmath_dtype(output.dtype))
        slope: Tensor = (y * (1 - y)).conj()
        return (grad * slope).to(output.dtype)
