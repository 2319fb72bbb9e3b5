"""The affine map as a module."""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from reimpl import functional as F
from reimpl import init
from reimpl.init.gain import fans


class Linear(torch.nn.Linear):
    r"""Affine map :math:`y = x W^\top + b`, from :math:`(*, \text{in\_features})` to :math:`(*, \text{out\_features})`.

    Weight and bias start from :math:`U(-1/\sqrt{\text{in}}, 1/\sqrt{\text{in}})`, with PyTorch's bits for a seed.

    Args:
        in_features, out_features: sizes.
        bias: whether there is a bias.
        device, dtype: of the parameters.

    Source: F1; N3. PyTorch: :class:`torch.nn.Linear`.
    """

    __constants__: ClassVar[list[str]] = ["in_features", "out_features"]  # type: ignore[misc]
    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = Parameter(torch.empty((out_features, in_features), device=device, dtype=dtype))
        self.register_parameter(
            "bias", Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        init.kaiming_uniform_(self.weight, a=sqrt(5))
        reset_bias(self.bias, self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def reset_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Draw a bias from the distribution of its weight, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    if bias is None:
        return
    fan_in, _ = fans(weight)
    bound = 1 / sqrt(fan_in) if fan_in > 0 else 0
    init.uniform_(bias, -bound, bound)
