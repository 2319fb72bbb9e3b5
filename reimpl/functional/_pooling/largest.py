"""Where the largest element of each window stands, and the gradient that goes there."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._dispatch import memory_format_of, opmath_dtype
from reimpl.functional._pooling import plain as _pooling_plain
from reimpl.functional._pooling.windows import Windows, adaptive_bounds
from reimpl.functional.kernels import final_kernels_for, kernels_for, teach


@dataclass(frozen=True)
class Grid:
    """Adaptive windows: numbers of rows and columns."""

    output: tuple[int, int]


def search(input: Tensor, windows: Windows | Grid, steps: bool = False) -> tuple[Tensor, Tensor]:
    """Maxima and their places; with ``steps`` these may be floating-point ones, from the first of a window, instead."""
    if _pooling_plain.runs_widened(input):
        values, places = search(input.float(), windows, steps)
        return values.to(input.dtype, memory_format=memory_format_of(input)), places
    kernels = kernels_for("_pooling.numba", input)
    if kernels and kernels.worth_it(input) and 0 not in windows.output:
        lines = _lines(kernels, windows, (input.shape[-2], input.shape[-1]))
        return kernels.largest(input, lines, windows.output, _apart(windows))  # type: ignore[no-any-return]
    if isinstance(windows, Grid):
        found = _pooling_plain.largest_of_grid(input, windows.output) if _plainly(input, windows) else None
        return found or _search_grid(input, windows)
    found = None
    if _plainly(input, windows):
        steps = steps and _pooling_plain.are_tiles(windows, (input.shape[-2], input.shape[-1]))
        found = _pooling_plain.largest(input, windows, steps)
    return found or _search_taps(input, windows)


def _plainly(input: Tensor, windows: Windows | Grid) -> bool:
    return 0 not in windows.output and _pooling_plain.runs_plainly(input)


def _lines(kernels: Any, windows: Windows | Grid, plane: tuple[int, int]) -> Any:
    """Where the windows lie, as the kernels want to know it."""
    return kernels.adaptive(windows.output, plane) if isinstance(windows, Grid) else kernels.bounds(windows, plane)


def _apart(windows: Windows | Grid) -> tuple[int, int]:
    return (1, 1) if isinstance(windows, Grid) else windows.dilation


def learn(key: tuple[object, ...] | None, input: Tensor, values: Tensor, windows: Windows | Grid) -> None:
    """Let the compiled node do, from here on, what kernels have just done to such an input."""
    kernels = kernels_for("_pooling.numba", input, values) if key else None
    if key and kernels and kernels.worth_it(input) and values.numel():
        lines = _lines(kernels, windows, (input.shape[-2], input.shape[-1]))
        teach(key, kernels, _through, input, values, lines, _apart(windows))


def _through(options: Any, grads: tuple[Tensor], saved: tuple[Tensor], numbers: Any, shape: Any) -> Tensor:
    return scattered(*grads, *saved, (shape[-2], shape[-1]))


def _search_taps(input: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """One kernel tap after the other."""
    (o_h, o_w), (s_h, s_w), (d_h, d_w) = windows.output, windows.stride, windows.dilation
    height, width = input.shape[-2:]
    lowest = -torch.inf if input.is_floating_point() else torch.iinfo(input.dtype).min
    k_h, k_w = windows.kernel
    padded = pad_constant(input, windows.overhang((height, width)), value=lowest)
    best = input.new_full((), lowest).expand(*input.shape[:-2], o_h, o_w)
    # The number, from 1, of the last tap that was better than those before it: bytes where they suffice.
    winner = torch.zeros_like(best, dtype=torch.uint8 if k_h * k_w < 256 else torch.int64)
    for k in range(k_h * k_w):
        i, j = divmod(k, k_w)
        tap = padded[..., i * d_h : i * d_h + (o_h - 1) * s_h + 1 : s_h, :]
        tap = tap[..., j * d_w : j * d_w + (o_w - 1) * s_w + 1 : s_w]
        better = (tap > best) | (tap != tap)
        best = torch.maximum(best, tap)
        winner = torch.maximum(winner, better.to(winner.dtype) * (k + 1))
    return best, _places_of(winner, windows, width)


def _places_of(winner: Tensor, windows: Windows, width: int) -> Tensor:
    """Where the winning taps stand in the plane, ``row * width + column``."""
    (d_h, d_w), (k_h, k_w) = windows.dilation, windows.kernel
    rows, columns = (
        torch.arange(n, device=winner.device) * s - p
        for n, s, p in zip(windows.output, windows.stride, windows.padding, strict=True)
    )
    taps = [0, *(i * d_h * width + j * d_w for i in range(k_h) for j in range(k_w))]
    corner = rows.unsqueeze(1) * width + columns
    places = torch.tensor(taps, device=winner.device)[winner.long()] + corner
    if max(windows.padding) == 0:
        return places
    # A window of nothing but the lowest value keeps the place where it enters the input.
    entry = [
        start - (start < 0) * start.div(d, rounding_mode="floor") * d for start, d in ((rows, d_h), (columns, d_w))
    ]
    return places + (winner == 0) * (entry[0].unsqueeze(1) * width + entry[1] - corner)


def _search_grid(input: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Each window gathered, the short ones filled up with their last row and column."""
    width = input.shape[-1]
    if 0 in grid.output:
        empty = input.new_empty((*input.shape[:-2], *grid.output))
        return empty, empty.to(torch.int64)
    lines = []
    for length, count in zip(input.shape[-2:], grid.output, strict=True):
        bounds = [adaptive_bounds(i, count, length) for i in range(count)]
        longest = max(end - start for start, end in bounds)
        members = [[min(start + j, end - 1) for j in range(longest)] for start, end in bounds]
        lines.append(torch.tensor(members, device=input.device))
    rows, columns = lines
    places = rows[:, None, :, None] * width + columns[None, :, None, :]
    gathered = input.flatten(-2)[..., places.flatten(2)]
    # The first of the largest, but the last NaN.
    unordered = gathered != gathered
    last = gathered.shape[-1] - 1 - unordered.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    winners = torch.where(unordered.any(-1, keepdim=True), last, gathered.argmax(-1, keepdim=True))
    chosen = places.flatten(2).expand(gathered.shape).gather(-1, winners)
    return gathered.gather(-1, winners).squeeze(-1), chosen.squeeze(-1)


def spread(
    grad: Tensor, places: Tensor, plane: tuple[int, int], windows: Windows | Grid, layout: torch.memory_format
) -> Tensor:
    """The gradient of each maximum at its place, in planes of so many rows and columns, laid out so."""
    if _pooling_plain.runs_widened(grad):
        return spread(grad.float(), places, plane, windows, layout).to(grad.dtype)
    height, width = plane
    if places.is_floating_point() and isinstance(windows, Windows):
        if _pooling_plain.runs_plainly(grad) and _pooling_plain.runs_plainly(places):
            result = _pooling_plain.spread_by_steps(grad, places, windows, plane, layout)
            if result is not None:
                return result
        places = _pooling_plain.places_of_steps(places, windows, width)
    kernels = final_kernels_for("_pooling.numba", grad)
    if kernels and places.numel() and kernels.worth_it(places):
        lines = _lines(kernels, windows, (height, width))
        return kernels.scatter(grad, places, (height, width), lines, layout)  # type: ignore[no-any-return]
    if _pooling_plain.runs_plainly(grad):
        return _pooling_plain.scatter(grad, places, (height, width), layout)
    return scattered(grad, places, (height, width)).contiguous(memory_format=layout)


def scattered(grad: Tensor, places: Tensor, plane: tuple[int, int]) -> Tensor:
    """:func:`spread` in differentiable operators."""
    outer, count = grad.shape[:-2], grad.shape[-2] * grad.shape[-1]
    flat = grad.to(opmath_dtype(grad.dtype)).reshape(*outer, count)
    result = flat.new_zeros(*outer, prod(plane)).scatter_add(-1, places.reshape(*outer, count), flat)
    return result.reshape(*outer, *plane).to(grad.dtype)
