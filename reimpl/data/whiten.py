"""``Whiten``: features that are uncorrelated and of unit variance, by PCA or ZCA (catalogue D2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from reimpl.data._fitted import FittedTransform, result_dtype, two_parts, working_dtype
from reimpl.data._moments import Moments

Method = Literal["pca", "zca"]

# How far above the rounding of the data a direction's variance must lie, as a multiple, to count as more than rounding.
_SAFETY = 16.0


class Whiten(FittedTransform):
    r"""A linear map after which the covariance of the data fitted on is the identity.

    .. math::
        y = W (x - \mu), \qquad \Sigma = \frac{1}{n - \text{correction}} \sum_i (x_i - \mu)(x_i - \mu)^\top
        = V \Lambda V^\top, \qquad W_\text{PCA} = \Lambda^{-1/2} V^\top, \qquad W_\text{ZCA} = V \Lambda^{-1/2} V^\top

    PCA orders the directions by variance, the largest first, each with the sign that makes the largest number of its
    vector positive; ZCA stays as near to the data as whitening can. A direction without variance (a constant feature,
    one that is a linear combination of others) cannot be brought to variance 1 and becomes 0; what counts as without
    is what the rounding of the data and of the eigenvalues can make by itself. :attr:`rank` counts the others.

    Args:
        method: ``"zca"`` or ``"pca"``.
        dim: the dimensions that together make one feature vector, all others being taken as further examples: 1 for
            the F features of (N, F) and the C channels of (N, C, H, W), (1, 2, 3) for whole images.
        correction: 0 divides by n, 1 by n - 1.
        eps: added to the variance of every direction, so that small ones are not blown up to 1.

    Shape: any (N, ...) with the features fitted on; the output has the input's shape and dtype, the default dtype for
    integers. Half precision is computed in float32. The fit keeps F² numbers three times.

    Attributes:
        mean: μ, float64.
        variances: (F,) eigenvalues Λ, descending, those that count as 0 being 0.
        whitening, coloring: (F, F), W and its (pseudo-)inverse.

    Raises:
        RuntimeError: used before :meth:`fit`.
        ValueError: an argument out of range, fewer than two examples, features of another shape.

    Source: D2 (N0 uses the word for D1). scikit-learn: ``PCA(whiten=True)``, which has ``correction=1``.
    """

    variances: Tensor
    whitening: Tensor
    coloring: Tensor
    products = True
    derived = ("variances", "whitening", "coloring")

    def __init__(
        self, method: Method = "zca", dim: int | Sequence[int] = 1, correction: int = 0, *, eps: float = 0.0
    ) -> None:
        super().__init__(dim, correction)
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        if not self.dim:
            raise ValueError("dim must name at least one dimension, got none")
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        self.method = method
        self.eps = eps

    @property
    def rank(self) -> int:
        """Number of directions that have variance."""
        return int((self.variances > 0).sum())

    def forward(self, input: Tensor) -> Tensor:
        """W (x - μ)."""
        dims, dtype = self._check(input), working_dtype(input)
        high, low = two_parts(self.mean.flatten(), dtype)
        return self._map(input, dims, lambda x: (x - high - low) @ self.whitening.to(dtype).mT)

    def inverse(self, input: Tensor) -> Tensor:
        """W⁻¹ y + μ; what had no variance in the fit comes back as its mean."""
        dims, dtype = self._check(input), working_dtype(input)
        high, low = two_parts(self.mean.flatten(), dtype)
        return self._map(input, dims, lambda y: y @ self.coloring.to(dtype).mT + low + high)

    def _map(self, x: Tensor, dims: list[int], function: Callable[[Tensor], Tensor]) -> Tensor:
        last = list(range(-len(dims), 0))
        moved = x.to(working_dtype(x)).movedim(dims, last)
        mapped = function(moved.flatten(-len(dims))).reshape(moved.shape)
        return mapped.movedim(last, dims).to(result_dtype(x))

    def _derive(self, moments: Moments, shape: tuple[int, ...]) -> dict[str, Tensor]:
        if moments.count < 2:
            raise ValueError(f"whitening needs at least two examples, got {moments.count}")
        covariance = moments.scatter / (moments.count - self.correction)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0), vectors.flip(1)
        largest = vectors.abs().argmax(0, keepdim=True)
        vectors = vectors * vectors.gather(0, largest).sign()

        # Variance along each direction that rounding the features would make, and that eigh cannot see below.
        mean_square = covariance.diagonal() + moments.mean.square()
        of_data = _SAFETY * moments.resolution**2 * (vectors.square() * mean_square[:, None]).sum(0)
        of_eigh = len(values) * torch.finfo(torch.float64).eps * values[0].clamp_min(0)
        seen = values > torch.maximum(of_data, of_eigh)
        values = torch.where(seen, values, 0)
        root = (values + self.eps).sqrt()
        inverse_root = torch.where(seen, 1 / root, 0)  # the branch not taken is infinite at most, and has no gradient
        whitening = inverse_root[:, None] * vectors.mT
        coloring = vectors * torch.where(seen, root, 0)
        if self.method == "zca":
            whitening, coloring = vectors @ whitening, coloring @ vectors.mT
        return {"variances": values, "whitening": whitening, "coloring": coloring}

    def extra_repr(self) -> str:
        return f"{self.method!r}, {super().extra_repr()}" + (f", eps={self.eps}" if self.eps else "")
