"""The three products of a convolution (output, gradient of the input, gradient of the weight) as matrix products.

``im2col`` gathers the windows of the padded input into rows, ``(N·H'·W', f_h·f_w·C)``, and multiplies once. Rows are
laid out with the channels last, so that a window's row of ``f_w·C`` numbers is copied as one run, and made for a few
samples at a time, so that they stay in the cache. ``views`` multiplies once for each kernel tap: the padded input as
one matrix of ``C`` columns, read from a row further down, is the input as that tap sees it. Ordinary tensors on the CPU
go to :mod:`reimpl.functional._conv.blocks` and, with one filter a channel, :mod:`reimpl.functional._conv.depthwise`.

The gradient of the input is itself a convolution of the output's gradient, at stride 1: one for each residue of a
pixel's place by the stride, with the kernel's taps that reach such a pixel, mirrored.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv import blocks, depthwise, grouped
from reimpl.functional._conv.arguments import Geometry, phase_pairs
from reimpl.functional._conv.products import unobserved
from reimpl.functional._conv.windows import every, parts, pixels_of, window_rows
from reimpl.functional._conv.winograd import winograd, winograd_weight
from reimpl.functional._dispatch import is_batched, memory_format_of, opmath_dtype
from reimpl.functional.kernels import kernels_for

# Measured: products over views win while the pixels of the padding that they compute in vain are this few, and the
# products of single taps are wide enough to run at the speed of large ones.
_VIEWS_WASTE, _VIEWS_CHANNELS = 1.15, 64

_HALF = (torch.bfloat16, torch.float16)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``C(x, w) + b``: the output, channels last in memory."""
    kernels = _compiled(geometry, input, weight, bias)
    if kernels and kernels.worth_it(input, weight, _output(input, weight, geometry), geometry.groups):
        return kernels.convolve(input, weight, bias, geometry)  # type: ignore[no-any-return]
    if sums := _sums_for(geometry, weight.shape[0], input.shape[1], _plane(weight), input, weight, bias):
        layout = memory_format_of(input, weight)
        return sums.convolve(input, weight, bias, _output(input, weight, geometry), geometry, layout)  # type: ignore[no-any-return]
    if _wider(geometry, input, weight, bias):
        offset = None if bias is None else bias.float()
        return convolve(input.float(), weight.float(), offset, geometry).to(input.dtype)
    algorithm = geometry.algorithm or _choose(input, weight, geometry)
    if algorithm == "winograd":
        return winograd(input, weight, bias, geometry)
    if algorithm == "views" and geometry.stride == (1, 1) and not is_batched(input):
        return _by_views(input, weight, bias, geometry)
    return _by_rows(input, weight, bias, geometry)


