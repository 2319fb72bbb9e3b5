"""What the declarations of layers and losses share: what is forbidden to all, and how sample tensors are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from reimpl.testing.declarations import Sample
from reimpl.testing.samples import random_tensor

# Forward and backward kernels of everything declared, and what would do the same job under another name.
FORBIDDEN: tuple[str, ...] = (
    *(
        f"aten::*{name}*"
        for name in (
            *("linear", "relu", "threshold", "hardtanh", "clamp", "sigmoid", "softmax", "logsumexp", "logaddexp"),
            *(
                "nll_loss",
                "cross_entropy",
                "conv",
                "im2col",
                "col2im",
                "pool",
                "batch_norm",
                "layer_norm",
                "group_norm",
            ),
            *("var", "std", "tanh", "logit", "softplus", "heaviside", "mse_loss", "dropout", "embedding", "renorm"),
            *("vector_norm", "lstm", "rnn_", "gru", "cdist", "huber_loss", "l1_loss"),
        )
    ),
    "aten::norm",
    *(
        f"torch.nn.functional.{name}"
        for name in ("[a-o]*", "p[b-z]*", "[q-z]*")  # all but pad
    ),
    "torch.nn.modules.*.forward",
)

# A sum of squares is one reduction of several in a variance, and the whole of a penalty.
FORBIDDEN_TO_VARIANCES = tuple(pattern for pattern in FORBIDDEN if pattern != "aten::*vector_norm*")

Samples = Callable[[torch.device, torch.dtype, Generator], Iterator[Sample]]


class Draw:
    """Leaf tensors from one generator."""

    def __init__(self, device: torch.device, dtype: torch.dtype, generator: Generator) -> None:
        self.device, self.dtype, self.generator = device, dtype, generator

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.constant(*shape, dtype=dtype).requires_grad_()

    def constant(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return random_tensor(shape, dtype or self.dtype, self.generator, self.device)

    def positive(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.constant(*shape, dtype=dtype).abs() + 0.25

    def unit(self, *shape: int) -> Tensor:
        """Between 1/16 and 15/16, so that numerical differentiation stays inside (0, 1)."""
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (drawn * 0.875 + 0.0625).to(self.dtype).to(self.device)

    def classes(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator).to(self.device)


def samples_from(rows: Callable[[Draw], Iterator[Sample]]) -> Samples:
    """The samples of a declaration from a function that draws them."""
    return lambda device, dtype, generator: rows(Draw(device, dtype, generator))
