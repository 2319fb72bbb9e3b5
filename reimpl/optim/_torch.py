"""The one place that takes private helpers from ``torch.optim``, and smooths over versions from 2.11 on."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import profiler
from torch.compiler import is_compiling
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    StateDict,
    _default_to_fused_or_foreach,
    _device_dtype_check_for_fused,
    _get_capturable_supported_devices,
    _get_scalar_dtype,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)

__all__ = [
    "FakeTensor",
    "LRScheduler",
    "Optimizer",
    "ParamsT",
    "StateDict",
    "check_fused_support",
    "defaults_to_foreach",
    "grad_mode_of_step",
    "has_accelerator",
    "hook_step",
    "is_being_compiled",
    "plain_scalar",
    "require_capturable_devices",
    "runs_eagerly",
    "step_dtype",
    "step_value",
    "to_scalar",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

check_fused_support = _device_dtype_check_for_fused
step_dtype = _get_scalar_dtype
runs_eagerly = _disable_dynamo
"""A decorator for what ``torch.compile`` is to call, not to trace; unlike ``torch.compiler.disable`` it is lazy."""


class Namespace:
    """Numbers by name: what ``types.SimpleNamespace`` is, which Dynamo of torch 2.11 cannot trace."""

    def __init__(self, **values: Any) -> None:
        if not is_compiling():
            self.__dict__.update(values)  # in half the time
            return
        for name, value in values.items():
            setattr(self, name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


def step_value(x: Any) -> Any:
    """The number in a tensor of one, or ``x`` itself where it is traced: PyTorch's ``_get_value``, in fewer calls."""
    return x.item() if isinstance(x, Tensor) and not is_compiling() else x


def is_being_compiled() -> bool:
    """Whether ``torch.compile`` is at work, also where what asks is called by it and not traced."""
    return torch.compiler.is_compiling() or CompileContext.try_get() is not None


@functools.cache
def _callbacks_question() -> Callable[[], bool]:
    """``at::hasCallbacks``: whether a profiler or another observer of operators is on; ``True`` where it is not found.

    What ``record_function`` does to tell them takes 60 µs where the caches are cold, and this a few.
    """
    try:
        function = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))._ZN2at12hasCallbacksEv
    except (OSError, AttributeError):
        return lambda: True
    function.restype = ctypes.c_bool
    return function


def _is_observed(optimizer: Any) -> bool:
    """Whether anything but the step itself is to happen when ``step`` is called."""
    return bool(
        torch.compiler.is_compiling()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or getattr(profiler, "_active_cuspy_profiler_observer", None) is not None
        or _callbacks_question()()
    )


def hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """``Optimizer.profile_hook_step``, which calls hooks and tells profilers, but at no cost where there are none."""
    hooked = Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return (hooked if _is_observed(args[0]) else func)(*args, **kwargs)

    return run


def grad_mode_of_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``step`` without autograd unless the optimizer is differentiable: PyTorch's decorator, at less cost."""
    traced = _use_grad_for_differentiable(step)

    @functools.wraps(step)
    def run(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced(optimizer, *args, **kwargs)
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(optimizer.defaults["differentiable"])
        try:
            return step(optimizer, *args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return run


@functools.cache
def has_accelerator() -> bool:
    """Whether this process can reach a device that captures graphs; asking PyTorch at each step takes 30 µs."""
    return torch.accelerator.current_accelerator(check_available=True) is not None


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
