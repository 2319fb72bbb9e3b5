"""Pooling in NumPy alone: the windows of the padded planes side by side, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parity_tests.oracle.functional import Array, Result

Size = int | Sequence[int]
Spread = Callable[[Array], Array]


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _planes(input: Array) -> Array:
    """Planes one after the other."""
    return input.reshape(int(np.prod(input.shape[:-2])), *input.shape[-2:])


def _windows(
    input: Array, kernel_size: Size, stride: Size | None, padding: Size, dilation: Size, ceil_mode: bool, fill: float
) -> tuple[Array, Array, Spread]:
    """Windows of shape (planes, rows, columns, taps), the places of their taps in the plane (-1 in the padding), and
    the map that adds numbers of that shape back into planes."""
    kernel, pads, d = _pair(kernel_size), _pair(padding), _pair(dilation)
    s = kernel if stride is None or stride == () else _pair(stride)
    planes = _planes(input)
    lines = []
    for size, k, step, pad, dil in zip(planes.shape[1:], kernel, s, pads, d, strict=True):
        room = size + 2 * pad - dil * (k - 1) - 1
        count = (-(-room // step) if ceil_mode else room // step) + 1
        count -= ceil_mode and (count - 1) * step >= size + pad
        places = np.arange(count)[:, None] * step - pad + np.arange(k) * dil
        lines.append(np.where((places >= 0) & (places < size), places, -1))
    rows, columns = lines
    inside = (rows >= 0)[:, None, :, None] & (columns >= 0)[None, :, None, :]
    places = np.where(inside, rows[:, None, :, None] * planes.shape[2] + columns[None, :, None, :], -1)
    places = places.reshape(*places.shape[:2], -1)
    flat = planes.reshape(len(planes), planes.shape[1] * planes.shape[2])
    windows = np.where(places >= 0, flat[:, np.maximum(places, 0)], np.asarray(fill, input.dtype))

    def spread(values: Array) -> Array:
        total = np.zeros((len(flat), flat.shape[1] + 1), values.dtype)  # the padding's share in the last column
        np.add.at(total, (np.arange(len(flat))[:, None, None, None], places[None]), values)
        return total[:, :-1].reshape(input.shape)

    return windows, places, spread


def max_pool2d(
    input: Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Result:
    """The first largest element of each window; its place gets the gradient."""
    windows, _, spread = _windows(input, kernel_size, stride, padding, dilation, ceil_mode, -np.inf)
    best = windows.argmax(-1)[..., None]
    output = np.take_along_axis(windows, best, -1)[..., 0]

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        chosen = np.zeros_like(windows)
        np.put_along_axis(chosen, best, grad.reshape(*output.shape, 1), -1)
        return (spread(chosen),)

    return output.reshape(*input.shape[:-2], *output.shape[1:]), vjp


def max_pool2d_magnitude(input: Array, *args: Any, **kwargs: Any) -> Result:
    """The maximum is copied, not computed; the gradients that meet in an element are added."""
    output, vjp = max_pool2d(input, *args, **kwargs)
    return np.abs(output), lambda grad: vjp(np.abs(grad))


def avg_pool2d(
    input: Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Result:
    """The sum over each window, over how many of its elements lie inside the plane (or the padded plane)."""
    windows, places, spread = _windows(input, kernel_size, stride, padding, 1, ceil_mode, 0.0)
    counts = (places >= 0).sum(-1)
    if count_include_pad:
        # A plane that the padding belongs to; what a window of ceil_mode reaches beyond it does not count.
        pads = _pair(padding)
        padded = np.pad(np.zeros((1, *input.shape[-2:])), ((0, 0), (pads[0],) * 2, (pads[1],) * 2))
        s = _pair(kernel_size) if stride is None or stride == () else _pair(stride)
        counts = _members(padded.shape[1:], _pair(kernel_size), s, counts.shape)
    divisor = np.asarray(counts if divisor_override is None else divisor_override, input.dtype)
    output = windows.sum(-1) / divisor

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        share = grad.reshape(output.shape) / divisor
        return (spread(np.broadcast_to(share[..., None], windows.shape)),)

    return output.reshape(*input.shape[:-2], *output.shape[1:]), vjp


def _members(plane: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """How many elements of a plane without padding each window holds."""
    lines = [
        [sum(i * s + k < size for k in range(length)) for i in range(count)]
        for size, length, s, count in zip(plane, kernel, stride, shape, strict=True)
    ]
    return np.outer(lines[0], lines[1])


def _line(pool: Callable[..., Result]) -> Callable[..., Result]:
    """The pooling of lines as that of planes with one row."""

    def pooled(input: Array, kernel_size: Size, stride: Size | None = None, padding: Size = 0, *rest: Any) -> Result:
        kernel, pad = _pair(kernel_size)[0], _pair(padding)[0]
        step = kernel if stride is None or stride == () else _pair(stride)[0]
        output, vjp = pool(input[..., None, :], (1, kernel), (1, step), (0, pad), *rest)
        return output[..., 0, :], lambda grad: (vjp(grad[..., None, :])[0].reshape(input.shape),)  # type: ignore[union-attr]

    return pooled


def max_pool1d(
    input: Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
) -> Result:
    """A plane of one row."""
    return _line(max_pool2d)(input, kernel_size, stride, padding, (1, _pair(dilation)[0]), ceil_mode)


def max_pool1d_magnitude(input: Array, *args: Any, **kwargs: Any) -> Result:
    """As for planes."""
    output, vjp = max_pool1d(input, *args, **kwargs)
    return np.abs(output), lambda grad: vjp(np.abs(grad))


def avg_pool1d(
    input: Array,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Result:
    """A plane of one row."""
    return _line(avg_pool2d)(input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def _grid(plane: tuple[int, ...], output_size: Any) -> list[list[tuple[int, int]]]:
    """Bounds of the adaptive windows along both dimensions."""
    wanted = (output_size, output_size) if output_size is None or isinstance(output_size, int) else output_size
    lines = []
    for length, size in zip(plane, wanted, strict=True):
        count = length if size is None else size
        lines.append(
            [(int(np.floor(i * length / count)), int(np.ceil((i + 1) * length / count))) for i in range(count)]
        )
    return lines


def adaptive_max_pool2d(input: Array, output_size: Any) -> Result:
    """Window after window, the first largest element."""
    rows, columns = _grid(input.shape[-2:], output_size)
    planes = _planes(input)
    output = np.empty((len(planes), len(rows), len(columns)), input.dtype)
    winners = np.empty((*output.shape, 2), int)
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            window = planes[:, top:bottom, left:right].reshape(len(planes), -1)
            best = window.argmax(1)
            output[:, i, j] = window[np.arange(len(planes)), best]
            winners[:, i, j, 0], winners[:, i, j, 1] = top + best // (right - left), left + best % (right - left)

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        spread = np.zeros_like(planes)
        plane = np.arange(len(planes))[:, None, None]
        np.add.at(spread, (plane, winners[..., 0], winners[..., 1]), grad.reshape(output.shape))
        return (spread.reshape(input.shape),)

    return output.reshape(*input.shape[:-2], *output.shape[1:]), vjp


def adaptive_max_pool2d_magnitude(input: Array, output_size: Any) -> Result:
    """As for other windows."""
    output, vjp = adaptive_max_pool2d(input, output_size)
    return np.abs(output), lambda grad: vjp(np.abs(grad))


def _averaging(bounds: list[tuple[int, int]], length: int, dtype: np.dtype[Any]) -> Array:
    """The matrix (windows, length) that takes means over the windows."""
    matrix = np.zeros((len(bounds), length), dtype)
    for i, (start, end) in enumerate(bounds):
        matrix[i, start:end] = dtype.type(1) / (end - start)
    return matrix


def adaptive_avg_pool2d(input: Array, output_size: Any) -> Result:
    """Rows and columns averaged by one matrix each: Y = A X Bᵀ."""
    plane = input.shape[-2:]
    left, right = (
        _averaging(line, length, input.dtype) for line, length in zip(_grid(plane, output_size), plane, strict=True)
    )
    output = np.einsum("ih,...hw,jw->...ij", left, input, right)
    return output, lambda grad: (np.einsum("ih,...ij,jw->...hw", left, grad, right),)


def adaptive_avg_pool1d(input: Array, output_size: Size) -> Result:
    """A plane of one row."""
    output, vjp = adaptive_avg_pool2d(input[..., None, :], (1, _pair(output_size)[0]))
    return output[..., 0, :], lambda grad: (vjp(grad[..., None, :])[0].reshape(input.shape),)  # type: ignore[union-attr]
