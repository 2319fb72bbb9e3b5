"""The switch for the library's own compiled kernels: when they run, and what is said where a compiler is missing."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._contextlib import _DecoratorContextManager

from reimpl.functional._plain import ordinary

_log = logging.getLogger("reimpl")
_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_enabled = False
# Whether somebody has said so; until then only compiled code's convolutions and maximum pooling run through kernels.
_said = False


class _Thread(threading.local):
    in_operator = False


_thread = _Thread()
# The module of the compiled node, once kernels have been switched on.
_native: Any = None

COMPILERS = {"cpu": "numba", "cuda": "triton"}
"""What compiles the kernels for the tensors of a device."""

_SOURCES = {"numba": "pip install 'reimpl[fused]'", "triton": "PyTorch's CUDA wheels bring it"}
_FLOAT32, _NONE = {torch.float32}, frozenset[torch.dtype]()
_DTYPES = {"triton": {torch.float32, torch.bfloat16, torch.float16}}
# What Numba's do, where not float32 alone.
_MORE_DTYPES = {"_norm.numba": {torch.float32, torch.float64, torch.bfloat16}}
# The module of Triton kernels behind the same functions as one of Numba's.
_TRITON = {
    "_conv.numba": "_conv.triton",
    "_losses.numba": "_losses.triton",
    "_norm.numba": "_norm.triton",
    "_pointwise.numba": "_pointwise.triton",
    "_pooling.numba": "_pooling.triton",
}


class use_kernels(_DecoratorContextManager):
    """Run what has one through a compiled kernel of the library's own, from here on, within a ``with`` block,
    or in a function that it decorates.

    Compiled at first use (the extra ``fused``), by Numba on the CPU, for float32, and by Triton on CUDA, for float32,
    bfloat16 and float16 with sums in float32; kept from then on in the user's cache folder. Everything else runs as it
    would without. Results differ by roundings: sums are taken in another order. The backward pass runs as the switch
    stands then. Until the switch is first set, convolutions and maximum pooling that ``torch.compile`` has put
    into a graph run through kernels on the CPU where Numba is installed, and nothing else does.

    On Linux with a C++ compiler (``CXX``, or ``c++``) and Python's headers, layers on the CPU other than convolutions
    run both their passes without Python, in an autograd node that is compiled once in the background, some 12 seconds,
    and taken up when it is there. Without it, and for whatever it does not do, the results are the same bits, but for
    running averages, which may differ by a rounding.

    Args:
        mode: on or off, in compiled code too.

    Convolutions (a direct algorithm, unless ``algorithm=`` names another) and batch normalisation, with relu or not
    (on the CPU in float64 and bfloat16 too), have such kernels; so have ``relu``, ``leaky_relu``, ``sigmoid``,
    ``tanh``, ``linear_activation``, average and maximum pooling (that of half-width numbers on the CPU as float32),
    ``softmax``, ``log_softmax``, ``cross_entropy`` of class indices and, on the CPU, that of probabilities,
    ``nll_loss``, ``mse_loss`` and the binary cross-entropies.
    """

    def __init__(self, mode: bool = True) -> None:
        global _enabled, _said
        if not isinstance(mode, bool):
            raise TypeError(f"mode must be a bool, but got {type(mode).__name__}")
        self._mode, self._before = mode, (_enabled, _said)
        _enabled, _said = mode, True
        if mode and module("_conv.numba"):
            _prepare_node()
        _switch_node()

    def __call__(self, function: _Decorated) -> _Decorated:
        # a decorator switches nothing until the function is called
        self.__exit__()
        return super().__call__(function)

    def clone(self) -> use_kernels:
        """For one call of a decorated function."""
        return type(self)(self._mode)

    def __enter__(self) -> use_kernels:  # type: ignore[override]
        return self

    def __exit__(self, *_: object) -> None:
        global _enabled, _said
        _enabled, _said = self._before
        _switch_node()


def kernels_enabled() -> bool:
    """Whether :class:`use_kernels` is on."""
    return _enabled


def _prepare_node() -> None:
    """Find the compiled autograd node; it needs the parts of the optimizers' kernels that Numba does."""
    global _native
    if _native is None:
        _native = importlib.import_module("reimpl.functional._node.native")
        _native.prepare()


