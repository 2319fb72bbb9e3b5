"""Pooling by the mean of each window."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._dispatch import call, memory_format_of, opmath_dtype
from reimpl.functional._options import check_flags, integer
from reimpl.functional._pooling import plain as _pooling_plain
from reimpl.functional._pooling.windows import (
    Size,
    Windows,
    adaptive_bounds,
    check_floating,
    check_two_or_three,
    left_out,
    one,
    options_key,
    plan_windows,
)
from reimpl.functional.kernels import attempt, final_kernels_for, kernels_for, teach

_KERNELS = "_pooling.numba"


def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    r"""Mean of each window, :math:`y_{ij} = \frac{1}{m_{ij}} \sum_{k,l} x_{is + k - p,\; js + l - p}`.

    Args:
        input: shape :math:`(N, C, H, W)` or :math:`(C, H, W)`, a floating-point dtype or int64.
        kernel_size, stride, padding: a number or a pair (rows, columns); ``stride`` defaults to ``kernel_size``, and
            the padding, at most half the kernel, holds zeros.
        ceil_mode: let a last window begin inside the input and reach over its edge.
        count_include_pad: whether :math:`m` counts the elements of the padding.
        divisor_override: take this number for every :math:`m`.

    Returns:
        the means, ``channels_last`` where ``input`` is.

    Raises:
        RuntimeError: shapes or options do not fit; the text is PyTorch's.
        IndexError: ``input`` has fewer than three dimensions.
        NotImplementedError: the dtype is none of the above.

    Source: F9; N1, N4. PyTorch: :func:`torch.nn.functional.avg_pool2d`.
    """
    flags = (ceil_mode, count_include_pad)
    key = options_key("avg_pool2d", kernel_size, stride, padding, divisor_override, flags=flags)
    done: Tensor | None = attempt(key, input)
    if done is not None:
        return done
    check_flags(*flags)
    divisor_override = None if divisor_override is None else integer(divisor_override)
    if divisor_override == 0:
        raise RuntimeError("divisor must be not zero")
    windows = plan_windows("avg_pool2d", input, kernel_size, stride, padding, 1, ceil_mode)
    if input.dtype != torch.int64:
        check_floating("avg_pool2d", input)
    output: Tensor = call(_AvgPool, _windowed_means, input, windows, count_include_pad, divisor_override)
    output = output.contiguous(memory_format=memory_format_of(input))
    kernels = kernels_for(_KERNELS, input, output)
    if key and kernels and kernels.worth_it(input):
        lines = kernels.bounds(windows, (input.shape[-2], input.shape[-1]), count_include_pad, divisor_override)
        teach(key, kernels, _through_windows, input, output, lines, None)
    return output


def avg_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    r"""Mean of each window, :math:`y_i = \frac{1}{m_i} \sum_k x_{is + k - p}`; see :func:`avg_pool2d`.

    Args:
        input: shape :math:`(N, C, L)` or :math:`(C, L)`.

    Source: F9; N1, N4. PyTorch: :func:`torch.nn.functional.avg_pool1d`.
    """
    check_two_or_three("avg_pool1d", input)
    kernel = one("avg_pool1d", "kernel_size", kernel_size)
    step = kernel if left_out(stride) else one("avg_pool1d", "stride", stride)
    pad = one("avg_pool1d", "padding", padding)
    plane = input.unsqueeze(-2)
    return avg_pool2d(plane, (1, kernel), (1, step), (0, pad), ceil_mode, count_include_pad).squeeze(-2)


def adaptive_avg_pool1d(input: Tensor, output_size: Size) -> Tensor:
    r"""Mean over windows that cover the input, as in :func:`adaptive_avg_pool2d`, to length ``output_size``.

    Args:
        input: shape :math:`(N, C, L)` or :math:`(C, L)`.

    Source: F9. PyTorch: :func:`torch.nn.functional.adaptive_avg_pool1d`.
    """
    check_two_or_three("adaptive_avg_pool1d", input)
    length = one("adaptive_avg_pool1d", "output_size", output_size)
    return adaptive_avg_pool2d(input.unsqueeze(-2), (1, length)).squeeze(-2)


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    r"""Mean over a grid of windows that cover the input: window :math:`i` of :math:`m` over :math:`h` rows holds the
    rows from :math:`\lfloor i h/m \rfloor` up to, without it, :math:`\lceil (i + 1) h/m \rceil`.

    Args:
        input: shape :math:`(N, C, H, W)` or :math:`(C, H, W)`.
        output_size: rows and columns of the result, one number for both, ``None`` in a pair for the input's; 1 is
            global average pooling, which takes any number of dimensions from two on, empty planes (their mean is NaN)
            and complex numbers too.

    Raises:
        ValueError, RuntimeError: shapes or sizes do not fit; the text is PyTorch's.
        IndexError: there are fewer than two dimensions to take the mean of.
        NotImplementedError: the dtype is not floating-point.

    Source: F9; N1, N4. PyTorch: :func:`torch.nn.functional.adaptive_avg_pool2d`.
    """
    key = options_key("adaptive_avg_pool2d", output_size)
    done: Tensor | None = attempt(key, input)
    if done is not None:
        return done
    if not isinstance(output_size, int) and input.dim() <= len(output_size):
        raise ValueError(f"Input dimension should be at least {len(output_size) + 1}")
    wanted = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(wanted) != 2:
        raise RuntimeError("adaptive_avg_pool2d: output_size must be 2")
    rows, columns = (integer(input.shape[d] if wanted[d] is None else wanted[d]) for d in (-2, -1))
    if min(rows, columns) < 0:
        raise RuntimeError(
            "adaptive_avg_pool2d: elements of output_size must be greater than or equal to 0 "
            f"but received {{{rows}, {columns}}}"
        )
    if (rows, columns) == (1, 1) and not _is_ordinary(input):
        return _mean(input)
    _check_planes(input, 0 in (rows, columns))
    output: Tensor = call(_AdaptiveAvgPool2d, _means, input, (rows, columns))
    output = output.contiguous(memory_format=memory_format_of(input))
    kernels = kernels_for(_KERNELS, input, output)
    if key and kernels and kernels.worth_it(input) and output.numel():
        lines = kernels.adaptive((rows, columns), (input.shape[-2], input.shape[-1]))
        teach(key, kernels, _through_grid, input, output, lines, None)
    return output


def _is_ordinary(input: Tensor) -> bool:
    """Whether there are planes of real floating-point numbers; PyTorch's means of whole ones are any tensor's."""
    return input.dim() in (3, 4) and input.is_floating_point() and 0 not in input.shape[-2:]


def _mean(input: Tensor) -> Tensor:
    """Means of whole planes; there need not be any."""
    mean = input.mean((-2, -1), keepdim=True)
    by_pixel = input.dim() == 4 and memory_format_of(input) is torch.channels_last
    # contiguous() would leave the strides of what is 1 long as they are
    return mean.clone(memory_format=torch.channels_last) if by_pixel else mean


def _check_planes(input: Tensor, empty: bool) -> None:
    """Raise PyTorch's errors where the windows of a grid cannot be laid over the input, or its dtype has no means."""
    if input.dim() not in (3, 4):
        raise RuntimeError(f"adaptive_avg_pool2d(): Expected 3D or 4D tensor, but got {list(input.shape)}")
    for d in (input.dim() - 2, input.dim() - 1):
        if input.shape[d] == 0:
            raise RuntimeError(
                "adaptive_avg_pool2d(): Expected input to have non-zero size for non-batch dimensions, "
                f"but input has sizes {list(input.shape)} with dimension {d} being empty"
            )
    if input.numel() and not empty:
        check_floating("adaptive_avg_pool2d", input)


