"""The one place that takes private helpers from ``torch.optim``, and smooths over versions from 2.11 on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._guards import CompileContext
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _default_to_fused_or_foreach,
    _device_dtype_check_for_fused,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
    _get_value,
    _use_grad_for_differentiable,
)

__all__ = [
    "LRScheduler",
    "Optimizer",
    "ParamsT",
    "StateDict",
    "check_fused_support",
    "defaults_to_foreach",
    "grad_mode_of_step",
    "is_being_compiled",
    "plain_scalar",
    "require_capturable_devices",
    "runs_eagerly",
    "step_dtype",
    "step_value",
    "to_scalar",
]

grad_mode_of_step = _use_grad_for_differentiable
check_fused_support = _device_dtype_check_for_fused
step_dtype = _get_scalar_dtype
step_value = _get_value
runs_eagerly = _disable_dynamo
"""A decorator for what ``torch.compile`` is to call, not to trace; unlike ``torch.compiler.disable`` it is lazy."""


def is_being_compiled() -> bool:
    """Whether ``torch.compile`` is at work, also where what asks is called by it and not traced."""
    return torch.compiler.is_compiling() or CompileContext.try_get() is not None


def defaults_to_foreach(params: list[Tensor], differentiable: bool) -> bool:
    """Whether PyTorch would take its foreach implementation when the user has not chosen one."""
    return _default_to_fused_or_foreach(params, differentiable, use_fused=False)[1]


def to_scalar(value: Any) -> Any:
    """A one-element tensor as a 0-d tensor; anything else as it is."""
    return value.squeeze() if isinstance(value, Tensor) and value.dim() != 0 else value


def plain_scalar(value: Any) -> Any:
    """A one-element tensor as a 0-d tensor cut out of any graph; anything else as it is."""
    return to_scalar(value.detach()) if isinstance(value, Tensor) else value


def require_capturable_devices(
    params: list[Tensor], numbers: list[list[Tensor]], names: str, *, supports_xla: bool
) -> None:
    """Raise PyTorch's error unless each parameter and its state's numbers lie on a device that graphs can capture.

    Raises:
        AssertionError: a parameter and a number are apart, or on a device without graph capture; ``names`` says what
            they are.
    """
    if torch.compiler.is_compiling():
        return
    supported = _get_capturable_supported_devices(supports_xla=supports_xla)
    if not all(
        p.device.type in supported and all(number.device.type == p.device.type for number in row)
        for p, row in zip(params, numbers, strict=True)
    ):
        raise AssertionError(f"If capturable=True, {names} must be on supported devices: {supported}.")
