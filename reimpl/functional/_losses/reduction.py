"""How losses end: the ``reduction`` argument with its deprecated forms, and the sum or mean that it asks for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import _reduction


def resolve(reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> str:
    """The reduction that the arguments ask for, ``"none"``, ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: there is no such reduction.
    """
    reduction = legacy_reduction(reduction, size_average, reduce)
    _reduction.get_enum(reduction)
    return reduction


def legacy_reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """``reduction``, or what its deprecated forms ask for where one is given, with PyTorch's warning."""
    if size_average is None and reduce is None:
        return reduction
    return _reduction.legacy_get_string(size_average, reduce)


def reduced(losses: Tensor, reduction: str, dtype: torch.dtype, count: Tensor | None = None) -> Tensor:
    """``losses``, their sum, or their mean over ``count`` (default: all of them), rounded to ``dtype`` at the end."""
    if reduction == "none":
        return losses.to(dtype)
    total = losses.sum()
    if reduction == "mean":
        total = total / (losses.numel() if count is None else count)
    return total.to(dtype)
