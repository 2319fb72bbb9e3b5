"""Pooling by compiled kernels, over planes or channels that lie in memory one after the other."""

from __future__ import annotations

from array import array
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from reimpl.functional._numba_source import load, run
from reimpl.functional._pooling.windows import Windows, adaptive_bounds

_KERNELS = load(Path(__file__).with_name("numba_kernels.py"))
# Below so many numbers PyTorch's own operators are as good.
_LEAST_NUMBERS = 1 << 10
Bounds = tuple[tuple[int, int, int], ...]


def worth_it(input: Tensor) -> bool:
    """Whether the input is laid out in planes or channels_last, and there is enough of it."""
    return input.numel() >= _LEAST_NUMBERS and (
        input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last))
    )


def worth_spreading(grad: Tensor, plane: tuple[int, int]) -> bool:
    """Whether there is enough of what the gradient goes to."""
    return grad.numel() > 0 and prod(grad.shape[:-2]) * prod(plane) >= _LEAST_NUMBERS


@lru_cache(64)
def bounds(windows: Windows, plane: tuple[int, int], include_pad: bool = True, divisor: int | None = None) -> Bounds:
    """Of the windows of rows, then of those of columns: first element, the one after the last, divisor."""
    lines = []
    for i, size in enumerate(plane):
        kernel, stride, pad, dilation = windows.kernel[i], windows.stride[i], windows.padding[i], windows.dilation[i]
        for start in range(-pad, windows.output[i] * stride - pad, stride):
            # the first element that is not padding
            first, end = start if start >= 0 else start % dilation, min(start + dilation * (kernel - 1) + 1, size)
            counted = min(start + kernel, size + pad) - start if include_pad else end - first
            lines.append((first, end, counted if divisor is None else (divisor, 1)[i]))
    return tuple(lines)


@lru_cache(64)
def adaptive(output: tuple[int, int], plane: tuple[int, int]) -> Bounds:
    """:func:`bounds` of adaptive windows."""
    each = (adaptive_bounds(i, count, size) for size, count in zip(plane, output, strict=True) for i in range(count))
    return tuple((start, end, end - start) for start, end in each)


@lru_cache(64)
def _table(lines: Bounds) -> array[int]:
    return array("q", [number for line in lines for number in line])


def layout_of(input: Tensor) -> torch.memory_format:
    """Planes, or else channels_last."""
    return torch.contiguous_format if input.is_contiguous() else torch.channels_last


def _empty(
    like: Tensor, plane: tuple[int, int], layout: torch.memory_format, dtype: torch.dtype | None = None
) -> Tensor:
    shape = (*like.shape[:-2], *plane)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _shares(input: Tensor, layout: torch.memory_format) -> tuple[int, int, int, int]:
    """Tasks, number of planes or images, how many of them a task has, and channels that lie side by side."""
    channels = 1 if layout == torch.contiguous_format else input.shape[1]
    count = prod(input.shape[:-2]) // channels
    tasks = max(1, min(torch.get_num_threads(), count))
    return tasks, count, -(-count // tasks), channels


def largest(input: Tensor, lines: Bounds, output: tuple[int, int], step: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest number of each window, whose elements are ``step`` apart, and its place in the plane."""
    layout = layout_of(input)
    values, places = _empty(input, output, layout), _empty(input, output, layout, torch.int64)
    tasks, *shares = _shares(input, layout)
    pairs = step == (1, 1) and all(end - first == 2 for first, end, _ in lines)
    table = _table(lines)
    words = [
        *(*shares, *input.shape[-2:], *output, *step, table.buffer_info()[0]),
        *(input.data_ptr(), values.data_ptr(), places.data_ptr(), int(pairs)),
    ]
    run(_KERNELS.largest, words, tasks)
    return values, places


def scatter(grad: Tensor, places: Tensor, plane: tuple[int, int], lines: Bounds, layout: torch.memory_format) -> Tensor:
    """The gradient, in that layout, of what :func:`largest` was taken of; the places suffice here, ``lines`` are for
    the twin."""
    result = _empty(grad, plane, layout)
    grad, places = grad.contiguous(memory_format=layout), places.contiguous(memory_format=layout)
    tasks, *shares = _shares(places, layout)
    sizes = (shares[-1] * prod(plane), shares[-1] * prod(grad.shape[-2:]))
    run(_KERNELS.scatter, [*shares, *sizes, grad.data_ptr(), places.data_ptr(), result.data_ptr()], tasks)
    return result


def _average(whole: Tensor, means: Tensor, lines: Bounds, layout: torch.memory_format, back: bool) -> None:
    tasks, *shares = _shares(whole, layout)
    scratch, table = whole.new_empty(tasks * shares[-1]), _table(lines)
    words = [
        *(*shares, *whole.shape[-2:], *means.shape[-2:], table.buffer_info()[0]),
        *(whole.data_ptr(), means.data_ptr(), int(back), scratch.data_ptr()),
    ]
    run(_KERNELS.average, words, tasks)


def means(input: Tensor, lines: Bounds, output: tuple[int, int]) -> Tensor:
    """The mean of each window."""
    layout = layout_of(input)
    result = _empty(input, output, layout)
    _average(input, result, lines, layout, back=False)
    return result


def spread(grad: Tensor, lines: Bounds, plane: tuple[int, int], layout: torch.memory_format) -> Tensor:
    """The gradient, in that layout, of what :func:`means` was taken of."""
    result, grad = _empty(grad, plane, layout), grad.contiguous(memory_format=layout)
    _average(result, grad, lines, layout, back=True)
    return result
