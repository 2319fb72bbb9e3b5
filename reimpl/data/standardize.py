"""``Standardize``: zero mean and unit variance, feature by feature (catalogue D1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from reimpl.data._fitted import FittedTransform, result_dtype, two_parts, working_dtype
from reimpl.data._moments import Data, Moments

Centring = Literal["feature", "sample"]


class Standardize(FittedTransform):
    r"""Centres each feature and divides it by its standard deviation, both those of the data fitted on.

    .. math::
        y = (x - \mu) / \sigma, \qquad \mu = \frac1n \sum_i x_i, \qquad
        \sigma^2 = \frac{1}{n - \text{correction}} \sum_i (x_i - \mu)^2

    Fit on the training set and use at test time as it is. A feature that is constant, or whose σ is too small to
    divide by, is centred only: σ counts as 1 (so does every feature of a single example). The means
    are subtracted in two parts, so that in float32 an offset much larger than σ costs no accuracy.

    Args:
        dim: the dimensions whose every index has a μ and σ of its own, all others being averaged over: 1 for the
            features of (N, F) and the channels of (N, C, H, W), -1 for channels that come last, (1, 2, 3) for every
            pixel by itself, ``None`` for one μ and σ of everything.
        correction: 0 divides by n, 1 by n - 1.
        centring: ``"sample"`` is what the notes' code does instead: each example's own mean is subtracted, nothing is
            divided, nothing fitted and nothing can be inverted.

    Shape: any (N, ...) with the features fitted on; the output has the input's shape and dtype, the default dtype for
    integers. Half precision is computed in float32.

    Attributes:
        mean, std: μ and σ, float64, of the sizes along ``dim``.
        count: n, the number of values that each is taken over.

    Raises:
        RuntimeError: used before :meth:`fit`; inverted with ``centring="sample"``.
        ValueError: ``dim`` holds 0, ``correction`` is negative, ``centring`` is unknown, features of another shape.

    Source: D1 (N0; N4, whose text calls σ the variance). scikit-learn: ``StandardScaler``.
    """

    std: Tensor
    products = False
    derived = ("std",)

    def __init__(
        self, dim: int | Sequence[int] | None = 1, correction: int = 0, *, centring: Centring = "feature"
    ) -> None:
        super().__init__(dim, correction)
        if centring not in get_args(Centring):
            raise ValueError(f"centring must be one of {get_args(Centring)}, got {centring!r}")
        self.centring = centring

    def fit(self, data: Data) -> Self:
        """As :meth:`FittedTransform.fit`; with ``centring="sample"`` there is nothing to take and nothing happens."""
        return self if self.centring == "sample" else super().fit(data)

    def forward(self, input: Tensor) -> Tensor:
        """(x - μ) / σ."""
        dtype = working_dtype(input)
        if self.centring == "sample":
            x = input.to(dtype)
            return (x - x.mean(list(range(1, x.dim())), keepdim=True)).to(result_dtype(input))
        mean, mean_rest, scale = self._broadcast(input, dtype)
        return ((input.to(dtype) - mean - mean_rest) / scale).to(result_dtype(input))

    def inverse(self, input: Tensor) -> Tensor:
        """σ y + μ."""
        if self.centring == "sample":
            raise RuntimeError('centring="sample" keeps no means, so that nothing can be inverted')
        dtype = working_dtype(input)
        mean, mean_rest, scale = self._broadcast(input, dtype)
        return (input.to(dtype) * scale + mean_rest + mean).to(result_dtype(input))

    def _broadcast(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        dims = self._check(x)
        shape = [x.shape[d] if d in dims else 1 for d in range(x.dim())]
        scale = self.std.to(dtype)
        scale = torch.where(scale < torch.finfo(dtype).tiny, 1, scale)
        high, low = two_parts(self.mean, dtype)
        return high.reshape(shape), low.reshape(shape), scale.reshape(shape)

    def _derive(self, moments: Moments, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"std": (moments.scatter / (moments.count - self.correction)).sqrt().reshape(shape)}

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", centring={self.centring!r}" if self.centring != "feature" else "")
