"""Batch normalisation in few passes over memory, for plain tensors that are not differentiated further.

The formulas are those of :class:`reimpl.functional._norm.chain.Chain`; what differs is that results overwrite what is
no longer needed, which neither ``vmap`` nor a graph allows, and that beside small planes, pixels and features the
numbers of the channels are written out as long rows: over 2 MB of float32 in planes of 4x4, on two threads, a product
with such a row takes 0.014 ms. A large batch goes by blocks, which stay in the cache from one operator to the next;
half-width numbers are widened block by block.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd, isfinite, prod

import torch
from torch import Tensor

from reimpl.functional._dispatch import opmath_dtype
from reimpl.functional._plain import masked

# Below so many images, rows as long as an image cost more than they save.
_LEAST_ROWS = 8
# Rows shorter than the first are taken so many at a time that they are about as long as the second.
_SHORT_ROW, _LONG_ROW = 128, 1024
# From this size on planes go one by one: an operator spends little on going from one to the next.
_LARGE_PLANE = 64
# A norm of more numbers than this loses digits.
_LONG_SUM = 1 << 13
DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
# Numbers in a block.
_BLOCK = 1 << 18


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
        self.fold = gcd(rows, max(1, _LONG_ROW // length)) if length < _SHORT_ROW else 1
        """Short rows are taken several at a time."""

    def flat(self, tensor: Tensor) -> Tensor:
        """A tensor of the batch's shape as rows; a view where its layout is the batch's."""
        if self.in_planes:
            return tensor.reshape(*self.shape[:2], -1)
        pixels = tensor.movedim(1, -1) if self.by_pixel else tensor
        return pixels.reshape(-1, self.fold * self.channels * self.size)

    def blocks(self, *flats: Tensor) -> list[tuple[Tensor, ...]]:
        """The same few rows or images of each."""
        first = flats[0]
        if first.numel() <= 2 * _BLOCK:
            return [flats]
        rows = max(1, _BLOCK * len(first) // first.numel())
        return list(zip(*(flat.split(rows) for flat in flats), strict=True))

    def sums(self, flat: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The sums of a block, to be added to those of the others."""
        return flat.sum((0, 2), dtype=dtype) if self.in_planes else flat.sum(0, dtype=dtype)

    def squares(self, flat: Tensor) -> Tensor:
        """The sums of a block's squares."""
        if self.in_planes:
            # norms are taken in one pass, with no squares written out
            whole = flat.shape[2] // _LONG_SUM * _LONG_SUM
            parts = flat[..., :whole].unflatten(2, (-1, _LONG_SUM)), flat[..., whole:].unsqueeze(2)
            norms = [torch.linalg.vector_norm(part, dim=3) for part in parts if part.numel()]
            total: Tensor = norms[0].square_().sum((0, 2))
            return total if len(norms) == 1 else total.add_(norms[1].square_().sum((0, 2)))
        return flat.square().sum(0)

    def joined(self, sums: Iterable[Tensor]) -> Tensor:
        """The sum of each channel, from those of the blocks."""
        first, *others = sums
        for other in others:
            first.add_(other)
        if self.in_planes or self.size == self.fold == 1:
            return first
        return first.view(self.fold, self.channels, self.size).sum((0, 2))

    def spread(self, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Vectors of one number a channel, at every place of the channel in a row."""
        if self.in_planes:
            return tuple(vector.unsqueeze(1) for vector in vectors)
        if self.size == self.fold == 1:
            return vectors
        table = torch.stack(vectors).view(len(vectors), 1, self.channels, 1)
        return table.expand(-1, self.fold, -1, self.size).reshape(len(vectors), -1).unbind()

    def scale(self, values: Tensor, factors: Tensor, shift: Tensor | None, out: Tensor) -> None:
        """Write ``values factors + shift``."""
        if shift is None or self.in_planes:
            # two numbers for a plane would keep the operator from whole registers
            torch.mul(values, factors, out=out)
            if shift is not None:
                out.add_(shift)
        else:
            torch.addcmul(shift, values, factors, out=out)


class _Wide:
    """Blocks in the dtype of the sums: half-width ones are written there.

    Args:
        blocks: all of them, of which the first is the longest.
        count: how many places are needed.
    """

    def __init__(self, blocks: list[tuple[Tensor, ...]], count: int) -> None:
        longest = blocks[0][0]
        self.needed = longest.dtype != opmath_dtype(longest.dtype)
        self.kept = len(blocks) == 1 or not self.needed
        """Whether what is written at a place, or to the result, is still there in the next pass."""
        self._places = torch.empty(count, *longest.shape, dtype=torch.float32).unbind() if self.needed else ()

    def read(self, block: Tensor, place: int) -> Tensor:
        """The numbers of a block, to be read."""
        return self._places[place][: len(block)].copy_(block) if self.needed else block

    def again(self, block: Tensor, place: int) -> Tensor:
        """What :meth:`read` returned in an earlier pass."""
        return self._places[place] if self.needed and self.kept else self.read(block, place)

    def centred(self, values: Tensor, mean: Tensor, own: Tensor) -> Tensor:
        """The deviations of what was read from the means, at its place or written to ``own``."""
        return values.sub_(mean) if self.needed else torch.sub(values, mean, out=own)

    def target(self, block: Tensor, place: int) -> Tensor:
        """Where to write what :meth:`write` shall put into ``block``."""
        return self._places[place][: len(block)] if self.needed else block

    def write(self, block: Tensor, values: Tensor) -> None:
        if self.needed:
            block.copy_(values)


def normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of a batch."""
    layout, output = Layout(input), torch.empty_like(input)
    blocks = layout.blocks(layout.flat(input), layout.flat(output))
    wide = _Wide(blocks, 1)
    mean = layout.joined([layout.sums(wide.read(x, 0)) for x, _ in blocks]).div_(layout.count)
    if mean.is_cpu and torch._C._len_torch_dispatch_stack() == 0 and not isfinite(mean.sum()):
        # PyTorch's sums, on the CPU in float64 from the start, do not overflow; a mode may hold no numbers to look at
        sums = layout.joined([layout.sums(wide.read(x, 0), torch.float64) for x, _ in blocks])
        mean = sums.div_(layout.count).to(mean.dtype)
    (means,) = layout.spread(mean)
    squares = [layout.squares(wide.centred(wide.again(x, 0), means, y)) for x, y in blocks]
    var = layout.joined(squares).div_(layout.count)
    scale = var.add(eps).rsqrt_()
    scale = scale if weight is None else scale.mul_(weight)
    # deviations that are not kept need not be taken again: their digits are more than the output's
    bias = bias if wide.kept else _shift(mean, scale, bias)
    factors, *shifts = layout.spread(scale) if bias is None else layout.spread(scale, bias)
    shift = shifts[0] if shifts else None
    for x, y in blocks:
        values = wide.target(y, 0) if wide.kept else wide.read(x, 0)
        layout.scale(values, factors, shift, values)
        _finish(wide, y, values, relu)
    return output, mean, var


def normalize_by(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """Output for a given mean and variance."""
    layout, output = Layout(input), torch.empty_like(input)
    blocks = layout.blocks(layout.flat(input), layout.flat(output))
    wide = _Wide(blocks, 1)
    scale = var.add(eps).rsqrt_()
    scale = scale if weight is None else scale.mul_(weight)
    factors, shifts = layout.spread(scale, _shift(mean, scale, bias))
    for x, y in blocks:
        values = wide.target(y, 0)
        layout.scale(wide.read(x, 0), factors, shifts, values)
        _finish(wide, y, values, relu)
    return output


def _shift(mean: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """``shift - mean scale``"""
    return torch.mul(mean, scale).neg_() if shift is None else torch.addcmul(shift, mean, scale, value=-1)


def _finish(wide: _Wide, output: Tensor, values: Tensor, relu: bool) -> None:
    if relu:
        torch.maximum(values, values.new_zeros(()), out=values)
    wide.write(output, values)


class Errors:
    """The gradient ``g`` of a normalised batch on its way back: sums first, then the gradient of the input.

    Args:
        grad: of the output.
        rectified: the output where it was rectified; ``g`` is the gradient before that.
        input: the batch.
        mean: of each channel.
    """

    def __init__(self, grad: Tensor, rectified: Tensor | None, input: Tensor, mean: Tensor) -> None:
        layout = self._layout = Layout(input)
        g = grad if rectified is None else masked(grad, rectified)
        self._result = torch.empty_like(input)
        self._blocks = layout.blocks(*(layout.flat(t) for t in (g, input, self._result)))
        self._wide = wide = _Wide(self._blocks, 2)
        self._mean = mean
        (means,) = layout.spread(mean)
        sums, sums_centred = [], []
        for own, x, d in self._blocks:
            values = wide.read(own, 0)
            sums.append(layout.sums(values))
            centred = wide.centred(wide.read(x, 1), means, d)
            sums_centred.append(layout.sums(centred * values if wide.kept else centred.mul_(values)))
        self.sum_g, self.sum_g_centred = layout.joined(sums), layout.joined(sums_centred)

    def to_input(self, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
        """(4.88): ``g scale + (x - mean) slope + offset``; can be asked for once, and instead of :meth:`scaled`."""
        wide = self._wide
        offset = offset if wide.kept else _shift(self._mean, slope, offset)
        factors, slopes, offsets = self._layout.spread(scale, slope, offset)
        for g, x, d in self._blocks:
            values = wide.target(d, 1) if wide.kept else wide.read(x, 1)
            self._layout.scale(values, slopes, offsets, values)
            values.addcmul_(wide.again(g, 0), factors)
            wide.write(d, values)
        return self._result

    def scaled(self, scale: Tensor) -> Tensor:
        """``g scale``: the gradient of the input where mean and variance do not depend on it."""
        (factors,) = self._layout.spread(scale)
        for g, _, d in self._blocks:
            values = self._wide.target(d, 1)
            torch.mul(self._wide.again(g, 0), factors, out=values)
            self._wide.write(d, values)
        return self._result
