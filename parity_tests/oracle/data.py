"""Oracles of data and diagnosis (D1, D2, D4, D7, D8), in NumPy alone, in the dtype of the arrays given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def standardize(x: Array, axes: tuple[int, ...], correction: int = 0) -> tuple[Array, Array, Array]:
    """(x - μ)/σ, μ and σ, averaged over ``axes``; σ = 1 where it is 0."""
    mean = x.mean(axis=axes, keepdims=True)
    std = x.std(axis=axes, ddof=correction, keepdims=True)
    scale = np.where(std == 0, 1, std)
    return (x - mean) / scale, mean, std


def pca_whitening(x: Array, correction: int = 0) -> tuple[Array, Array]:
    """W = Λ^(-1/2) Vᵀ, largest variance first, by the singular values of the centred rows; and Λ."""
    centred = x - x.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)])
    variances = singular**2 / (len(x) - correction)
    return rows * signs[:, None] / np.sqrt(variances)[:, None], variances


def zca_whitening(x: Array, correction: int = 0) -> Array:
    """W = Σ^(-1/2), which has W Σ W = 1 and is symmetric: by Newton's iteration, no eigenvalues taken."""
    centred = x - x.mean(axis=0)
    covariance = centred.T @ centred / (len(x) - correction)
    scale = np.linalg.norm(covariance)
    y, z, identity = covariance / scale, np.eye(len(covariance)), np.eye(len(covariance))
    for _ in range(60):  # Denman and Beavers' coupled form: z converges to (Σ/scale)^(-1/2)
        step = (3 * identity - z @ y) / 2
        y, z = y @ step, step @ z
    return np.asarray(z / np.sqrt(scale))


def f1(target: Sequence[int], prediction: Sequence[int], positive: int) -> float:
    """2 tp / (2 tp + fp + fn), 0 where there is none of them, counted one example after the other."""
    tp = fp = fn = 0
    for t, p in zip(target, prediction, strict=True):
        tp += t == positive and p == positive
        fp += t != positive and p == positive
        fn += t == positive and p != positive
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def wilson(count: int, n: int, z: float) -> tuple[float, float]:
    """The shares p that solve (p - count/n)² = z² p (1 - p)/n."""
    roots = np.roots([1 + z**2 / n, -(2 * count / n + z**2 / n), (count / n) ** 2])
    low, high = sorted(float(root.real) for root in roots)
    return low, high