def _window_sums(input: Tensor, dim: int, kernel: int, stride: int, windows: int) -> Tensor:
    """Sums over the windows along one dimension, one tap after the other; the input is padded already."""
    every = (slice(None),) * dim + (slice(None, None, stride),)
    span = (windows - 1) * stride + 1

    def tap(k: int) -> Tensor:
        elements = input.narrow(dim, k, span)
        return elements if stride == 1 else elements[every]

    total = tap(0)
    for k in range(1, kernel):
        total = total + tap(k)
    return total


def _spread(grad: Tensor, dim: int, kernel: int, stride: int) -> Tensor:
    """The transposed map of :func:`_window_sums`: each window's number added to every element of the window."""
    windows = grad.shape[dim]
    if kernel <= stride:
        return _blocks(grad, dim, kernel, stride).narrow(dim, 0, (windows - 1) * stride + kernel)
    apart = _blocks(grad, dim, 1, stride).narrow(dim, 0, (windows - 1) * stride + 1)
    padded = pad_constant(apart, (0, 0) * (grad.dim() - 1 - dim) + (kernel - 1, kernel - 1))
    return _window_sums(padded, dim, kernel, 1, (windows - 1) * stride + kernel)


def _blocks(grad: Tensor, dim: int, count: int, length: int) -> Tensor:
    """Each number ``count`` times, followed by zeros up to ``length``."""
    block = grad.unsqueeze(dim + 1).expand(*grad.shape[: dim + 1], count, *grad.shape[dim + 1 :])
    filled = pad_constant(block, (0, 0) * (grad.dim() - 1 - dim) + (0, length - count))
    return filled.reshape(*grad.shape[:dim], grad.shape[dim] * length, *grad.shape[dim + 1 :])


