"""Finds an optimizer by name, ours or PyTorch's, and builds it from ``key=value`` arguments."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

import reimpl.optim

_WORDS = {"true": "True", "false": "False", "none": "None"}


def known_optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer by its full name, ``reimpl.Adam`` or ``torch.Adam``."""
    ours = _classes(reimpl.optim, "reimpl.")  # reimpl.optim also re-exports classes of PyTorch's
    theirs = _classes(torch.optim, "torch.")
    return {f"reimpl.{name}": cls for name, cls in ours.items()} | {f"torch.{n}": cls for n, cls in theirs.items()}


def _classes(module: ModuleType, package: str) -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
        and value.__module__.startswith(package)
        and not name.startswith("_")
    }


def full_name(name: str) -> str:
    """``name`` with its package: a bare ``Adam`` is ours.

    Raises:
        ValueError: there is no such optimizer; the text lists those that there are, and the nearest name.
    """
    known = known_optimizers()
    full = name if "." in name else f"reimpl.{name}"
    if full in known:
        return full
    package, _, bare = full.rpartition(".")
    bare_names = {k: k.rpartition(".")[2].lower() for k in known}
    nearest = difflib.get_close_matches(bare.lower(), list(bare_names.values()), n=1)
    hints = sorted((k for k in known if bare_names[k] in nearest), key=lambda k: not k.startswith(f"{package}."))
    meant = f"; did you mean {hints[0]}?" if hints else "."
    raise ValueError(f"unknown optimizer {name!r}{meant} Known: {', '.join(known)}; a bare name is reimpl's")


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``("momentum=0.9", "nesterov=True")`` as keyword arguments; what is no Python literal is taken as a string.

    Raises:
        ValueError: an entry has no ``=``, or no key before it.
    """
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"--set takes key=value, got {setting!r}")
        try:
            arguments[key] = ast.literal_eval(_WORDS.get(value.lower(), value))
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments


def build_optimizer(name: str, model: nn.Module, arguments: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Builds the optimizer over the parameters of ``model`` that are trained.

    Where ``arguments`` has a ``weight_decay``, biases and normalisations are a second group without it.

    Raises:
        ValueError: unknown name, or an argument out of range.
        TypeError: an argument that the optimizer has not.
    """
    cls = known_optimizers()[full_name(name)]
    trained = [p for p in model.parameters() if p.requires_grad]
    params: list[Any] = trained
    if arguments.get("weight_decay"):
        vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
        params = [{"params": [p for p in trained if p.ndim >= 2]}, vectors]
    try:
        return cls(params, **arguments)
    except TypeError as error:
        raise TypeError(f"{full_name(name)} with {dict(arguments)}: {error}") from error
