"""Pooling in few operators that write over their results, for plain tensors on the CPU in planes or channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv.layouts import pixels_of_planes, planes_of_pixels
from reimpl.functional._plain import BITS, plain_on_cpu
from reimpl.functional._pooling.windows import Windows, adaptive_bounds

Pair = tuple[Tensor, Tensor]
# Places are kept as numbers of the input's dtype until they are whole: float32 holds so many.
_MOST_PLACES = 1 << 24
# Measured: rows of so many numbers may be taken pixel by pixel, and tiles of so many be filled tap by tap.
_LONG_PIXEL, _SMALL_TILE = 32, 6


def runs_plainly(input: Tensor) -> bool:
    """Whether to take the functions of this file. They look at numbers, which a dispatch mode may not have."""
    return plain_on_cpu(input) and torch._C._len_torch_dispatch_stack() == 0


def largest(input: Tensor, windows: Windows, steps: bool = False) -> Pair | None:
    """The largest number of each window and its place, ``None`` where NaN or a window of -inf alone want more care.

    With ``steps``, of windows that :func:`are_tiles`, in the input's dtype how far the place is from the window's first.
    """
    plane = input.shape[-2], input.shape[-1]
    if input.numel() == 0 or prod(plane) >= _MOST_PLACES:
        return None
    pixels, overhang = _pixels(input), any(windows.overhang(plane))
    distances, corners = _places(windows, plane[1], input.dtype)
    first, *others = _taps(pixels, windows)
    search = _Search(first)
    for tap, distance in zip(others, distances[1:], strict=True):
        search.go_on(tap, distance)
    best, found = search.result()
    if not _is_sure(best, overhang):
        return None
    if steps:
        return _planes_like(input, best), found.permute(0, 3, 1, 2)
    # the sum of two whole numbers below the bound
    places = _planes_like(input, found.add_(corners))
    return _planes_like(input, best), places.to(torch.int64, memory_format=torch.preserve_format)


def _pixels(input: Tensor) -> Tensor:
    """Images or one image as ``(N, H, W, C)``, best with dense channels."""
    planes = input.unsqueeze(0) if input.dim() == 3 else input
    return planes.permute(0, 2, 3, 1) if planes.shape[1] == 1 else pixels_of_planes(planes)


def _planes_like(input: Tensor, pixels: Tensor) -> Tensor:
    """The reverse, with as many dimensions as ``input`` and in its layout."""
    layout = torch.channels_last if _side_by_side(input) else torch.contiguous_format
    planes = planes_of_pixels(pixels, layout)
    return planes.squeeze(0) if input.dim() == 3 else planes


def _taps(pixels: Tensor, windows: Windows) -> Iterator[Tensor]:
    """The elements at each place of a window, those of all windows together.

    Columns are dealt out by the remainder of their number by the stride, where that leaves more to do side by side.
    """
    (s_h, s_w), (d_h, d_w), (images, height, width, channels) = windows.stride, windows.dilation, pixels.shape
    left, right, top, bottom = windows.overhang((height, width))
    hands = s_w if windows.kernel[1] > s_w or channels < _LONG_PIXEL else 1
    right += -(left + width + right) % hands
    if left or right or top or bottom:
        pixels = pad_constant(pixels, (0, 0, left, right, top, bottom), value=-torch.inf)
    if hands > 1:
        pixels = pixels.unflatten(2, (-1, hands)).transpose(2, 3).contiguous()
        image, row, hand, column, channel = pixels.stride()
    else:
        hand, (image, row, column, channel) = 0, pixels.stride()
    size, strides = (images, *windows.output, channels), (image, s_h * row, s_w // hands * column, channel)
    for i in range(windows.kernel[0]):
        for j in range(windows.kernel[1]):
            place, owner = divmod(j * d_w, hands)
            yield pixels.as_strided(
                size, strides, pixels.storage_offset() + i * d_h * row + owner * hand + place * column
            )


@lru_cache(64)
def _places(windows: Windows, width: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """The distance of each tap from the first, and for each window the place of that one."""
    (k_h, k_w), (d_h, d_w) = windows.kernel, windows.dilation
    distances = [float(i * d_h * width + j * d_w) for i in range(k_h) for j in range(k_w)]
    top, left = (
        torch.arange(n, device="cpu", dtype=dtype) * s - p
        for n, s, p in zip(windows.output, windows.stride, windows.padding, strict=True)
    )
    corners = top.view(-1, 1, 1) * width + left.view(-1, 1)
    return torch.tensor(distances, dtype=dtype, device="cpu").unbind(), corners


class _Search:
    """The largest of several tensors, one after the other, and the number given with each: the first of equal ones."""

    def __init__(self, first: Tensor) -> None:
        self._best = first
        self._found: Tensor | None = None
        self._wins: Tensor | None = None

    def go_on(self, values: Tensor, number: Tensor) -> Tensor:
        """Look at further values; 1 where they are better than those before, else 0."""
        # as numbers of the values' dtype: a comparison into bytes takes three times as long
        if self._found is None:
            best = torch.maximum(values, self._best)
            wins = self._wins = torch.gt(values, self._best, out=torch.empty_like(best))
            self._best, self._found = best, wins * number
            return wins
        wins = torch.gt(values, self._best, out=self._wins)
        torch.maximum(values, self._best, out=self._best)
        self._found.lerp_(number, wins)  # exact at 0 and at 1
        return wins

    def result(self) -> Pair:
        """The largest values and their numbers, to be written over."""
        if self._found is None:
            self._best, self._found = self._best.clone(), torch.zeros_like(self._best)
        return self._best, self._found


def _is_sure(best: Tensor, padded: bool) -> bool:
    """Whether comparisons told the first of the largest: not NaN's, nor in the padding."""
    # not aminmax, which takes four times as long as both
    highest = float(best.amax())
    return highest == highest and not (padded and float(best.amin()) == -torch.inf)


