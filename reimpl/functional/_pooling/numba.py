"""Pooling by compiled kernels, over planes or channels that lie in memory one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._node.plan import (
    COUNTERS,
    Address,
    Constants,
    Launch,
    Layout,
    Plan,
    Room,
    Step,
    Word,
    layout_of,
    run,
    step,
)
from reimpl.functional._numba_source import load
from reimpl.functional._pooling.windows import Windows, adaptive_bounds

LARGEST_SOURCE = Path(__file__).with_name("numba_largest_kernels.py")
# Keys that are made at a time: they stay in a core's cache. Rows of windows that need more than the second number are
# taken one by one.
_KEYS, _MOST_KEYS = 1 << 12, 1 << 17


@cache
def average_kernels() -> ModuleType:
    """What compiles for some seconds is not loaded before it is asked for."""
    return load(Path(__file__).with_name("numba_kernels.py"))


@cache
def largest_kernels() -> ModuleType:
    """The same of maximum pooling."""
    return load(LARGEST_SOURCE)


@dataclass(frozen=True, eq=False, slots=True)
class Lines:
    """Where windows lie: of those of rows, then of those of columns, first element, the one after the last, divisor.

    Args:
        table: these numbers.
        windows: what they come from, ``None`` for a grid.
    """

    table: tuple[tuple[int, int, int], ...]
    windows: Windows | None = None


def worth_it(input: Tensor) -> bool:
    """Whether there are numbers, laid out in planes or channels_last."""
    return input.numel() > 0 and (
        input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
    )


def worth_spreading(grad: Tensor, plane: tuple[int, int]) -> bool:
    """Whether there are gradients, and numbers that they go to."""
    return grad.numel() > 0 and prod(plane) > 0


@lru_cache(256)
def bounds(windows: Windows, plane: tuple[int, int], include_pad: bool = True, divisor: int | None = None) -> Lines:
    """Of the windows of rows, then of those of columns: first element, the one after the last, divisor."""
    lines = []
    for i, size in enumerate(plane):
        kernel, stride, pad, dilation = windows.kernel[i], windows.stride[i], windows.padding[i], windows.dilation[i]
        for start in range(-pad, windows.output[i] * stride - pad, stride):
            # the first element that is not padding
            first, end = start if start >= 0 else start % dilation, min(start + dilation * (kernel - 1) + 1, size)
            counted = min(start + kernel, size + pad) - start if include_pad else end - first
            lines.append((first, end, counted if divisor is None else (divisor, 1)[i]))
    return Lines(tuple(lines), windows)


@lru_cache(256)
def adaptive(output: tuple[int, int], plane: tuple[int, int]) -> Lines:
    """:func:`bounds` of adaptive windows."""
    each = (adaptive_bounds(i, count, size) for size, count in zip(plane, output, strict=True) for i in range(count))
    return Lines(tuple((start, end, end - start) for start, end in each))


def _format_of(input: Tensor) -> torch.memory_format:
    """Planes, or else channels_last."""
    return torch.contiguous_format if input.is_contiguous() else torch.channels_last


def _empty(
    like: Tensor, plane: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype | None = None
) -> Tensor:
    shape = (*like.shape[:-2], *plane)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _shares(shape: tuple[int, ...], by_pixel: bool, threads: int) -> tuple[int, int, int, int]:
    """Threads, number of planes or images, how many of them a thread has, and channels that lie side by side."""
    channels = shape[1] if by_pixel else 1
    count = prod(shape[:-2]) // channels
    threads = max(1, min(threads, count))
    return threads, count, -(-count // threads), channels


def _table(lines: Lines) -> Constants:
    return Constants(number for line in lines.table for number in line)


@lru_cache(256)
def _search_step(
    shape: tuple[int, ...], by_pixel: bool, lines: Lines, output: tuple[int, int], apart: tuple[int, int], threads: int
) -> Step:
    """Input to values and places."""
    threads, *shares = _shares(shape, by_pixel, threads)
    plane, tensors = (shape[-2], shape[-1]), (Address(0), Address(1), Address(2))
    spans = [end - first for first, end, _ in lines.table] if apart == (1, 1) else []
    sizes: tuple[Word, ...] = (COUNTERS, *(shares if by_pixel else shares[:2]), *plane, *output)
    if by_pixel:
        words = (*sizes, *apart, _table(lines), int(set(spans) == {2}), *tensors)
        return step(Launch(largest_kernels().largest_of_pixels.address, words, threads))
    keys = _room_for_keys(lines.windows, plane)
    if keys and lines.windows:
        w = lines.windows
        words = (*sizes, *w.kernel, *w.stride, *w.padding, *w.dilation, *keys, Room(threads * 3 * keys[-1]), *tensors)
        return step(Launch(largest_kernels().largest_of_overlapping.address, words, threads))
    whole, room = output == (1, 1) and spans == list(plane), Room(threads * 3 * plane[1])
    words = (*sizes, *apart, _table(lines), int(whole), room)
    return step(Launch(largest_kernels().largest_of_planes.address, (*words, *tensors), threads))


def _room_for_keys(windows: Windows | None, plane: tuple[int, int]) -> tuple[int, int, int] | None:
    """Rows of windows that are done at a time, columns with those of the padding, and how many keys that makes;
    ``None`` where there is but one window, or none like the others, or they need too many keys."""
    if windows is None or windows.output == (1, 1):
        return None
    reach, across = (d * (k - 1) + 1 for d, k in zip(windows.dilation, windows.kernel, strict=True))
    rows = max(1, min(windows.output[0], (_KEYS // plane[1] - reach) // windows.stride[0] + 1))
    columns = max((windows.output[1] - 1) * windows.stride[1] + across, plane[1] + windows.padding[1])
    keys = max(((rows - 1) * windows.stride[0] + reach) * plane[1], rows * columns)
    return (rows, columns, keys) if keys <= _MOST_KEYS else None


@lru_cache(256)
def _scatter_step(shape: tuple[int, ...], by_pixel: bool, plane: tuple[int, int], threads: int) -> Step:
    """Places of such a shape, and gradients, to the gradient of the input."""
    threads, *shares = _shares(shape, by_pixel, threads)
    sizes = (shares[-1] * prod(plane), shares[-1] * prod(shape[-2:]))
    words: tuple[Word, ...] = (COUNTERS, *shares, *sizes, Address(1), Address(0), Address(2))
    return step(Launch(largest_kernels().scatter.address, words, threads))


@lru_cache(256)
def _average_step(
    shape: tuple[int, ...], by_pixel: bool, lines: Lines, output: tuple[int, int], back: bool, threads: int
) -> Step:
    """Input to means, or ``back``: the gradient of the means to that of the input."""
    threads, *shares = _shares(shape, by_pixel, threads)
    tensors: tuple[Word, ...] = (Address(1), Address(0)) if back else (Address(0), Address(1))
    room = Room(-(-threads * (shares[-1] if shares[-1] > 1 else shape[-1]) // 2))
    words: tuple[Word, ...] = (COUNTERS, *shares, *shape[-2:], *output, _table(lines), *tensors, int(back), room)
    return step(Launch(average_kernels().average.address, words, threads))


@lru_cache(256)
def _largest_plan(
    given: Layout, values: Layout, lines: Lines, apart: tuple[int, int], by_pixel: bool, threads: int
) -> Plan:
    output = (values.sizes[-2], values.sizes[-1])
    return Plan(
        (given,),
        (values, values._replace(dtype=torch.int64)),
        _search_step(given.sizes, by_pixel, lines, output, apart, threads),
        _scatter_step(values.sizes, by_pixel, (given.sizes[-2], given.sizes[-1]), threads),
        saved=(2,),
    )


@lru_cache(256)
def _means_plan(given: Layout, means: Layout, lines: Lines, by_pixel: bool, threads: int) -> Plan:
    output = (means.sizes[-2], means.sizes[-1])
    there, back = (_average_step(given.sizes, by_pixel, lines, output, way, threads) for way in (False, True))
    return Plan((given,), (means,), there, back, saved=())


def plan_of(
    key: tuple[Any, ...], input: Tensor, output: Tensor, lines: Lines, apart: tuple[int, int] | None
) -> Plan | None:
    """The plan of a layer that has made the output of the input, as :func:`largest` does where elements of a window are
    so far ``apart``, or as :func:`means` does."""
    if not output.is_contiguous(memory_format=_format_of(input)):
        return None
    layouts, others = (layout_of(input), layout_of(output), lines), (not input.is_contiguous(), torch.get_num_threads())
    return _means_plan(*layouts, *others) if apart is None else _largest_plan(*layouts, apart, *others)


def largest(input: Tensor, lines: Lines, output: tuple[int, int], step: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest number of each window, whose elements are ``step`` apart, and its place in the plane."""
    layout, by_pixel = _format_of(input), not input.is_contiguous()
    values, places = _empty(input, output, layout), _empty(input, output, layout, torch.int64)
    search = _search_step(tuple(input.shape), by_pixel, lines, output, step, torch.get_num_threads())
    run(search, (input, values, places))
    return values, places


