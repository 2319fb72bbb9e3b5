"""Looks at parameters, gradients and state between two fused steps, without a Python call for each.

One call to Python for each of a thousand small tensors costs more than the step itself. ``Walker`` asks the same
questions in compiled loops: through C interfaces that PyTorch and Python keep stable, and at a few offsets inside
PyTorch's objects that are found out by looking at tensors whose contents are known. Where one of them cannot be found,
or the loops' answers differ from Python's, there is no walker, and the questions are asked in Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _kernel_cache

_BODY_WORDS, _META_WORDS, _VERSION_WORDS = (22 if torch.__version__ >= "2.13" else 23), 16, 3
"""How much of a tensor's body, of autograd's part of it and of its version counter is searched; each is no smaller."""
_SHIMS = ("data_ptr", "dtype", "dim", "sizes", "strides")


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))


def _only(places: Sequence[int]) -> int:
    if len(places) != 1:
        raise LookupError("PyTorch's objects are not laid out as expected")
    return 8 * places[0]


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _keys(t: Tensor) -> int:
    return int(torch._C._dispatch_keys(t).raw_repr())


def _same(a: Tensor, b: Tensor) -> list[bool]:
    """Which words of the bodies are equal."""
    return [x == y for x, y in zip(_words(a._cdata, _BODY_WORDS), _words(b._cdata, _BODY_WORDS), strict=True)]


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _require_inline_form(first: int) -> None:
    """Raise ``LookupError`` unless five sizes and five strides stand among a body's words from ``first`` on."""
    t = torch.empty(2, 3, 5, 7, 11, device="cpu")
    words = _words(t._cdata, _BODY_WORDS)
    for numbers in (list(t.shape), list(t.stride())):
        if not any(words[i : i + len(numbers)] == numbers for i in range(first, _BODY_WORDS)):
            raise LookupError("PyTorch's objects are not laid out as expected")


