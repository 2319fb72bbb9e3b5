"""Turns an existing model over from :mod:`torch.nn` to :mod:`reimpl.nn` and back, module by module and in place."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

# They hold, pass on or reshape, and compute nothing that could be reimplemented.
_PASSIVE = (
    "DataParallel",
    "DistributedDataParallel",
    "Flatten",
    "Identity",
    "Module",
    "ModuleDict",
    "ModuleList",
    "ParameterDict",
    "ParameterList",
    "ParametrizationList",
    "Sequential",
    "Unflatten",
)


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` or :func:`revert` did.

    Args:
        model: the model itself, changed in place.
        replaced: names of the modules (``""`` is the model) that are now of the other library.
        left: names of the modules that stayed what they were, each with the reason.
    """

    model: Module
    replaced: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        count = len(self.replaced)
        lines = [f"{count} module{'' if count == 1 else 's'} replaced, {len(self.left)} left"]
        return "\n".join([*lines, *(f"  {name or 'the model itself'}: {why}" for name, why in self.left.items())])


def convert(model: Module) -> Conversion:
    """Make every module of ``model`` whose class is one of :mod:`torch.nn`'s with a twin here that twin.

    The twin takes over the module's identity, and with it everything that it has or that refers to it: parameters and
    buffers, hooks and parametrizations, mode, device and layout, names, places where it is shared, an optimizer's
    references. Only exact classes are replaced: a subclass may do anything. What a ``forward`` calls in
    :mod:`torch.nn.functional` stays.

    Args:
        model: any module; changed in place.

    Returns:
        the model, what was replaced and what was left: modules of :mod:`torch.nn` that have no twin (attention, layer
        normalisation and others that the notes do not have), subclasses, lazy modules before their first call, modules
        with a ``forward`` of their own, and what :mod:`torch.jit` has compiled.

    Raises:
        TypeError: ``model`` is no module.
    """
    return _turn(model, dict(twins()), "torch.nn")


def revert(model: Module) -> Conversion:
    """Make every module of ``model`` whose class is one of :mod:`reimpl.nn`'s with a twin in PyTorch that twin.

    The way back from :func:`convert`, for models that were built on :mod:`reimpl.nn` too.

    Raises:
        TypeError: ``model`` is no module.
    """
    return _turn(model, {ours: theirs for theirs, ours in twins()}, "reimpl.nn")


@cache
def twins() -> tuple[tuple[type[Module], type[Module]], ...]:
    """PyTorch's class and ours, for every module class of :mod:`reimpl.nn` whose name :mod:`torch.nn` has as well."""
    found = []
    for name, ours in vars(sys.modules["reimpl.nn"]).items():
        theirs: Any = getattr(torch.nn, name, None)
        if _is_module_class(ours) and _is_module_class(theirs) and ours is not theirs:
            found.append((theirs, ours))
    return tuple(found)


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Module)


def _turn(model: Module, twin_of: dict[type[Module], type[Module]], source: str) -> Conversion:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    replaced, left = [], {}
    for name, module in list(model.named_modules()):
        reason = _reason_to_leave(module, twin_of, source)
        if reason is not None:
            left[name] = reason
        elif (cls := _own_class(module)) in twin_of:
            module.__class__ = _parametrized(module, twin_of[cls]) if is_parametrized(module) else twin_of[cls]
            # a graph compiled by torch 2.11 asks for a module's class again only once its dictionary has changed
            vars(module)["_turned"] = True
            del vars(module)["_turned"]
            replaced.append(name)
    return Conversion(model, tuple(replaced), left)


def _own_class(module: Module) -> type[Module]:
    """The module's class, or what it was before it was parametrized."""
    cls = type(module)
    return cls.__bases__[0] if is_parametrized(module) else cls


def _parametrized(module: Module, twin: type[Module]) -> type[Module]:
    """A class like the one that :mod:`torch.nn.utils.parametrize` made for this module alone, from the twin."""
    own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{twin.__name__}", (twin,), own | {"__module__": twin.__module__})


def _reason_to_leave(module: Module, twin_of: dict[type[Module], type[Module]], source: str) -> str | None:
    """Why a module that one might expect to be replaced is not; ``None`` where there is nothing to explain."""
    if isinstance(module, torch.jit.ScriptModule):
        name = module.original_name
        return None if name in _PASSIVE else f"torch.jit has compiled this {name}"
    cls = _own_class(module)
    if cls in twin_of:
        return "has a forward of its own" if "forward" in vars(module) else None
    becomes = getattr(cls, "cls_to_become", None) if isinstance(module, LazyModuleMixin) else None
    if becomes in twin_of:
        return (
            f"{cls.__name__} becomes {source}.{becomes.__name__} when it is first called: convert the model after that"
        )
    if becomes is not None and becomes.__module__.startswith(f"{source}."):
        return f"{cls.__name__} becomes {source}.{becomes.__name__}, which has no twin"
    for base in cls.__mro__:
        if base in twin_of.values():  # looked for first, since our classes derive from PyTorch's
            return None
        if base in twin_of:
            name = cls.__qualname__ if cls.__name__ != base.__name__ else f"{cls.__module__}.{cls.__qualname__}"
            return f"{name} is a subclass of {source}.{base.__name__}"
    if cls.__module__.startswith(f"{source}.") and cls.__name__ not in _PASSIVE:
        return f"{source}'s {cls.__name__} has no twin"
    return None