def scatter(grad: Tensor, places: Tensor, plane: tuple[int, int], lines: Lines, layout: torch.memory_format) -> Tensor:
    """The gradient, in that layout, of what :func:`largest` was taken of; the places suffice here, ``lines`` are for
    the twin."""
    result, by_pixel = _empty(grad, plane, layout), layout == torch.channels_last
    grad, places = grad.contiguous(memory_format=layout), places.contiguous(memory_format=layout)
    run(_scatter_step(tuple(places.shape), by_pixel, plane, torch.get_num_threads()), (places, grad, result))
    return result


def means(input: Tensor, lines: Lines, output: tuple[int, int]) -> Tensor:
    """The mean of each window."""
    result, by_pixel = _empty(input, output, _format_of(input)), not input.is_contiguous()
    run(_average_step(tuple(input.shape), by_pixel, lines, output, False, torch.get_num_threads()), (input, result))
    return result


def spread(grad: Tensor, lines: Lines, plane: tuple[int, int], layout: torch.memory_format) -> Tensor:
    """The gradient, in that layout, of what :func:`means` was taken of."""
    result, grad = _empty(grad, plane, layout), grad.contiguous(memory_format=layout)
    shape, output = tuple(result.shape), (grad.shape[-2], grad.shape[-1])
    by_pixel = layout == torch.channels_last
    run(_average_step(shape, by_pixel, lines, output, True, torch.get_num_threads()), (grad, result))
    return result
