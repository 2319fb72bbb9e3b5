"""Batch normalisation in few passes over memory, for plain tensors that are not differentiated further.

The formulas are those of :class:`reimpl.functional.normalization.Chain`; what differs is that results overwrite what is
no longer needed, which neither ``vmap`` nor a graph allows, and that beside small planes, pixels and features the
numbers of the channels are written out as long rows: over 2 MB of float32 in planes of 4x4, on two threads, a product
with such a row takes 0.014 ms.
"""

from __future__ import annotations

from math import gcd, prod

import torch
from torch import Tensor

# Below so many images, rows as long as an image cost more than they save; and the length at which a row is long.
_LEAST_ROWS, _LONG_ROW = 8, 1024
# From this size on planes go one by one: an operator spends little on going from one to the next.
_LARGE_PLANE = 64


class Layout:
    """A batch as rows of memory, each holding all channels: an image in planes, a pixel of ``channels_last``.

    Of few images and of large planes it is three-dimensional, (images, channels, places), instead.

    Args:
        input: not empty; contiguous in one of PyTorch's memory formats.
    """

    def __init__(self, input: Tensor) -> None:
        self.shape, self.channels = input.shape, input.shape[1]
        self.by_pixel = not input.is_contiguous()
        self.size = 1 if self.by_pixel else prod(input.shape[2:])
        self.count = input.numel() // self.channels
        """Values a channel."""
        rows, length = self.count // self.size, self.channels * self.size
        self.in_planes = self.size > 1 and (rows < _LEAST_ROWS or self.size >= _LARGE_PLANE)
        self.fold = gcd(rows, max(1, _LONG_ROW // length))
        """Short rows are taken several at a time."""

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor of the batch's shape as rows; a view where its layout is the batch's."""
        if self.in_planes:
            return tensor.reshape(*self.shape[:2], -1)
        pixels = tensor.permute(0, 2, 3, 1) if self.by_pixel else tensor
        return pixels.reshape(-1, self.fold * self.channels * self.size)

    def sums(self, flat: Tensor) -> Tensor:
        """The sum of each channel."""
        if self.in_planes:
            return flat.sum((0, 2))
        sums = flat.view(-1, self.channels * self.size).sum(0)
        return sums.view(-1, self.size).sum(1) if self.size > 1 else sums

    def means(self, flat: Tensor) -> Tensor:
        """The mean of each channel."""
        if self.in_planes:
            return flat.mean((0, 2))
        means = flat.view(-1, self.channels * self.size).mean(0)
        return means.view(-1, self.size).mean(1) if self.size > 1 else means

    def mean_squares(self, flat: Tensor) -> Tensor:
        """The mean of each channel's squares; of rows the squares are written over them."""
        if self.in_planes:
            # the norm of each plane is taken in one pass, with no squares written out
            norms: Tensor = torch.linalg.vector_norm(flat, dim=2)
            return norms.square_().sum(0).div_(self.count)
        return self.means(flat.square_())

    def spread(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Vectors of one number a channel, at every place of the channel in a row."""
        if self.in_planes:
            return tuple(vector.unsqueeze(1) for vector in vectors)
        if self.size == self.fold == 1:
            return vectors
        table = torch.stack(vectors).view(len(vectors), 1, self.channels, 1)
        return table.expand(-1, self.fold, -1, self.size).reshape(len(vectors), -1).unbind()


def normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of a batch."""
    layout = Layout(input)
    x = layout.flat(input)
    mean = layout.means(x)
    (place_means,) = layout.spread(mean)
    output = torch.empty_like(input)
    values = torch.sub(x, place_means, out=layout.flat(output))
    var = layout.mean_squares(values)
    if not layout.in_planes:
        torch.sub(x, place_means, out=values)
    _scale(layout, values, var, weight, bias, eps, relu)
    return output, mean, var


def normalize_by(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """Output for a given mean and variance."""
    layout, output = Layout(input), torch.empty_like(input)
    centred = torch.sub(layout.flat(input), layout.spread(mean)[0], out=layout.flat(output))
    _scale(layout, centred, var, weight, bias, eps, relu)
    return output


def _scale(
    layout: Layout, centred: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> None:
    """Write the normalised batch over ``centred``."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale.mul_(weight)
    factors, *shifts = layout.spread(scale) if bias is None else layout.spread(scale, bias)
    centred.mul_(factors)
    for shift in shifts:
        centred.add_(shift)
    if relu:
        torch.maximum(centred, centred.new_zeros(()), out=centred)


class Errors:
    """The gradient ``g`` of a normalised batch on its way back: sums first, then the gradient of the input.

    Args:
        g: of the output, before the rectification.
        input: the batch.
        mean: of each channel.
    """

    def __init__(self, g: Tensor, input: Tensor, mean: Tensor) -> None:
        layout = self._layout = Layout(input)
        self._g, self._result = layout.flat(g), torch.empty_like(input)
        self._centred = torch.sub(layout.flat(input), layout.spread(mean)[0], out=layout.flat(self._result))
        self._products = self._g * self._centred
        self.sum_g, self.sum_g_centred = layout.sums(self._g), layout.sums(self._products)

    def to_input(self, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        """(4.88): ``g scale + (x - mean) slope + offset``; can be asked for once, and instead of :meth:`scaled`."""
        factors, slopes, offsets = self._layout.spread(scale, slope, offset)
        self._centred.mul_(slopes).add_(offsets).add_(torch.mul(self._g, factors, out=self._products))
        return self._result

    def scaled(self, scale: Tensor) -> Tensor:
        """``g scale``: the gradient of the input where mean and variance do not depend on it."""
        torch.mul(self._g, self._layout.spread(scale)[0], out=self._centred)
        return self._result
