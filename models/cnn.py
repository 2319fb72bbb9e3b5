"""The plain convolutional network: convolution, pooling, fully connected layers (M2)."""

from __future__ import annotations

import torch
from torch import nn

from models.layers import Layers


class PlainCNN(nn.Module):
    """Convolutions of 3x3, each followed by ReLU and pooling of 2x2, then two fully connected layers.

    A convolution of F filters of f x f over C channels has F (f² C + 1) parameters: 28 for one filter of 3x3x3, 56 for
    two, 456 for six of 5x5x3 (the notes say 156, which is six of 5x5x1).

    Input (N, 3, 32, 32); output logits (N, num_classes). Source: M2, N4.

    Args:
        L: the layers to build with.
        channels: output channels of each convolution; each halves the image's sides.
        hidden: width of the first fully connected layer.
    """

    def __init__(
        self, L: Layers, num_classes: int = 10, *, channels: tuple[int, ...] = (32, 64), hidden: int = 128
    ) -> None:
        super().__init__()
        if not 1 <= len(channels) <= 5:
            raise ValueError(f"channels must name 1 to 5 convolutions, as 32 halves five times, got {channels}")
        stages: list[nn.Module] = []
        for fan_in, fan_out in zip((3, *channels), channels):
            stages += [L.Conv2d(fan_in, fan_out, 3, padding=1), L.ReLU(), L.MaxPool2d(2)]
        side = 32 >> len(channels)
        self.features = nn.Sequential(*stages)
        self.hidden = L.Linear(channels[-1] * side * side, hidden)
        self.relu = L.ReLU()
        self.head = L.Linear(hidden, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.hidden(self.features(x).flatten(1))))