def largest_of_grid(input: Tensor, output: tuple[int, int]) -> Pair | None:
    """:func:`largest` of adaptive windows."""
    height, width = input.shape[-2:]
    if input.numel() == 0 or height * width >= _MOST_PLACES:
        return None
    if output == (1, 1):
        return _largest_of_all(input)
    if input.dim() != 4:
        return None
    if height % output[0] == 0 and width % output[1] == 0:
        size = (height // output[0], width // output[1])
        return largest(input, Windows(size, size, (0, 0), (1, 1), output))
    # images of channels side by side; columns first, so that of equal numbers the first in row-major order counts
    x = input.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    left, columns = _members(output[1], width, input.device)
    search = _Search(x.index_select(2, columns[0]))
    for number, line in enumerate(columns[1:], 1):
        search.go_on(x.index_select(2, line), x.new_tensor(number))
    values, places = search.result()
    places.add_(left.unsqueeze(1))
    top, rows = _members(output[0], height, input.device)
    search, found = _Search(values.index_select(1, rows[0])), places.index_select(1, rows[0])
    for number, line in enumerate(rows[1:], 1):
        wins = search.go_on(values.index_select(1, line), x.new_tensor(number))
        found.lerp_(places.index_select(1, line), wins)
    best, places = search.result()
    if not _is_sure(best, False):
        return None
    # the sum of two whole numbers below the bound
    places = places.add_(top.view(-1, 1, 1)).mul_(width).add_(found).long()
    layout = torch.channels_last if _side_by_side(input) else torch.contiguous_format
    best, places = (t.permute(0, 3, 1, 2).contiguous(memory_format=layout) for t in (best, places))
    return best, places


def _members(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the adaptive windows: the first elements, and line by line the first, the second, ... element of each; the
    short ones repeat their last."""
    bounds = [adaptive_bounds(i, count, size) for i in range(count)]
    longest = max(end - start for start, end in bounds)
    lines = [[min(start + j, end - 1) for start, end in bounds] for j in range(longest)]
    return torch.tensor(lines[0], device=device), torch.tensor(lines, device=device)


def _largest_of_all(input: Tensor) -> Pair | None:
    """:func:`largest` of whole planes: the places count down, and the highest is the first."""
    height, width = input.shape[-2:]
    best = input.amax((-2, -1), keepdim=True)
    if bool(best.amax().isnan()):
        return None
    rest = torch.arange(height * width, 0, -1, dtype=input.dtype, device=input.device).view(height, width)
    hits = torch.eq(input, best, out=torch.empty_like(input)).mul_(rest)
    return best, height * width - hits.amax((-2, -1), keepdim=True).long()


def are_tiles(windows: Windows, plane: tuple[int, int]) -> bool:
    """Whether windows of few elements stand side by side, none beyond the plane, so that each element is in one."""
    return (
        windows.kernel == windows.stride
        and windows.dilation == (1, 1)
        and prod(windows.kernel) <= _SMALL_TILE
        and not any(windows.overhang(plane))
    )


def places_of_steps(steps: Tensor, windows: Windows, width: int) -> Tensor:
    """The places of the largest numbers by how far they are from the first of their windows."""
    _, corners = _places(windows, width, steps.dtype)
    return (steps + corners.squeeze(-1)).long()


def spread_by_steps(
    grad: Tensor, steps: Tensor, windows: Windows, plane: tuple[int, int], layout: torch.memory_format
) -> Tensor:
    """:func:`scatter` for windows that :func:`are_tiles`, by the steps that :func:`largest` gives."""
    kind, gone, found = BITS[grad.dtype], _pixels(grad), steps.permute(0, 2, 3, 1)
    (rows, columns), (s_h, s_w), (images, _, _, channels) = windows.output, windows.stride, gone.shape
    covered = (rows * s_h, columns * s_w) == plane
    result = (grad.new_empty if covered else grad.new_zeros)(images, *plane, channels)
    bits, shift = gone.view(kind), torch.empty_like(found)
    distances, _ = _places(windows, plane[1], grad.dtype)
    for number, distance in enumerate(distances):
        i, j = divmod(number, s_w)
        part = result[:, i : rows * s_h : s_h, j : columns * s_w : s_w]
        # the bits of 1 shift everything out, NaN too
        torch.ne(found, distance, out=shift)
        torch.bitwise_left_shift(bits, shift.view(kind), out=part.view(kind))
    planes = planes_of_pixels(result, layout).contiguous(memory_format=layout)
    return planes.squeeze(0) if grad.dim() == 3 else planes


def scatter(grad: Tensor, places: Tensor, plane: tuple[int, int], layout: torch.memory_format) -> Tensor:
    """The gradients, each added at its place of zeros in that layout."""
    size, count, outer = prod(plane), prod(grad.shape[-2:]), grad.shape[:-2]
    if layout is torch.channels_last:
        where, what = (t.permute(0, 2, 3, 1).reshape(outer[0], count, outer[1]) for t in (places, grad))
        result = grad.new_zeros(outer[0], size, outer[1]).scatter_add_(1, where, what)
        return result.view(outer[0], *plane, outer[1]).permute(0, 3, 1, 2)
    where, what = (t.reshape(*outer, count) for t in (places, grad))
    return grad.new_zeros(*outer, size).scatter_add_(-1, where, what).view(*outer, *plane)


def adaptive_sums(input: Tensor, dim: int, windows: int) -> Tensor:
    """Sums over the adaptive windows along one dimension, or, for more windows than elements, the transposed map."""
    length = input.shape[dim]
    shape = (*input.shape[:dim], windows, *input.shape[dim + 1 :])
    layout = torch.channels_last if _side_by_side(input) else torch.contiguous_format
    result = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if windows < length:
        for i in range(windows):
            start, end = adaptive_bounds(i, windows, length)
            torch.sum(input.narrow(dim, start, end - start), dim, out=result.select(dim, i))
        return result
    result.zero_()
    for j in range(length):
        start, end = adaptive_bounds(j, length, windows)
        result.narrow(dim, start, end - start).add_(input.narrow(dim, j, 1))
    return result


def spread(shares: Tensor, windows: Windows, plane: tuple[int, int]) -> Tensor:
    """Each window's number added to every element of it: the channels_last gradient of sums over windows."""
    count, channels = shares.shape[:2]
    tiled = (
        windows.kernel == windows.stride
        and windows.padding == (0, 0)
        and all(n * k == size for n, k, size in zip(windows.output, windows.kernel, plane, strict=True))
    )
    result = (shares.new_empty if tiled else shares.new_zeros)(count, *plane, channels).permute(0, 3, 1, 2)
    for i in range(windows.kernel[0]):
        for j in range(windows.kernel[1]):
            to, of = zip(*(_reached(windows, plane, axis, tap) for axis, tap in enumerate((i, j))), strict=True)
            meets, part = result[..., to[0], to[1]], shares[..., of[0], of[1]]
            if tiled:
                meets.copy_(part)
            else:
                meets.add_(part)
    return result


def _reached(windows: Windows, plane: tuple[int, int], axis: int, tap: int) -> tuple[slice, slice]:
    """The elements of the plane that a tap of the windows meets, and the windows that meet one."""
    stride, offset = windows.stride[axis], tap - windows.padding[axis]
    first = max(0, -(offset // stride))
    last = min(windows.output[axis] - 1, (plane[axis] - 1 - offset) // stride)
    start = first * stride + offset
    return slice(start, max(start, last * stride + offset + 1), stride), slice(first, max(first, last + 1))


def _side_by_side(input: Tensor) -> bool:
    return input.dim() == 4 and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