def _offsets() -> dict[str, int]:
    """Where Python's tensor has its body, and the body its storage, version, form, keys and gradient.

    Raises:
        LookupError: not found, or found more than once.
    """
    plain, other = torch.zeros(2, 3, device="cpu"), torch.zeros(2, 3, device="cpu")
    samples = [plain, plain._neg_view(), torch.zeros(3, device="meta")]
    handle = [set(range(2, Tensor.__basicsize__ // 8)) for _ in samples]
    for t, found in zip(samples, handle, strict=True):
        words = _words(id(t), Tensor.__basicsize__ // 8)
        found.intersection_update(i for i, w in enumerate(words) if w == t._cdata)
    keys = [{i for i, w in enumerate(_words(t._cdata, _BODY_WORDS)) if w == _keys(t)} for t in samples]
    storage = _only([i for i, w in enumerate(_words(plain._cdata, _BODY_WORDS)) if w == _storage(plain)])
    # the form is what comes after the last word in which two tensors of one form differ
    form = max(i for i, same in enumerate(_same(plain, other)) if not same) + 1
    _require_inline_form(form)
    # a tensor and its detached twin share their storage and their version, and nothing else that is their own
    twin = plain.detach()
    pairs = zip(_same(plain, twin), _same(plain, other), strict=True)
    version = _only([i for i, (shared, equal) in enumerate(pairs) if shared and not equal and 8 * i != storage])
    address = _words(plain._cdata + version, 1)[0]
    counts = []
    for _ in range(2):
        counts.append(_words(address, _VERSION_WORDS))
        plain.add_(1)
    count = _only([i for i, (a, b) in enumerate(zip(*counts, strict=True)) if b == a + 1])
    before = _words(plain._cdata, _BODY_WORDS)
    plain.requires_grad_()
    after = _words(plain._cdata, _BODY_WORDS)
    meta = _only([i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b])
    address = _words(plain._cdata + meta, 1)[0]
    undefined = _words(address, _META_WORDS)
    plain.grad = torch.ones(2, 3, device="cpu")
    grad = _only([i for i, w in enumerate(_words(address, _META_WORDS)) if w == plain.grad._cdata])
    return {
        "HANDLE": _only(list(set.intersection(*handle))),
        "STORAGE": storage,
        "VERSION": version,
        "COUNT": count,
        "FORM": 8 * form,
        "KEYS": _only(list(set.intersection(*keys))),
        "META": meta,
        "GRAD": grad,
        "UNDEFINED": undefined[grad // 8],
    }


@dataclass(frozen=True)
class Question:
    """Whether objects are as they were, asked in one compiled call; each part may be left out.

    - ``the_list``, the address of a list, has the objects at the addresses ``items``.
    - Dictionary ``i`` has the keys and values ``entries[2 * starts[i] : 2 * starts[i + 1]]``, in order, and no more.
    - The tensors ``where`` lie where they lay. Its rows are their handles, bodies, those bodies' storages, places, and
      sizes in bytes.
    - The parameters ``params`` do too, and they and their gradients are plain tensors (``plain_keys``) of the dtype
      ``kind`` and of the sizes and strides given (sizes, then strides, of parameter ``i`` in
      ``forms[form_starts[i] : form_starts[i + 1]]``). Then ``row`` gets the gradients' addresses, 0 for none and 1
      for an empty one. ``room`` and ``marks`` are kept from call to call.
    """

    parts: Any
    """What the compiled code reads, kept alive."""
    holds: Callable[[], bool]
    count_change: Callable[[], None]
    """``torch.autograd.graph.increment_version`` of the parameters that have a gradient."""


class Walker:
    """The compiled loops, and what they need to know of this PyTorch.

    Raises:
        ImportError: Numba is missing.
        LookupError, OSError, AttributeError: PyTorch's objects or libraries are not as expected.
    """

    def __init__(self) -> None:
        from ._numba import VERSIONS

        text = Path(__file__).with_name("_walk_code.py").read_text()
        self._code: Any = _kernel_cache.load(text, VERSIONS)
        found = _offsets()
        self._handle = found.pop("HANDLE")
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        found |= {name.upper(): _address(getattr(library, f"aoti_torch_get_{name}")) for name in _SHIMS}
        found["DICT_NEXT"] = _address(ctypes.pythonapi.PyDict_Next)
        found["LIST_ITEM"] = _address(ctypes.pythonapi.PyList_GetItem)
        found["LIST_SIZE"] = _address(ctypes.pythonapi.PyList_Size)
        self._api = np.zeros(self._code.API_SIZE, dtype=np.int64)
        for name, value in found.items():
            self._api[getattr(self._code, name)] = value
        # they read Python's objects, so that other Python threads must wait meanwhile
        self._unchanged = ctypes.PYFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(self._code.unchanged.address)
        self._count_change = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self._code.count_change.address)

    def question(self, **parts: Any) -> Question:
        """What is asked of lists, dictionaries, tensors and gradients; see ``Question``."""
        words = np.zeros(self._code.QUESTION_SIZE, dtype=np.int64)
        words[self._code.API] = self._api.ctypes.data
        for name, value in parts.items():
            at = getattr(self._code, name.upper())
            words[at : at + 1 if isinstance(value, int) else at + 2] = (
                value if isinstance(value, int) else (value.ctypes.data, value.size)
            )
        place = words.ctypes.data
        return Question((words, parts), partial(self._unchanged, place), partial(self._count_change, place))

    def handles(self, tensors: Sequence[Tensor]) -> Any:
        """Where each Python tensor keeps the pointer to its body: what C++ calls an ``at::Tensor *``."""
        return np.fromiter((id(t) + self._handle for t in tensors), np.int64, len(tensors))

    def kind(self, t: Tensor) -> dict[str, int]:
        """C++'s number for the tensor's dtype, and the dispatch keys of a plain tensor like it."""
        code, ask = ctypes.c_int32(), ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
        ask(int(self._api[self._code.DTYPE]))(id(t) + self._handle, ctypes.addressof(code))
        return {"kind": code.value, "plain_keys": _keys(torch.empty_like(t))}

    def marks(self, count: int) -> Any:
        """Room for what ``count`` parameters and their gradients look like."""
        return np.zeros((2, count, _BODY_WORDS - int(self._api[self._code.FORM]) // 8), dtype=np.int64)


def find_walker() -> Walker | None:
    """The compiled loops, or ``None`` where they cannot be had."""
    try:
        return Walker()
    except Exception:  # whatever a Numba or a PyTorch to come says: Python's questions give the same answers
        return None
