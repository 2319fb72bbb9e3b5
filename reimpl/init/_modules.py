"""How a model is walked through and its parameters are written: leaves in order, parametrised weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from reimpl.init._kinds import AFFINE, ATTENTION, EMBEDDINGS, NORMS, RECURRENT, is_a

KNOWN = AFFINE | NORMS | EMBEDDINGS | RECURRENT | ATTENTION | {"PReLU"}


def leaves(model: Module) -> Iterator[tuple[str, Module]]:
    """Modules that compute something themselves, with their names, in the order of definition.

    These are the layers that are known and whatever has no children. A module that stands in several places comes up
    at each; a parametrisation of a layer is part of it.
    """
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(inside)):
            continue
        if parametrize.is_parametrized(module):
            inside.append(f"{name}.parametrizations." if name else "parametrizations.")
        if is_a(module, KNOWN) or next(module.children(), None) is None:
            yield name, module


def check_model(model: Module) -> None:
    """Raise ``TypeError`` for what is no module, and ``ValueError`` for one whose parameters have no shape yet."""
    if not isinstance(model, Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: a tensor is filled by init.zeros_ "
            "and the like"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} belongs to a lazy layer that has no shape yet; run an input through it first")


def rewrite(module: Module, name: str, fill: Callable[[Tensor], object]) -> None:
    """Let ``fill`` change a parameter in place, through its parametrisation (weight norm, ...) where it has one."""
    with torch.no_grad():
        if parametrize.is_parametrized(module, name):
            value = getattr(module, name).detach().clone()
            fill(value)
            setattr(module, name, value)
        else:
            fill(getattr(module, name))


def parameters_behind(module: Module, name: str) -> list[Tensor]:
    """The parameter of that name, or those that its parametrisation computes it from."""
    if parametrize.is_parametrized(module, name):
        parametrizations = module.parametrizations
        assert isinstance(parametrizations, Module)
        return list(parametrizations[name].parameters())  # type: ignore[index]
    parameter = getattr(module, name, None)
    return [parameter] if isinstance(parameter, Tensor) else []


def own_names(module: Module) -> list[str]:
    """Names of the parameters that a module holds itself, parametrised ones by the name of what is computed."""
    direct = [name for name, _ in module.named_parameters(recurse=False)]
    if not parametrize.is_parametrized(module):
        return direct
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, Module)
    return [*(name for name, _ in parametrizations.named_children()), *direct]


def call(model: Module, batch: Any) -> Any:
    """``model`` of a tensor, of a tuple or list of arguments, or of a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end of the block, whatever happens in it."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


@contextmanager
def buffers_restored(model: Module) -> Iterator[None]:
    """Put the model's buffers (running statistics, ...) back at the end of the block."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
