"""The switch for the library's own compiled kernels: when they run, and what is said where Numba is missing."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._plain import ordinary

_enabled = False
# What kernels do beside float32.
_MORE_DTYPES = {"_norm_numba": {torch.float64, torch.bfloat16}}


class use_kernels:
    """Run what has one through a compiled kernel of the library's own, from here on or within a ``with`` block.

    Compiled by Numba (the extra ``fused``) at first use, on the CPU, for float32, and kept from then on in the
    user's cache folder. Everything else runs as it would without. Results differ by roundings: sums are taken in
    another order. The backward pass runs as the switch stands then.

    Args:
        mode: on or off.

    Convolutions (a direct algorithm, unless ``algorithm=`` names another) and batch normalisation, with relu or not (in
    float64 and bfloat16 too), have such kernels; so have ``relu``, ``leaky_relu``, ``sigmoid``, ``tanh``,
    ``linear_activation``, maximum and average pooling, ``softmax``, ``log_softmax``, ``cross_entropy`` of class indices,
    ``mse_loss`` and the binary cross-entropies.
    """

    def __init__(self, mode: bool = True) -> None:
        global _enabled
        if not isinstance(mode, bool):
            raise TypeError(f"mode must be a bool, but got {type(mode).__name__}")
        self._before = _enabled
        _enabled = mode
        if mode:
            module("_conv_numba")

    def __enter__(self) -> use_kernels:
        return self

    def __exit__(self, *_: object) -> None:
        global _enabled
        _enabled = self._before


def kernels_enabled() -> bool:
    """Whether :class:`use_kernels` is on."""
    return _enabled


@cache
def module(name: str) -> Any:
    """The module of this package that holds the kernels, ``None`` (and once a warning) where Numba is missing."""
    if importlib.util.find_spec("numba") is None:
        warnings.warn(
            "use_kernels needs numba, which is not installed (pip install 'reimpl[fused]'); "
            "everything runs without compiled kernels",
            stacklevel=3,
        )
        return None
    return importlib.import_module(f"reimpl.functional.{name}")


def kernels_for(name: str, *tensors: Tensor | None) -> Any:
    """The kernels of ``name`` where they are on and do for such tensors: ordinary, of a dtype that they do, on the CPU;
    else ``None``."""
    if not _enabled:
        return None
    dtypes = _MORE_DTYPES.get(name, set()) | {torch.float32}
    fit = all(t is None or (t.dtype in dtypes and t.device.type == "cpu") for t in tensors)
    # a dispatch mode wants to see operators
    if not fit or not ordinary(*tensors) or torch._C._len_torch_dispatch_stack() > 0:
        return None
    return module(name)


def final_kernels_for(name: str, *tensors: Tensor | None) -> Any:
    """:func:`kernels_for` a backward pass: ``None`` where it is itself differentiated, which takes operators."""
    return None if not _enabled or torch.is_grad_enabled() else kernels_for(name, *tensors)
