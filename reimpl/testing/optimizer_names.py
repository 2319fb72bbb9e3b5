"""Finds an optimizer class by its dotted name, and holds arguments against what the class takes."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch

from reimpl.testing.optimizers import OptimizerClass


def load_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer class of a dotted name, such as ``"timm.optim.RMSpropTF"``.

    Raises:
        ValueError: the name has no dot, its module cannot be imported, or there is no such class in it (the text has
            the nearest names).
        TypeError: what stands there is no subclass of ``torch.optim.Optimizer``.
    """
    module_name, _, attribute = name.rpartition(".")
    if not module_name:
        raise ValueError(f"an optimizer is named with its module, as in torch.optim.Adam; got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"cannot import {module_name!r} for {name!r}: {error}") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=3)
        hint = f"; did you mean {', '.join(f'{module_name}.{each}' for each in near)}?" if near else ""
        raise ValueError(f"module {module_name!r} has no {attribute!r}{hint}")
    found = getattr(module, attribute)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        kind = "class" if isinstance(found, type) else type(found).__name__
        raise TypeError(f"{name} is no optimizer: expected a subclass of torch.optim.Optimizer, got a {kind}")
    return found


def described(optimizer: OptimizerClass) -> str:
    """The shortest dotted name under which the class can be imported, as far as it has one."""
    if isinstance(optimizer, functools.partial):
        return described(optimizer.func)
    name = str(getattr(optimizer, "__qualname__", type(optimizer).__qualname__))
    parts = str(getattr(optimizer, "__module__", "")).split(".")
    for count in range(1, len(parts) + 1):
        module = ".".join(parts[:count])
        if getattr(sys.modules.get(module), name, None) is optimizer:
            return f"{module}.{name}" if module != "__main__" else name
    return name


def takes(optimizer: OptimizerClass, argument: str) -> bool:
    """Whether ``argument`` is named in the signature; ``**kwargs`` is not taken for a yes."""
    return argument in inspect.signature(optimizer).parameters


def settings_of(optimizer: OptimizerClass, kwargs: Mapping[str, Any], role: str) -> dict[str, Any]:
    """``kwargs`` themselves, if the class takes them.

    Raises:
        TypeError: ``optimizer`` cannot be called, or takes no such argument; the text lists those it takes.
    """
    if not callable(optimizer):
        raise TypeError(f"{role} must be an optimizer class or a function that makes one, got {optimizer!r}")
    known = list(inspect.signature(optimizer).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return dict(kwargs)
    names = [parameter.name for parameter in known[1:]]
    for key in kwargs:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise TypeError(
                f"{role} {described(optimizer)} takes no argument {key!r}{hint} It takes: {', '.join(names)}"
            )
    return dict(kwargs)