def _switch_node() -> None:
    if _native is not None:
        _native.switch(_enabled)


def attempt(key: tuple[Any, ...] | None, *arguments: Tensor | float | None) -> Any:
    """A layer done by the compiled node, recorded for the backward pass, or ``None`` where it does not do that.

    Args:
        key: the layer's name, and its options; ``None`` where these cannot be a key.
        arguments: tensors, and numbers that can change from call to call.
    """
    if not _enabled or _native is None or key is None or torch.compiler.is_compiling() or _hooks_saved_tensors():
        return None
    return _native.attempt(key, *arguments)


def _hooks_saved_tensors() -> bool:
    """Whether somebody looks at what is saved, such as a checkpoint, which tells by its order what it computes again:
    the node, taught between the two passes, would save in another one."""
    return _top_hooks is not None and _top_hooks(True) is not None


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def teach(key: tuple[Any, ...], worker: Any, differentiate: Callable[..., Any], *arguments: Any) -> None:
    """Let the compiled node do a layer from here on for tensors like those that ``worker``, a module of kernels, has
    just done.

    Args:
        key: as for :func:`attempt`.
        worker: its ``plan_of`` makes the plan, given the key and the arguments.
        differentiate: the gradients of all arguments, or of the first alone, by differentiable operators, given the
            options, the gradients of the outputs, what was saved, the numbers carried, and the shape of the first
            argument.
        arguments: the tensors, and whatever else the plan depends on.
    """
    if _native is not None and _native.ready() and hasattr(worker, "plan_of"):
        plan = worker.plan_of(key, *arguments)
        if plan is not None:
            _native.teach(key, plan, differentiate)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def in_compiled_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that compiled code calls, run through kernels on the CPU unless they are off or not installed."""

    @wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        before = _thread.in_operator
        _thread.in_operator = first.is_cpu and not _said and _installed()
        try:
            return function(first, *others)
        finally:
            _thread.in_operator = before

    return run


@cache
def module(name: str, compiler: str = "numba") -> Any:
    """The module of this package that holds the kernels, ``None`` (and once a warning) without their compiler."""
    if importlib.util.find_spec(compiler) is None:
        warnings.warn(
            f"use_kernels needs {compiler}, which is not installed ({_SOURCES[compiler]}); everything runs without "
            "compiled kernels",
            stacklevel=3,
        )
        return None
    _log.info("loading %s; %s compiles what the cache folder does not hold, for some seconds", name, compiler)
    return importlib.import_module(f"reimpl.functional.{name}")


def kernels_for(name: str, *tensors: Tensor | None) -> Any:
    """The kernels of ``name`` where they are on and do for such tensors, else ``None``.

    Args:
        name: the module of Numba's; on CUDA its twin is taken.
        tensors: ordinary ones, on one device, of a dtype that the kernels do.
    """
    # called twice a layer, so every question that need not be asked counts
    if not (_enabled or _thread.in_operator):
        return None
    dtypes = _MORE_DTYPES.get(name, _FLOAT32) if COMPILERS["cpu"] == "numba" else _NONE
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype in dtypes):
            return _kernels_elsewhere(name, [t for t in tensors if t is not None])
    return module(name) if _may_run(tensors) else None


def _kernels_elsewhere(name: str, given: list[Tensor]) -> Any:
    """:func:`kernels_for` tensors that Numba's do not do."""
    device, compiler = given[0].device, COMPILERS.get(given[0].device.type)
    if compiler not in _DTYPES or name not in _TRITON:
        return None
    dtypes = _DTYPES[compiler]
    for t in given:
        if t.dtype not in dtypes or t.device != device:
            return None
    return module(_TRITON[name], compiler) if _may_run(given) else None


def _may_run(tensors: Sequence[Tensor | None]) -> bool:
    # a dispatch mode wants to see operators; the question about it is none that Dynamo can trace
    return ordinary(*tensors) and torch._C._len_torch_dispatch_stack() == 0


def final_kernels_for(name: str, *tensors: Tensor | None) -> Any:
    """:func:`kernels_for` a backward pass: ``None`` where it is itself differentiated, which takes operators."""
    return None if torch.is_grad_enabled() else kernels_for(name, *tensors)
