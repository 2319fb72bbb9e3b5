"""Mean and second moments of data that comes in batches: one pass, float64, each chunk centred before it is added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Data = Tensor | np.ndarray[Any, Any] | Iterable[Any]

_CHUNK = 2**20  # numbers that are widened to float64 at a time, to bound memory


@dataclass(frozen=True)
class Moments:
    r"""Count, mean and centred second moments of rows, and how two of them become one.

    .. math::
        n = n_a + n_b, \quad \delta = \bar x_b - \bar x_a, \quad \bar x = \bar x_a + \delta n_b / n, \quad
        S = S_a + S_b + \delta \delta^\top n_a n_b / n

    Source: T. Chan, G. Golub, R. LeVeque, *Updating formulae and a pairwise algorithm for computing sample variances*,
    1979.
    """

    count: int
    mean: Tensor  # (F,), float64
    scatter: Tensor  # (F,) sums of squared deviations, or (F, F) sums of their products
    resolution: float  # the largest relative spacing of the dtypes seen; 0 for integers

    @classmethod
    def of(cls, rows: Tensor, full: bool) -> Moments:
        """The moments of ``rows`` (M, F), with products between features if ``full``."""
        resolution = torch.finfo(rows.dtype).eps if rows.is_floating_point() else 0.0
        rows = rows.double()
        # Relative to the first row, so that a constant feature is exactly 0 and a large offset costs no digits.
        first = rows[0].clone()
        rows = rows - first
        shift = rows.mean(0)
        rows -= shift
        scatter = rows.mT @ rows if full else rows.square().sum(0)
        return cls(len(rows), first + shift, scatter, resolution)

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        return Moments(self.count, self.mean.to(device), self.scatter.to(device), self.resolution)

    def merge(self, other: Moments) -> Moments:
        """The moments of both together."""
        count = self.count + other.count
        delta = other.mean - self.mean
        products = torch.outer(delta, delta) if self.scatter.dim() == 2 else delta.square()
        scatter = self.scatter + other.scatter + products * (self.count * (other.count / count))
        resolution = max(self.resolution, other.resolution)
        return Moments(count, self.mean + delta * (other.count / count), scatter, resolution)


def chunks(data: Data) -> Iterator[Tensor]:
    """Tensors of at least one example each, one after the other, from a tensor, an array or an iterable of batches.

    Raises:
        TypeError: ``data``, or a batch of it, is none of these, or is complex.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        yield from _pieces(data)
    elif hasattr(data, "__iter__") and not isinstance(data, (str, bytes, dict)):
        for batch in data:
            array = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
            if not isinstance(array, (Tensor, np.ndarray)):
                raise TypeError(
                    "a batch must be a tensor or an array, or a list or tuple that begins with one, "
                    f"got {type(array).__name__}"
                )
            yield from _pieces(array)
    else:
        raise TypeError(f"data must be a tensor, an array or an iterable of batches, got {type(data).__name__}")


def _pieces(array: Tensor | np.ndarray[Any, Any]) -> Iterator[Tensor]:
    if array.ndim == 0:
        raise ValueError("data must have a first dimension that runs over the examples, got a scalar")
    values = int(np.prod(array.shape[1:]))
    step = max(1, _CHUNK // max(1, values))
    for start in range(0, len(array), step):
        piece = array[start : start + step]
        tensor = piece.detach() if isinstance(piece, Tensor) else torch.from_numpy(np.array(piece))
        if tensor.is_complex():
            raise TypeError(f"data must be real, got {tensor.dtype}")
        yield tensor
