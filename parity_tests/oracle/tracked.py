"""Arrays that carry the scale of their own rounding errors along: a running error analysis in NumPy.

Each operation adds the size of its result, which it rounds, to what it passes on of its operands' scales: products by
the other factor, functions by their slope. A formula written once over :class:`Tracked` gives value and magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tracked:
    """A value and the scale of its error, in units of the machine epsilon."""

    value: Array
    scale: Array

    def __add__(self, other: Tracked | float) -> Tracked:
        right = exact(other)
        value = self.value + right.value
        return Tracked(value, np.abs(value) + self.scale + right.scale)

    __radd__ = __add__

    def __neg__(self) -> Tracked:
        return Tracked(-self.value, self.scale)

    def __sub__(self, other: Tracked | float) -> Tracked:
        return self + (-exact(other))

    def __rsub__(self, other: Tracked | float) -> Tracked:
        return exact(other) + (-self)

    def __mul__(self, other: Tracked | float) -> Tracked:
        right = exact(other)
        value = self.value * right.value
        passed = np.abs(self.value) * right.scale + self.scale * np.abs(right.value)
        return Tracked(value, np.abs(value) + passed)

    __rmul__ = __mul__

    def __matmul__(self, other: Tracked) -> Tracked:
        left, right = np.abs(self.value), np.abs(other.value)
        return Tracked(self.value @ other.value, left @ right + self.scale @ right + left @ other.scale)

    def __getitem__(self, key: Any) -> Tracked:
        return Tracked(self.value[key], self.scale[key])

    @property
    def T(self) -> Tracked:
        """The transposed matrix."""
        return Tracked(self.value.T, self.scale.T)

    def sum(self, axis: int) -> Tracked:
        """Sum along one dimension."""
        return Tracked(self.value.sum(axis), (np.abs(self.value) + self.scale).sum(axis))

    def apply(self, value: Array, slope: Array) -> Tracked:
        """A function of this, from its values and its derivatives."""
        return Tracked(value, np.abs(value) + np.abs(slope) * self.scale)


def exact(value: Tracked | Array | float) -> Tracked:
    """A number without error."""
    if isinstance(value, Tracked):
        return value
    array = np.asarray(value)
    return Tracked(array, np.zeros_like(array, dtype=np.result_type(array, np.float64)))


def sigmoid(x: Tracked) -> Tracked:
    """1/(1 + exp(-x))."""
    with np.errstate(over="ignore"):
        y, mirrored = 1 / (1 + np.exp(-x.value)), 1 / (1 + np.exp(x.value))
    return x.apply(y, y * mirrored)


def tanh(x: Tracked) -> Tracked:
    """The hyperbolic tangent; its slope is 1/cosh²."""
    y = np.tanh(x.value)
    return x.apply(y, 1 - y * y)


def softplus(x: Tracked) -> Tracked:
    """log(1 + exp(x)), in two pieces of one sign."""
    value = np.log1p(np.exp(-np.abs(x.value))) + np.maximum(x.value, 0)
    return x.apply(value, sigmoid(x).value)


def rectify(x: Tracked) -> Tracked:
    """max(x, 0)."""
    positive = x.value > 0
    return Tracked(np.where(positive, x.value, 0), np.where(positive, x.scale, 0))


def concatenate(parts: list[Tracked], axis: int) -> Tracked:
    """Parts one after the other."""
    return Tracked(np.concatenate([p.value for p in parts], axis), np.concatenate([p.scale for p in parts], axis))
