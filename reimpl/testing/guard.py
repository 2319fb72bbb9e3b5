"""Watches that code does not call what it reimplements: operators, Python calls, and the names in its source."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode


class IndependenceError(AssertionError):
    """An implementation called something that it must not call."""


class _Watch:
    """The names seen so far, and those that are forbidden."""

    def __init__(self, forbidden: Iterable[str]) -> None:
        self.forbidden = tuple(forbidden)
        self.seen: set[str] = set()
        self.offences: list[str] = []

    def note(self, kind: str, name: str) -> None:
        self.seen.add(name)
        for pattern in self.forbidden:
            if fnmatch.fnmatchcase(name, pattern):
                offence = f"{kind} {name} (forbidden: {pattern})"
                self.offences.append(offence)
                raise IndependenceError(f"called {offence}")


class _Operators(TorchDispatchMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.watch.note("operator", func._schema.name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = resolve_name(func) or f"{getattr(func, '__module__', None)}.{getattr(func, '__qualname__', func)}"
        self.watch.note("function", name)
        if name.startswith("torch.") or not hasattr(func, "__wrapped__"):
            return func(*args, **(kwargs or {}))
        with self:  # a function that was wrapped to offer itself to modes is looked into
            return inspect.unwrap(func)(*args, **(kwargs or {}))


@contextmanager
def _python_calls(watch: _Watch) -> Iterator[None]:
    """Note ``module.qualname`` of every Python function entered in this thread."""
    known: set[CodeType] = set()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        # bodies of modules and classes, which have no such flag, run when somebody imports them first: no call
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        if event == "call" and is_function and frame.f_code not in known:
            watch.note("Python function", f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}")
            known.add(frame.f_code)

    previous = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(previous)


@contextmanager
def independence_guard(forbidden: Iterable[str]) -> Iterator[set[str]]:
    """Raise :class:`IndependenceError` when code in the block calls something forbidden.

    Args:
        forbidden: shell patterns, matched against operators (``"aten::_fused_adam_"``), PyTorch functions and methods
            (``"torch.nn.functional.softmax"``, ``"torch.Tensor.softmax"``) and Python functions by module and
            qualified name (``"torch.optim.adam.*"``).

    Yields:
        the names called so far; use it to show that the guard was awake.

    The operator's name is seen after autograd and after the decomposition of composite operators: ``softmax``
    arrives as ``aten::_softmax``. An offence that the code swallows is raised again at the end of the block.
    """
    watch = _Watch(forbidden)
    with _Operators(watch), _Functions(watch), _python_calls(watch):
        yield watch.seen
    if watch.offences:
        raise IndependenceError(f"called {'; '.join(watch.offences)}")


def names_used(function: Callable[..., Any] | type, *, follow: str | None = None) -> set[str]:
    """Dotted names that a function's or class's source uses, with their first part resolved.

    ``F.softmax(x)`` is reported as ``torch.nn.functional.softmax`` whatever ``F`` is called, a method of an unknown
    object as ``.softmax``. Functions and classes of the package ``follow`` (default: the top-level package of
    ``function``) that the source names are looked into as well.

    Raises:
        OSError: the source is not available.
    """
    package = follow or function.__module__.partition(".")[0]
    names: set[str] = set()
    pending: list[Any] = [function]
    visited: set[int] = set()
    while pending:
        item = inspect.unwrap(pending.pop())
        if id(item) in visited:
            continue
        visited.add(id(item))
        module = sys.modules[item.__module__]
        tree = ast.parse(textwrap.dedent(inspect.getsource(item)))
        aliases = {**vars(module), **_closure(item), **_local_imports(tree)}
        for dotted in _dotted_names(tree):
            resolved, value = _resolve(dotted, aliases)
            names.add(resolved)
            if isinstance(value, (type, FunctionType)) and (value.__module__ or "").partition(".")[0] == package:
                pending.append(value)
    return names


def _closure(item: Any) -> dict[str, Any]:
    return dict(inspect.getclosurevars(item).nonlocals) if isinstance(item, FunctionType) else {}


def _local_imports(tree: ast.AST) -> dict[str, Any]:
    """What the imports inside the source bind."""
    bound: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                loaded = importlib.import_module(alias.name)
                bound[alias.asname or alias.name.partition(".")[0]] = (
                    loaded if alias.asname else sys.modules[alias.name.partition(".")[0]]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            source = importlib.import_module(node.module)
            for alias in node.names:
                bound[alias.asname or alias.name] = getattr(source, alias.name, None)
    return bound


def _dotted_names(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    """``a.b.c`` as ``("a", "b", "c")``; an attribute of anything else than a name as ``("", "c")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield (node.id,)
        elif isinstance(node, ast.Attribute):
            parts: list[str] = [node.attr]
            inner: ast.expr = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            parts.append(inner.id if isinstance(inner, ast.Name) else "")
            yield tuple(reversed(parts))


def _resolve(dotted: tuple[str, ...], aliases: Mapping[str, Any]) -> tuple[str, Any]:
    """The full name, and the object it stands for where the first part is a known global."""
    head, *rest = dotted
    if head not in aliases:
        return (f".{dotted[-1]}" if rest else head), None
    value = aliases[head]
    name = _name_of(value, head)
    for attribute in rest:
        # Descend only while the value is known: attributes of instances are theirs to compute.
        value = getattr(value, attribute, None) if isinstance(value, (ModuleType, type)) else None
        name = _name_of(value, f"{name}.{attribute}") if isinstance(value, ModuleType) else f"{name}.{attribute}"
    return name, value


def _name_of(value: Any, default: str) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type) or callable(value):
        resolved = resolve_name(value) if not isinstance(value, type) else None
        module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        return resolved or (f"{module}.{qualname}" if module and qualname else default)
    return default
