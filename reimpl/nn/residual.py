"""Skip connections."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module


class Residual(Module):
    r"""A skip connection around a module: :math:`y = f(x) + s(x)`, with :math:`s` the identity unless one is given.

    The skip adds the identity to the Jacobian, :math:`\partial y/\partial x = \partial f/\partial x + I`, so that the
    gradient reaches the layers below whatever :math:`f` does to it.

    Args:
        body: :math:`f`.
        shortcut: :math:`s`, where :math:`f` changes the shape, such as a 1×1 convolution.

    Raises:
        ValueError: the two branches give different shapes.

    Source: F13; N2 §8.7.5. PyTorch has none.
    """

    body: Module
    shortcut: Module | None

    def __init__(self, body: Module, shortcut: Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.body(input)
        skipped: Tensor = input if self.shortcut is None else self.shortcut(input)
        if output.shape != skipped.shape:
            raise ValueError(
                f"body and shortcut must give the same shape, got {list(output.shape)} and {list(skipped.shape)}"
            )
        return output + skipped
