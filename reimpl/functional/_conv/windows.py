"""The windows of a batch of images as matrices, and the parts of the batch for which they are made at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv.arguments import Geometry, Phase

# Measured: some 10 MB of rows a product is fastest on CPU caches; CUDA wants few, large products.
_ROW_BYTES_CPU = 10 << 20
_ROW_BYTES_OTHER = 512 << 20


def window_rows(input: Tensor, kernel: tuple[int, int], output: tuple[int, int], geometry: Geometry) -> Tensor:
    """The windows of ``input`` as rows ``(groups, N·H'·W', f_h·f_w·C/groups)``."""
    top, bottom, left, right = geometry.padding
    planes = input.permute(0, 2, 3, 1)
    if any(geometry.padding):
        planes = pad_constant(planes, (0, 0, left, right, top, bottom))
    count, groups = input.shape[0], geometry.groups
    channels = input.shape[1] // groups
    planes = planes.contiguous()
    n, h, w, c = planes.stride()
    (s_h, s_w), (d_h, d_w) = geometry.stride, geometry.dilation
    windows = planes.as_strided(
        (groups, count, *output, *kernel, channels),
        (c * channels, n, h * s_h, w * s_w, h * d_h, w * d_w, c),
    )
    return windows.reshape(groups, count * output[0] * output[1], prod(kernel) * channels)


def parts(
    count: int, bytes_per_sample: int, device: torch.device, least: int = 0, budget: int | None = None
) -> Iterator[slice]:
    """Slices of the batch whose rows fit the device's budget, or ``least`` bytes: the kernel is read once a slice."""
    if budget is None:
        budget = max(least, _ROW_BYTES_CPU if device.type == "cpu" else _ROW_BYTES_OTHER)
    size = int(max(1, budget // max(1, bytes_per_sample)))  # while tracing, sizes are tensors
    if size < count:
        size = 1 << size.bit_length() - 1  # so that batches, powers of two as a rule, leave no small rest
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def every(tensor: Tensor, dim: int, start: int, count: int, step: int) -> Tensor:
    """``count`` elements of a dimension, ``step`` apart; ``narrow``, unlike a whole slice, works in every vmap."""
    run = tensor.narrow(dim, start, (count - 1) * step + 1)
    return run if step == 1 else run[(slice(None),) * dim + (slice(None, None, step),)]


def pixels_of(planes: Tensor, down: Phase, across: Phase, geometry: Geometry) -> Tensor:
    """The pixels of two phases in a batch of planes."""
    rows = every(planes, 2, down.first, down.number, geometry.stride[0])
    return every(rows, 3, across.first, across.number, geometry.stride[1])


class Run(NamedTuple):
    """Numbers that are copied into a matrix in one go."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    places: tuple[int, ...]
    """Strides in the matrix."""
    begin: int
    """The first there."""

    @property
    def lies(self) -> bool:
        """Whether they lie as the matrix has them."""
        return all(size == 1 or a == b for size, a, b in zip(self.sizes, self.strides, self.places, strict=True))

    def copy(self, source: Tensor, offset: int, target: Tensor) -> None:
        """Copy them; those of ``source`` begin at ``offset``."""
        numbers = source.as_strided(self.sizes, self.strides, offset + self.first)
        target.as_strided(self.sizes, self.places, self.begin).copy_(numbers)


@lru_cache(maxsize=4096)
def dense(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of dense numbers."""
    return tuple(prod(sizes[k + 1 :]) for k in range(len(sizes)))
