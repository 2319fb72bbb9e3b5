"""The distributions that initialisations draw from, computed in NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": np.sqrt(2.0), "selu": 0.75}


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """Connections into and out of a unit of a weight (out, in, *kernel)."""
    field = int(np.prod(shape[2:]))
    return shape[1] * field, shape[0] * field


def uniform(low: float, high: float) -> dict[str, Any]:
    """U(low, high): its variance is (high - low)²/12."""
    std = float((high - low) / np.sqrt(12))
    return {"kind": "uniform", "mean": (low + high) / 2, "std": std, "low": float(low), "high": float(high)}


def normal(mean: float, std: float) -> dict[str, Any]:
    """N(mean, std²)."""
    return {"kind": "normal", "mean": mean, "std": float(std), "low": -np.inf, "high": np.inf}


def constant(value: float) -> dict[str, Any]:
    """One value."""
    return {"kind": "constant", "mean": value, "std": 0.0, "low": value, "high": value}


def _of_variance(kind: str, variance: float) -> dict[str, Any]:
    if kind == "normal":
        return normal(0.0, np.sqrt(variance))
    bound = np.sqrt(3 * variance)
    return uniform(-bound, bound)


def lecun(kind: str, shape: Sequence[int]) -> dict[str, Any]:
    """Variance 1/n_in."""
    return _of_variance(kind, 1 / fans(shape)[0])


def xavier(kind: str, shape: Sequence[int], gain: float = 1.0) -> dict[str, Any]:
    """Variance 2 gain²/(n_in + n_out)."""
    return _of_variance(kind, gain**2 * 2 / sum(fans(shape)))


def kaiming(
    kind: str, shape: Sequence[int], a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> dict[str, Any]:
    """Variance gain²/fan, for leaky ReLU of slope a 2/((1 + a²) fan)."""
    gain = np.sqrt(2 / (1 + a**2)) if nonlinearity == "leaky_relu" else _GAINS[nonlinearity]
    return _of_variance(kind, gain**2 / fans(shape)[mode == "fan_out"])
