"""Bands of rows, by which large images are convolved: the windows of one would take many times its own memory.

A band is a convolution of some rows of one image, with a padding of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from reimpl.functional._conv.arguments import Geometry

# Measured: bytes of the windows and values of a band. Images of up to twice as many are as quick whole.
_BYTES = 12 << 20


class Band(NamedTuple):
    """Of one image rows of the input, rows of the output, and the convolution that has the one for the other."""

    image: slice
    input: slice
    output: slice
    geometry: Geometry


def of_output(count: int, rows: int, row_bytes: int, size: int, taps: int, geometry: Geometry) -> list[Band]:
    """Bands of an output of so many rows, whose windows take so many bytes each, with the rows of the input of ``size``
    rows that a kernel of ``taps`` rows sees for them; none where it is best left whole."""
    stride, top, reach, found = geometry.stride[0], geometry.padding[0], _reach(taps, geometry), []
    for part in _evenly(rows, row_bytes):
        first, end = part.start * stride - top, (part.stop - 1) * stride - top + reach
        start = min(max(first, 0), size - 1)
        stop = max(min(end, size), start + 1)
        found.append((slice(start, stop), part, _padded(geometry, start - first, end - stop)))
    return list(_of_each(count, found))


def of_input(count: int, rows: int, row_bytes: int, errors: int, taps: int, geometry: Geometry) -> list[Band]:
    """The same of an input, with the rows of an output's gradient of ``errors`` rows that the kernel spreads there."""
    stride, top, reach, found = geometry.stride[0], geometry.padding[0], _reach(taps, geometry), []
    for part in _evenly(rows, row_bytes):
        start = min(max(-((reach - 1 - top - part.start) // stride), 0), errors - 1)
        stop = max(min((part.stop - 1 + top) // stride + 1, errors), start + 1)
        before = top + part.start - start * stride
        after = (stop - start - 1) * stride + reach - (part.stop - part.start) - before
        found.append((part, slice(start, stop), _padded(geometry, before, after)))
    return list(_of_each(count, found))


def _reach(taps: int, geometry: Geometry) -> int:
    return (taps - 1) * geometry.dilation[0] + 1


def _padded(geometry: Geometry, top: int, bottom: int) -> Geometry:
    return replace(geometry, padding=(top, bottom, *geometry.padding[2:]))


def _evenly(rows: int, row_bytes: int) -> Iterator[slice]:
    if row_bytes * rows <= 2 * _BYTES or rows == 1:
        return
    number = min(rows, -(-row_bytes * rows // _BYTES))
    for k in range(number):
        yield slice(rows * k // number, rows * (k + 1) // number)


def _of_each(count: int, found: list[tuple[slice, slice, Geometry]]) -> Iterator[Band]:
    for image in range(count):
        for input, output, geometry in found:
            yield Band(slice(image, image + 1), input, output, geometry)
