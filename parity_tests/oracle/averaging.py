"""Oracles of averages (O14, O15) and of clipping (O13), in the dtype of the arrays given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def ewa(x: Array, beta: float, bias_correction: bool = True) -> Array:
    """v ← βv + (1 - β)x, step by step, over the first dimension; v/(1 - βᵗ)."""
    b = x.dtype.type(beta)
    v, result = np.zeros_like(x[0]), []
    for t, value in enumerate(x, start=1):
        v = b * v + (1 - b) * value
        result.append(v / (1 - b**t) if bias_correction else v)
    return np.stack(result)


def polyak(path: Sequence[Array]) -> Array:
    """The mean of all parameters so far."""
    return np.asarray(np.mean(np.stack(path), axis=0))


def moving_average(path: Sequence[Array], decay: float) -> Array:
    """αθ̄ + (1 - α)θ, begun at the first θ."""
    alpha = path[0].dtype.type(decay)
    mean = path[0]
    for theta in path[1:]:
        mean = alpha * mean + (1 - alpha) * theta
    return mean


def total_norm(arrays: Sequence[Array], p: float = 2.0) -> Any:
    """The p-norm of all numbers together."""
    every = np.abs(np.concatenate([x.ravel() for x in arrays]))
    if p == 0:
        # the norm of norms counts tensors that have a number other than 0, as PyTorch's does
        return every.dtype.type(sum(np.any(x != 0) for x in arrays))
    if np.isinf(p):
        return every.max() if p > 0 else every.min()
    return (every**p).sum() ** (1 / every.dtype.type(p))


def clipped_by_norm(arrays: Sequence[Array], max_norm: float, p: float = 2.0) -> list[Array]:
    """g·min(1, c/(‖g‖ + 1e-6))."""
    norm = total_norm(arrays, p)
    return [x * min(norm.dtype.type(1), max_norm / (norm + norm.dtype.type(1e-6))) for x in arrays]


def clipped_by_value(arrays: Sequence[Array], value: float) -> list[Array]:
    """min(max(g, -c), c)."""
    return [np.clip(x, -value, value) for x in arrays]
