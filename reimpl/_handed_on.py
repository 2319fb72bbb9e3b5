"""What a module leaves to PyTorch's of the same name: whatever it does not define itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any


def handed_on(
    own: str, theirs: ModuleType, submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A module's ``__getattr__`` and ``__dir__``, which look for the names that it lacks in PyTorch's.

    Args:
        own: the module's name.
        theirs: PyTorch's.
        submodules: those of PyTorch's that can be imported under the module's name too: the same objects, since a
            second copy's classes would be others.
    """
    for name in submodules:
        sys.modules[f"{own}.{name}"] = importlib.import_module(f"{theirs.__name__}.{name}")

    def __getattr__(name: str) -> Any:
        # what Python asks modules for, such as __path__, is each module's own
        if not name.startswith("__") and hasattr(theirs, name):
            return getattr(theirs, name)
        raise AttributeError(f"neither module {own!r} nor {theirs.__name__!r} has an attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[own]), *dir(theirs)})

    return __getattr__, __dir__
