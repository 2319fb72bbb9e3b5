"""The distributions that initialisations draw from, computed in NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, erf
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


def truncated(mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> dict[str, Any]:
    """N(mean, std²) conditioned on [a, b], with the mean and the standard deviation that this leaves."""
    low, high = (a - mean) / std, (b - mean) / std
    density = [np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) for x in (low, high)]
    mass = (erf(high / np.sqrt(2)) - erf(low / np.sqrt(2))) / 2
    shift = (density[0] - density[1]) / mass
    variance = 1 + (low * density[0] - high * density[1]) / mass - shift**2
    return {
        "kind": "truncated",
        "loc": mean,
        "scale": std,
        "mean": float(mean + std * shift),
        "std": float(std * np.sqrt(variance)),
        "low": a,
        "high": b,
    }


def orthogonal(shape: Sequence[int], gain: float = 1.0, groups: int = 1) -> dict[str, Any]:
    """A number of a vector that is uniform on the sphere of radius gain in n dimensions; its variance is gain²/n."""
    rows = shape[0] // groups
    n = max(rows, int(np.prod(shape)) // shape[0])
    return {"kind": "sphere", "size": n, "mean": 0.0, "std": float(gain / np.sqrt(n)), "low": -gain, "high": gain}


def sparse(shape: Sequence[int], sparsity: float, std: float = 0.01) -> dict[str, Any]:
    """N(0, std²), but so many zeros in each column."""
    zeros = ceil(sparsity * shape[0])
    share = 1 - zeros / shape[0]
    return {
        "kind": "sparse",
        "zeros": zeros,
        "scale": std,
        "mean": 0.0,
        "std": float(std * np.sqrt(share)),
        "low": -np.inf,
        "high": np.inf,
    }


def exactly(value: np.ndarray) -> dict[str, Any]:
    """These numbers and no others."""
    mean, std = float(value.mean()), float(value.std())
    return {"kind": "exact", "value": value, "mean": mean, "std": std, "low": value.min(), "high": value.max()}


def eye(shape: Sequence[int]) -> dict[str, Any]:
    """The identity."""
    return exactly(np.eye(*shape))


def dirac(shape: Sequence[int], groups: int = 1) -> dict[str, Any]:
    """1 in the middle of the kernel from each channel to that of the same number in its group."""
    value = np.zeros(shape)
    outputs = shape[0] // groups
    middle = tuple(size // 2 for size in shape[2:])
    for out in range(shape[0]):
        if out % outputs < shape[1]:
            value[(out, out % outputs, *middle)] = 1
    return exactly(value)


def random_walk(shape: Sequence[int], a: float = 0.0, nonlinearity: str = "relu") -> dict[str, Any]:
    """N(0, g²/n_in), g as Sussillo and Abbott give it; for leaky ReLU from the moments of one step of the walk."""
    n = fans(shape)[0]
    if nonlinearity == "leaky_relu":
        # One unit's share s of the step: x² or a²x² with probability 1/2 each, x normal, E[x⁴] = 3.
        mean, square = (1 + a**2) / 2, 3 * (1 + a**4) / 2
        log_drift = -(square / mean**2 - 1) / (2 * n)
        return normal(0.0, np.sqrt(np.exp(-log_drift) / mean / n))
    gain = np.exp(0.5 / n) if nonlinearity == "linear" else np.sqrt(2) * np.exp(1.2 / (max(n, 6) - 2.4))
    return normal(0.0, gain / np.sqrt(n))
