"""The three products of a depthwise convolution, one filter a channel, on the CPU: a sum over taps of shifted planes.

There is nothing to add up over channels, and so no matrix product worth the name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry, phase_pairs
from reimpl.functional._conv.layouts import empty_planes
from reimpl.functional._conv.products import unobserved
from reimpl.functional._conv.windows import every, fill_padded, pixels_of
from reimpl.functional._dispatch import is_channels_last, opmath_dtype

# Bytes of padded planes that stay in the cache from tap to tap.
_BLOCK_BYTES = 1 << 20


def fits(geometry: Geometry, *tensors: Tensor | None) -> bool:
    """Whether the sums do for such tensors; for one filter a channel."""
    return (
        geometry.groups > 1
        and geometry.algorithm is None
        and all(t is None or (t.device.type == "cpu" and t.is_floating_point() and t.numel() > 0) for t in tensors)
        and unobserved(*tensors)
    )


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: tuple[int, int],
    geometry: Geometry,
    layout: torch.memory_format,
) -> Tensor:
    """``C(x, w) + b``, of height and width ``output``; ``weight`` is ``(C, 1, f_h, f_w)``."""
    target = empty_planes(input, input.shape[1], output, layout)
    _convolve_into(target, input, weight, bias, geometry)
    return target


def _convolve_into(target: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    walk = _Walk(input, _plane(target), _plane(weight), geometry)
    filters = weight.to(walk.dtype).permute(2, 3, 0, 1).flatten(0, 1).flatten(1)
    factors, offset = [walk.of_channels(row) for row in filters], None
    if bias is not None:
        offset = walk.of_channels(bias.to(walk.dtype))
    for part, taps in walk.blocks(input):
        into = walk.place_of(target[part])
        (tap, factor), *others = zip(taps, factors, strict=True)
        if offset is None:
            total = torch.mul(tap, factor, out=into)
        else:
            total = torch.addcmul(offset, tap, factor, out=into)
        for tap, factor in others:
            total.addcmul_(tap, factor)
        if into is None:
            target[part].copy_(walk.images(total))


def convolve_input(
    grad: Tensor, weight: Tensor, size: tuple[int, int], geometry: Geometry, layout: torch.memory_format
) -> Tensor:
    """``T(g, w)``, the gradient of an input of height and width ``size``."""
    target = empty_planes(grad, grad.shape[1], size, layout)
    mirrored = weight.flip(2, 3)
    pairs = list(phase_pairs(_plane(grad), size, _plane(weight), geometry))
    if sum(down.number * across.number for down, across, _ in pairs) < prod(size):
        target.zero_()
    for down, across, part in pairs:
        taps = every(every(mirrored, 2, *down.taps), 3, *across.taps)
        _convolve_into(pixels_of(target, down, across, geometry), grad, taps, None, part)
    return target


def convolve_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``, the gradient of a kernel of height and width ``kernel``."""
    walk, totals = _Walk(input, _plane(grad), kernel, geometry), list[Tensor]()
    for part, taps in walk.blocks(input):
        errors = walk.errors(grad[part])
        if not totals:
            totals = [torch.mul(errors, tap) for tap in taps]
            continue
        # the sums over places are left to the end: what a thread has just written, it alone reads
        for total, tap in zip(totals, taps, strict=True):
            total[: len(errors)].addcmul_(errors, tap)
    sums = torch.stack([walk.images(total).sum((0, 2, 3)) for total in totals], 1)
    return sums.view(grad.shape[1], 1, *kernel).to(grad.dtype)


