"""Activations as modules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from reimpl import functional as F


class ReLU(torch.nn.ReLU):
    """:func:`reimpl.functional.relu`; ``inplace`` writes into the input. PyTorch: :class:`torch.nn.ReLU`."""

    __constants__: ClassVar[list[str]] = ["inplace"]  # type: ignore[misc]
    inplace: bool

    def __init__(self, inplace: bool = False) -> None:
        Module.__init__(self)
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, inplace=self.inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class LeakyReLU(torch.nn.LeakyReLU):
    """:func:`reimpl.functional.leaky_relu`. PyTorch: :class:`torch.nn.LeakyReLU`."""

    __constants__: ClassVar[list[str]] = ["inplace", "negative_slope"]  # type: ignore[misc]
    inplace: bool
    negative_slope: float

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False) -> None:
        Module.__init__(self)
        self.negative_slope = negative_slope
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}" + (", inplace=True" if self.inplace else "")


class Identity(torch.nn.Identity):
    """:func:`reimpl.functional.identity`; takes and ignores any arguments. PyTorch: :class:`torch.nn.Identity`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Module.__init__(self)

    def forward(self, input: Tensor) -> Tensor:
        return F.identity(input)


class Tanh(torch.nn.Tanh):
    """:func:`reimpl.functional.tanh`. PyTorch: :class:`torch.nn.Tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class Maxout(Module):
    """:func:`reimpl.functional.maxout`: after a layer of ``pieces`` times the units, their maxima.

    Args:
        pieces: how many neighbours share a unit.
        dim: the dimension of the units (1: features of a batch, or channels).

    Source: F2; N2. PyTorch has none.
    """

    __constants__: ClassVar[list[str]] = ["pieces", "dim"]
    pieces: int
    dim: int

    def __init__(self, pieces: int, dim: int = 1) -> None:
        if pieces < 1:
            raise ValueError(f"pieces must be positive, got {pieces}")
        Module.__init__(self)
        self.pieces = pieces
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return F.maxout(input, self.pieces, self.dim)

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}, dim={self.dim}"


class Sigmoid(torch.nn.Sigmoid):
    """:func:`reimpl.functional.sigmoid`. PyTorch: :class:`torch.nn.Sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class _AlongDim(Module):
    __constants__: ClassVar[list[str]] = ["dim"]
    dim: int | None

    def __init__(self, dim: int | None = None) -> None:
        _check_dim(dim)
        Module.__init__(self)
        self.dim = dim

    def __setstate__(self, state: dict[str, Any]) -> None:
        Module.__setstate__(self, state)
        if not hasattr(self, "dim"):
            self.dim = None

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _check_dim(dim: object) -> None:
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool)):
        raise TypeError(f"dim must be an int or None, got {type(dim)}")


class Softmax(_AlongDim, torch.nn.Softmax):
    """:func:`reimpl.functional.softmax` along ``dim``. PyTorch: :class:`torch.nn.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(_AlongDim, torch.nn.LogSoftmax):
    """:func:`reimpl.functional.log_softmax` along ``dim``. PyTorch: :class:`torch.nn.LogSoftmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)
