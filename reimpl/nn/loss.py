"""Losses as modules."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from reimpl import functional as F
from reimpl.functional._losses.reduction import legacy_reduction


class _Loss(Module):
    __constants__: ClassVar[list[str]] = ["reduction"]
    reduction: str

    def __init__(self, size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean") -> None:
        Module.__init__(self)
        self.reduction = legacy_reduction(reduction, size_average, reduce)


class _WeightedLoss(_Loss):
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.register_buffer("weight", weight)


class CrossEntropyLoss(_WeightedLoss, torch.nn.CrossEntropyLoss):
    """:func:`reimpl.functional.cross_entropy` between logits and classes or probabilities.

    Args:
        weight: weight of each class, kept as a buffer.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index, reduction, label_smoothing: see the function.

    Source: F5; N3, N4. PyTorch: :class:`torch.nn.CrossEntropyLoss`.
    """

    __constants__: ClassVar[list[str]] = ["ignore_index", "reduction", "label_smoothing"]  # type: ignore[misc]
    ignore_index: int
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
        super().__init__(weight, size_average, reduce, reduction)
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


class NLLLoss(_WeightedLoss, torch.nn.NLLLoss):
    """:func:`reimpl.functional.nll_loss` of log-probabilities.

    Args:
        weight: weight of each class, kept as a buffer.
        size_average, reduce: deprecated, as in PyTorch.
        ignore_index, reduction: see the function.

    Source: F5; N3. PyTorch: :class:`torch.nn.NLLLoss`.
    """

    __constants__: ClassVar[list[str]] = ["ignore_index", "reduction"]  # type: ignore[misc]
    ignore_index: int

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(input, target, weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class MSELoss(_Loss, torch.nn.MSELoss):
    """:func:`reimpl.functional.mse_loss`.

    Source: F4; N3. PyTorch: :class:`torch.nn.MSELoss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class BCELoss(_WeightedLoss, torch.nn.BCELoss):
    """:func:`reimpl.functional.binary_cross_entropy` of probabilities; ``weight`` is kept as a buffer.

    Source: F5; N3, N4. PyTorch: :class:`torch.nn.BCELoss`.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, weight=self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(_Loss, torch.nn.BCEWithLogitsLoss):
    """:func:`reimpl.functional.binary_cross_entropy_with_logits`; ``weight`` and ``pos_weight`` are kept as buffers.

    Source: F5, F18; N3, N4. PyTorch: :class:`torch.nn.BCEWithLogitsLoss`.
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(size_average, reduce, reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )
