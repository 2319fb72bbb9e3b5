"""Pooling in few operators that write over their results, for plain tensors on the CPU in planes or channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import isfinite, prod

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv.layouts import pixels_of_planes, planes_of_pixels
from reimpl.functional._plain import BITS, HALF, final_on_cpu, plain_on_cpu
from reimpl.functional._pooling.windows import Windows, adaptive_bounds

Pair = tuple[Tensor, Tensor]
# Places are kept as numbers of the input's dtype until they are whole: float32 holds so many.
_MOST_PLACES = 1 << 24
# Measured: rows of so many numbers may be taken pixel by pixel, and tiles of so many be filled tap by tap.
_LONG_PIXEL, _SMALL_TILE = 32, 6


def runs_plainly(input: Tensor) -> bool:
    """Whether to take the functions of this file. They look at numbers, which a dispatch mode may not have."""
    return plain_on_cpu(input) and torch._C._len_torch_dispatch_stack() == 0


def runs_widened(tensor: Tensor) -> bool:
    """Whether numbers of half the width are sooner taken as float32: PyTorch compares them one by one."""
    return tensor.dtype in HALF and final_on_cpu(tensor) and torch._C._len_torch_dispatch_stack() == 0


def largest(input: Tensor, windows: Windows, steps: bool = False) -> Pair | None:
    """The largest number of each window and its place, ``None`` where NaN or a window of -inf alone want more care.

    With ``steps``, for windows that :func:`are_tiles`: how far the place is from the window's first, in the input's
    dtype.
    """
    plane = input.shape[-2], input.shape[-1]
    if input.numel() == 0 or prod(plane) >= _MOST_PLACES:
        return None
    pixels, overhang = _pixels(input), any(windows.overhang(plane))
    signed = _has_negative_zero(pixels)
    steps = steps and not signed
    distances, starts = _places(windows, plane[1], input.dtype, min(pixels.shape[3], _LONG_PIXEL))
    first, *others = _taps(pixels, windows)
    columns = _Search(first)
    for tap, distance in zip(others, distances[1:], strict=True):
        columns.go_on(tap, distance)
    best, found = columns.result()
    if not steps:
        found.add_(starts)
    rows = _Search(_row(best, 0, windows), _row(found, 0, windows))
    for i in range(1, windows.kernel[0]):
        places = _row(found, i, windows)
        rows.go_on(_row(best, i, windows), places.add_(i * plane[1]) if steps else places)
    best, found = rows.result()
    if not _is_sure(best, overhang):
        return None
    if steps:
        return _planes_like(input, best), found.permute(0, 3, 1, 2)
    places = _planes_like(input, found).to(torch.int64, memory_format=torch.preserve_format)
    return _at(input, places) if signed else _planes_like(input, best), places


def _has_negative_zero(input: Tensor) -> bool:
    """Whether a zero is negative: of zeros, PyTorch's maximum takes now the first, now the second."""
    kind = BITS[input.dtype]
    lowest = torch.iinfo(kind).min
    if kind is torch.int32:
        return int(input.view(kind).amin()) == lowest
    # halves first, since a minimum of int64 takes nine times as long
    dense = input.is_contiguous() and input.stride(-1) == 1
    if dense and int(input.view(torch.int32).amin()) > torch.iinfo(torch.int32).min:
        return False
    return bool((input.view(kind) == lowest).any())


def _at(input: Tensor, places: Tensor) -> Tensor:
    """The numbers that stand there."""
    values = input.flatten(-2).gather(-1, places.flatten(-2)).view(places.shape)
    return values.contiguous(memory_format=_layout(input))


def _pixels(input: Tensor) -> Tensor:
    """Images or one image as ``(N, H, W, C)``, best with dense channels."""
    planes = input.unsqueeze(0) if input.dim() == 3 else input
    return planes.permute(0, 2, 3, 1) if planes.shape[1] == 1 else pixels_of_planes(planes)


def _planes_like(input: Tensor, pixels: Tensor) -> Tensor:
    """The reverse, with as many dimensions as ``input`` and in its layout."""
    return _planes(pixels, _layout(input), input.dim())


def _planes(pixels: Tensor, layout: torch.memory_format, dims: int) -> Tensor:
    planes = planes_of_pixels(pixels, layout).contiguous(memory_format=layout)
    if 1 in planes.shape[1:]:
        # the strides of what is 1 long are any so far
        empty = torch.empty(planes.shape, dtype=planes.dtype, device=planes.device, memory_format=layout)
        planes = empty.copy_(planes)
    return planes.squeeze(0) if dims == 3 else planes


def _taps(pixels: Tensor, windows: Windows) -> Iterator[Tensor]:
    """The elements at each column of a window, those of all windows in a row and of all rows together.

    Columns of few channels are dealt out by the remainder of their number by the stride, to have more side by side.
    """
    images, height, width, channels = pixels.shape
    left, right, top, bottom = windows.overhang((height, width))
    hands = windows.stride[1] if channels < _LONG_PIXEL and windows.output[1] > 1 else 1
    if hands > 1:
        pixels = _dealt(pixels, hands, (left, right, top, bottom))
        image, row, hand, column, channel = pixels.stride()
    else:
        if left or right or top or bottom:
            pixels = pad_constant(pixels, (0, 0, left, right, top, bottom), value=-torch.inf)
        hand, (image, row, column, channel) = 0, pixels.stride()
    size = images, _reach(windows), windows.output[1], channels
    strides = image, row, windows.stride[1] // hands * column, channel
    for j in range(windows.kernel[1]):
        place, owner = divmod(j * windows.dilation[1], hands)
        yield pixels.as_strided(size, strides, pixels.storage_offset() + owner * hand + place * column)


def _dealt(pixels: Tensor, hands: int, pads: tuple[int, int, int, int]) -> Tensor:
    """Columns, those of the padding among them, dealt out to so many hands: ``(N, H, hands, W / hands, C)``."""
    images, height, width, channels = pixels.shape
    left, right, top, bottom = pads
    size = images, top + height + bottom, hands, -(-(left + width + right) // hands), channels
    dealt = pixels.new_full(size, -torch.inf) if any(pads) else pixels.new_empty(size)
    for first in range(left, min(left + hands, left + width)):
        column, hand = divmod(first, hands)
        of = pixels[:, :, first - left :: hands]
        dealt[:, top : top + height, hand, column : column + of.shape[2]].copy_(of)
    return dealt


def _row(values: Tensor, number: int, windows: Windows) -> Tensor:
    """Of values for every row, those at one row of each window."""
    first = number * windows.dilation[0]
    return values[:, first : first + (windows.output[0] - 1) * windows.stride[0] + 1 : windows.stride[0]]


def _reach(windows: Windows) -> int:
    """Rows from the first window's first to the last one's last."""
    return (windows.output[0] - 1) * windows.stride[0] + (windows.kernel[0] - 1) * windows.dilation[0] + 1


@lru_cache(64)
def _places(windows: Windows, width: int, dtype: torch.dtype, channels: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The distance of each column of a window from the first, and of every row, the places where windows begin."""
    distances = torch.arange(windows.kernel[1], device="cpu", dtype=dtype) * windows.dilation[1]
    rows = torch.arange(_reach(windows), device="cpu", dtype=dtype) - windows.padding[0]
    columns = torch.arange(windows.output[1], device="cpu", dtype=dtype) * windows.stride[1] - windows.padding[1]
    starts = (rows.unsqueeze(1) * width + columns).unsqueeze(2)
    # side by side with few channels, one for all of many
    return distances.unbind(), starts.expand(-1, -1, channels).contiguous() if channels < _LONG_PIXEL else starts


class _Search:
    """The largest of several tensors, one after the other, and its place: that of the first of equal ones."""

    def __init__(self, first: Tensor, places: Tensor | None = None) -> None:
        self._best, self._found = first, places
        self._wins: Tensor | None = None

    def go_on(self, values: Tensor, places: Tensor) -> Tensor:
        """Look at further values; 1 where they are better than those before, else 0, until the next."""
        # as numbers of the values' dtype: a comparison into bytes takes three times as long
        wins = self._wins
        if wins is None:
            wins = self._wins = torch.empty(values.shape, dtype=values.dtype, device=values.device)
            torch.gt(values, self._best, out=wins)
            self._best = torch.maximum(values, self._best)
            # exact at 0 and at 1
            self._found = wins * places if self._found is None else torch.lerp(self._found, places, wins)
            return wins
        torch.gt(values, self._best, out=wins)
        torch.maximum(values, self._best, out=self._best)
        assert self._found is not None
        self._found.lerp_(places, wins)
        return wins

    def result(self) -> Pair:
        """The largest values and their places, to be written over."""
        if self._wins is None:
            self._best = self._best.clone(memory_format=torch.contiguous_format)
            self._found = torch.zeros_like(self._best) if self._found is None else self._found.clone()
        assert self._found is not None
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
    places = _planes_like(input, places.add_(top.view(-1, 1, 1)).mul_(width).add_(found).long())
    return _at(input, places) if _has_negative_zero(x) else _planes_like(input, best), places


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
    places = height * width - hits.amax((-2, -1), keepdim=True).long()
    # the maximum of zeros may have either sign
    best = input.flatten(-2).gather(-1, places.flatten(-2))
    best, places = (_planes_like(input, t.reshape(-1, 1, 1, input.shape[-3])) for t in (best, places))
    return best, places


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
    _, starts = _places(windows, width, steps.dtype, _LONG_PIXEL)
    return (steps + _row(starts.unsqueeze(0), 0, windows).squeeze(-1)).long()


def spread_by_steps(
    grad: Tensor, steps: Tensor, windows: Windows, plane: tuple[int, int], layout: torch.memory_format
) -> Tensor | None:
    """:func:`scatter` for windows that :func:`are_tiles`, by the steps that :func:`largest` gives; ``None`` where the
    gradient is not finite."""
    if not isfinite(float(grad.sum())):
        return None
    given, found = _pixels(grad), steps.permute(0, 2, 3, 1)
    (rows, columns), (s_h, s_w), (images, _, _, channels) = windows.output, windows.stride, given.shape
    covered = (rows * s_h, columns * s_w) == plane
    result = (grad.new_empty if covered else grad.new_zeros)(images, *plane, channels)
    hits, zero = torch.empty_like(found), grad.new_zeros(())
    for i, j in product(range(s_h), range(s_w)):
        torch.eq(found, i * plane[1] + j, out=hits)
        # a sum, since a negative number times 0 is -0
        torch.addcmul(zero, given, hits, out=result[:, i : rows * s_h : s_h, j : columns * s_w : s_w])
    return _planes(result, layout, grad.dim())


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
    layout = _layout(input)
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


def _layout(input: Tensor) -> torch.memory_format:
    return torch.channels_last if _side_by_side(input) else torch.contiguous_format


def _side_by_side(input: Tensor) -> bool:
    return input.dim() == 4 and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
