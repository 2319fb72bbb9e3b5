"""Maximum pooling as Numba compiles it: a plane, or an image of channels_last layout, at a time, among the threads.

Addresses and sizes come in a table of 64-bit words, written in :mod:`reimpl.functional._pooling.numba`. The windows of
rows, and then those of columns, are listed as first element, the one after the last, and divisor.

In planes a number and its place are one integer, the key: of several, the largest is that of the largest number, of
equal ones the first, and of NaN the last. So windows can be put together of parts in any order, from parts that
overlap: those of 13 x 13 of pairs of rows, of these pairs four rows, and so on, then the same for columns.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.optim._numba_ops import floats, ints, longs, pointer, take

_ZERO, _LOWEST = np.float32(0.0), np.float32(-np.inf)
# Of the bits of a number: all but the sign, those of infinity, and what comes after these.
_MAGNITUDE, _INFINITE, _UNORDERED = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x7FFFFFFF)
_LEAST_CODE, _LEAST_KEY = np.int32(-(2**31)), np.int64(-(2**63))


@njit(error_model="numpy")
def better(x: Any, best: Any) -> Any:
    """Whether x takes the place of the best so far; NaN, unequal to itself, always does."""
    return (x > best) | (x != x)


@njit(inline="always")
def rank(bits: Any) -> Any:
    """An integer that grows as the numbers with such bits do; NaN is the largest, and zeros are equal."""
    magnitude = np.int32(bits & _MAGNITUDE)
    order = np.int32(bits ^ (np.int32(bits >> 31) & _MAGNITUDE))
    order = np.int32(0) if magnitude == 0 else order
    return _UNORDERED if magnitude > _INFINITE else order


@njit(inline="always")
def code_of(order: Any, place: Any) -> Any:
    """An integer that is larger for the earlier of two places, or of NaN for the later one."""
    return np.int32(place) if order == _UNORDERED else np.int32(~place)


@njit(inline="always")
def key_of(bits: Any, place: Any) -> Any:
    order = rank(bits)
    return (np.int64(order) << 32) | (np.int64(code_of(order, place)) & np.int64(0xFFFFFFFF))


@njit(inline="always")
def place_of(code: Any) -> Any:
    return np.int64(code ^ np.int32(code >> 31))


@njit(error_model="numpy")
def to_keys(source: Any, target: Any, count: Any, place: Any) -> None:
    """The keys of numbers that lie at an address, the first of them at such a place of its plane."""
    bits, keys = ints(source, count), longs(target, count)
    for k in range(count):
        keys[k] = key_of(bits[k], np.int32(place + k))


@njit(error_model="numpy")
def put_least(target: Any, count: Any) -> None:
    keys = longs(target, count)
    for k in range(count):
        keys[k] = _LEAST_KEY


@njit(error_model="numpy")
def move(source: Any, target: Any, count: Any) -> None:
    a, b = longs(source, count), longs(target, count)
    for k in range(count):
        b[k] = a[k]


@njit(error_model="numpy")
def put_larger(first: Any, second: Any, target: Any, count: Any) -> None:
    a, b, c = longs(first, count), longs(second, count), longs(target, count)
    for k in range(count):
        c[k] = max(a[k], b[k])


@njit(error_model="numpy")
def largest_of_taps(source: Any, here: Any, there: Any, count: Any, taps: Any, step: Any) -> Any:
    """The address of keys, the largest of ``taps`` that are ``step`` apart, from each that has so many after it; the
    next two addresses are room."""
    span = 1
    while span < taps:
        more = min(span, taps - span)
        count -= more * step
        put_larger(source, source + 8 * more * step, here, count)
        source, here, there = here, there, here
        span += more
    return source


@njit(error_model="numpy")
def put_result(x: Any, source: Any, step: Any, y: Any, places: Any, count: Any) -> None:
    """Numbers and places of every so many keys."""
    keys, values, found = longs(source, count * step), floats(y, count), longs(places, count)
    numbers = floats(x, 1)
    for c in range(count):
        place = place_of(np.int32(keys[np.uint64(c * step)]))
        found[c] = place
        values[c] = numbers[np.uint64(place)]


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def largest_of_overlapping(task: Any) -> None:
    """The largest number of each window of planes and its place, from keys of all rows that some windows need."""
    w = carray(task, (22,), np.int64)
    counter, count, block, height, width, n_rows, n_columns = w[0], w[1], w[2], w[3], w[4], w[5], w[6]
    k_h, k_w, s_h, s_w, p_h, p_w, d_h, d_w = w[7], w[8], w[9], w[10], w[11], w[12], w[13], w[14]
    strip, padded, size, scratch, x, y, places = w[15], w[16], w[17], w[18], w[19], w[20], w[21]
    while True:
        turn = take(counter)
        if turn * block >= count:
            return
        keys = scratch + 24 * turn * size
        here, lines = keys + 8 * size, keys + 16 * size
        put_least(lines, strip * padded)
        for n in range(turn * block, min(count, (turn + 1) * block)):
            plane, at = x + 4 * n * height * width, n * n_rows * n_columns
            for i in range(0, n_rows, strip):
                rows, top = min(strip, n_rows - i), i * s_h - p_h
                needed = (rows - 1) * s_h + (k_h - 1) * d_h + 1
                above, inside = max(0, -top), min(top + needed, height) - max(0, top)
                put_least(keys, above * width)
                start = max(0, top) * width
                to_keys(plane + 4 * start, keys + 8 * above * width, inside * width, start)
                put_least(keys + 8 * (above + inside) * width, (needed - above - inside) * width)
                found = largest_of_taps(keys, here, keys, needed * width, k_h, d_h * width)
                for r in range(rows):
                    move(found + 8 * r * s_h * width, lines + 8 * (r * padded + p_w), width)
                found = largest_of_taps(lines, here, keys, rows * padded, k_w, d_w)
                for r in range(rows):
                    first = at + (i + r) * n_columns
                    put_result(plane, found + 8 * r * padded, s_w, y + 4 * first, places + 8 * first, n_columns)


@njit(error_model="numpy")
def largest_of_whole(x: Any, size: Any) -> Any:
    """The place of the largest of so many numbers."""
    bits = ints(x, size)
    top, best = _LEAST_CODE, _LEAST_CODE
    for k in range(size):
        top = max(top, rank(bits[k]))
    for k in range(size):
        best = max(best, code_of(top, np.int32(k)) if rank(bits[k]) == top else _LEAST_CODE)
    return place_of(best)


@njit(error_model="numpy")
def keep_better(x: Any, best: Any, starts: Any, count: Any, start: Any) -> None:
    """Of a row of numbers, those that are better than the best of the rows above, and where it starts."""
    values, highest, found = floats(x, count), floats(best, count), ints(starts, count)
    for k in range(count):
        wins = better(values[k], highest[k])
        highest[k] = values[k] if wins else highest[k]
        found[k] = start if wins else found[k]


@njit(error_model="numpy")
def begin_row(x: Any, best: Any, starts: Any, count: Any, start: Any) -> None:
    values, highest, found = floats(x, count), floats(best, count), ints(starts, count)
    for k in range(count):
        highest[k], found[k] = values[k], start


@njit(error_model="numpy")
def to_keys_of_columns(best: Any, starts: Any, keys: Any, count: Any) -> None:
    bits, found, target = ints(best, count), ints(starts, count), longs(keys, count)
    for k in range(count):
        target[k] = key_of(bits[k], np.int32(found[k] + k))


@njit(error_model="numpy")
def largest_key(keys: Any, first: Any, end: Any, step: Any) -> Any:
    most = keys[first]
    for k in range(first + step, end, step):
        most = max(most, keys[k])
    return most


@njit(error_model="numpy")
def largest_of_plane(
    x: Any, y: Any, places: Any, rows: Any, columns: Any, width: Any, down: Any, right: Any, room: Any
) -> None:
    """Row by row the best number of each column, then of these each window's; with room for three rows of keys."""
    best, starts, found = room, room + 8 * width, longs(room + 16 * width, width)
    numbers, values, where = floats(x, 1), floats(y, len(rows) * len(columns)), longs(places, len(rows) * len(columns))
    at = 0
    for i in range(len(rows)):
        first = rows[i, 0] * width
        begin_row(x + 4 * first, best, starts, width, np.int32(first))
        for h in range(rows[i, 0] + down, rows[i, 1], down):
            keep_better(x + 4 * h * width, best, starts, width, np.int32(h * width))
        to_keys_of_columns(best, starts, room + 16 * width, width)
        for j in range(len(columns)):
            place = place_of(np.int32(largest_key(found, columns[j, 0], columns[j, 1], right)))
            where[at] = place
            values[at] = numbers[np.uint64(place)]
            at += 1


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def largest_of_planes(task: Any) -> None:
    """The largest number of each window of planes and its place: whole planes, or windows one by one."""
    w = carray(task, (15,), np.int64)
    counter, count, block, height, width, n_rows, n_columns = w[0], w[1], w[2], w[3], w[4], w[5], w[6]
    down, right, whole, scratch = w[7], w[8], w[10], w[11]
    windows = carray(pointer(w[9]), (n_rows + n_columns, 3), np.int64)
    rows, columns = windows[:n_rows], windows[n_rows:]
    size, outputs = height * width, n_rows * n_columns
    while True:
        turn = take(counter)
        if turn * block >= count:
            return
        for n in range(turn * block, min(count, (turn + 1) * block)):
            x, y, places = w[12] + 4 * n * size, w[13] + 4 * n * outputs, w[14] + 8 * n * outputs
            if whole:
                place = largest_of_whole(x, size)
                longs(places, 1)[0] = place
                floats(y, 1)[0] = floats(x, size)[place]
            else:
                room = scratch + 24 * turn * width
                largest_of_plane(x, y, places, rows, columns, width, down, right, room)


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
def largest_of_pixels(task: Any) -> None:
    """The largest number of each window and its place, of images whose channels lie side by side."""
    w = carray(task, (15,), np.int64)
    counter, count, block, channels, height, width = w[0], w[1], w[2], w[3], w[4], w[5]
    n_rows, n_columns, down, right, pairs = w[6], w[7], w[8], w[9], w[11]
    windows = carray(pointer(w[10]), (n_rows + n_columns, 3), np.int64)
    rows, columns = windows[:n_rows], windows[n_rows:]
    size, outputs = channels * height * width, channels * n_rows * n_columns
    while True:
        first = take(counter) * block
        if first >= count:
            return
        for n in range(first, min(count, first + block)):
            x, y, places = w[12] + 4 * n * size, w[13] + 4 * n * outputs, w[14] + 8 * n * outputs
            if pairs:
                largest_of_image_pairs(x, y, places, rows, columns, width, channels)
            else:
                largest_of_image(x, y, places, rows, columns, width, down, right, channels)


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
            for k in range(size):
                d[k] = _ZERO
            if channels == 1:
                for k in range(outputs):
                    d[places[k]] += g[k]
            else:
                for start in range(0, outputs, channels):
                    for c in range(channels):
                        d[places[start + c] * channels + c] += g[start + c]
