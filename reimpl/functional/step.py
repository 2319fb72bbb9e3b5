"""The activations without a derivative of their own: the step function and the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def identity(input: Tensor) -> Tensor:
    """The tensor itself, :math:`y = x`: the activation of an output layer under squared error.

    Source: F2; N3. PyTorch: :class:`torch.nn.Identity`.
    """
    return input


def heaviside(input: Tensor, values: Tensor) -> Tensor:
    r"""Step function: 0 for :math:`x < 0`, 1 for :math:`x > 0`, and ``values`` at 0.

    The notes' formula is 1 at 0 (``values=torch.ones(())``), their code 0. NaN gives 0, as in PyTorch. There is no
    derivative: a backward pass raises, as PyTorch's does; compiled, the result is a constant.

    Args:
        input: any shape, a real dtype.
        values: the value at 0, of the dtype of ``input`` and a shape that broadcasts with it.

    Raises:
        TypeError: an argument is no tensor.
        RuntimeError: the dtypes differ.
        NotImplementedError: the dtype is complex.

    Source: F2; N3. PyTorch: :func:`torch.heaviside`.
    """
    if input.is_complex() or values.is_complex():
        raise NotImplementedError("heaviside is not yet implemented for complex tensors.")
    if input.dtype != values.dtype:
        raise RuntimeError("heaviside is not yet implemented for tensors with different dtypes.")
    if torch.compiler.is_compiling():
        return _step(input.detach(), values.detach())
    if torch.is_grad_enabled() and (input.requires_grad or values.requires_grad):
        return _Heaviside.apply(input, values)  # type: ignore[no-any-return]
    return _step(input, values)


def _step(input: Tensor, values: Tensor) -> Tensor:
    return torch.where(input == 0, values, (input > 0).to(input.dtype))


class _Heaviside(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, values: Tensor) -> Tensor:
        return _step(input, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: there is no backward pass."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("derivative for aten::heaviside is not implemented")
