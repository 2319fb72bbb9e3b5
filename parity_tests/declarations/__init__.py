"""Every declared technique: the rows that the generic tests, the report and the documentation are made from."""

import importlib
from typing import Any

from parity_tests.declarations.optim import OPTIMIZERS

_TABLES = {"FUNCTIONS": "functional", "INITS": "init"}

__all__ = ["FUNCTIONS", "INITS", "OPTIMIZERS"]


def __getattr__(name: str) -> Any:
    """Load the tables of layers and initialisations on first use: tests of optimizers need neither."""
    if name not in _TABLES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_TABLES[name]}"), name)
