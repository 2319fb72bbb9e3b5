"""Activations in NumPy alone, with their gradients; the conventions are those of the functional oracles."""

from __future__ import annotations

import numpy as np

from parity_tests.oracle.functional import Array, Result


def tanh(input: Array) -> Result:
    """y = tanh x and y' = 1/cosh² x, which does not cancel for large x."""
    with np.errstate(over="ignore"):
        slope = 1 / np.cosh(input) ** 2
    return np.tanh(input), lambda grad: (grad * slope,)


def tanh_magnitude(input: Array) -> Result:
    """The output itself; the gradient comes from 1 - y²."""
    output = np.abs(np.tanh(input))
    return output, lambda grad: (np.abs(grad) * (1 + output * output),)


def leaky_relu(input: Array, negative_slope: float = 0.01) -> Result:
    """y = x where x > 0, else a x."""
    slope = np.where(input > 0, 1, np.asarray(negative_slope, input.dtype))
    return input * slope, lambda grad: (grad * slope,)


def leaky_relu_magnitude(input: Array, negative_slope: float = 0.01) -> Result:
    """One product, nothing added up."""
    output, vjp = leaky_relu(input, negative_slope)
    return np.abs(output), lambda grad: (np.abs(vjp(grad)[0]),)  # type: ignore[arg-type]


def heaviside(input: Array, values: Array) -> Result:
    """0 below, 1 above, ``values`` at 0; no gradient."""
    steps = np.where(input > 0, 1, 0).astype(input.dtype)
    return np.where(input == 0, values, steps), lambda grad: (None, None)


def identity(input: Array) -> Result:
    """y = x."""
    return input, lambda grad: (grad,)


def maxout(input: Array, pieces: int, dim: int = 1) -> Result:
    """Unit after unit, the largest of its pieces, whose place gets the gradient."""
    rows = np.moveaxis(input, dim, -1)
    units = rows.shape[-1] // pieces
    output, winners = np.empty((*rows.shape[:-1], units), input.dtype), np.empty((*rows.shape[:-1], units), int)
    for unit in range(units):
        piece = rows[..., unit * pieces : (unit + 1) * pieces]
        output[..., unit] = piece.max(-1)
        winners[..., unit] = unit * pieces + piece.argmax(-1)

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        spread = np.zeros_like(rows)
        np.put_along_axis(spread, winners, np.moveaxis(grad, dim, -1), -1)
        return (np.moveaxis(spread, -1, dim),)

    return np.moveaxis(output, -1, dim), vjp


def maxout_magnitude(input: Array, pieces: int, dim: int = 1) -> Result:
    """The maxima are copied, not computed."""
    output, vjp = maxout(input, pieces, dim)
    return np.abs(output), lambda grad: vjp(np.abs(grad))
