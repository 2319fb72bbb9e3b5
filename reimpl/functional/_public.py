"""What each public function does around its own work: Tensor-likes take it over, and what is no tensor is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, dtype
from torch.overrides import handle_torch_function, has_torch_function

_P = ParamSpec("_P")
_R = TypeVar("_R")
_HEAP_TYPE = 1 << 9  # of classes that Python code defines, CPython's Py_TPFLAGS_HEAPTYPE


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` as PyTorch's own functions behave towards arguments other than plain tensors.

    An argument with ``__torch_function__`` (a subclass, a proxy of :mod:`torch.fx`) or a mode of that kind is asked
    first, with the function itself. Where a call fails since an argument is no tensor, the error says so.

    Raises:
        TypeError: an argument is no tensor, or an option is of another type.
        AttributeError: an argument is no tensor, where that is what PyTorch's Python raises.
    """

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = (*args, *kwargs.values()) if kwargs else args
        if has_torch_function(given):
            return handle_torch_function(call, given, *args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:  # asked only now, since what is right should not pay for it
            if not (isinstance(error, (ValueError, AssertionError)) and function.__name__ in _CHECKED_FIRST):
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
    for name, value in given.items():
        if (function.__name__, name) in _COMPARED and not (_compares(value) or (name, value) == ("padding_idx", None)):
            return  # the comparison has failed
    for position, (name, parameter) in enumerate(signature.parameters.items(), 1):
        value, annotation = given.get(name), parameter.annotation
        if name not in given or (value is None and "None" in annotation) or name in _ANY_TRUTH:
            continue
        wanted = _wanted(value, annotation)
        if wanted:
            if wanted == "float" and function.__name__ in _OF_SCALARS:
                if isinstance(value, complex):
                    continue
                wanted = "Number"
            if wanted == "Tensor":
                _ask(value, function.__name__, name, given)
            operator, at = _in_pytorch(function.__name__, name, position, name in kwargs)
            raise TypeError(f"{operator}(): argument {at} must be {wanted}{_found(value, wanted)}") from None


def _ask(value: Any, function: str, argument: str, given: dict[str, Any]) -> None:
    """Fail over what is no tensor where PyTorch's Python does: over the method that it calls of it before C++ looks."""
    method = _CALLED.get((function, argument))
    if method == "dim" and given.get("dim") is not None:
        method = function
    if method is None or (function == "batch_norm" and given.get("training") is not True):
        return
    try:
        getattr(value, method)()
    except (AttributeError, TypeError) as error:
        raise error from None


def _in_pytorch(function: str, name: str, position: int, by_keyword: bool) -> tuple[str, str]:
    """How PyTorch calls a function and its argument: what its Python hands on to C++, in that order."""
    usual = (function, name, None if by_keyword and function in _WITHOUT_PYTHON else position)
    operator, argument, place = _HANDED_ON.get((function, name), usual)
    return operator, f"'{argument}'" + (f" (position {place})" if place else "")


_OF_CLASSES = ("input", "target", "weight")
# Arguments that PyTorch's Python hands on by another name or at another place.
_HANDED_ON: dict[tuple[str, str], tuple[str, str, int | None]] = {
    **{("cross_entropy", name): ("cross_entropy_loss", name, 1 + i) for i, name in enumerate(_OF_CLASSES)},
    **{("nll_loss", name): ("nll_loss_nd", name, 1 + i) for i, name in enumerate(_OF_CLASSES)},
    ("binary_cross_entropy_with_logits", "pos_weight"): ("binary_cross_entropy_with_logits", "pos_weight", 4),
    ("batch_norm", "weight"): ("batch_norm", "weight", 2),
    ("batch_norm", "bias"): ("batch_norm", "bias", 3),
    ("batch_norm", "running_mean"): ("batch_norm", "running_mean", 4),
    ("batch_norm", "running_var"): ("batch_norm", "running_var", 5),
    ("embedding", "input"): ("embedding", "indices", 2),
    ("embedding", "weight"): ("embedding", "weight", 1),
    ("embedding", "max_norm"): ("embedding_renorm_", "max_norm", 3),
    ("embedding", "norm_type"): ("embedding_renorm_", "norm_type", 4),
    ("cross_entropy", "ignore_index"): ("cross_entropy_loss", "ignore_index", 5),
    ("cross_entropy", "label_smoothing"): ("cross_entropy_loss", "label_smoothing", 6),
    ("nll_loss", "ignore_index"): ("nll_loss_nd", "ignore_index", 5),
    ("dropout", "training"): ("dropout", "train", 3),
    ("embedding", "scale_grad_by_freq"): ("embedding", "scale_grad_by_freq", 4),
    ("embedding", "sparse"): ("embedding", "sparse", 5),
    ("softmax", "dim"): ("softmax", "dim", 1),
    ("softmax", "dtype"): ("softmax", "dtype", None),
    ("log_softmax", "dim"): ("log_softmax", "dim", 1),
    ("log_softmax", "dtype"): ("log_softmax", "dtype", None),
}
# What PyTorch's Python looks at itself, and takes anything for.
_ANY_TRUTH = {"inplace", "return_indices", "size_average", "reduce", "_stacklevel"}
_CHECKED_FIRST = {"batch_norm", "dropout", "embedding"}  # whose values its Python refuses, before C++ looks at types
# Numbers that it compares before C++ sees them.
_COMPARED = {("dropout", "p"), ("batch_norm", "eps"), ("embedding", "padding_idx")}
_OF_SCALARS = {"leaky_relu", "leaky_relu_"}  # complex ones too, for C++ to refuse
# Tensors of which it calls a method before C++ sees them.
_CALLED: dict[tuple[str, str], str] = {
    **{(name, argument): "size" for name in ("binary_cross_entropy", "mse_loss") for argument in _OF_CLASSES},
    **{("binary_cross_entropy_with_logits", argument): "size" for argument in ("input", "target")},
    **{(name, "input"): "size" for name in ("batch_norm", "adaptive_avg_pool2d", "adaptive_max_pool2d")},
    ("softmax", "input"): "dim",
    ("log_softmax", "input"): "dim",
}
_WITHOUT_PYTHON = {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d"}


def _found(value: object, wanted: str) -> str:
    if wanted == "tuple of ints" and isinstance(value, (tuple, list)):
        for place, element in enumerate(value):
            if not _is_index(element):
                return f", but found element of type {_type_name(type(element))} at pos {place}"
    return f", not {_type_name(type(value))}"


def _wanted(value: object, annotation: str) -> str | None:
    """PyTorch's name of what should stand in the place of ``value``, ``None`` where that is right."""
    simple = _SIMPLE.get(annotation.removesuffix(" | None"))
    if simple:
        right, kind = simple
        return None if right(value) else kind
    if annotation.startswith("Tensor | Iterable"):
        return None if isinstance(value, Iterable) else "Tensor"
    if annotation.startswith("Tensor"):
        return None if isinstance(value, Tensor) else "Tensor"
    if annotation.startswith("tuple[Tensor"):
        are_tensors = isinstance(value, (tuple, list)) and all(isinstance(element, Tensor) for element in value)
        return None if are_tensors else "tuple of Tensors"
    if "Size" in annotation or "Sequence[int" in annotation:
        fits = _is_size(value, "int | None" in annotation) or (isinstance(value, str) and "str" in annotation)
        return None if fits else "tuple of ints"
    return None


def _is_size(value: object, optional: bool) -> bool:
    if isinstance(value, (tuple, list)):
        return all((optional and element is None) or _is_index(element) for element in value)
    return _is_index(value)


def _is_index(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() and not value.is_complex() and value.numel() == 1
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad
    return hasattr(value, "__float__") or hasattr(value, "__index__")


def _compares(value: object) -> bool:
    return isinstance(value, (float, int, Tensor))


# For annotations of one type: what it takes, and its name.
_SIMPLE: dict[str, tuple[Callable[[object], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "bool"),
    "int": (_is_index, "int"),
    "float": (_is_number, "float"),
    "torch.dtype": (lambda value: isinstance(value, dtype), "torch.dtype"),
}


def _type_name(kind: type) -> str:
    """The name as C knows it: classes of extension modules carry their module."""
    is_simple = kind.__flags__ & _HEAP_TYPE or kind.__module__ == "builtins"
    return kind.__name__ if is_simple else f"{kind.__module__}.{kind.__name__}"
