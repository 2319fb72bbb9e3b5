"""Pooling as Numba compiles it: a plane, or an image of channels_last layout, at a time, shared among the threads.

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._pooling.numba`. The windows of
rows, and then those of columns, are listed as first element, the one after the last, and divisor.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.optim._numba_ops import pointer, take

_ZERO, _LOWEST = np.float32(0.0), np.float32(-np.inf)
_LANES = {"reassoc", "nsz"}


@njit(inline="always")
def floats(address: Any, n: Any) -> Any:
    return carray(pointer(address), (n,), np.float32)


@njit(inline="always")
def longs(address: Any, n: Any) -> Any:
    return carray(pointer(address), (n,), np.int64)


@njit(error_model="numpy")
def better(x: Any, best: Any) -> Any:
    """Whether x takes the place of the best so far; NaN, unequal to itself, always does."""
    return (x > best) | (x != x)


@njit(error_model="numpy")
def largest_of_plane(x: Any, y: Any, places: Any, rows: Any, columns: Any, width: Any, down: Any, right: Any) -> None:
    at = 0
    for i in range(len(rows)):
        for j in range(len(columns)):
            best, place = _LOWEST, rows[i, 0] * width + columns[j, 0]
            for h in range(rows[i, 0], rows[i, 1], down):
                for k in range(h * width + columns[j, 0], h * width + columns[j, 1], right):
                    wins = better(x[k], best)
                    best, place = x[k] if wins else best, k if wins else place
            y[at], places[at] = best, place
            at += 1


@njit(error_model="numpy")
def largest_of_pairs(x: Any, y: Any, places: Any, rows: Any, columns: Any, width: Any) -> None:
    """:func:`largest_of_plane` for windows of 2 x 2, side by side."""
    at = 0
    for i in range(len(rows)):
        for j in range(len(columns)):
            place = rows[i, 0] * width + columns[j, 0]
            best = x[place]
            for k in (place + 1, place + width, place + width + 1):
                wins = better(x[k], best)
                best, place = x[k] if wins else best, k if wins else place
            y[at], places[at] = best, place
            at += 1


@njit(error_model="numpy")
def better_channels(x: Any, y: Any, places: Any, place: Any) -> None:
    for c in range(len(y)):
        wins = better(x[c], y[c])
        y[c], places[c] = x[c] if wins else y[c], place if wins else places[c]


@njit(error_model="numpy")
def largest_of_image(
    x: Any, y: Any, places: Any, rows: Any, columns: Any, width: Any, down: Any, right: Any, channels: Any
) -> None:
    """Of channels side by side; the first three are addresses, since slices would take as long as the work."""
    for i in range(len(rows)):
        for j in range(len(columns)):
            best, where = floats(y, channels), longs(places, channels)
            first = rows[i, 0] * width + columns[j, 0]
            for c in range(channels):
                best[c], where[c] = _LOWEST, first
            for h in range(rows[i, 0], rows[i, 1], down):
                for k in range(h * width + columns[j, 0], h * width + columns[j, 1], right):
                    better_channels(floats(x + 4 * k * channels, channels), best, where, k)
            y += 4 * channels
            places += 8 * channels


@njit(error_model="numpy")
def best_of_four(a: Any, b: Any, c: Any, d: Any, y: Any, places: Any, first: Any, width: Any) -> None:
    """The largest of the channels of four neighbours; a loop over these would keep the other from whole registers."""
    for i in range(len(y)):
        best, place = a[i], first
        wins = better(b[i], best)
        best, place = b[i] if wins else best, first + 1 if wins else place
        wins = better(c[i], best)
        best, place = c[i] if wins else best, first + width if wins else place
        wins = better(d[i], best)
        y[i], places[i] = d[i] if wins else best, first + width + 1 if wins else place


@njit(error_model="numpy")
def largest_of_image_pairs(x: Any, y: Any, places: Any, rows: Any, columns: Any, width: Any, channels: Any) -> None:
    """:func:`largest_of_image` for windows of 2 x 2."""
    pixel = 4 * channels
    for i in range(len(rows)):
        for j in range(len(columns)):
            first = rows[i, 0] * width + columns[j, 0]
            up, down = x + pixel * first, x + pixel * (first + width)
            a, b = floats(up, channels), floats(up + pixel, channels)
            c, d = floats(down, channels), floats(down + pixel, channels)
            best_of_four(a, b, c, d, floats(y, channels), longs(places, channels), first, width)
            y += pixel
            places += 8 * channels


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def largest(task: Any) -> None:
    """The largest number of each window and its place."""
    w = carray(task, (15,), np.int64)
    counter, count, block, channels, height, width = w[0], w[1], w[2], w[3], w[4], w[5]
    n_rows, n_columns, down, right, pairs = w[6], w[7], w[8], w[9], w[14]
    windows = carray(pointer(w[10]), (n_rows + n_columns, 3), np.int64)
    rows, columns = windows[:n_rows], windows[n_rows:]
    size, outputs = channels * height * width, channels * n_rows * n_columns
    while True:
        first = take(counter) * block
        if first >= count:
            return
        for n in range(first, min(count, first + block)):
            at_x, at_y, at_places = w[11] + 4 * n * size, w[12] + 4 * n * outputs, w[13] + 8 * n * outputs
            x, y, places = floats(at_x, size), floats(at_y, outputs), longs(at_places, outputs)
            if channels > 1 and pairs:
                largest_of_image_pairs(at_x, at_y, at_places, rows, columns, width, channels)
            elif channels > 1:
                largest_of_image(at_x, at_y, at_places, rows, columns, width, down, right, channels)
            elif pairs:
                largest_of_pairs(x, y, places, rows, columns, width)
            else:
                largest_of_plane(x, y, places, rows, columns, width, down, right)


@njit(error_model="numpy")
def clear(d: Any) -> None:
    for i in range(len(d)):
        d[i] = _ZERO


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def scatter(task: Any) -> None:
    """Each gradient added where the largest number of its window stood."""
    w = carray(task, (9,), np.int64)
    counter, count, block, channels, size, outputs = w[0], w[1], w[2], w[3], w[4], w[5]
    while True:
        first = take(counter) * block
        if first >= count:
            return
        for n in range(first, min(count, first + block)):
            g, places = floats(w[6] + 4 * n * outputs, outputs), longs(w[7] + 8 * n * outputs, outputs)
            d = floats(w[8] + 4 * n * size, size)
            clear(d)
            if channels == 1:
                for k in range(outputs):
                    d[places[k]] += g[k]
            else:
                for start in range(0, outputs, channels):
                    for c in range(channels):
                        d[places[start + c] * channels + c] += g[start + c]


@njit(error_model="numpy", fastmath=_LANES)
def row_sum(x: Any) -> Any:
    total = _ZERO
    for k in range(len(x)):
        total += x[k]
    return total


@njit(error_model="numpy")
def fill(d: Any, value: Any) -> None:
    for k in range(len(d)):
        d[k] = value


@njit(error_model="numpy", fastmath=_LANES)
def means_of_whole(x: Any, y: Any, size: Any, divisor: Any) -> None:
    """Planes whose only window is all of them; in small ones few sums at a time, which wait less for each other."""
    for n in range(len(y)):
        plane = x[n * size : (n + 1) * size]
        if size >= 64:
            y[n] = row_sum(plane) / divisor
            continue
        a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
        for k in range(size // 4):
            a += plane[4 * k]
            b += plane[4 * k + 1]
            c += plane[4 * k + 2]
            d += plane[4 * k + 3]
        for k in range(size // 4 * 4, size):
            a += plane[k]
        y[n] = ((a + b) + (c + d)) / divisor


@njit(error_model="numpy")
def spread_over_whole(g: Any, d: Any, size: Any, divisor: Any) -> None:
    for n in range(len(g)):
        fill(d[n * size : (n + 1) * size], g[n] / divisor)


@njit(error_model="numpy")
def add(x: Any, y: Any) -> None:
    for c in range(len(y)):
        y[c] += x[c]


@njit(error_model="numpy")
def means_of_plane(x: Any, y: Any, rows: Any, columns: Any, width: Any) -> None:
    at = 0
    for i in range(len(rows)):
        for j in range(len(columns)):
            total = _ZERO
            if columns[j, 1] - columns[j, 0] == width:
                total = row_sum(x[rows[i, 0] * width : rows[i, 1] * width])
            else:
                for h in range(rows[i, 0], rows[i, 1]):
                    for k in range(h * width + columns[j, 0], h * width + columns[j, 1]):
                        total += x[k]
            y[at] = total / np.float32(rows[i, 2] * columns[j, 2])
            at += 1


@njit(error_model="numpy")
def means_of_image(x: Any, y: Any, rows: Any, columns: Any, width: Any, channels: Any) -> None:
    """Of channels side by side, at addresses."""
    for i in range(len(rows)):
        for j in range(len(columns)):
            mean = floats(y, channels)
            clear(mean)
            for h in range(rows[i, 0], rows[i, 1]):
                for k in range(h * width + columns[j, 0], h * width + columns[j, 1]):
                    add(floats(x + 4 * k * channels, channels), mean)
            divisor = np.float32(rows[i, 2] * columns[j, 2])
            for c in range(channels):
                mean[c] /= divisor
            y += 4 * channels


@njit(error_model="numpy")
def spread_over_plane(g: Any, d: Any, rows: Any, columns: Any, width: Any) -> None:
    clear(d)
    at = 0
    for i in range(len(rows)):
        for j in range(len(columns)):
            share = g[at] / np.float32(rows[i, 2] * columns[j, 2])
            for h in range(rows[i, 0], rows[i, 1]):
                for k in range(h * width + columns[j, 0], h * width + columns[j, 1]):
                    d[k] += share
            at += 1


@njit(error_model="numpy")
def spread_over_image(g: Any, d: Any, rows: Any, columns: Any, width: Any, channels: Any, share: Any) -> None:
    """Over channels side by side; the first two are addresses."""
    for i in range(len(rows)):
        for j in range(len(columns)):
            divisor, errors = np.float32(rows[i, 2] * columns[j, 2]), floats(g, channels)
            for c in range(channels):
                share[c] = errors[c] / divisor
            for h in range(rows[i, 0], rows[i, 1]):
                for k in range(h * width + columns[j, 0], h * width + columns[j, 1]):
                    add(share, floats(d + 4 * k * channels, channels))
            g += 4 * channels


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def average(task: Any) -> None:
    """The mean of each window, or with the last word set the gradient of all that it is the mean of."""
    w = carray(task, (13,), np.int64)
    counter, count, block, channels, height, width = w[0], w[1], w[2], w[3], w[4], w[5]
    n_rows, n_columns, back, scratch = w[6], w[7], w[11], w[12]
    windows = carray(pointer(w[8]), (n_rows + n_columns, 3), np.int64)
    rows, columns = windows[:n_rows], windows[n_rows:]
    size, outputs = channels * height * width, channels * n_rows * n_columns
    whole = outputs == 1 and (rows[0, 1] - rows[0, 0]) * (columns[0, 1] - columns[0, 0]) == size
    while True:
        turn = take(counter)
        first = turn * block
        if first >= count:
            return
        if whole:
            planes, divisor = min(count - first, block), np.float32(rows[0, 2] * columns[0, 2])
            x, y = floats(w[9] + 4 * first * size, planes * size), floats(w[10] + 4 * first, planes)
            if back:
                spread_over_whole(y, x, size, divisor)
            else:
                means_of_whole(x, y, size, divisor)
            continue
        share = floats(scratch + 4 * turn * channels, channels)
        for n in range(first, min(count, first + block)):
            at_x, at_y = w[9] + 4 * n * size, w[10] + 4 * n * outputs
            x, y = floats(at_x, size), floats(at_y, outputs)
            if channels > 1 and back:
                clear(x)
                spread_over_image(at_y, at_x, rows, columns, width, channels, share)
            elif channels > 1:
                means_of_image(at_x, at_y, rows, columns, width, channels)
            elif back:
                spread_over_plane(y, x, rows, columns, width)
            else:
                means_of_plane(x, y, rows, columns, width)
