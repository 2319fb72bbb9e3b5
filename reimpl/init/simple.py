"""Initialisations that do not look at the shape: constants and plain distributions."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None) -> Tensor:
    r"""Draw from :math:`U(a, b)`, mean :math:`(a + b)/2`, variance :math:`(b - a)^2/12`.

    Source: I1; N0, N2. PyTorch: :func:`torch.nn.init.uniform_`, same bits for the same generator.
    """
    with torch.no_grad():
        return tensor.uniform_(a, b, generator=generator)


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None) -> Tensor:
    r"""Draw from :math:`N(\text{mean}, \text{std}^2)`.

    Source: I1; N0, N2. PyTorch: :func:`torch.nn.init.normal_`, same bits for the same generator.
    """
    with torch.no_grad():
        return tensor.normal_(mean, std, generator=generator)


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Fill with ``val``. Source: I1. PyTorch: :func:`torch.nn.init.constant_`."""
    with torch.no_grad():
        return tensor.fill_(val)


def ones_(tensor: Tensor) -> Tensor:
    """Fill with 1. Source: I1. PyTorch: :func:`torch.nn.init.ones_`."""
    return constant_(tensor, 1.0)


def zeros_(tensor: Tensor) -> Tensor:
    """Fill with 0.

    For biases: zero weights in two layers on end give every unit the same gradient, and the units stay equal.

    Source: I1; N0, N2. PyTorch: :func:`torch.nn.init.zeros_`.
    """
    with torch.no_grad():
        return tensor.zero_()
