"""Where each pixel, tap and tile of a convolution lies in the buffers of the compiled kernels, as tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from reimpl.functional._conv.arguments import Geometry, phases
from reimpl.functional._numba_tiles import LANES, NARROW_ROWS, ROWS, WIDTH

# Terms summed up in registers before they are added to the result: the error of a longer sum grows with their number,
# and PyTorch's convolutions sum 192.
TERMS = 192
# Measured: pixels summed up before the next tile; and for kernels of one tap, where PyTorch sums about as many.
_PIXELS_PER_CHUNK, _PIXELS_OF_ONE_TAP = 1024, 128
# A row of fewer pixels makes runs so short that their bookkeeping shows.
SHORT_ROW = 16
# The buffers of one task are to stay in a core's second-level cache; its numbers of images divide most batches.
_TASK_BYTES, _IMAGES = 768 << 10, (1, 2, 4, 8, 16)

Array = Any


@dataclass(frozen=True)
class Image:
    """A buffer with room for padding and the channels of a pixel together; in pixels.

    ``places`` says where each pixel of the image goes, ``width`` how many a row of the buffer has.
    """

    places: Array
    pixels: int
    width: int

    @property
    def dense(self) -> bool:
        """Whether the buffer is the image, with nothing around it."""
        return bool(self.pixels == len(self.places))


@dataclass(frozen=True)
class Tiles:
    """Tiles of pixels with the same taps, for ``size`` images at a time.

    ``places`` puts the pixels of an image into the buffer, ``inputs`` and ``outputs`` place the pixels of each tile in
    the buffers, and ``runs`` (offset in the image, offset in the kernel, length) from ``first`` on, ``count`` of them,
    are its taps: each at most ``TERMS`` long, with ends wherever so many are done. Offsets are in bytes once
    :meth:`in_bytes` has said what a pixel takes, before in pixels and numbers.
    """

    image: Image
    taps: int
    places: Array
    inputs: Array
    outputs: Array
    first: Array
    count: Array
    runs: Array
    size: int

    def in_bytes(self, pixel: int, row: int, tap: int) -> Tiles:
        """For pixels of ``pixel`` and ``row`` bytes in the two buffers, and ``tap`` for an input's weights."""
        places, inputs, outputs = self.places * pixel, self.inputs * pixel, self.outputs * row
        return replace(self, places=places, inputs=inputs, outputs=outputs, runs=self.runs * np.array([4, tap, 1]))

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of ``places``, of ``inputs`` and ``outputs``, and of ``first``, ``count`` and ``runs``."""
        tables = self.places, self.inputs, self.outputs, self.first, self.count, self.runs
        return tuple(table.ctypes.data for table in tables)


@dataclass(frozen=True)
class WeightPlan:
    """Runs of pixels (bytes into the gradients, bytes into the images, length), for spans of taps side by side.

    A span is (bytes into the images, numbers, first tap, first run, number of runs). ``by_pixel`` says that the buffers
    hold all images of one pixel together, else all pixels of one image; ``errors_in_planes`` that the gradients stay
    where they are, in planes; ``step`` is from one pixel of a run to the next in the images, in bytes.
    """

    image: Image
    by_pixel: bool
    errors_in_planes: bool
    step: int
    runs: Array
    most_runs: int
    runs_per_chunk: int
    spans: Array
    span_bytes: int


@lru_cache(maxsize=256)
def identity(pixels: int) -> Image:
    return Image(np.arange(pixels, dtype=np.int64), pixels, pixels)


def _image(size: tuple[int, int], low: tuple[int, int], high: tuple[int, int]) -> tuple[Image, int]:
    """A buffer from pixel ``low`` to before ``high`` that holds all of the image, and where its pixel (0, 0) is."""
    top, left = (max(0, -n) for n in low)
    height, width = (max(n, h) + before for n, h, before in zip(size, high, (top, left), strict=True))
    rows, columns = np.arange(size[0]) + top, np.arange(size[1]) + left
    return Image((rows[:, None] * width + columns).reshape(-1), height * width, width), top * width + left


# index, row and column offset
_Tap = tuple[int, int, int]
# pixels of the output, row and column of the first input pixel under each, and the taps
_Class = tuple[Array, Array, Array, list[_Tap]]


def _tiles(
    size: tuple[int, int], classes: list[_Class], taps: int, output: int, channels: int, outputs: int, groups: int
) -> Tiles:
    """The cheapest tiles: with the padding multiplied or left out, over as many images as the cache holds."""
    best, least = None, np.inf
    height = ROWS if panels_of(outputs // groups)[1] == WIDTH else NARROW_ROWS
    inner = [part for whole in classes for part in _without_padding(size, whole)]
    for chosen in (classes, inner):
        for images in _IMAGES:
            tiles = _tiles_of(size, chosen, taps, output, images, channels, groups, height)
            if images > 1 and 4 * images * (tiles.image.pixels * channels + output * outputs) > _TASK_BYTES:
                break
            lengths = np.append(0, np.cumsum(tiles.runs[:, 2]))
            work = (lengths[tiles.first + tiles.count] - lengths[tiles.first]).sum() / images
            if work < 0.99 * least:
                best, least = tiles, work
    assert best is not None
    panels, width = panels_of(outputs // groups)
    return best.in_bytes(channels * 4, groups * panels * width * 4, width * 4)


def panels_of(outputs: int) -> tuple[int, int]:
    """Number and width of the panels into which a kernel of so many outputs is laid."""
    width = WIDTH if outputs > LANES else LANES
    return -(-outputs // width), width


def _without_padding(size: tuple[int, int], whole: _Class) -> list[_Class]:
    """A class split by which of its taps see the image."""
    pixels, rows, columns, taps = whole
    inside = np.ones((len(pixels), len(taps)), bool)
    for t, (_, down, across) in enumerate(taps):
        h, w = rows + down, columns + across
        inside[:, t] = (h >= 0) & (h < size[0]) & (w >= 0) & (w < size[1])
    parts = []
    kinds, kind = np.unique(inside, axis=0, return_inverse=True)
    for k, mask in enumerate(kinds):
        own = np.flatnonzero(kind.reshape(-1) == k)
        met = [tap for tap, seen in zip(taps, mask, strict=True) if seen]
        parts.append((pixels[own], rows[own], columns[own], met))
    return parts


def _tiles_of(
    size: tuple[int, int],
    classes: list[_Class],
    taps: int,
    output: int,
    images: int,
    channels: int,
    groups: int,
    height: int,
) -> Tiles:
    met = [c for c in classes if c[3]]
    low, high = [0, 0], [0, 0]
    for _, *places, class_taps in met:
        for d in (0, 1):
            offsets = [tap[1 + d] for tap in class_taps]
            low[d] = min(low[d], int(places[d].min()) + min(offsets))
            high[d] = max(high[d], int(places[d].max()) + max(offsets) + 1)
    image, origin = _image(size, (low[0], low[1]), (high[0], high[1]))
    inputs, outputs, first, count = [], [], [], []
    runs: list[_Tap] = []
    batch = np.arange(images)[:, None]
    for pixels, rows, columns, class_taps in classes:
        offset = rows * image.width + columns + origin if class_taps else np.zeros_like(pixels)
        a = (batch * image.pixels + offset).reshape(-1)
        c = (batch * output + pixels).reshape(-1)
        short = -len(a) % height
        # the last pixel fills up the last tile
        inputs.append(np.append(a, np.repeat(a[-1:], short)))
        outputs.append(np.append(c, np.repeat(c[-1:], short)))
        n_tiles, own = (len(a) + short) // height, _runs(class_taps, image.width, channels, groups)
        first += [len(runs)] * n_tiles
        count += [len(own)] * n_tiles
        runs += own
    table = np.array(runs or [(0, 0, 0)], np.int64)
    arrays = (np.concatenate(inputs), np.concatenate(outputs), np.array(first), np.array(count), table)
    return Tiles(image, taps, image.places, *arrays, images)


def _runs(taps: list[_Tap], width: int, channels: int, groups: int) -> list[tuple[int, int, int]]:
    """Offset in the image, offset in the kernel and length, in numbers, of the longest pieces that follow each other in
    both memories; none goes on where a multiple of ``TERMS`` is done."""
    runs: list[tuple[int, int, int]] = []
    done, own = 0, channels // groups
    for tap, row, column in taps:
        a, b, left = (row * width + column) * channels, tap * own, own
        while left:
            length = min(left, TERMS - done % TERMS)
            last = runs[-1] if runs and done % TERMS else None
            if last and last[0] + last[2] == a and last[1] + last[2] == b:
                runs[-1] = (*last[:2], last[2] + length)
            else:
                runs.append((a, b, length))
            a, b, left, done = a + length, b + length, left - length, done + length
    return runs


@lru_cache(maxsize=256)
def forward_plan(
    size: tuple[int, int], kernel: tuple[int, int], channels: int, outputs: int, geometry: Geometry
) -> Tiles:
    output = geometry.output(*size, *kernel)
    (s_h, s_w), (d_h, d_w), (top, _, left, _) = geometry.stride, geometry.dilation, geometry.padding
    rows, columns = np.divmod(np.arange(output[0] * output[1]), output[1])
    taps = [(k * kernel[1] + j, k * d_h, j * d_w) for k in range(kernel[0]) for j in range(kernel[1])]
    pixels = output[0] * output[1]
    whole: _Class = (np.arange(pixels), rows * s_h - top, columns * s_w - left, taps)
    return _tiles(size, [whole], len(taps), pixels, channels, outputs, geometry.groups)


@lru_cache(maxsize=256)
def input_plan(
    errors: tuple[int, int],
    size: tuple[int, int],
    kernel: tuple[int, int],
    channels: int,
    outputs: int,
    geometry: Geometry,
) -> Tiles:
    parts = [list(phases(d, errors[d], size[d], kernel[d], geometry)) for d in (0, 1)]
    classes: list[_Class] = []
    idle = np.ones(size, bool)
    for first, rows, (row_tap, n_rows, row_step), (top, _), down in parts[0]:
        for left, columns, (column_tap, n_columns, column_step), (before, _), across in parts[1]:
            i, j = np.arange(rows)[:, None], np.arange(columns)[None]
            h, w = first + i * geometry.stride[0], left + j * geometry.stride[1]
            idle[h, w] = False
            taps = [
                ((row_tap + k * row_step) * kernel[1] + column_tap + m * column_step, k * down, m * across)
                for k in range(n_rows)
                for m in range(n_columns)
            ]
            flat = ((h * size[1] + w).reshape(-1), (i - top + 0 * j).reshape(-1), (j - before + 0 * i).reshape(-1))
            classes.append((*flat, taps))
    if idle.any():
        untouched = np.flatnonzero(idle)
        classes.append((untouched, np.zeros_like(untouched), np.zeros_like(untouched), []))
    pixels = size[0] * size[1]
    return _tiles(errors, classes, kernel[0] * kernel[1], pixels, channels, outputs, geometry.groups)


@lru_cache(maxsize=256)
def weight_plan(
    count: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    channels: int,
    outputs: int,
    geometry: Geometry,
    in_planes: bool,
) -> WeightPlan:
    columns = geometry.output(*size, *kernel)[1]
    by_pixel = columns < SHORT_ROW and count >= SHORT_ROW and channels // geometry.groups >= LANES
    if by_pixel:
        return _runs_by_pixel(count, size, kernel, channels, outputs, geometry)
    return _runs_by_row(count, size, kernel, channels, outputs, geometry, in_planes)


def _pixels(kernel: tuple[int, int]) -> int:
    """Of how many pixels the gradient of a kernel adds up the products in registers."""
    return _PIXELS_OF_ONE_TAP if kernel == (1, 1) else _PIXELS_PER_CHUNK


@lru_cache(maxsize=256)
def thin_plan(
    size: tuple[int, int], kernel: tuple[int, int], channels: int, geometry: Geometry
) -> tuple[Image, Array] | None:
    """For few channels, of which a row of taps fits a register but leaves lanes idle: a buffer for an image, and where
    each row of taps under each output starts in it, in bytes; else ``None``."""
    (s_h, s_w), (d_h, d_w), (top, _, left, _) = geometry.stride, geometry.dilation, geometry.padding
    if geometry.groups > 1 or d_w > 1 or kernel[0] == 1 or kernel[1] * channels > LANES:
        return None
    (rows, columns), reach = geometry.output(*size, *kernel), geometry.reach(*kernel)
    high = (rows - 1) * s_h - top + reach[0], (columns - 1) * s_w - left + reach[1]
    image, origin = _image(size, (-top, -left), high)
    i, j, k = np.ogrid[:rows, :columns, : kernel[0]]
    sources = (i * s_h + k * d_h - top) * image.width + j * s_w - left + origin
    return image, np.ascontiguousarray(sources.reshape(-1, kernel[0]) * (channels * 4), np.int64)


def _runs_by_row(
    count: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    channels: int,
    outputs: int,
    geometry: Geometry,
    in_planes: bool,
) -> WeightPlan:
    """A run is a row of one image; taps of a row that lie side by side are one span, and skip rows of the padding."""
    rows, columns = geometry.output(*size, *kernel)
    (s_h, s_w), (d_h, d_w), (top, _, left, _) = geometry.stride, geometry.dilation, geometry.padding
    reach = geometry.reach(*kernel)
    high = (rows - 1) * s_h - top + reach[0], (columns - 1) * s_w - left + reach[1]
    image, origin = _image(size, (-top, -left), high)
    n, i = np.divmod(np.arange(count * rows), rows)
    first = n * image.pixels + (i * s_h - top) * image.width - left + origin
    errors = (n * (outputs if in_planes else 1) * rows + i) * columns
    table = np.stack(
        [errors * (4 if in_planes else outputs * 4), first * (channels * 4), np.full(count * rows, columns)], 1
    )
    together = kernel[1] if d_w == 1 and geometry.groups == 1 else 1
    own, so_far = channels // geometry.groups, 0
    spans, runs = [], []
    for k in range(kernel[0]):
        seen = i * s_h - top + k * d_h
        runs.append(table[(seen >= 0) & (seen < size[0])])
        for j in range(0, kernel[1], together):
            start = (k * d_h * image.width + j * d_w) * channels * 4
            spans.append((start, together * own, k * kernel[1] + j, so_far, len(runs[-1])))
        so_far += len(runs[-1])
    width, per_chunk = -(-together * own // WIDTH) * WIDTH * 4, max(1, _pixels(kernel) // columns)
    return WeightPlan(
        image, False, in_planes, s_w * channels * 4, np.ascontiguousarray(np.concatenate(runs), np.int64),
        max(map(len, runs)), per_chunk, np.array(spans, np.int64), width,
    )  # fmt: skip


def _runs_by_pixel(
    count: int, size: tuple[int, int], kernel: tuple[int, int], channels: int, outputs: int, geometry: Geometry
) -> WeightPlan:
    """A run is one pixel of all images; each tap is a span, and skips the pixels that it sees in the padding."""
    rows, columns = geometry.output(*size, *kernel)
    (s_h, s_w), (d_h, d_w), (top, _, left, _) = geometry.stride, geometry.dilation, geometry.padding
    i, j = np.divmod(np.arange(rows * columns), columns)
    runs: list[Array] = []
    spans, own, width, so_far = [], channels // geometry.groups, 4 * WIDTH, 0
    for k in range(kernel[0]):
        for m in range(kernel[1]):
            h, w = i * s_h - top + k * d_h, j * s_w - left + m * d_w
            inside = np.flatnonzero((h >= 0) & (h < size[0]) & (w >= 0) & (w < size[1]))
            seen = (h * size[1] + w)[inside]
            spans.append((0, own, k * kernel[1] + m, so_far, len(inside)))
            so_far += len(inside)
            runs.append(np.stack([inside * (count * outputs * 4), seen * (count * channels * 4), 0 * seen + count], 1))
    table, most = np.ascontiguousarray(np.concatenate(runs), np.int64), max(len(rows) for rows in runs)
    return WeightPlan(
        identity(size[0] * size[1]), True, False, channels * 4, table, most, max(1, _pixels(kernel) // count),
        np.array(spans, np.int64), -(-own // WIDTH) * width,
    )  # fmt: skip