def _plane(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[2], tensor.shape[3]


class _Walk:
    """How the taps of a kernel go over parts of a batch, so small that they stay in the cache from tap to tap.

    Planes are padded, sorted by the remainder of rows and columns by the stride, and seen as runs of all their numbers:
    each tap's begins with its first, all are of one length, and the numbers between the rows of the output are of no
    use. Of channels_last images a tap sees the pixels under it.
    """

    def __init__(self, input: Tensor, output: tuple[int, int], kernel: tuple[int, int], geometry: Geometry) -> None:
        self.geometry, self.output, self.dtype = geometry, output, opmath_dtype(input.dtype)
        self.by_pixel = not input.is_contiguous() and is_channels_last(input)
        self._layout = torch.channels_last if self.by_pixel else torch.contiguous_format
        self._padded = geometry.padded(input.shape[2], input.shape[3])
        self._places = list(product(*(range(0, k * d, d) for k, d in zip(kernel, geometry.dilation, strict=True))))
        # of a row of sorted planes
        self._width = -(-self._padded[1] // geometry.stride[1])
        self._length = (output[0] - 1) * self._width + output[1]
        self._errors: Tensor | None = None

    def blocks(self, input: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Parts of the batch, and what each tap sees of them."""
        count, shape = input.shape[0], (input.shape[1], *self._padded)
        size = min(count, max(1, _BLOCK_BYTES // (prod(shape) * self.dtype.itemsize)))
        room = torch.empty((size, *shape), dtype=self.dtype, device=input.device, memory_format=self._layout).zero_()
        copies, all_taps = ([], self._taps_by_pixel(room)) if self.by_pixel else self._taps_of_planes(room)
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            images = part.stop - start
            fill_padded(room[:images], input[part], self.geometry)
            for some, planes in copies:
                planes.copy_(some)
            yield part, all_taps if images == size else [tap[:images] for tap in all_taps]

    def _taps_by_pixel(self, padded: Tensor) -> list[Tensor]:
        pixels, (s_h, s_w) = padded.permute(0, 2, 3, 1), self.geometry.stride
        rows, columns = self.output
        return [every(every(pixels, 1, i, rows, s_h), 2, j, columns, s_w) for i, j in self._places]

    def _taps_of_planes(self, padded: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """The taps, and before these what is to be copied and where."""
        (s_h, s_w), copies, taps = self.geometry.stride, list[tuple[Tensor, Tensor]](), list[Tensor]()
        shape = (*padded.shape[:2], -(-padded.shape[2] // s_h), self._width)
        runs = {(0, 0): padded.flatten(2)} if (s_h, s_w) == (1, 1) else {}
        for i, j in self._places:
            rest = i % s_h, j % s_w
            if rest not in runs:
                some, planes = padded[..., rest[0] :: s_h, rest[1] :: s_w], padded.new_zeros(shape)
                copies.append((some, planes[..., : some.shape[2], : some.shape[3]]))
                runs[rest] = planes.flatten(2)
            taps.append(runs[rest].narrow(2, i // s_h * self._width + j // s_w, self._length))
        return copies, taps

    def of_channels(self, vector: Tensor) -> Tensor:
        """A number for each channel, as the taps are multiplied by it: a whole row of pixels of them."""
        return vector.expand(self.output[1], -1).contiguous() if self.by_pixel else vector.unsqueeze(1)

    def place_of(self, target: Tensor) -> Tensor | None:
        """Where in the images what is made of taps can be written at once; ``None`` where it cannot."""
        return target.permute(0, 2, 3, 1) if self.by_pixel and target.dtype is self.dtype else None

    def images(self, values: Tensor) -> Tensor:
        """The images that were made of taps."""
        if self.by_pixel:
            return values.permute(0, 3, 1, 2)
        n, c, _ = values.stride()
        return values.as_strided((*values.shape[:2], *self.output), (n, c, self._width, 1), values.storage_offset())

    def errors(self, grad: Tensor) -> Tensor:
        """Images laid out as the taps are, with zeros between the rows."""
        if self.by_pixel:
            return grad.to(self.dtype).permute(0, 2, 3, 1).contiguous()
        if self._errors is None:
            self._errors = grad.new_zeros(*grad.shape[:2], self._length, dtype=self.dtype)
        own = self._errors[: len(grad)]
        self.images(own).copy_(grad)
        return own
