"""Dropout as a module."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from reimpl import functional as F


class Dropout(torch.nn.Dropout):
    """:func:`reimpl.functional.dropout` while training; the input itself in evaluation.

    Args:
        p: probability of an element being set to 0.
        inplace: write into the input.

    Raises:
        ValueError: ``p`` lies outside [0, 1].

    Source: F11; N1, N4. PyTorch: :class:`torch.nn.Dropout`.
    """

    __constants__: ClassVar[list[str]] = ["p", "inplace"]  # type: ignore[misc]
    p: float
    inplace: bool

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        Module.__init__(self)
        if p < 0 or p > 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"
