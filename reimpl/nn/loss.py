"""Losses as modules."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import Module, _reduction

from reimpl import functional as F


class CrossEntropyLoss(Module):
    """:func:`reimpl.functional.cross_entropy` between logits and classes or probabilities.

    Args:
        weight: weight of each class, kept as a buffer.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index, reduction, label_smoothing: see the function.

    Source: F5; N3, N4. PyTorch: :class:`torch.nn.CrossEntropyLoss`.
    """

    __constants__: ClassVar[list[str]] = ["ignore_index", "reduction", "label_smoothing"]
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        legacy = size_average is not None or reduce is not None
        self.reduction = _reduction.legacy_get_string(size_average, reduce) if legacy else reduction
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
