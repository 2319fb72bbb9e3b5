"""``Mix``: training examples made to look like the target by mixing something into them (catalogue D18)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Mix(nn.Module):
    r"""Mixes one of several recordings, textures or other variations into each example.

    .. math:: y_i = x_i + a_i v_{k_i}, \qquad \text{or blended,} \quad y_i = (1 - a_i) x_i + a_i v_{k_i}

    with k uniform over the variations and a uniform in ``amount``, drawn anew for each example at each call. A
    variation that is larger than the example gives a random window of itself. In evaluation mode the examples pass
    unchanged.

    **A network learns the variations it is shown.** With few of them (one hour of noise under a thousand hours of
    speech) it fits these few and fails on the others that the target holds; ``scripts/demo_synthesis.py`` shows by how
    much. What counts is the number of different variations, not of mixed examples.

    Args:
        variations: (K, ...) what is mixed in, one along the first dimension, or a sequence of tensors of any sizes.
            They are buffers: moved with the model, not saved with it.
        amount: (low, high) of a.
        p: the share of examples that are mixed.
        blend: replace a share of the example instead of adding to it.

    Shape: (N, ...) with no dimension larger than a variation's; the output has the input's shape and dtype.

    Raises:
        ValueError: there is no variation, ``amount`` or ``p`` is out of range, an example is larger than a variation.
        TypeError: integer examples.

    Source: D18 (N4).
    """

    def __init__(
        self,
        variations: Tensor | Sequence[Tensor],
        amount: tuple[float, float] = (0.0, 1.0),
        p: float = 1.0,
        blend: bool = False,
    ) -> None:
        super().__init__()
        low, high = amount
        if not len(variations):
            raise ValueError("variations must hold at least one to mix in, got none")
        if not low <= high or (blend and not 0 <= low <= high <= 1):
            raise ValueError(f"amount must be (low, high){' within 0..1 to blend' if blend else ''}, got {amount}")
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in 0..1, got {p}")
        for k, variation in enumerate(variations):
            self.register_buffer(f"variation{k}", variation, persistent=False)
        self.amount = (low, high)
        self.p = p
        self.blend = blend

    def __len__(self) -> int:
        return len(self._buffers)

    def forward(self, input: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The examples mixed; ``generator`` (of the CPU) draws, the default one if left out."""
        if not input.is_floating_point():
            raise TypeError(f"examples must be floating point to mix into, got {input.dtype}")
        if not self.training or not len(input):
            return input
        n, (low, high) = len(input), self.amount
        chosen = torch.randint(len(self), (n,), generator=generator).tolist()
        amounts = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
        mixed = torch.rand(n, generator=generator, dtype=torch.float64) < self.p
        windows = torch.stack([self._window(k, input.shape[1:], generator) for k in chosen])
        a = torch.where(mixed, amounts, 0).to(input).reshape(-1, *[1] * (input.dim() - 1))
        base = (1 - a) * input if self.blend else input
        return base + a * windows.to(input)

    def _window(self, k: int, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        variation = self.get_buffer(f"variation{k}")
        room = [have - want for have, want in zip(variation.shape, shape)]
        if variation.dim() != len(shape) or min(room, default=0) < 0:
            raise ValueError(
                f"variation {k} has shape {tuple(variation.shape)}, too small for examples of {tuple(shape)}"
            )
        for dim, (spare, want) in enumerate(zip(room, shape)):
            if spare:
                start = int(torch.randint(spare + 1, (), generator=generator))
                variation = variation.narrow(dim, start, want)
        return variation

    def extra_repr(self) -> str:
        return f"{len(self)} variations, amount={self.amount}, p={self.p}, blend={self.blend}"