def _divisors(
    windows: Windows, plane: tuple[int, int], include_pad: bool, override: int | None, like: Tensor
) -> Tensor | int:
    """What the sum over each window is divided by."""
    if override is not None:
        return override
    counts = []
    for size, kernel, stride, pad, length in zip(
        plane, windows.kernel, windows.stride, windows.padding, windows.output, strict=True
    ):
        starts = [i * stride - pad for i in range(length)]
        edge, first = (size + pad, -pad) if include_pad else (size, 0)
        inside = [min(start + kernel, edge) - max(start, first) for start in starts]
        counts.append(torch.tensor(inside, dtype=like.dtype, device=like.device))
    return counts[0].unsqueeze(1) * counts[1]


def _windowed_means(input: Tensor, windows: Windows, include_pad: bool, override: int | None) -> Tensor:
    plane = (input.shape[-2], input.shape[-1])
    x = input.to(opmath_dtype(input.dtype))
    overhang = windows.overhang(plane)
    sums = pad_constant(x, overhang) if any(overhang) else x
    for i, dim in enumerate((input.dim() - 2, input.dim() - 1)):
        sums = _window_sums(sums, dim, windows.kernel[i], windows.stride[i], windows.output[i])
    divisors = _divisors(windows, plane, include_pad, override, x)
    if x.is_floating_point():
        return (sums / divisors).to(input.dtype)
    return torch.div(sums, divisors, rounding_mode="trunc")


class _AvgPool(torch.autograd.Function):
    r"""Each element gets the gradients of the windows that hold it, each divided by :math:`m`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, windows: Windows, include_pad: bool, override: int | None) -> Tensor:
        kernels = kernels_for(_KERNELS, input)
        if kernels and kernels.worth_it(input):
            lines = kernels.bounds(windows, (input.shape[-2], input.shape[-1]), include_pad, override)
            return kernels.means(input, lines, windows.output)  # type: ignore[no-any-return]
        return _windowed_means(input, windows, include_pad, override)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, *ctx.options = inputs
        ctx.plane, ctx.layout = (input.shape[-2], input.shape[-1]), memory_format_of(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        windows, include_pad, override = ctx.options
        kernels = final_kernels_for(_KERNELS, grad)
        if kernels and kernels.worth_spreading(grad, ctx.plane):
            lines = kernels.bounds(windows, ctx.plane, include_pad, override)
            return kernels.spread(grad, lines, ctx.plane, ctx.layout), None, None, None
        return _over_windows(grad, windows, include_pad, override, ctx.plane, ctx.layout), None, None, None


def _over_windows(
    grad: Tensor,
    windows: Windows,
    include_pad: bool,
    override: int | None,
    plane: tuple[int, int],
    layout: torch.memory_format,
) -> Tensor:
    """The gradient of the input from that of the means of windows."""
    spread = grad.to(opmath_dtype(grad.dtype))
    spread = spread / _divisors(windows, plane, include_pad, override, spread)
    if layout == torch.channels_last and _pooling_plain.runs_plainly(spread):
        return _pooling_plain.spread(spread, windows, plane)
    for i, dim in enumerate((grad.dim() - 2, grad.dim() - 1)):
        spread = _spread(spread, dim, windows.kernel[i], windows.stride[i])
        # From the padded plane back to the plane: cut off what lies outside, and add what no window reached.
        before, size = windows.padding[i], plane[i]
        after = size - (spread.shape[dim] - before)
        spread = pad_constant(spread, (0, 0) * (grad.dim() - 1 - dim) + (-before, after))
    return spread.to(grad.dtype).contiguous(memory_format=layout)


def _through_windows(options: Any, grads: tuple[Tensor], saved: Any, numbers: Any, shape: Any) -> Tensor:
    """The same as the compiled node asks for it."""
    kernel_size, stride, padding, override, ceil_mode, include_pad = options
    (grad,) = grads
    windows = plan_windows("avg_pool2d", grad.new_empty(shape), kernel_size, stride, padding, 1, ceil_mode)
    return _over_windows(grad, windows, include_pad, override, (shape[-2], shape[-1]), memory_format_of(grad))


def _adaptive_sums(input: Tensor, dim: int, windows: int) -> Tensor:
    """Sums over the adaptive windows along one dimension.

    The relation "element h lies in window i" reads the same from both sides, so that the transposed map is this
    function with the two lengths exchanged.
    """
    length = input.shape[dim]
    if windows == 0 or length == 1:
        return input.narrow(dim, 0, min(length, windows)).expand(*input.shape[:dim], windows, *input.shape[dim:][1:])
    if windows == 1:
        return input.sum(dim, keepdim=True)
    if _pooling_plain.runs_plainly(input):
        return _pooling_plain.adaptive_sums(input, dim, windows)
    parts = (adaptive_bounds(i, windows, length) for i in range(windows))
    return torch.stack([input.narrow(dim, start, end - start).sum(dim) for start, end in parts], dim)


def _counts(length: int, windows: int, like: Tensor) -> Tensor:
    ends = (adaptive_bounds(i, windows, length) for i in range(windows))
    return torch.tensor([end - start for start, end in ends], dtype=like.dtype, device=like.device)


def _areas(plane: tuple[int, int], sizes: tuple[int, int], like: Tensor) -> Tensor:
    return _counts(plane[0], sizes[0], like).unsqueeze(1) * _counts(plane[1], sizes[1], like)


def _means(input: Tensor, sizes: tuple[int, int]) -> Tensor:
    rows, columns = input.dim() - 2, input.dim() - 1
    if sizes == (1, 1):
        return _mean(input)
    x = input.to(opmath_dtype(input.dtype))
    sums = _adaptive_sums(_adaptive_sums(x, rows, sizes[0]), columns, sizes[1])
    return (sums / _areas((input.shape[-2], input.shape[-1]), sizes, x)).to(input.dtype)


def _is_whole(tensor: Tensor, sizes: tuple[int, int], layout: torch.memory_format) -> bool:
    """Whether means are taken over whole planes, on CUDA, where PyTorch's reduction is as good as a kernel."""
    return sizes == (1, 1) and layout == torch.contiguous_format and not tensor.is_cpu


