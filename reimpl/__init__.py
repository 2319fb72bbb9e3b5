"""Techniques of deep learning reimplemented as PyTorch citizens, each held against PyTorch and a NumPy oracle."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

__version__ = "0.1.0"

_PARTS = ("data", "diagnose", "functional", "init", "nn", "optim", "strategies", "testing")


def __getattr__(name: str) -> _ModuleType:
    # each part when it is first asked for: some take a second to import
    if name in _PARTS:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})
