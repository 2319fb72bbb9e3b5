"""The three products of a convolution (output, gradient of the input, gradient of the weight) as matrix products.

Each gathers the windows of the padded input into rows, ``(N·H'·W', f_h·f_w·C)``, and multiplies. Rows are laid out with
the channels last, so that a window's row of ``f_w·C`` numbers is copied as one run, and made for a few samples at a
time, so that they stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._dispatch import opmath_dtype

# Measured: 1-4 MB of rows a product is fastest on CPU caches; CUDA wants few, large products.
_ROW_BYTES_CPU = 2 << 20
_ROW_BYTES_OTHER = 512 << 20


@dataclass(frozen=True)
class Geometry:
    """Stride, padding (top, bottom, left, right), dilation and number of groups."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Size of the input with its padding."""
        top, bottom, left, right = self.padding
        return height + top + bottom, width + left + right

    def reach(self, k_h: int, k_w: int) -> tuple[int, int]:
        """Size of the dilated kernel."""
        return self.dilation[0] * (k_h - 1) + 1, self.dilation[1] * (k_w - 1) + 1

    def output(self, height: int, width: int, k_h: int, k_w: int) -> tuple[int, int]:
        """Size of the output, floor((h + 2p - d(f - 1) - 1)/s) + 1."""
        (rows, columns), (r_h, r_w) = self.padded(height, width), self.reach(k_h, k_w)
        return (rows - r_h) // self.stride[0] + 1, (columns - r_w) // self.stride[1] + 1

    def repeated(self, times: int) -> Geometry:
        """The same with ``times`` as many groups."""
        return replace(self, groups=self.groups * times)


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``C(x, w) + b``: the output, channels last in memory."""
    count, groups, kernel = input.shape[0], geometry.groups, (weight.shape[2], weight.shape[3])
    output = geometry.output(input.shape[2], input.shape[3], *kernel)
    filters = _filters(weight, groups)
    offset = None if bias is None else bias.reshape(groups, 1, -1)
    row_bytes = prod(output) * prod(kernel) * input.shape[1] * input.element_size()

    def product(part: slice) -> Tensor:
        rows = _window_rows(input[part], kernel, output, geometry)
        values = rows @ filters if offset is None else torch.baddbmm(offset, rows, filters)
        return values.transpose(0, 1).reshape(-1, *output, weight.shape[0])

    return _over_parts(product, count, row_bytes, input.device).permute(0, 3, 1, 2)


def convolve_input(grad: Tensor, weight: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """``T(g, w)``: each output's gradient spread over its window; ``size`` is the input's height and width."""
    groups, (k_h, k_w), (o_h, o_w) = geometry.groups, weight.shape[2:], grad.shape[2:]
    (height, width), channels, dtype = geometry.padded(*size), weight.shape[1], opmath_dtype(grad.dtype)
    (s_h, s_w), (d_h, d_w), (top, _, left, _) = geometry.stride, geometry.dilation, geometry.padding
    filters = _filters(weight, groups).transpose(1, 2).to(dtype)

    def product(part: slice) -> Tensor:
        errors = _error_rows(grad[part], groups, dtype)
        samples = errors.shape[1] // (o_h * o_w)
        rows = (errors @ filters).view(groups, samples, o_h, o_w, k_h, k_w, channels)
        spread = rows.new_zeros(samples, height, width, groups, channels)
        for i in range(k_h):
            for j in range(k_w):
                window = _every(_every(spread, 1, i * d_h, o_h, s_h), 2, j * d_w, o_w, s_w)
                window += rows[:, :, :, :, i, j].permute(1, 2, 3, 0, 4)
        inner = spread.narrow(1, top, size[0]).narrow(2, left, size[1])
        return inner.reshape(samples, *size, groups * channels).to(grad.dtype)

    row_bytes = o_h * o_w * k_h * k_w * groups * channels * dtype.itemsize
    return _over_parts(product, grad.shape[0], row_bytes, grad.device).permute(0, 3, 1, 2)


def convolve_weight(grad: Tensor, input: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``: each window of the input weighted by its output's gradient; ``size`` is the kernel's."""
    groups, output, dtype = geometry.groups, (grad.shape[2], grad.shape[3]), opmath_dtype(grad.dtype)
    channels = input.shape[1] // groups
    total = None
    for part in _parts(input.shape[0], prod(output) * prod(size) * input.shape[1] * dtype.itemsize, input.device):
        rows = _window_rows(input[part].to(dtype), size, output, geometry)
        product = _error_rows(grad[part], groups, dtype).transpose(1, 2) @ rows
        total = product if total is None else total.add_(product)
    if total is None:
        return grad.new_zeros(grad.shape[1], channels, *size)
    weight = total.reshape(grad.shape[1], *size, channels).permute(0, 3, 1, 2)
    return weight.to(grad.dtype).contiguous()


def _over_parts(product: Callable[[slice], Tensor], count: int, row_bytes: int, device: torch.device) -> Tensor:
    """The products of all parts of the batch, one below the other."""
    whole = None
    for part in _parts(count, row_bytes, device):
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


def _every(tensor: Tensor, dim: int, start: int, count: int, step: int) -> Tensor:
    """``count`` elements of a dimension, ``step`` apart; ``narrow``, unlike a whole slice, works in every vmap."""
    run = tensor.narrow(dim, start, (count - 1) * step + 1)
    return run if step == 1 else run[(slice(None),) * dim + (slice(None, None, step),)]


def _filters(weight: Tensor, groups: int) -> Tensor:
    """The kernel as matrices ``(groups, f_h·f_w·C/groups, O/groups)``."""
    outputs, channels, k_h, k_w = weight.shape
    split = weight.reshape(groups, outputs // groups, channels, k_h, k_w)
    return split.permute(0, 3, 4, 2, 1).reshape(groups, k_h * k_w * channels, outputs // groups)


def _window_rows(input: Tensor, kernel: tuple[int, int], output: tuple[int, int], geometry: Geometry) -> Tensor:
    """The windows of ``input`` as rows ``(groups, N·H'·W', f_h·f_w·C/groups)``."""
    top, bottom, left, right = geometry.padding
    planes = input.permute(0, 2, 3, 1)
    if any(geometry.padding):
        planes = pad_constant(planes, (0, 0, left, right, top, bottom))
    count, groups = input.shape[0], geometry.groups
    channels = input.shape[1] // groups
    planes = planes.contiguous()
    n, h, w, c = planes.stride()
    (s_h, s_w), (d_h, d_w) = geometry.stride, geometry.dilation
    windows = planes.as_strided(
        (groups, count, *output, *kernel, channels),
        (c * channels, n, h * s_h, w * s_w, h * d_h, w * d_w, c),
    )
    return windows.reshape(groups, count * output[0] * output[1], kernel[0] * kernel[1] * channels)


def _parts(count: int, bytes_per_sample: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch whose rows fit the device's budget."""
    budget = _ROW_BYTES_CPU if device.type == "cpu" else _ROW_BYTES_OTHER
    size = max(1, budget // max(1, bytes_per_sample))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
