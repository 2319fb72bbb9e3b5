"""Where generated kernels live: one source file a kernel in the user's cache folder, beside its compiled code."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from ._warnings import warn


def folder() -> Path | None:
    """The folder of compiled kernels, or ``None`` where it cannot be made or written.

    ``REIMPL_CACHE_DIR`` if set, else ``reimpl`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    chosen = os.environ.get("REIMPL_CACHE_DIR")
    try:
        base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reimpl"
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=base):
            return base
    except (OSError, RuntimeError):
        return None


@cache
def _temporary_folder() -> Path:
    base = Path(tempfile.mkdtemp(prefix="reimpl-kernels-"))
    owner = os.getpid()
    atexit.register(_remove, base, owner)
    return base


def _remove(base: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(base, ignore_errors=True)


def load(
    text: str, versions: Iterable[str], prepare: Callable[[ModuleType], object] = lambda module: None
) -> ModuleType:
    """The module of a generated source, whose compiled code is found again by the next process.

    Args:
        text: Python source.
        versions: whatever else the compiled code depends on. Python, PyTorch and the source itself always count, so
            that an upgrade starts afresh instead of reading a stale file.
        prepare: called with the module, to compile what it holds or to read that back.
    """
    try:
        module = _load(text, versions)
        prepare(module)
    except Exception:
        # compiled code that cannot be read back (cut short, or damaged) is made anew; a real fault comes up again
        _forget(text, versions)
        module = _load(text, versions)
        prepare(module)
    return module


def _load(text: str, versions: Iterable[str]) -> ModuleType:
    name = _name(text, versions)
    base = folder()
    if base is not None:
        try:
            return _import(_write(base, name, text), name)
        except OSError as error:
            warn(f"compiled kernels are not kept: {base} cannot be used ({error})")
    return _import(_write(_temporary_folder(), name, text), name)


def _name(text: str, versions: Iterable[str]) -> str:
    stamp = "\n".join((sys.version, torch.__version__, *versions, text))
    return f"reimpl_kernel_{hashlib.sha256(stamp.encode()).hexdigest()[:24]}"


def _forget(text: str, versions: Iterable[str]) -> None:
    name = _name(text, versions)
    for base in (folder(), _temporary_folder()):
        for path in base.rglob(f"{name}.*") if base is not None else ():
            path.unlink(missing_ok=True)


def _write(base: Path, name: str, text: str) -> Path:
    """The source's file; what stands there already counts only if it is the very same text."""
    path = base / f"{name}.py"
    if path.exists() and path.read_text() == text:
        return path
    descriptor, beside = tempfile.mkstemp(dir=base, suffix=".tmp")
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(beside, path)
    except OSError:
        Path(beside).unlink(missing_ok=True)
        raise
    return path


def _import(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