def convolve_input(
    grad: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    geometry: Geometry,
    layout: torch.memory_format | None = None,
) -> Tensor:
    """``T(g, w)``: each output's gradient spread over its window; ``size`` is the input's height and width.

    The result is best wanted in ``layout``; without one, in that of ``grad`` and ``weight``.
    """
    kernels = _compiled(geometry, grad, weight)
    if kernels and kernels.worth_it(grad, weight.transpose(0, 1), (grad.shape[2], grad.shape[3]), geometry.groups):
        return kernels.convolve_input(grad, weight, size, geometry, layout)  # type: ignore[no-any-return]
    if sums := _sums_for(geometry, grad.shape[1], geometry.groups * weight.shape[1], _plane(weight), grad, weight):
        return sums.convolve_input(grad, weight, size, geometry, layout or memory_format_of(grad, weight))  # type: ignore[no-any-return]
    if _wider(geometry, grad, weight):
        return convolve_input(grad.float(), weight.float(), size, geometry, layout).to(grad.dtype)
    groups, (outputs, channels, k_h, k_w) = geometry.groups, weight.shape
    mirrored = weight.reshape(groups, outputs // groups, channels, k_h, k_w).transpose(1, 2).flip(3, 4)
    mirrored = mirrored.reshape(groups * channels, outputs // groups, k_h, k_w)
    spread = None
    for down, across, part in phase_pairs((grad.shape[2], grad.shape[3]), size, (k_h, k_w), geometry):
        taps = every(every(mirrored, 2, *down.taps), 3, *across.taps)
        values = convolve(grad, taps, None, part)
        if values.shape[2:] == size:
            return values
        if spread is None:
            spread = values.new_zeros(values.shape[0], *size, values.shape[1]).permute(0, 3, 1, 2)
        pixels_of(spread, down, across, geometry).copy_(values)
    return grad.new_zeros(grad.shape[0], groups * channels, *size) if spread is None else spread


def convolve_weight(grad: Tensor, input: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``: each window of the input weighted by its output's gradient; ``size`` is the kernel's."""
    if geometry.algorithm == "winograd":
        return winograd_weight(grad, input, geometry)
    groups, output, dtype = geometry.groups, (grad.shape[2], grad.shape[3]), opmath_dtype(grad.dtype)
    channels = input.shape[1] // groups
    kernels = _compiled(geometry, grad, input)
    if kernels and kernels.worth_it_for_weight(grad, input, size, groups):
        return kernels.convolve_weight(grad, input, size, geometry)  # type: ignore[no-any-return]
    if sums := _sums_for(geometry, grad.shape[1], input.shape[1], size, grad, input):
        return sums.convolve_weight(grad, input, size, geometry)  # type: ignore[no-any-return]
    if _wider(geometry, grad, input):
        return convolve_weight(grad.float(), input.float(), size, geometry).to(grad.dtype)
    total = None
    row_bytes = prod(output) * prod(size) * input.shape[1] * dtype.itemsize
    least = grad.shape[1] * channels * prod(size) * dtype.itemsize
    for part in parts(input.shape[0], row_bytes, input.device, least):
        rows = window_rows(input[part].to(dtype), size, output, geometry)
        product = _error_rows(grad[part], groups, dtype).transpose(1, 2) @ rows
        total = product if total is None else total.add_(product)
    if total is None:
        return grad.new_zeros(grad.shape[1], channels, *size)
    weight = total.reshape(grad.shape[1], *size, channels).permute(0, 3, 1, 2)
    return weight.to(grad.dtype).contiguous()


def _compiled(geometry: Geometry, *tensors: Tensor | None) -> Any:
    """The module of compiled convolutions, where it is wanted and does for these tensors."""
    return kernels_for("_conv.numba", *tensors) if geometry.algorithm is None else None


def _sums_for(
    geometry: Geometry, outputs: int, channels: int, kernel: tuple[int, int], *tensors: Tensor | None
) -> ModuleType | None:
    """What computes over blocks of the batch, where it does for these tensors."""
    if geometry.groups > 1:
        if outputs == channels == geometry.groups and depthwise.fits(geometry, *tensors):
            return depthwise
        if grouped.fits(geometry, outputs, channels, kernel, *tensors):
            return grouped
    fits = blocks.fits(geometry, outputs, channels, *tensors)
    return blocks if fits or blocks.fits_bfloat16(geometry, outputs, channels, kernel, *tensors) else None


def _wider(geometry: Geometry, *tensors: Tensor | None) -> bool:
    """Whether half precision is best multiplied in float32, by the blocks: rounded once, and on the CPU quicker."""
    return (
        geometry.algorithm is None
        and all(t is None or (t.is_cpu and t.dtype in _HALF and t.numel() > 0) for t in tensors)
        and unobserved(*tensors)
    )


def _plane(weight: Tensor) -> tuple[int, int]:
    return weight.shape[2], weight.shape[3]


def _output(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int]:
    return geometry.output(input.shape[2], input.shape[3], weight.shape[2], weight.shape[3])


def _choose(input: Tensor, weight: Tensor, geometry: Geometry) -> str:
    if geometry.stride != (1, 1) or weight.shape[1] < _VIEWS_CHANNELS:
        return "im2col"
    padded = geometry.padded(input.shape[2], input.shape[3])
    output = geometry.output(input.shape[2], input.shape[3], weight.shape[2], weight.shape[3])
    return "views" if prod(padded) <= _VIEWS_WASTE * prod(output) else "im2col"


def _by_rows(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    groups, kernel = geometry.groups, (weight.shape[2], weight.shape[3])
    output = geometry.output(input.shape[2], input.shape[3], *kernel)
    filters = _filters(weight, groups)
    offset = None if bias is None else bias.reshape(groups, 1, -1)
    row_bytes = prod(output) * prod(kernel) * input.shape[1] * input.element_size()

    def product(part: slice) -> Tensor:
        rows = window_rows(input[part], kernel, output, geometry)
        values = rows @ filters if offset is None else torch.baddbmm(offset, rows, filters)
        samples = values.shape[1] // prod(output)
        return values.transpose(0, 1).reshape(samples, *output, weight.shape[0])

    least = weight.numel() * weight.element_size()
    return _over_parts(product, input.shape[0], row_bytes, input.device, least).permute(0, 3, 1, 2)


def _by_views(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    groups, (outputs, channels, k_h, k_w) = geometry.groups, weight.shape
    (d_h, d_w), (top, bottom, left, right) = geometry.dilation, geometry.padding
    height, width = geometry.padded(input.shape[2], input.shape[3])
    rows, columns = geometry.output(input.shape[2], input.shape[3], k_h, k_w)
    dtype = opmath_dtype(input.dtype)
    filters = weight.reshape(groups, outputs // groups, channels, k_h, k_w).permute(3, 4, 0, 2, 1).to(dtype)
    # the last tap of the last pixel looks past the end by the kernel's reach
    beyond = (k_h - 1) * d_h + -(-(k_w - 1) * d_w // width)

    def product(part: slice) -> Tensor:
        planes = pad_constant(input[part].permute(0, 2, 3, 1).to(dtype), (0, 0, left, right, top, bottom))
        count = planes.shape[0]
        pixels = pad_constant(planes.reshape(count * height, width, groups * channels), (0, 0, 0, 0, 0, beyond))
        matrix = pixels.reshape((count * height + beyond) * width, groups, channels).transpose(0, 1)
        total = None
        for k in range(k_h):
            for j in range(k_w):
                seen = matrix.narrow(1, k * d_h * width + j * d_w, count * height * width)
                if total is None:
                    total = torch.bmm(seen, filters[k, j])
                else:
                    total.baddbmm_(seen, filters[k, j])
        assert total is not None
        values = total.transpose(0, 1).reshape(count, height, width, outputs).narrow(1, 0, rows).narrow(2, 0, columns)
        return values.to(input.dtype) if bias is None else (values + bias).to(input.dtype)

    row_bytes = height * width * (groups * channels + outputs) * dtype.itemsize
    return _over_parts(product, input.shape[0], row_bytes, input.device).permute(0, 3, 1, 2)


def _over_parts(
    product: Callable[[slice], Tensor], count: int, row_bytes: int, device: torch.device, least: int = 0
) -> Tensor:
    """The products of all parts of the batch, one below the other."""
    whole = None
    for part in parts(count, row_bytes, device, least):
        values = product(part)
        if values.shape[0] == count:
            return values
        if whole is None:
            whole = values.new_empty(count, *values.shape[1:])
        whole[part].copy_(values)
    return product(slice(0, 0)) if whole is None else whole


def _error_rows(grad: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """The output's gradient as rows ``(groups, N·H'·W', O/groups)``."""
    rows = grad.permute(0, 2, 3, 1).to(dtype)
    return rows.reshape(prod(rows.shape[:3]), groups, grad.shape[1] // groups).transpose(0, 1)


def _filters(weight: Tensor, groups: int) -> Tensor:
    """The kernel as matrices ``(groups, f_h·f_w·C/groups, O/groups)``."""
    outputs, channels, k_h, k_w = weight.shape
    split = weight.reshape(groups, outputs // groups, channels, k_h, k_w)
    return split.permute(0, 3, 4, 2, 1).reshape(groups, k_h * k_w * channels, outputs // groups)
