"""The convolution kernels as Numba compiles them: packing, tiles of products, and unpacking, task by task.

Addresses and strides are in bytes. A task is a table of 64-bit words, written in :mod:`reimpl.functional._conv.numba`;
threads share the work by taking numbers from counters in it.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from reimpl.functional._numba_tiles import (
    LANES,
    NARROW_ROWS,
    ROWS,
    WIDTH,
    accumulate_broad_tile,
    accumulate_narrow_tile,
    accumulate_tile,
    interleave_three,
    move_number,
    move_vector,
    multiply_more_narrow_pairs,
    multiply_more_narrow_tile,
    multiply_more_tile,
    multiply_narrow_pairs,
    multiply_narrow_tile,
    multiply_tile,
    transpose_block,
    untranspose_block,
)
from reimpl.optim._numba_ops import pointer, take


@njit(error_model="numpy")
def move_pixels(
    source: Any, channel_step: Any, pixel_step: Any, channels: Any, pixels: Any, target: Any, table: Any
) -> None:
    """Put pixels where ``table`` says, one by one, with their channels together."""
    places = carray(pointer(table), (pixels,), np.int64)
    whole = channels // LANES * LANES if channel_step == 4 else 0
    for p in range(pixels):
        row, place = source + p * pixel_step, target + places[p]
        for c in range(0, whole, LANES):
            move_vector(row + 4 * c, place + 4 * c)
        for c in range(whole, channels):
            move_number(row + c * channel_step, place + 4 * c)


@njit(error_model="numpy")
def pack_image(
    source: Any, channel_step: Any, pixel_step: Any, channels: Any, pixels: Any, target: Any, table: Any
) -> None:
    """Write one image, planes or pixels, to a buffer with the channels of a pixel together; ``table`` places pixels."""
    places = carray(pointer(table), (pixels,), np.int64)
    whole_c, whole_p = channels // LANES * LANES, pixels // LANES * LANES
    if (channel_step == 4 and pixel_step == 4 * channels) or (pixel_step == 4 and channels == 3):
        for p in range(0, whole_p, LANES):
            row, place = source + p * pixel_step, target + places[p]
            if places[p + LANES - 1] - places[p] != (LANES - 1) * channels * 4:
                move_pixels(row, channel_step, pixel_step, channels, LANES, target, table + 8 * p)
            elif channel_step == 4:
                for k in range(channels):
                    move_vector(row + 4 * LANES * k, place + 4 * LANES * k)
            else:
                interleave_three(row, channel_step, place)
        left = source + whole_p * pixel_step
        move_pixels(left, channel_step, pixel_step, channels, pixels - whole_p, target, table + 8 * whole_p)
    elif pixel_step == 4:
        for c in range(0, whole_c, LANES):
            for p in range(0, whole_p, LANES):
                transpose_block(source + c * channel_step + 4 * p, channel_step, target + 4 * c, table + 8 * p)
        for c in range(channels):
            for p in range(whole_p if c < whole_c else 0, pixels):
                move_number(source + c * channel_step + p * pixel_step, target + places[p] + 4 * c)
    else:
        move_pixels(source, channel_step, pixel_step, channels, pixels, target, table)


@njit(error_model="numpy")
def unpack_image(
    source: Any, row_step: Any, channels: Any, pixels: Any, target: Any, channel_step: Any, pixel_step: Any
) -> None:
    """Write one image from a buffer with the channels of a pixel together to planes or pixels."""
    whole_c, whole_p = channels // LANES * LANES, pixels // LANES * LANES
    if channel_step == 4:
        for p in range(pixels):
            row, place = source + p * row_step, target + p * pixel_step
            for c in range(0, whole_c, LANES):
                move_vector(row + 4 * c, place + 4 * c)
            for c in range(whole_c, channels):
                move_number(row + 4 * c, place + 4 * c)
        return
    for c in range(0, whole_c, LANES):
        for p in range(0, whole_p, LANES):
            untranspose_block(source + p * row_step + 4 * c, row_step, target + c * channel_step + 4 * p, channel_step)
    for c in range(channels):
        for p in range(whole_p if c < whole_c else 0, pixels):
            move_number(source + p * row_step + 4 * c, target + c * channel_step + p * pixel_step)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def pack_batch(task: Any) -> None:
    """Pack every image of a batch."""
    w = carray(task, (10,), np.int64)
    counter, count, source, image_step, channel_step, pixel_step = w[0], w[1], w[2], w[3], w[4], w[5]
    channels, pixels, table, target_start = w[6], w[7], w[8], w[9]
    target_step = carray(task, (11,), np.int64)[10]
    while True:
        i = take(counter)
        if i >= count:
            return
        target = target_start + i * target_step
        pack_image(source + i * image_step, channel_step, pixel_step, channels, pixels, target, table)


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def pack_weight(task: Any) -> None:
    """Lay the kernel out in panels of outputs: (groups, panels, taps, channels, outputs), zeros past the last."""
    w = carray(task, (14,), np.int64)
    counter, panels_per_group, groups, outputs, channels, taps = w[0], w[1], w[2], w[3], w[4], w[5]
    source, group_step, output_step, channel_step, tap_step = w[6], w[7], w[8], w[9], w[10]
    target, mirror, panel_width = w[11], w[12], w[13]
    panel = taps * channels * panel_width * 4
    while True:
        i = take(counter)
        if i >= panels_per_group * groups:
            return
        g, first = i // panels_per_group, i % panels_per_group * panel_width
        width = min(panel_width, outputs - first)
        start = source + g * group_step + first * output_step
        for c in range(channels):
            for k in range(taps):
                tap = taps - 1 - k if mirror else k
                numbers = start + c * channel_step + tap * tap_step
                row = target + i * panel + (k * channels + c) * panel_width * 4
                for o in range(width):
                    move_number(numbers + o * output_step, row + 4 * o)
                padding = carray(pointer(row), (panel_width,), np.float32)
                for o in range(width, panel_width):
                    padding[o] = 0.0


@njit(error_model="numpy")
def in_pairs(table: Any) -> Any:
    """Whether the second row of every pair of a narrow tile is as far behind the first."""
    rows = carray(pointer(table), (NARROW_ROWS,), np.int64)
    same = True
    for j in range(2, NARROW_ROWS, 2):
        same &= rows[j + 1] - rows[j] == rows[1] - rows[0]
    return same


@njit(error_model="numpy")
def multiply_panel(
    wide: Any,
    a: Any,
    a_table: Any,
    b: Any,
    runs: Any,
    first: Any,
    count: Any,
    terms: Any,
    bias: Any,
    c: Any,
    c_table: Any,
) -> None:
    """All tiles with one panel of the kernel; what ``terms`` terms or a few more add up to is added to the result."""
    height = ROWS if wide else NARROW_ROWS
    for t in range(len(first)):
        rows_a, rows_c = a_table + t * height * 8, c_table + t * height * 8
        start, number, more = runs + first[t] * 24, count[t], False
        lengths = carray(pointer(start), (number, 3), np.int64)
        paired = not wide and in_pairs(rows_a)
        # where the last row of the first half is there again, it fills up the second: once added to is enough
        places = carray(pointer(rows_c), (height,), np.int64)
        halves = 1 if not wide and places[ROWS] == places[ROWS - 1] else 2
        done = 0
        while number > done or not more:
            until, length = done, 0
            while until < number and length < terms:
                length += lengths[until, 2]
                until += 1
            own, n = start + done * 24, until - done
            if wide:
                if more:
                    multiply_more_tile(a, rows_a, b, own, n, WIDTH * 4, bias, c, rows_c)
                else:
                    multiply_tile(a, rows_a, b, own, n, WIDTH * 4, bias, c, rows_c)
            elif paired:
                if more:
                    multiply_more_narrow_pairs(a, rows_a, b, own, n, LANES * 4, bias, c, rows_c)
                else:
                    multiply_narrow_pairs(a, rows_a, b, own, n, LANES * 4, bias, c, rows_c)
            else:
                for k in range(halves):
                    half = k * ROWS * 8
                    if more:
                        multiply_more_narrow_tile(a, rows_a + half, b, own, n, LANES * 4, bias, c, rows_c + half)
                    else:
                        multiply_narrow_tile(a, rows_a + half, b, own, n, LANES * 4, bias, c, rows_c + half)
            done, more = until, True


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def convolve(task: Any) -> None:
    """Pack some images, multiply all their tiles with every panel of the kernel, and unpack the result.

    What has the buffers' form, images or result, is read or written where it is, unless the task has too few images.
    """
    w = carray(task, (39,), np.int64)
    counter, tasks, per_task, count = w[0], w[1], w[2], w[3]
    source, s_image, s_channel, s_pixel, channels, pixels, table, image_bytes = (
        w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11],
    )  # fmt: skip
    scratch, scratch_step, result_offset, padded = w[12], w[13], w[14], w[15]
    n_tiles, a_table, c_table, run_first, run_count, runs = w[16], w[17], w[18], w[19], w[20], w[21]
    weight, panel, panels, groups, group_step, bias = w[22], w[23], w[24], w[25], w[26], w[27]
    row_step, target, t_image, t_channel, t_pixel, outputs, out_pixels = w[28], w[29], w[30], w[31], w[32], w[33], w[34]
    panel_width, terms, in_form, out_form = w[35], w[36], w[37], w[38]
    first = carray(pointer(run_first), (n_tiles,), np.int64)
    number = carray(pointer(run_count), (n_tiles,), np.int64)
    local = scratch + take(counter + 8) * scratch_step
    result = local + result_offset
    numbers = carray(pointer(local), (padded,), np.float32)
    for j in range(padded):
        numbers[j] = 0.0
    while True:
        i = take(counter)
        if i >= tasks:
            return
        images = min(per_task, count - i * per_task)
        own, own_target = source + i * per_task * s_image, target + i * per_task * t_image
        a_base, c_base = local, result
        if in_form and images == per_task:
            a_base = own
        else:
            for n in range(images):
                image = local + n * image_bytes
                pack_image(own + n * s_image, s_channel, s_pixel, channels, pixels, image, table)
        direct = out_form and images == per_task
        if direct:
            c_base = own_target
        for p in range(groups * panels):
            a, columns = a_base + p // panels * group_step, p * panel_width * 4
            multiply_panel(
                panel_width == WIDTH, a, a_table, weight + p * panel, runs, first, number, terms,
                bias + columns, c_base + columns, c_table,
            )  # fmt: skip
        for n in range(0 if direct else images):
            for g in range(groups):
                unpack_image(
                    result + n * out_pixels * row_step + g * panels * panel_width * 4,
                    row_step,
                    outputs,
                    out_pixels,
                    own_target + n * t_image + g * outputs * t_channel,
                    t_channel,
                    t_pixel,
                )


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def convolve_weight(task: Any) -> None:
    """For some outputs: tiles of (outputs, channels under a row of taps), summed over chunks of pixels."""
    w = carray(task, (28,), np.int64)
    counter, tasks, rows_per_task, row_tiles = w[0], w[1], w[2], w[3]
    errors, a_step, images, b_step, runs, n_runs, per_chunk = w[4], w[5], w[6], w[7], w[8], w[9], w[10]
    groups, group_outputs, channels, n_spans, spans, span_bytes = w[11], w[12], w[13], w[14], w[15], w[16]
    sums, sums_step, target, taps, a_row = w[17], w[18], w[19], w[20], w[21]
    # offset in the image, numbers, first tap, first run, number of runs
    span = carray(pointer(spans), (n_spans, 5), np.int64)
    while True:
        i = take(counter)
        if i >= tasks * groups:
            return
        g, first = i // tasks, i % tasks * rows_per_task
        last = min(first + rows_per_task, row_tiles)
        own = sums + (g * row_tiles + first) * ROWS * sums_step
        for chunk in range(0, n_runs, per_chunk):
            for s in range(n_spans):
                length = min(per_chunk, span[s, 4] - chunk)
                own_runs = runs + (span[s, 3] + chunk) * 24
                for x in range(0, span[s, 1], WIDTH):
                    b = images + g * channels * 4 + span[s, 0] + 4 * x
                    for r in range(first, last):
                        a = errors + (g * group_outputs + r * ROWS) * a_row
                        c = own + (r - first) * ROWS * sums_step + s * span_bytes + 4 * x
                        if span[s, 1] - x > LANES:
                            accumulate_tile(a, a_row, b, own_runs, length, a_step, b_step, c, sums_step)
                        else:
                            accumulate_narrow_tile(a, a_row, b, own_runs, length, a_step, b_step, c, sums_step)
        for o in range(first * ROWS, min(last * ROWS, group_outputs)):
            row = sums + (g * row_tiles * ROWS + o) * sums_step
            place = target + (g * group_outputs + o) * channels * taps * 4
            for s in range(n_spans):
                for k in range(span[s, 1] // channels):
                    for c in range(channels):
                        move_number(
                            row + s * span_bytes + (k * channels + c) * 4, place + (c * taps + span[s, 2] + k) * 4
                        )


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def convolve_weight_by_image(task: Any) -> None:
    """For some images, one after the other: pack it, and sum up its tiles of (outputs, channels of a row of taps)."""
    w = carray(task, (27,), np.int64)
    counter, tasks, count, source, s_image, s_channel, s_pixel = w[0], w[1], w[2], w[3], w[4], w[5], w[6]
    channels, pixels, table, scratch, scratch_step, sums_offset = w[7], w[8], w[9], w[10], w[11], w[12]
    errors, e_image, a_row, a_step, b_step = w[13], w[14], w[15], w[16], w[17]
    runs, n_runs, per_chunk, row_tiles = w[18], w[19], w[20], w[21]
    n_spans, spans, span_bytes, sums_step = w[22], w[23], w[24], w[25]
    # offset in the image, numbers, first tap, first run, number of runs
    span = carray(pointer(spans), (n_spans, 5), np.int64)
    while True:
        t = take(counter)
        if t >= tasks:
            return
        local = scratch + t * scratch_step
        for i in range(count * t // tasks, count * (t + 1) // tasks):
            pack_image(source + i * s_image, s_channel, s_pixel, channels, pixels, local, table)
            for chunk in range(0, n_runs, per_chunk):
                for s in range(n_spans):
                    own, length = runs + (span[s, 3] + chunk) * 24, min(per_chunk, span[s, 4] - chunk)
                    b, left = local + span[s, 0], span[s, 1]
                    c = local + sums_offset + s * span_bytes
                    while left > 0 and length > 0:
                        width = WIDTH if left > LANES else LANES
                        if LANES == 16 and (left % (3 * LANES) == 0 or WIDTH < left <= 3 * LANES):
                            width = 3 * LANES
                        # the columns stay in the first cache while all rows go by
                        for r in range(row_tiles):
                            a, row = errors + i * e_image + r * ROWS * a_row, c + r * ROWS * sums_step
                            if width == 3 * LANES:
                                accumulate_broad_tile(a, a_row, b, own, length, a_step, b_step, row, sums_step)
                            elif width == WIDTH:
                                accumulate_tile(a, a_row, b, own, length, a_step, b_step, row, sums_step)
                            else:
                                accumulate_narrow_tile(a, a_row, b, own, length, a_step, b_step, row, sums_step)
                        b, c, left = b + 4 * width, c + 4 * width, left - width


@cfunc("void(voidptr)", cache=True, error_model="numpy")
def convolve_weight_thin(task: Any) -> None:
    """For some images, one after the other: gather windows, a row each, and sum their products with the errors."""
    w = carray(task, (29,), np.int64)
    counter, tasks, count, source, s_image, s_channel, s_pixel = w[0], w[1], w[2], w[3], w[4], w[5], w[6]
    channels, pixels, table, scratch, scratch_step, windows_offset, sums_offset = (
        w[7], w[8], w[9], w[10], w[11], w[12], w[13],
    )  # fmt: skip
    sources, n_windows, rows, row_step, window_step = w[14], w[15], w[16], w[17], w[18]
    errors, e_image, a_row, a_step, runs, n_chunks, per_chunk = w[19], w[20], w[21], w[22], w[23], w[24], w[25]
    row_tiles, length, sums_step = w[26], w[27], w[28]
    places = carray(pointer(sources), (n_windows, rows), np.int64)
    while True:
        t = take(counter)
        if t >= tasks:
            return
        local = scratch + t * scratch_step
        windows, sums = local + windows_offset, local + sums_offset
        for i in range(count * t // tasks, count * (t + 1) // tasks):
            pack_image(source + i * s_image, s_channel, s_pixel, channels, pixels, local, table)
            for chunk in range(n_chunks):
                first = chunk * per_chunk
                for p in range(first, min(first + per_chunk, n_windows)):
                    # what a vector holds beyond its row of taps is written over by the next
                    for k in range(rows):
                        move_vector(local + places[p, k], windows + (p - first) * window_step + k * row_step)
                for x in range(0, length, WIDTH):
                    b, own = windows + 4 * x, runs + chunk * 24
                    for r in range(row_tiles):
                        a, c = errors + i * e_image + r * ROWS * a_row, sums + r * ROWS * sums_step + 4 * x
                        if length - x > LANES:
                            accumulate_tile(a, a_row, b, own, 1, a_step, window_step, c, sums_step)
                        else:
                            accumulate_narrow_tile(a, a_row, b, own, 1, a_step, window_step, c, sums_step)
