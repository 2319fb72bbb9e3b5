"""Writes the declarations (name, source, formula, dialects) as JSON: ``python -m parity_tests.describe FILE``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from parity_tests.declarations import FUNCTIONS, INITS, OPTIMIZERS
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique, Technique
from reimpl.testing.recorder import write_json


def describe() -> list[dict[str, Any]]:
    """One dictionary a technique, in the order of the declarations."""
    return [
        _technique(kind, row)
        for kind, rows in (("optimizer", OPTIMIZERS), ("function", FUNCTIONS), ("init", INITS))
        for row in rows
    ]


def _technique(kind: str, row: Technique) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": row.name,
        "ids": list(row.ids),
        "source": row.source,
        "formula": row.formula,
        "ours": _qualified(row.ours),
        "torch": None if row.torch is None else _qualified(row.torch),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in row.dtypes],
        "dialects": list(_dialects(row)),
    }


def _dialects(row: Technique) -> Iterator[dict[str, Any]]:
    """The optimizer's configurations that have a catalogue id or no counterpart in PyTorch."""
    for config in row.configs if isinstance(row, OptimizerTechnique) else ():
        if config.id is not None or config.torch_kwargs is None:
            yield _dialect(config)


def _dialect(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "id": config.id,
        "description": config.desc,
        "arguments": _arguments(config.kwargs),
        "torch": None if config.torch_kwargs is None else _arguments(config.torch_kwargs),
        "note": config.note,
    }


def _arguments(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in kwargs.items())


def _qualified(target: Callable[..., Any]) -> str:
    """``torch.nn.functional.linear`` and ``torch.optim.Adam`` rather than the private modules they live in."""
    if isinstance(target, functools.partial):
        given = [*map(repr, target.args), *filter(None, [_arguments(target.keywords)])]
        return f"{_qualified(target.func)}({', '.join(given)})"
    if isinstance(target, torch.nn.Module):
        return f"torch.nn.{type(target).__name__}"
    name = getattr(target, "__name__", repr(target))
    # What is built in and written in C++ has no module.
    home = "torch.nn.functional" if hasattr(torch.nn.functional, name) else "torch"
    module = getattr(target, "__module__", None) or home
    for public in ("torch.optim", "torch.nn.init", "reimpl.optim", "reimpl.functional", "reimpl.init"):
        if module.startswith(public):
            return f"{public}.{name}"
    if module.startswith("torch._C"):
        return f"torch.nn.functional.{name}"
    return f"{module}.{name}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="where the JSON goes")
    write_json(parser.parse_args().file, describe())


if __name__ == "__main__":
    main()
