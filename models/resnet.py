"""Residual networks in their CIFAR shapes: ResNet-20, -32, -44, -56, -110 (M4)."""

from __future__ import annotations

import torch
from torch import nn

from models.layers import Layers


class BasicBlock(nn.Module):
    """y = ReLU(x + F(x)), F two 3x3 convolutions with batch normalisation.

    Where F halves the image and widens the channels, x is subsampled and padded with zero channels: the paper's option
    A, which has no parameters.
    """

    def __init__(self, L: Layers, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.widen = fan_out - fan_in
        self.conv1 = L.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = L.BatchNorm2d(fan_out)
        self.conv2 = L.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = L.BatchNorm2d(fan_out)
        self.relu = L.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self._shortcut(x))

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.widen:
            zeros = x.new_zeros(x.shape[0], self.widen // 2, *x.shape[2:])
            x = torch.cat([zeros, x, zeros], dim=1)
        return x


class ResNet(nn.Module):
    """A residual network of ``depth`` = 6n + 2 layers: three stages of n blocks, of 16, 32 and 64 channels.

    Input (N, 3, 32, 32); output logits (N, num_classes). 269,722 parameters at depth 20, 853,018 at 56.
    Source: M4; He et al., *Deep Residual Learning for Image Recognition*, 2015, section 4.2.

    Args:
        L: the layers to build with.
        depth: 20, 32, 44, 56, 110, or any other 6n + 2.
        width: channels of the first stage.
    """

    def __init__(self, L: Layers, num_classes: int = 10, *, depth: int = 20, width: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 2 with n at least 1 (8, 14, 20, ...), got {depth}")
        if width < 2 or width % 2:
            raise ValueError(f"width must be even, as half the zero channels go to each side, got {width}")
        self.conv = L.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = L.BatchNorm2d(width)
        self.relu = L.ReLU()
        self.stages = nn.Sequential()
        fan_in = width
        for stage, fan_out in enumerate((width, 2 * width, 4 * width)):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            for stride in strides:
                self.stages.append(BasicBlock(L, fan_in, fan_out, stride))
                fan_in = fan_out
        self.head = L.Linear(fan_in, num_classes)
        for parameter in self.parameters():
            if parameter.ndim == 4:
                L.kaiming_normal_(parameter, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))
