"""Average pooling as Numba compiles it: a plane, or an image of channels_last layout, at a time, among the threads.

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._pooling.numba`. The windows of
rows, and then those of columns, are listed as first element, the one after the last, and divisor.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.optim._numba_ops import floats, pointer, take

_ZERO = np.float32(0.0)
_LANES = {"reassoc", "nsz"}
# A row of so many numbers has a sum of its own, since digits go lost where all of a large window are added one by one.
_LONG_ROW = 16


@njit(error_model="numpy")
def clear(d: Any) -> None:
    for i in range(len(d)):
        d[i] = _ZERO


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
def sum_between(x: Any, first: Any, end: Any) -> Any:
    total = _ZERO
    for k in range(first, end):
        total += x[k]
    return total


@njit(error_model="numpy")
def means_of_plane(x: Any, y: Any, rows: Any, columns: Any, width: Any, sums: Any) -> None:
    """Of each row of windows the sums of columns, and of these the windows' own; x is an address."""
    at = 0
    for i in range(len(rows)):
        clear(sums)
        for h in range(rows[i, 0], rows[i, 1]):
            add(floats(x + 4 * h * width, width), sums)
        for j in range(len(columns)):
            total = sum_between(sums, columns[j, 0], columns[j, 1])
            y[at] = total / np.float32(rows[i, 2] * columns[j, 2])
            at += 1


@njit(error_model="numpy")
def means_of_image(x: Any, y: Any, rows: Any, columns: Any, width: Any, channels: Any, sums: Any) -> None:
    """Of channels side by side, at addresses: the sums of rows, where these are long, and of these the window's."""
    for i in range(len(rows)):
        for j in range(len(columns)):
            mean, by_row = floats(y, channels), columns[j, 1] - columns[j, 0] >= _LONG_ROW
            clear(mean)
            row = sums if by_row else mean
            for h in range(rows[i, 0], rows[i, 1]):
                if by_row:
                    clear(sums)
                for k in range(h * width + columns[j, 0], h * width + columns[j, 1]):
                    add(floats(x + 4 * k * channels, channels), row)
                if by_row:
                    add(sums, mean)
            divisor = np.float32(rows[i, 2] * columns[j, 2])
            for c in range(channels):
                mean[c] /= divisor
            y += 4 * channels


@njit(error_model="numpy")
def spread_over_plane(g: Any, d: Any, rows: Any, columns: Any, width: Any, shares: Any) -> None:
    """The reverse of :func:`means_of_plane`; d is an address."""
    at = 0
    for i in range(len(rows)):
        clear(shares)
        for j in range(len(columns)):
            share = g[at] / np.float32(rows[i, 2] * columns[j, 2])
            for k in range(columns[j, 0], columns[j, 1]):
                shares[k] += share
            at += 1
        for h in range(rows[i, 0], rows[i, 1]):
            add(shares, floats(d + 4 * h * width, width))


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
        lane = channels if channels > 1 else width
        share = floats(scratch + 4 * turn * lane, lane)
        for n in range(first, min(count, first + block)):
            at_x, at_y = w[9] + 4 * n * size, w[10] + 4 * n * outputs
            x, y = floats(at_x, size), floats(at_y, outputs)
            if back:
                clear(x)
            if channels > 1 and back:
                spread_over_image(at_y, at_x, rows, columns, width, channels, share)
            elif channels > 1:
                means_of_image(at_x, at_y, rows, columns, width, channels, share)
            elif back:
                spread_over_plane(y, at_x, rows, columns, width, share)
            else:
                means_of_plane(at_x, y, rows, columns, width, share)
