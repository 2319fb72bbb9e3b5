"""Convolutions by compiled kernels: what is worth it, the buffers, and the calls."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.plans import (
    SHORT_ROW,
    TERMS,
    Image,
    Tiles,
    forward_plan,
    identity,
    input_plan,
    panels_of,
    thin_plan,
    weight_plan,
)
from reimpl.functional._dispatch import memory_format_of
from reimpl.functional._numba_source import load, run
from reimpl.functional._numba_tiles import LANES, ROWS, WIDTH

# Fewer multiplications than this are done before the tables are looked up; and outputs of a group that would leave
# most lanes of a register idle.
_LEAST_WORK, _LEAST_OUTPUTS = 1 << 18, LANES // 2
# Measured: tiles of outputs to a task.
_ROW_TILES_PER_TASK = 4
_SLACK = 4 * WIDTH
# Measured: images that a thread needs to be worth sums of its own, and the pixels that stay in its first cache; the
# shortest rows that are read one by one, and how many sums are worth being read and written for each image.
_IMAGES_PER_THREAD, _PIXELS_IN_FIRST_CACHE = 4, 256
_SHORTEST_ROW, _MOST_OWN_SUMS, _OWN_SUMS_OF_SHORT_ROWS = 8, 1 << 16, 1 << 15
# Windows that a thread gathers at a time, to stay in its first caches.
_WINDOWS_PER_CHUNK = 256


_KERNELS = load(Path(__file__).with_name("numba_kernels.py"))


def worth_it(input: Tensor, weight: Tensor, output: tuple[int, int], groups: int) -> bool:
    """Whether there is enough to do, in a shape that fills the registers; for gradients the two swap their parts."""
    work = input.shape[0] * weight.numel() * output[0] * output[1]
    return work >= _LEAST_WORK and (groups == 1 or min(weight.shape[0] // groups, weight.shape[1]) >= _LEAST_OUTPUTS)


def worth_it_for_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], groups: int) -> bool:
    """The same for the gradient of the kernel."""
    work = grad.numel() * input.shape[1] // groups * kernel[0] * kernel[1]
    return work >= _LEAST_WORK and (groups == 1 or min(grad.shape[1], input.shape[1]) // groups >= _LEAST_OUTPUTS)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``C(x, w) + b``, in the layout that PyTorch would give it."""
    size, kernel = (input.shape[2], input.shape[3]), (weight.shape[2], weight.shape[3])
    output = geometry.output(*size, *kernel)
    result = _empty((input.shape[0], weight.shape[0], *output), input, memory_format_of(input, weight))
    groups = geometry.groups
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    _multiply(input, split, False, bias, result, forward_plan(size, kernel, input.shape[1], weight.shape[0], geometry))
    return result


