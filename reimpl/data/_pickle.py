"""Reads pickles of arrays, dicts, lists, strings and numbers, and runs nothing that such a file asks for."""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_SCALARS = (str, bytes, int, float, type(None))  # bool is an int


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _raw(value: Any) -> bytes:
    """The bytes behind a Python 2 string, which the unpickler has decoded as latin1, or behind bytes."""
    if isinstance(value, str):
        return value.encode("latin1")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    raise pickle.UnpicklingError(f"array data must be bytes, got {type(value).__name__}")


class _Dtype:
    """Stands for ``numpy.dtype(code, align, copy)`` and the state set on it."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = _text(code)
        if not _DTYPE.fullmatch(self.code):
            raise pickle.UnpicklingError(f"dtype {self.code[:40]!r} is not a plain number's")
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields = tuple(state)[:5]
        if (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("structured dtypes are not read")
        self.order = _text(order)

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder({"|": "="}.get(self.order, self.order))  # type: ignore[arg-type]


class _Array:
    """Stands for an array: an empty one from ``_reconstruct`` until its state comes, or a whole one."""

    def __init__(self) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C")

    def resolve(self) -> np.ndarray[Any, Any]:
        if self.value is None:
            raise pickle.UnpicklingError("an array was announced and its contents never came")
        return self.value


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError(f"array dtype must be a numpy.dtype, got {type(dtype).__name__}")
    if order not in ("C", "F"):
        raise pickle.UnpicklingError("array order must be 'C' or 'F'")
    flat = np.frombuffer(_raw(data), dtype=dtype.resolve())
    return flat.reshape([int(n) for n in shape], order=order).copy()  # frombuffer is read-only


class _Allowed:
    """An allowed global: callable, and closed to the pickle's ``BUILD``, which could rewrite a plain function."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a global's state may not be set")


def _not_callable(*_: Any) -> NoReturn:
    raise pickle.UnpicklingError("numpy.ndarray may be named, not called")


_NDARRAY = _Allowed(_not_callable)


def _reconstruct(subtype: Any, shape: Any, code: Any) -> _Array:
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError("only numpy.ndarray itself is rebuilt, no other class")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, _text(order))
    return array


def _scalar(dtype: Any, data: Any) -> int | float:
    number: int | float = _array(data, dtype, (), "C").item()
    return number


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """``_codecs.encode``, by which Python 3 writes bytes for Python 2 to read."""
    if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError("_codecs.encode is read for text and plain encodings only")
    return text.encode(_text(encoding))


def _empty_bytes(*args: Any) -> bytes:
    if args:
        raise pickle.UnpicklingError("bytes() is read without arguments only")
    return b""


_GLOBALS: dict[tuple[str, str], _Allowed] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Allowed(_Dtype),
    ("_codecs", "encode"): _Allowed(_encode),
    ("__builtin__", "bytes"): _Allowed(_empty_bytes),
    ("builtins", "bytes"): _Allowed(_empty_bytes),
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _GLOBALS[f"{_core}.multiarray", "_reconstruct"] = _Allowed(_reconstruct)
    _GLOBALS[f"{_core}.multiarray", "scalar"] = _Allowed(_scalar)
    _GLOBALS[f"{_core}.numeric", "_frombuffer"] = _Allowed(_from_buffer)


def _load_bytearray8(unpickler: Any) -> None:
    """Reads what is there, where the standard library's reserves the announced size first."""
    (size,) = struct.unpack("<Q", unpickler.read(8))
    unpickler.append(bytearray(unpickler.read(size)))


class _Unpickler(pickle._Unpickler):
    """The standard library's reader in Python: the one in C reserves whatever memory eight hostile bytes ask for."""

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray8}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"refused {module}.{name}: only arrays, dtypes, dicts, lists, strings and numbers are read"
            ) from None


def _resolve(value: Any, done: dict[int, Any]) -> Any:
    """``value`` with every placeholder replaced. Each container is visited once, however often it is referred to."""
    if isinstance(value, _SCALARS):
        return value
    if id(value) in done:
        if done[id(value)] is None:
            raise pickle.UnpicklingError("a container that holds itself is not read")
        return done[id(value)]
    done[id(value)] = None
    result: Any
    if type(value) is dict:
        result = {_resolve(k, done): _resolve(v, done) for k, v in value.items()}
    elif type(value) in (list, tuple):
        result = type(value)(_resolve(v, done) for v in value)
    elif isinstance(value, (_Array, _Dtype)):
        result = value.resolve()
    else:
        kind = "global" if isinstance(value, _Allowed) else type(value).__name__
        raise pickle.UnpicklingError(f"refused a {kind}: only arrays, dicts, lists, strings and numbers are read")
    done[id(value)] = result
    return result


def load_plain(path: str | Path) -> Any:
    """Reads a pickle of plain data from ``path``: protocols 0 to 5, written by Python 2 or 3, NumPy 1 or 2.

    Python 2's 8-bit strings come as ``str``, decoded as latin1. No class or function named in the file is imported
    or called; the few globals that arrays need are stood for by code of this module.

    Raises:
        FileNotFoundError: there is no such file.
        pickle.UnpicklingError: the file names another global (``module.name`` is in the text), holds another type,
            or is truncated or corrupt. The text begins with the file's path.
    """
    data = Path(path).read_bytes()
    try:
        return _resolve(_Unpickler(io.BytesIO(data), encoding="latin1").load(), {})
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(f"{path}: {error}") from error
    except Exception as error:  # a corrupt stream may raise nearly anything, from EOFError to MemoryError
        detail = f"{type(error).__name__}: {error}"
        message = f"{path}: truncated or corrupt pickle of {len(data)} bytes ({detail})"
        raise pickle.UnpicklingError(message) from error
