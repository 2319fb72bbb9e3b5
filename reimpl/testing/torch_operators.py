"""The adapter to PyTorch's own databases of sample calls for functions and modules, private as those are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reimpl.testing.declarations import Sample

__all__ = ["ErrorCall", "ModuleCall", "error_calls", "module_calls", "sample_calls", "tensors_of"]


@dataclass(frozen=True)
class ErrorCall:
    """A call that must raise: ``args`` and ``kwargs``, the error's type, and words that PyTorch's message has."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    error_type: type[Exception]
    error_regex: str


@dataclass(frozen=True)
class ModuleCall:
    """How to make a module and how to call it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Any, ...]
    input_kwargs: dict[str, Any]
    desc: str


def sample_calls(
    name: str, device: torch.device | str, dtype: torch.dtype, requires_grad: bool = True
) -> Iterator[Sample]:
    """PyTorch's own sample calls of an operator such as ``"nn.functional.conv2d"``.

    Raises:
        KeyError: PyTorch's database has no such operator.
    """
    for info in _operators(name):
        if info.dtypes and dtype not in info.dtypes:
            continue
        for sample in info.sample_inputs(str(device), dtype, requires_grad=requires_grad):
            yield Sample((sample.input, *sample.args), dict(sample.kwargs), sample.name or "")


def error_calls(name: str, device: torch.device | str) -> Iterator[ErrorCall]:
    """PyTorch's own bad calls of an operator, none where its database has none.

    Raises:
        KeyError: PyTorch's database has no such operator.
    """
    for info in _operators(name):
        if info.error_inputs_func is None:
            continue
        for case in info.error_inputs(str(device)):
            sample = case.sample_input
            yield ErrorCall((sample.input, *sample.args), dict(sample.kwargs), case.error_type, str(case.error_regex))


def module_calls(
    module: type[torch.nn.Module], device: torch.device | str, dtype: torch.dtype, training: bool
) -> Iterator[ModuleCall]:
    """PyTorch's own sample constructions and calls of a module class; each has inputs that want a gradient.

    Raises:
        KeyError: PyTorch's database has no such module.
    """
    from torch.testing._internal import common_modules

    _allow_flags_again()
    for info in common_modules.module_db:
        if info.module_cls is not module:
            continue
        make: Callable[..., Any] = info.module_inputs_func
        for row in make(info, device=str(device), dtype=dtype, requires_grad=True, training=training):
            built, called = row.constructor_input, row.forward_input
            if called is not None:
                yield ModuleCall(built.args, dict(built.kwargs), called.args, dict(called.kwargs), row.desc or "plain")
        return
    raise KeyError(f"PyTorch's database has no module {module.__name__}")


def tensors_of(sample: Sample) -> list[Tensor]:
    """The tensors of a call that want a gradient, in the order of its arguments."""
    values = (*sample.args, *sample.kwargs.values())
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def _operators(name: str) -> list[Any]:
    found: list[Any] = _database().get(name, [])
    if not found:
        raise KeyError(f"PyTorch's database has no operator {name!r}")
    return found


@functools.cache
def _database() -> dict[str, list[Any]]:
    from torch.testing._internal.common_methods_invocations import op_db

    _allow_flags_again()
    rows: dict[str, list[Any]] = {}
    for info in op_db:
        rows.setdefault(info.name, []).append(info)
    return rows


def _allow_flags_again() -> None:
    # the import of common_utils forbids setting torch.backends' flags from then on: a surprise at a distance
    torch.backends.__allow_nonbracketed_mutation_flag = True
