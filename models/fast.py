"""The fast CIFAR-10 network: a fixed whitening layer, identity starts, batch normalisation (M10)."""

from __future__ import annotations

import torch
from torch import nn

from models.layers import Layers

_PATCH = 2  # side of the whitened patches
_FILTERS = 2 * 3 * _PATCH**2  # each direction of the patches' space, and its opposite


class ConvGroup(nn.Module):
    """Convolution, pooling of 2x2, convolution; batch normalisation and ReLU after each convolution."""

    def __init__(self, L: Layers, fan_in: int, fan_out: int, bn_momentum: float) -> None:
        super().__init__()
        self.conv1 = L.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
        self.pool = L.MaxPool2d(2)
        self.bn1 = L.BatchNorm2d(fan_out, momentum=bn_momentum)
        self.conv2 = L.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = L.BatchNorm2d(fan_out, momentum=bn_momentum)
        self.relu = L.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.pool(self.conv1(x))))
        return self.relu(self.bn2(self.conv2(x)))


class FastNet(nn.Module):
    """A network that learns CIFAR-10 in a few epochs.

    The first layer whitens 2x2 patches: call :meth:`whiten_` with training images before the first step. The first
    filters of every other convolution start as the identity, so that the signal passes an untrained network.

    Input (N, 3, 32, 32); output logits (N, num_classes). Source: M10; K. Jordan, *94% on CIFAR-10 in 3.29 Seconds on a
    Single GPU*, 2024, with ReLU where that has GELU and half its widths (64, 256, 256).

    Args:
        L: the layers to build with.
        widths: channels of the three groups.
        bn_momentum: share of the newest batch in the running statistics (PyTorch's sense of the word).
        scale: factor on the logits, which keeps them small at the start.
    """

    def __init__(
        self,
        L: Layers,
        num_classes: int = 10,
        *,
        widths: tuple[int, int, int] = (64, 128, 128),
        bn_momentum: float = 0.4,
        scale: float = 1 / 9,
    ) -> None:
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise ValueError(f"widths must be three positive channel counts, got {widths}")
        self.whiten = L.Conv2d(3, _FILTERS, _PATCH)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        self.relu = L.ReLU()
        groups = [ConvGroup(L, i, o, bn_momentum) for i, o in zip((_FILTERS, *widths), widths)]
        self.groups = nn.Sequential(*groups)
        self.pool = L.MaxPool2d(3)
        self.head = L.Linear(widths[-1], num_classes, bias=False)
        self.scale = scale
        for group in groups:
            for conv in (group.conv1, group.conv2):
                nn.init.dirac_(conv.weight[: conv.weight.shape[1]])

    @torch.no_grad()
    def whiten_(self, images: torch.Tensor, eps: float = 5e-4) -> None:
        """Sets the first layer from patches of ``images`` (N, 3, H, W), normalised as the network's input will be.

        The filters are v / √(λ + eps) and their negatives, over the eigenpairs (λ, v) of the patches' covariance.
        """
        patches = images.unfold(2, _PATCH, 1).unfold(3, _PATCH, 1)  # (N, 3, H', W', 2, 2)
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, _FILTERS // 2).double()
        eigenvalues, eigenvectors = torch.linalg.eigh(rows.T.cov())
        filters = (eigenvectors / (eigenvalues + eps).sqrt()).T.reshape(-1, 3, _PATCH, _PATCH)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.groups(self.relu(self.whiten(x)))
        return self.head(self.pool(x).flatten(1)) * self.scale
