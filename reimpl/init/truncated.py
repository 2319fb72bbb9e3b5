"""The normal distribution cut off on both sides."""

from __future__ import annotations

import warnings
from math import erf, sqrt

import torch
from torch import Generator, Tensor

# Share of the normal distribution's mass within the bounds from which redrawing what falls outside is cheap enough.
_MASS_FOR_REDRAWING = 0.3


def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    generator: Generator | None = None,
) -> Tensor:
    r"""Draw from :math:`N(\text{mean}, \text{std}^2)` conditioned on :math:`[a, b]`.

    The standard deviation of what is drawn is below ``std``: 0.88 of it at two standard deviations on either side.
    ``a`` and ``b`` are values of the weight, not standard deviations.

    Where more than 0.3 of the normal distribution lies within the bounds, numbers outside are drawn again; otherwise
    uniform proposals are accepted with the density's height. That is PyTorch's algorithm since 2.12, and gives its
    bits; 2.11 inverted the distribution function and gives other numbers of the same distribution.

    A meta tensor is returned as it is.

    Raises:
        ZeroDivisionError: ``std`` is 0.
        RuntimeError: ``a`` exceeds ``b``.

    Source: I11. PyTorch: :func:`torch.nn.init.trunc_normal_`.
    """
    if tensor.is_meta:
        return tensor
    if mean < a - 2 * std or mean > b + 2 * std:
        warnings.warn(
            "mean is more than 2 std from [a, b] in nn.init.trunc_normal_. "
            "The distribution of values may be incorrect.",
            stacklevel=2,
        )
    mass = _normal_cdf((b - mean) / std) - _normal_cdf((a - mean) / std)
    draw = _redraw if mass > _MASS_FOR_REDRAWING else _accept_or_reject
    with torch.no_grad():
        drawn = draw(tensor, mean, std, a, b, generator)
        return tensor if drawn is tensor else tensor.copy_(drawn)


def _normal_cdf(x: float) -> float:
    return (1.0 + erf(x / sqrt(2.0))) / 2.0


def _redraw(tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Generator | None) -> Tensor:
    """Normal numbers, those outside the bounds (as the dtype rounds them) replaced by new ones until none is left."""
    low, high = (tensor.new_tensor(bound, device="cpu").item() for bound in (a, b))
    drawn = tensor.normal_(mean, std, generator=generator)
    while (outside := (drawn < low) | (drawn > high)).any():
        drawn = torch.where(outside, torch.empty_like(drawn).normal_(mean, std, generator=generator), drawn)
    return drawn


def _accept_or_reject(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Generator | None
) -> Tensor:
    """Uniform proposals, each kept with the probability density(proposal)/density(the peak within the bounds)."""
    peak = max(a, min(mean, b))
    log_peak = -0.5 * ((peak - mean) / std) ** 2

    def rejected(proposals: Tensor) -> Tensor:
        log_ratio = proposals.clone().sub_(mean).div_(std).pow_(2).mul_(-0.5).sub_(log_peak)
        return torch.empty_like(tensor).uniform_(generator=generator).log_().gt(log_ratio)

    drawn = tensor.uniform_(a, b, generator=generator)
    pending = rejected(drawn)
    while pending.any():
        proposals = torch.empty_like(tensor).uniform_(a, b, generator=generator)
        drawn = torch.where(pending, proposals, drawn)
        pending &= rejected(proposals)
    return drawn
