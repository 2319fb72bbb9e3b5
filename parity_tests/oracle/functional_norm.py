"""Fused layers and the chain of batch normalisation's derivatives in NumPy alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from parity_tests.oracle.functional import batch_norm, batch_norm_magnitude, linear, sigmoid

Array = np.ndarray[Any, np.dtype[Any]]
Result = tuple[Array, Callable[[Array], tuple[Array | None, ...]]]


def batch_norm_relu(*args: Any, **kwargs: Any) -> Result:
    """max(y, 0), and the gradient where y > 0."""
    output, vjp = batch_norm(*args, **kwargs)
    return np.maximum(output, 0), lambda grad: vjp(np.where(output > 0, grad, 0))


def batch_norm_relu_magnitude(*args: Any, **kwargs: Any) -> Result:
    """The normalisation's, since the rectification adds nothing up; the gradient only where it passes."""
    output, _ = batch_norm(*args, **kwargs)
    size, vjp = batch_norm_magnitude(*args, **kwargs)
    return size, lambda grad: vjp(np.where(output > 0, np.abs(grad), 0))


def _activation(u: Array, name: str) -> tuple[Array, Array]:
    """The value and the derivative."""
    if name == "relu":
        return np.maximum(u, 0), (u > 0).astype(u.dtype)
    if name == "tanh":
        return np.tanh(u), 1 / np.cosh(u) ** 2
    value, vjp = sigmoid(u)
    (slope,) = vjp(np.ones_like(u))
    assert slope is not None
    return value, slope


def linear_activation(input: Array, weight: Array, bias: Array | None = None, activation: str = "relu") -> Result:
    """f(x Wᵀ + b); its error is the gradient times f'."""
    u, vjp = linear(input, weight, bias)
    value, slope = _activation(u, activation)
    return value, lambda grad: vjp(grad * slope)


def linear_activation_magnitude(
    input: Array, weight: Array, bias: Array | None = None, activation: str = "relu"
) -> Result:
    """What the affine map adds up, times the derivative, and the value; y (1 - y) and 1 - y² add up 2 at most.

    An error of u changes the derivative by as much again, since |f''| <= 1.
    """
    u, _ = linear(input, weight, bias)
    size, vjp = linear(np.abs(input), np.abs(weight), None if bias is None else np.abs(bias))
    value, slope = _activation(u, activation)
    smooth = 0.0 if activation == "relu" else 1.0
    return np.abs(value) + slope * size, lambda grad: vjp(np.abs(grad) * (slope + smooth * (2 + size)))


def batch_norm_chain(input: Array, weight: Array, grad: Array, eps: float) -> dict[str, Array]:
    """The notes' intermediates one after the other, (4.84) to (4.94) and (4.88), each by its own sum.

    The second sum of (4.94), over the deviations from the mean, is not left out.
    """

    def lay(vector: Array) -> Array:
        return vector.reshape(1, -1, *(1,) * (input.ndim - 2))

    axes = tuple(d for d in range(input.ndim) if d != 1)
    m = input.size // input.shape[1]
    mean = input.sum(axis=axes) / m
    deviation = input - lay(mean)
    var = (deviation**2).sum(axis=axes) / m
    s = (var + np.asarray(eps, input.dtype)) ** -0.5
    normalized = deviation * lay(s)
    to_normalized = grad * lay(weight)
    to_var = (to_normalized * deviation * lay(-(s**3) / 2)).sum(axis=axes)
    to_mean = (-to_normalized * lay(s)).sum(axis=axes) - to_var * (2 * deviation).sum(axis=axes) / m
    return {
        "weight": (grad * normalized).sum(axis=axes),
        "bias": grad.sum(axis=axes),
        "normalized": to_normalized,
        "var": to_var,
        "mean": to_mean,
        "input": to_normalized * lay(s) + lay(to_var) * 2 * deviation / m + lay(to_mean) / m,
    }
