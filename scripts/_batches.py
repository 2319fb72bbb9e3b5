"""Training batches, whose order and augmentation follow from seed and epoch, so that any batch can be made again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

_SIDE = 32


@dataclass(frozen=True)
class Normalize:
    """(x / 255 - mean) / std, channel by channel, with the training set's figures."""

    mean: torch.Tensor  # (3,)
    std: torch.Tensor
    channels_last: bool

    @classmethod
    def of(cls, images: torch.Tensor, channels_last: bool) -> Normalize:
        """Takes mean and deviation from uint8 ``images``; sums of integers, so the order of addition is no matter."""
        sums = torch.zeros(2, 3, dtype=torch.int64, device=images.device)
        for chunk in images.split(2_000):
            values = chunk.to(torch.int64)
            sums += torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
        mean, mean_square = sums.double() / (images.numel() // 3)
        std = (mean_square - mean.square()).sqrt().clamp_min(1.0)  # one level, where all pixels are alike
        return cls((mean / 255).float(), (std / 255).float(), channels_last)

    def to(self, device: torch.device) -> Normalize:
        return Normalize(self.mean.to(device), self.std.to(device), self.channels_last)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x = (images / 255).sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return x.contiguous(memory_format=layout)


@dataclass(frozen=True)
class Batches:
    """Batches of uint8 ``images`` (N, 3, 32, 32) and ``labels`` (N,), which lie on the device that trains.

    Each epoch is a new permutation; the remainder that fills no batch is left out. ``flip`` mirrors a random half of
    the images in the first epoch and turns each one over in every epoch after, so that two epochs show both sides.
    ``shift`` moves each image by up to that many pixels either way, the edge reflected.
    """

    images: torch.Tensor
    labels: torch.Tensor
    normalize: Normalize
    size: int
    seed: int
    flip: bool
    shift: int

    def __len__(self) -> int:
        return len(self.labels) // self.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches ``start`` and after of ``epoch``, both counted from 0."""
        count, device = len(self.labels), self.images.device
        always = torch.Generator().manual_seed(2 * self.seed)
        here = torch.Generator().manual_seed(2 * self.seed + 1 + (epoch + 1) * 1_000_003)
        order = torch.randperm(count, generator=here)
        shifts = torch.randint(-self.shift, self.shift + 1, (2, count), generator=here)
        flips = torch.randint(2, (count,), generator=always).bool() ^ bool(epoch % 2) if self.flip else None
        for batch in range(start, len(self)):
            index = order[batch * self.size : (batch + 1) * self.size]
            rows, columns = (_reflect(torch.arange(_SIDE) + shift[index, None]) for shift in shifts)
            if flips is not None:
                columns = torch.where(flips[index, None], _SIDE - 1 - columns, columns)
            index, rows, columns = index.to(device), rows.to(device), columns.to(device)
            channels = torch.arange(3, device=device)[None, :, None, None]
            x = self.images[index[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
            yield self.normalize(x), self.labels[index]


def _reflect(position: torch.Tensor) -> torch.Tensor:
    """Positions outside 0..31 mirrored at the edge pixel: -1 is 1, 32 is 30."""
    return _SIDE - 1 - (_SIDE - 1 - position.abs()).abs()