def convolve_input(
    grad: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    geometry: Geometry,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """``T(g, w)``: the gradient of the input, of height and width ``size``, in ``layout`` or that of the two."""
    groups, kernel = geometry.groups, (weight.shape[2], weight.shape[3])
    result = _empty((grad.shape[0], groups * weight.shape[1], *size), grad, layout or memory_format_of(grad, weight))
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
    errors = (grad.shape[2], grad.shape[3])
    plan = input_plan(errors, size, kernel, grad.shape[1], result.shape[1], geometry)
    _multiply(grad, split, True, None, result, plan)
    return result


def convolve_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``: the gradient of a kernel of height and width ``kernel``."""
    count, outputs = grad.shape[:2]
    thin = thin_plan((input.shape[2], input.shape[3]), kernel, input.shape[1], geometry)
    if thin is not None and outputs % ROWS == 0:
        return _convolve_weight_thin(grad, input, kernel, *thin)
    size, groups, channels = (input.shape[2], input.shape[3]), geometry.groups, input.shape[1]
    if (
        groups == 1
        and outputs % ROWS == 0
        and count >= _IMAGES_PER_THREAD * torch.get_num_threads()
        and grad.shape[3] >= _SHORTEST_ROW
        and outputs * channels * kernel[0] * kernel[1]
        <= (_MOST_OWN_SUMS if grad.shape[3] >= SHORT_ROW else _OWN_SUMS_OF_SHORT_ROWS)
    ):
        return _convolve_weight_by_image(grad, input, kernel, geometry)
    # planes of gradients can be read where they are, if no tile reaches past the last of them
    in_planes = grad.is_contiguous() and outputs // groups % ROWS == 0
    plan = weight_plan(count, size, kernel, channels, outputs, geometry, in_planes)
    pixels = grad.shape[2] * grad.shape[3]
    errors = grad if plan.errors_in_planes else _packed(grad, identity(pixels), plan.by_pixel)
    row, step = (pixels * 4, 4) if plan.errors_in_planes else (4, outputs * 4)
    images = _packed(input, plan.image, plan.by_pixel)
    result = grad.new_empty(outputs, channels // groups, *kernel)
    group_outputs = outputs // groups
    row_tiles = -(-group_outputs // ROWS)
    threads = torch.get_num_threads()
    rows_per_task = max(1, min(_ROW_TILES_PER_TASK, row_tiles * groups // threads))
    tasks = -(-row_tiles // rows_per_task)
    sums = grad.new_zeros(groups * row_tiles * ROWS, len(plan.spans), plan.span_bytes // 4)
    words = [
        *(tasks, rows_per_task, row_tiles),
        *(errors.data_ptr(), step, images.data_ptr(), plan.step),
        *(plan.runs.ctypes.data, plan.most_runs, plan.runs_per_chunk),
        *(groups, group_outputs, channels // groups, len(plan.spans), plan.spans.ctypes.data, plan.span_bytes),
        *(sums.data_ptr(), sums.stride(0) * 4, result.data_ptr(), kernel[0] * kernel[1], row),
    ]
    run(_KERNELS.convolve_weight, words, tasks * groups)
    return result


def _convolve_weight_by_image(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """The gradient of a small kernel: each thread packs its own images, one after the other, and sums them up."""
    if not grad.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous()
    count, outputs, channels = *grad.shape[:2], input.shape[1]
    in_planes = grad.is_contiguous()
    plan = weight_plan(1, (input.shape[2], input.shape[3]), kernel, channels, outputs, geometry, in_planes)
    input, n, c, p = _strides(input)
    row, step = (grad.shape[2] * grad.shape[3] * 4, 4) if in_planes else (4, outputs * 4)
    sums_offset, sums_step = (plan.image.pixels * channels + _SLACK) * 4, len(plan.spans) * plan.span_bytes
    tasks = min(torch.get_num_threads(), count)
    scratch = grad.new_zeros(tasks, -(-(sums_offset + outputs * sums_step) // 64) * 16 + LANES)
    table = plan.image.places * (channels * 4)
    words = [
        *(tasks, count, input.data_ptr(), n, c, p, channels, len(table), table.ctypes.data),
        *(scratch.data_ptr(), scratch.stride(0) * 4, sums_offset),
        *(grad.data_ptr(), grad.stride(0) * 4, row, step, plan.step),
        *(plan.runs.ctypes.data, plan.most_runs, max(1, _PIXELS_IN_FIRST_CACHE // grad.shape[3]), outputs // ROWS),
        *(len(plan.spans), plan.spans.ctypes.data, plan.span_bytes, sums_step),
    ]
    run(_KERNELS.convolve_weight_by_image, words, tasks)
    spans = len(plan.spans), plan.span_bytes // 4
    return _summed(scratch, sums_offset // 4, outputs, spans, kernel, channels)


def _convolve_weight_thin(
    grad: Tensor, input: Tensor, kernel: tuple[int, int], image: Image, sources: np.ndarray[Any, Any]
) -> Tensor:
    """The gradient of a kernel of few channels: each thread gathers the windows of its own images, and sums them up."""
    if not grad.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous()
    count, outputs, channels = *grad.shape[:2], input.shape[1]
    input, n, c, p = _strides(input)
    length, places = kernel[0] * kernel[1] * channels, len(sources)
    window, width = -(-length // LANES) * LANES, -(-length // WIDTH) * WIDTH
    chunk = min(places, _WINDOWS_PER_CHUNK)
    step = grad.stride(3) if grad.shape[3] > 1 else grad.stride(2)
    runs = _chunks(places, chunk, step * 4)
    # a vector read or written at the end of a part reaches into the next
    windows_offset = (image.pixels * channels + LANES) * 4
    sums_offset = windows_offset + (chunk * window + LANES) * 4
    tasks = min(torch.get_num_threads(), count)
    scratch = grad.new_zeros(tasks, -(-(sums_offset // 4 + outputs * width + LANES) // LANES) * LANES)
    table = image.places * (channels * 4)
    words = [
        *(tasks, count, input.data_ptr(), n, c, p, channels, len(table), table.ctypes.data),
        *(scratch.data_ptr(), scratch.stride(0) * 4, windows_offset, sums_offset),
        *(sources.ctypes.data, places, kernel[0], kernel[1] * channels * 4, window * 4),
        *(grad.data_ptr(), grad.stride(0) * 4, grad.stride(1) * 4, step * 4, runs.ctypes.data, len(runs), chunk),
        *(outputs // ROWS, length, width * 4),
    ]
    run(_KERNELS.convolve_weight_thin, words, tasks)
    return _summed(scratch, sums_offset // 4, outputs, (1, width), kernel, channels)


def _summed(
    scratch: Tensor, start: int, outputs: int, spans: tuple[int, int], kernel: tuple[int, int], channels: int
) -> Tensor:
    """The gradient from the sums of all threads: for each output, so many spans of taps, and so far apart."""
    number, apart = spans
    shape = scratch.shape[0], outputs, number, kernel[0] * kernel[1] * channels // number
    sums = scratch.as_strided(shape, (scratch.stride(0), number * apart, apart, 1), start)
    return sums.sum(0).view(outputs, *kernel, channels).permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=256)
def _chunks(places: int, chunk: int, step: int) -> np.ndarray[Any, Any]:
    """Runs of ``chunk`` places, ``step`` bytes apart, as the kernels read them."""
    first = np.arange(0, places, chunk)
    return np.stack([first * step, 0 * first, np.minimum(chunk, places - first)], 1).astype(np.int64)


@lru_cache(maxsize=64)
def _zeros(count: int) -> Tensor:
    """What is added where there is no bias."""
    return torch.zeros(count, dtype=torch.float32, device="cpu")


def _empty(shape: tuple[int, ...], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _strides(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """The tensor, or a copy whose pixels are evenly spaced, and the bytes from image to image, channel and pixel."""
    n, c, h, w = tensor.stride()
    if not ((h == tensor.shape[3] * w or tensor.shape[2] == 1) and (w == 1 or c == 1)):
        tensor = tensor.contiguous()
        n, c, h, w = tensor.stride()
    return tensor, n * 4, c * 4, (w if tensor.shape[3] > 1 else h) * 4


def _packed(tensor: Tensor, image: Image, by_pixel: bool) -> Tensor:
    """All images in buffers of the plan's form, one behind the other or pixel by pixel; the tensor where it is that."""
    count, channels = tensor.shape[:2]
    if (
        not by_pixel
        and image.dense
        and channels % WIDTH == 0
        and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return tensor
    tensor, n, c, p = _strides(tensor)
    make = tensor.new_empty if image.dense else tensor.new_zeros
    buffer = make(count * image.pixels * channels + _SLACK)
    table = image.places * (channels * 4 * (count if by_pixel else 1))
    words = [
        *(count, tensor.data_ptr(), n, c, p, channels, len(table), table.ctypes.data),
        *(buffer.data_ptr(), channels * 4 * (1 if by_pixel else image.pixels)),
    ]
    run(_KERNELS.pack_batch, words, count)
    return buffer


def _panels(weight: Tensor, mirror: bool, threads: int) -> tuple[Tensor, int, int]:
    """(groups, outputs, channels, f_h, f_w) in panels, their number in a group, and the outputs of each."""
    groups, outputs, channels, k_h, k_w = weight.shape
    g, o, c, h, w = weight.stride()
    if h != k_w * w and k_h > 1:
        weight = weight.contiguous()
        g, o, c, h, w = weight.stride()
    panels, width = panels_of(outputs)
    buffer = weight.new_empty(groups * panels * k_h * k_w * channels * width)
    tap = w if k_w > 1 else h
    words = [
        *(panels, groups, outputs, channels, k_h * k_w),
        *(weight.data_ptr(), g * 4, o * 4, c * 4, tap * 4, buffer.data_ptr(), int(mirror), width),
    ]
    run(_KERNELS.pack_weight, words, groups * panels)
    return buffer, panels, width


def _multiply(input: Tensor, weight: Tensor, mirror: bool, bias: Tensor | None, result: Tensor, plan: Tiles) -> None:
    """All tiles of all images with all panels of ``weight`` (groups, outputs, channels, f_h, f_w), into ``result``."""
    threads, (groups, outputs, own) = torch.get_num_threads(), weight.shape[:3]
    buffer, panels, width = _panels(weight, mirror, threads)
    input, s_image, s_channel, s_pixel = _strides(input)
    count, channels = input.shape[:2]
    row = groups * panels * width * 4
    # held until the kernels have run: another thread may drive it out of the cache
    offsets = _zeros(groups * panels * width) if bias is None else input.new_zeros(groups, panels * width)
    if bias is not None:
        offsets[:, :outputs] = bias.view(groups, outputs)
    _, t_image, t_channel, t_pixel = _strides(result)
    out_pixels, pixels = result.shape[2] * result.shape[3], plan.image.pixels
    in_form = plan.image.dense and (s_image, s_channel, s_pixel) == (pixels * channels * 4, 4, channels * 4)
    out_form = (t_image, t_channel, t_pixel) == (out_pixels * row, 4, row)
    image_bytes, tasks = pixels * channels * 4, -(-count // plan.size)
    used = min(threads, tasks)
    result_offset = plan.size * image_bytes + _SLACK
    scratch_bytes = -(-(result_offset + plan.size * out_pixels * row + 4096) // 64) * 64
    scratch = input.new_empty(used, scratch_bytes // 4)
    places, inputs, targets, *tables = plan.addresses
    words = [
        *(tasks, plan.size, count),
        *(input.data_ptr(), s_image, s_channel, s_pixel, channels, len(plan.places), places, image_bytes),
        *(scratch.data_ptr(), scratch_bytes, result_offset, 0 if plan.image.dense else result_offset // 4),
        *(len(plan.first), inputs, targets, *tables),
        *(buffer.data_ptr(), plan.taps * own * width * 4, panels, groups, own * 4, offsets.data_ptr()),
        *(row, result.data_ptr(), t_image, t_channel, t_pixel, outputs, out_pixels, width, TERMS),
        *(int(in_form), int(out_form)),
    ]
    run(_KERNELS.convolve, words, used)
