"""What each public function does around its own work: Tensor-likes take it over, and what is no tensor is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

_P = ParamSpec("_P")
_R = TypeVar("_R")
_HEAP_TYPE = 1 << 9  # of classes that Python code defines, CPython's Py_TPFLAGS_HEAPTYPE


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` as PyTorch's own functions behave towards arguments other than plain tensors.

    An argument with ``__torch_function__`` (a subclass, a proxy of :mod:`torch.fx`) or a mode of that kind is asked
    first, with the function itself. Where a call fails since an argument is no tensor, the error says so.

    Raises:
        TypeError: an argument is no tensor, or a size holds no integers.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception:  # asked only now, since what is right should not pay for it
            _refuse(function, args, kwargs)
            raise

    call.__module__ = "reimpl.functional"
    return call


def _refuse(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise PyTorch's ``TypeError`` for the first argument that is of no type that ``function`` is annotated with."""
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # an argument is missing, or there is one too many: the call itself has said so
        return
    for position, (name, parameter) in enumerate(signature.parameters.items(), 1):
        value, annotation = given.get(name), parameter.annotation
        if name not in given or (value is None and "None" in annotation):
            continue
        wanted = _wanted(value, annotation)
        if wanted:
            what = f"argument '{name}' (position {position}) must be {wanted}, not {_type_name(type(value))}"
            raise TypeError(f"{function.__name__}(): {what}") from None


def _wanted(value: object, annotation: str) -> str | None:
    """PyTorch's name of what should stand in the place of ``value``, ``None`` where that is right."""
    if annotation.startswith("Tensor | Iterable"):
        return None if isinstance(value, Iterable) else "Tensor"
    if annotation.startswith("Tensor"):
        return None if isinstance(value, Tensor) else "Tensor"
    if annotation.startswith("tuple[Tensor"):
        are_tensors = isinstance(value, (tuple, list)) and all(isinstance(element, Tensor) for element in value)
        return None if are_tensors else "tuple of Tensors"
    if "Size" in annotation or "Sequence[int" in annotation:
        return None if _is_size(value) or (isinstance(value, str) and "str" in annotation) else "tuple of ints"
    return None


def _is_size(value: object) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(element is None or hasattr(element, "__index__") for element in value)
    return hasattr(value, "__index__")


def _type_name(kind: type) -> str:
    """The name as C knows it: classes of extension modules carry their module."""
    is_simple = kind.__flags__ & _HEAP_TYPE or kind.__module__ == "builtins"
    return kind.__name__ if is_simple else f"{kind.__module__}.{kind.__name__}"
