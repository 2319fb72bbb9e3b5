"""Pooling over planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._dispatch import call, memory_format_of, opmath_dtype, scalar_type_name


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    r"""Largest element of each window, :math:`y_{ij} = \max_{k,l} x_{is + kd - p,\; js + ld - p}`.

    Of equal elements the first in row-major order counts (and gets the gradient); of several NaN the last.

    Args:
        input: shape :math:`(N, C, H, W)` or :math:`(C, H, W)`.
        kernel_size, stride, padding, dilation: a number or a pair (rows, columns); ``stride`` defaults to
            ``kernel_size``, and the padding, at most half the kernel, is never chosen.
        ceil_mode: let a last window begin inside the input and reach over its edge.
        return_indices: return also where each maximum stands, as ``row * W + column``.

    Returns:
        the maxima, or (maxima, int64 indices); ``channels_last`` where ``input`` is.

    Raises:
        RuntimeError: shapes or options do not fit; the text is PyTorch's.
        NotImplementedError: the dtype is boolean or complex.

    Source: F9; N1, N4. PyTorch: :func:`torch.nn.functional.max_pool2d`.
    """
    windows = _windows(input, kernel_size, stride, padding, dilation, ceil_mode)
    values, indices = call(_MaxPool2d, _composition, input, windows)
    layout = memory_format_of(input)
    values = values.contiguous(memory_format=layout)
    return (values, indices.contiguous(memory_format=layout)) if return_indices else values


@dataclass(frozen=True)
class _Windows:
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]


def _windows(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> _Windows:
    kernel = _pair(kernel_size, "kernel_size must either be a single int, or a tuple of two ints")
    step = kernel
    # An empty sequence, too, stands for "as the kernel".
    if stride is not None and not (isinstance(stride, Sequence) and len(stride) == 0):
        step = _pair(stride, "stride must either be omitted, a single int, or a tuple of two ints")
    pad = _pair(padding, "padding must either be a single int, or a tuple of two ints")
    dil = _pair(dilation, "dilation must be either a single int, or a tuple of two ints")
    _check_input(input)
    if min(step) == 0:
        raise RuntimeError("stride should not be zero")
    if min(kernel) <= 0 or min(step) < 0:
        raise RuntimeError(f"kernel_size and stride should be greater than zero, but got {kernel} and {step}")
    if min(dil) <= 0:
        raise RuntimeError(f"dilation should be greater than zero, but got dilationH: {dil[0]} dilationW: {dil[1]}")
    sizes = [_length(input.shape[d], kernel[d], step[d], pad[d], dil[d], ceil_mode) for d in (-2, -1)]
    if 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        raise RuntimeError(
            "pad should be smaller than or equal to half of kernel size, but got "
            f"padW = {pad[1]}, padH = {pad[0]}, kW = {kernel[1]}, kH = {kernel[0]}"
        )
    if min(sizes) < 1:
        planes, height, width = input.shape[-3:]
        raise RuntimeError(
            f"Given input size: ({planes}x{height}x{width}). "
            f"Calculated output size: ({planes}x{sizes[0]}x{sizes[1]}). Output size is too small"
        )
    return _Windows(kernel, step, pad, dil, (sizes[0], sizes[1]))


def _pair(value: int | Sequence[int], message: str) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) not in (1, 2):
        raise RuntimeError(f"max_pool2d: {message}")
    return values[0], values[-1]


def _check_input(input: Tensor) -> None:
    if input.dim() not in (3, 4):
        raise RuntimeError("non-empty 3D or 4D (batch mode) tensor expected for input")
    if 0 in input.shape[-3:]:
        raise RuntimeError(
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got:{list(input.shape)}"
        )
    if input.dtype == torch.bool or input.is_complex():
        raise NotImplementedError(f"\"max_pool2d\" not implemented for '{scalar_type_name(input.dtype)}'")


def _length(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> int:
    """Number of windows along one dimension."""
    if pad < 0:
        raise RuntimeError(f"pad must be non-negative, but got pad: {pad}")
    reach = dilation * (kernel - 1) + 1
    if pad > reach // 2:
        raise RuntimeError(
            "pad should be at most half of effective kernel size, "
            f"but got pad={pad}, kernel_size={kernel} and dilation={dilation}"
        )
    if any(start % dilation >= size for start in range(-pad, 0, stride)):
        raise RuntimeError(
            f"pad={pad}, kernel_size={kernel} and dilation={dilation} over an input of size {size} "
            "leave a window in the padding alone, and every window must hold an element of the input"
        )
    length = (size + 2 * pad - reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (length - 1) * stride >= size + pad:
        length -= 1
    return length


def _search(input: Tensor, windows: _Windows) -> tuple[Tensor, Tensor]:
    """Maxima and their places, one kernel tap after the other."""
    (o_h, o_w), (s_h, s_w), (d_h, d_w) = windows.output, windows.stride, windows.dilation
    height, width = input.shape[-2:]
    lowest = -torch.inf if input.is_floating_point() else torch.iinfo(input.dtype).min
    (top, left), (k_h, k_w) = windows.padding, windows.kernel
    below = max(0, (o_h - 1) * s_h + d_h * (k_h - 1) + 1 - height - top)
    beside = max(0, (o_w - 1) * s_w + d_w * (k_w - 1) + 1 - width - left)
    padded = pad_constant(input, (left, beside, top, below), value=lowest)
    rows, columns = (
        torch.arange(n, device=input.device) * s - p
        for n, s, p in zip((o_h, o_w), (s_h, s_w), (top, left), strict=True)
    )
    # A window of nothing but the lowest value keeps the place where it enters the input.
    entry = [
        start - (start < 0) * start.div(d, rounding_mode="floor") * d for start, d in ((rows, d_h), (columns, d_w))
    ]
    places = (entry[0].unsqueeze(1) * width + entry[1]).expand(*input.shape[:-2], o_h, o_w)
    best = input.new_full((), lowest).expand(places.shape)
    for i in range(k_h):
        for j in range(k_w):
            tap = padded[..., i * d_h : i * d_h + (o_h - 1) * s_h + 1 : s_h, :]
            tap = tap[..., j * d_w : j * d_w + (o_w - 1) * s_w + 1 : s_w]
            better = (tap > best) | (tap != tap)
            best = torch.where(better, tap, best)
            here = (rows + i * d_h).unsqueeze(1) * width + (columns + j * d_w)
            places = torch.where(better, here, places)
    return best, places


def _composition(input: Tensor, windows: _Windows) -> tuple[Tensor, Tensor]:
    _, places = _search(input.detach(), windows)
    values = input.flatten(-2).gather(-1, places.flatten(-2))
    return values.unflatten(-1, windows.output), places


class _MaxPool2d(torch.autograd.Function):
    r"""The gradient of each maximum goes to where it stood."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, windows: _Windows) -> tuple[Tensor, Tensor]:
        return _search(input, windows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.plane = inputs[0].shape[-2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        height, width = ctx.plane
        outer, count = grad.shape[:-2], grad.shape[-2] * grad.shape[-1]
        flat = grad.to(opmath_dtype(grad.dtype)).reshape(*outer, count)
        spread = flat.new_zeros(*outer, height * width).scatter_add(-1, places.reshape(*outer, count), flat)
        return spread.reshape(*outer, height, width).to(grad.dtype), None


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    r"""Mean over a grid of windows that cover the input: window :math:`i` of :math:`m` over :math:`h` rows holds the
    rows from :math:`\lfloor i h/m \rfloor` up to, without it, :math:`\lceil (i + 1) h/m \rceil`.

    Args:
        input: shape :math:`(N, C, H, W)` or :math:`(C, H, W)`.
        output_size: rows and columns of the result, one number for both, ``None`` for the input's; 1 is global
            average pooling.

    Raises:
        RuntimeError: shapes or sizes do not fit; the text is PyTorch's.
        NotImplementedError: the dtype is not floating-point.

    Source: F9; N1, N4. PyTorch: :func:`torch.nn.functional.adaptive_avg_pool2d`.
    """
    wanted: Sequence[int | None] = (
        (output_size, output_size) if output_size is None or isinstance(output_size, int) else output_size
    )
    if len(wanted) != 2:
        raise RuntimeError("adaptive_avg_pool2d: output_size must be 2")
    if input.dim() not in (3, 4):
        raise RuntimeError(f"adaptive_avg_pool2d(): Expected 3D or 4D tensor, but got {list(input.shape)}")
    sizes = [n if size is None else size for n, size in zip(input.shape[-2:], wanted, strict=True)]
    if min(sizes) < 0:
        raise RuntimeError(
            "adaptive_avg_pool2d: elements of output_size must be greater than or equal to 0 "
            f"but received {{{sizes[0]}, {sizes[1]}}}"
        )
    for d in range(1 - input.dim() % 2 or 1, input.dim()):
        if input.shape[d] == 0:
            raise RuntimeError(
                "adaptive_avg_pool2d(): Expected input to have non-zero size for non-batch dimensions, "
                f"but input has sizes {list(input.shape)} with dimension {d} being empty"
            )
    if not input.is_floating_point():
        raise NotImplementedError(f"\"adaptive_avg_pool2d\" not implemented for '{scalar_type_name(input.dtype)}'")
    output: Tensor = call(_AdaptiveAvgPool2d, _means, input, (sizes[0], sizes[1]))
    return output.contiguous(memory_format=memory_format_of(input))


def _bounds(index: int, windows: int, length: int) -> tuple[int, int]:
    return index * length // windows, -((index + 1) * length // -windows)


def _window_sums(input: Tensor, dim: int, windows: int) -> Tensor:
    """Sums over the adaptive windows along one dimension.

    The relation "element h lies in window i" reads the same from both sides, so that the transposed map is this
    function with the two lengths exchanged.
    """
    length = input.shape[dim]
    if windows == 0 or length == 1:
        return input.narrow(dim, 0, min(length, windows)).expand(*input.shape[:dim], windows, *input.shape[dim:][1:])
    if windows == 1:
        return input.sum(dim, keepdim=True)
    parts = (_bounds(i, windows, length) for i in range(windows))
    return torch.stack([input.narrow(dim, start, end - start).sum(dim) for start, end in parts], dim)


def _counts(length: int, windows: int, like: Tensor) -> Tensor:
    ends = (_bounds(i, windows, length) for i in range(windows))
    return torch.tensor([end - start for start, end in ends], dtype=like.dtype, device=like.device)


def _areas(plane: tuple[int, int], sizes: tuple[int, int], like: Tensor) -> Tensor:
    return _counts(plane[0], sizes[0], like).unsqueeze(1) * _counts(plane[1], sizes[1], like)


def _means(input: Tensor, sizes: tuple[int, int]) -> Tensor:
    x = input.to(opmath_dtype(input.dtype))
    rows, columns = input.dim() - 2, input.dim() - 1
    sums = _window_sums(_window_sums(x, rows, sizes[0]), columns, sizes[1])
    return (sums / _areas((input.shape[-2], input.shape[-1]), sizes, x)).to(input.dtype)


class _AdaptiveAvgPool2d(torch.autograd.Function):
    r"""Each element gets the gradients of the windows that hold it, each divided by its window's area."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, sizes: tuple[int, int]) -> Tensor:
        return _means(input, sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.sizes = inputs
        ctx.plane = (input.shape[-2], input.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        g = grad.to(opmath_dtype(grad.dtype))
        g = g / _areas(ctx.plane, ctx.sizes, g)
        spread = _window_sums(_window_sums(g, g.dim() - 2, ctx.plane[0]), g.dim() - 1, ctx.plane[1])
        return spread.to(grad.dtype), None
