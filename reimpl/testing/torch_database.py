"""The one adapter to PyTorch's own test databases, which are private, slow to import and in need of ``expecttest``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from reimpl.testing.declarations import OptimizerConfig, Sample


@dataclass(frozen=True)
class OptimizerErrorCase:
    """A constructor call, or a first step, that must raise (or warn, where ``error_type`` is a ``Warning``).

    ``params`` is ``None`` where the test supplies its own.
    """

    desc: str
    params: Any
    kwargs: Mapping[str, Any]
    error_type: type[Exception]
    error_regex: str
    on_step: bool


@dataclass(frozen=True)
class OptimizerFlags:
    """What PyTorch's database says about an optimizer."""

    supported_impls: tuple[str, ...]
    not_original_flags: tuple[str, ...]
    supports_sparse: bool
    supports_complex: bool
    has_capturable_arg: bool
    fused_on: tuple[str, ...]


def optimizer_inputs(name: str, device: str | torch.device, dtype: torch.dtype) -> tuple[OptimizerConfig, ...]:
    """PyTorch's own sample configurations of ``torch.optim.<name>``.

    Each call makes new ones: the keyword arguments may hold tensors. Parameters are the caller's affair.

    Raises:
        KeyError: PyTorch's database has no such optimizer.
    """
    inputs = _info(name).optim_inputs_func(str(torch.device(device).type), dtype)
    return tuple(OptimizerConfig(item.desc, dict(item.kwargs), torch_kwargs=dict(item.kwargs)) for item in inputs)


def optimizer_error_inputs(name: str, device: str | torch.device, dtype: torch.dtype) -> tuple[OptimizerErrorCase, ...]:
    """PyTorch's own bad inputs of ``torch.optim.<name>``, with the error that it expects of each.

    Raises:
        KeyError: PyTorch's database has no such optimizer.
    """
    database = _database()
    cases = _info(name).optim_error_inputs_func(str(torch.device(device).type), dtype)
    return tuple(
        OptimizerErrorCase(
            desc=case.optimizer_error_input.desc,
            params=case.optimizer_error_input.params,
            kwargs=dict(case.optimizer_error_input.kwargs),
            error_type=case.error_type,
            error_regex=case.error_regex,
            on_step=case.error_on is database.OptimizerErrorEnum.STEP_ERROR,
        )
        for case in cases
    )


def optimizer_flags(name: str) -> OptimizerFlags:
    """Which execution flags, gradients and devices ``torch.optim.<name>`` supports.

    Raises:
        KeyError: PyTorch's database has no such optimizer.
    """
    info = _info(name)
    return OptimizerFlags(
        supported_impls=tuple(info.supported_impls),
        not_original_flags=tuple(info.not_og_supported_flags),
        supports_sparse=bool(info.supports_sparse),
        supports_complex=bool(info.supports_complex),
        has_capturable_arg=bool(info.has_capturable_arg),
        fused_on=tuple(info.supports_fused_on),
    )


@dataclass(frozen=True)
class ModuleCase:
    """How PyTorch's database builds a module (``args``, ``kwargs``) and what it calls it with."""

    desc: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Any, ...]
    input_kwargs: Mapping[str, Any]


def function_dtypes(name: str, device: str | torch.device) -> tuple[torch.dtype, ...]:
    """Every dtype for which PyTorch's database has sample calls of the function on such a device."""
    kind = torch.device(device).type
    return tuple(sorted({dtype for info in _function_rows(name) for dtype in info.supported_dtypes(kind)}, key=str))


def function_inputs(name: str, device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """PyTorch's own sample calls of ``torch.nn.functional.<name>`` or ``torch.<name>``; none where it has no row."""
    kind = torch.device(device).type
    for info in _function_rows(name):
        if dtype in info.supported_dtypes(kind):
            differentiable = info.supports_autograd and dtype in info.supported_backward_dtypes(kind)
            for item in info.sample_inputs(device, dtype, requires_grad=differentiable):
                yield Sample(_arguments(name, item), dict(item.kwargs), desc=item.name)


def function_error_inputs(name: str, device: str | torch.device) -> Iterator[tuple[Sample, Any]]:
    """PyTorch's own bad calls of ``torch.nn.functional.<name>`` or ``torch.<name>``, with the exception's type."""
    for info in _function_rows(name):
        for error in info.error_inputs(device) if info.error_inputs_func else ():
            item = error.sample_input
            yield Sample(_arguments(name, item), dict(item.kwargs), desc=error.error_regex), error.error_type


def module_inputs(
    name: str, device: str | torch.device, dtype: torch.dtype, training: bool = True
) -> Iterator[ModuleCase]:
    """PyTorch's own sample constructions and calls of ``torch.nn.<name>``; none where it has no row."""
    for info in _module_rows(name):
        for item in info.module_inputs_func(info, device, dtype, requires_grad=True, training=training):
            if item.forward_input is not None:
                yield _module_case(item, item.desc)


def module_error_inputs(
    name: str, device: str | torch.device, dtype: torch.dtype
) -> Iterator[tuple[ModuleCase, Any, bool]]:
    """PyTorch's own bad constructions and calls of ``torch.nn.<name>``: the exception's type, and whether it is the
    constructor that raises."""
    on_construction = _import("common_modules").ModuleErrorEnum.CONSTRUCTION_ERROR
    for info in _module_rows(name):
        if info.module_error_inputs_func is not None:
            for error in info.module_error_inputs_func(info, device, dtype, requires_grad=True, training=True):
                case = _module_case(error.module_error_input, error.error_regex)
                yield case, error.error_type, error.error_on is on_construction


def _arguments(name: str, item: Any) -> tuple[Any, ...]:
    args = (item.input, *item.args)
    # Its row of embedding has the table first.
    return args[1::-1] if name == "embedding" else args


def _module_case(item: Any, desc: str) -> ModuleCase:
    call, inputs = item.constructor_input, item.forward_input
    args, kwargs = (tuple(inputs.args), dict(inputs.kwargs)) if inputs is not None else ((), {})
    return ModuleCase(desc, tuple(call.args), dict(call.kwargs), args, kwargs)


def _module_rows(name: str) -> list[Any]:
    return [info for info in _import("common_modules").module_db if info.module_cls.__name__ == name]


def _function_rows(name: str) -> list[Any]:
    rows = _import("common_methods_invocations").op_db
    return [info for info in rows if info.name in (name, f"nn.functional.{name}")]


@functools.cache
def _import(name: str) -> ModuleType:
    """Import a part of the database, and undo what its import does to the process.

    ``torch.testing._internal.common_utils`` forbids setting ``torch.backends`` flags from then on; here that would be
    a surprise at a distance.
    """
    module = importlib.import_module(f"torch.testing._internal.{name}")
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return module


def _database() -> ModuleType:
    return _import("common_optimizers")


def _info(name: str) -> Any:
    for info in _database().optim_db:
        if info.optim_cls.__name__ == name:
            return info
    known = sorted(info.optim_cls.__name__ for info in _database().optim_db)
    raise KeyError(f"PyTorch's database has no optimizer {name!r}; it has {', '.join(known)}")