class _AdaptiveAvgPool2d(torch.autograd.Function):
    r"""Each element gets the gradients of the windows that hold it, each divided by its window's area."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, sizes: tuple[int, int]) -> Tensor:
        kernels = kernels_for(_KERNELS, input)
        if (
            kernels
            and not _is_whole(input, sizes, memory_format_of(input))
            and kernels.worth_it(input)
            and 0 not in sizes
        ):
            lines = kernels.adaptive(sizes, (input.shape[-2], input.shape[-1]))
            return kernels.means(input, lines, sizes)  # type: ignore[no-any-return]
        return _means(input, sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.sizes = inputs
        ctx.plane, ctx.layout = (input.shape[-2], input.shape[-1]), memory_format_of(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        kernels = final_kernels_for(_KERNELS, grad)
        if kernels and not _is_whole(grad, ctx.sizes, ctx.layout) and kernels.worth_spreading(grad, ctx.plane):
            return kernels.spread(grad, kernels.adaptive(ctx.sizes, ctx.plane), ctx.plane, ctx.layout), None
        return _over_grid(grad, ctx.plane, ctx.layout), None


def _over_grid(grad: Tensor, plane: tuple[int, int], layout: torch.memory_format) -> Tensor:
    """The gradient of the input from that of the means of a grid of windows."""
    sizes = (grad.shape[-2], grad.shape[-1])
    if sizes == (1, 1):
        return grad.expand(*grad.shape[:-2], *plane) / prod(plane)
    g = grad.to(opmath_dtype(grad.dtype))
    g = g / _areas(plane, sizes, g)
    spread = _adaptive_sums(_adaptive_sums(g, g.dim() - 2, plane[0]), g.dim() - 1, plane[1])
    return spread.to(grad.dtype).contiguous(memory_format=layout)


def _through_grid(options: Any, grads: tuple[Tensor], saved: Any, numbers: Any, shape: Any) -> Tensor:
    """The same as the compiled node asks for it."""
    (grad,) = grads
    return _over_grid(grad, (shape[-2], shape[-1]), memory_format_of(grad))
