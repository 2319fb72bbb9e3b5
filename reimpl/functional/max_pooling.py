"""Pooling by the largest element of each window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import call, memory_format_of
from reimpl.functional._options import check_flags, integer
from reimpl.functional._pooling.largest import Grid, learn, search, spread
from reimpl.functional._pooling.operators import max_pool
from reimpl.functional._pooling.windows import (
    Size,
    Windows,
    as_tuple,
    check_floating,
    check_reach,
    check_real,
    check_two_or_three,
    left_out,
    one,
    options_key,
    plan_windows,
    window_count,
)
from reimpl.functional.kernels import attempt


def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
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
    key = options_key("max_pool2d", kernel_size, stride, padding, dilation, flags=(ceil_mode,))
    done: Tensor | None = None if return_indices else attempt(key, input)
    if done is not None:
        return done
    check_flags(ceil_mode)
    windows = plan_windows("max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode)
    if input.numel():
        _refuse_windows_of_padding(input, windows)
    check_real("max_pool2d", input)
    return _pool(input, windows, return_indices, key)


def max_pool1d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    r"""Largest element of each window, :math:`y_i = \max_k x_{is + kd - p}`; see :func:`max_pool2d`.

    Args:
        input: shape :math:`(N, C, L)` or :math:`(C, L)`; integers only with ``return_indices``, as in PyTorch.
        kernel_size, stride, padding, dilation: a number; ``stride`` defaults to ``kernel_size``.
        ceil_mode, return_indices: see :func:`max_pool2d`.

    Raises:
        RuntimeError: shapes or options do not fit; the text is PyTorch's.
        NotImplementedError: the dtype is not floating-point.

    Source: F9; N1, N4. PyTorch: :func:`torch.nn.functional.max_pool1d`.
    """
    if return_indices:
        check_two_or_three("max_pool1d", input)
        kernel = one("max_pool1d", "kernel_size", kernel_size)
        step = kernel if left_out(stride) else one("max_pool1d", "stride", stride)
        pad, dil = one("max_pool1d", "padding", padding), one("max_pool1d", "dilation", dilation)
        values, places = max_pool2d(input.unsqueeze(-2), (1, kernel), (1, step), (0, pad), (1, dil), ceil_mode, True)
        return values.squeeze(-2), places.squeeze(-2)
    check_flags(ceil_mode)
    windows = _plan_line(input, kernel_size, stride, padding, dilation, ceil_mode)
    check_floating("max_pool1d_impl", input)
    return _pool(input.unsqueeze(-2), windows, False).squeeze(-2)


def adaptive_max_pool2d(input: Tensor, output_size: int | Sequence[int | None], return_indices: bool = False) -> Any:
    r"""Largest element of each window of a grid that covers the input, as in :func:`adaptive_avg_pool2d`.

    Args:
        input: shape :math:`(N, C, H, W)` or :math:`(C, H, W)`.
        output_size: rows and columns of the result, one number for both, ``None`` for the input's.
        return_indices: return also where each maximum stands, as ``row * W + column``.

    Raises:
        ValueError, RuntimeError: shapes or sizes do not fit; the text is PyTorch's.
        NotImplementedError: the dtype is not floating-point.

    Source: F9. PyTorch: :func:`torch.nn.functional.adaptive_max_pool2d`.
    """
    key = options_key("adaptive_max_pool2d", output_size)
    done: Tensor | None = None if return_indices else attempt(key, input)
    if done is not None:
        return done
    if not isinstance(output_size, int) and input.dim() <= len(output_size):
        raise ValueError(f"Input dimension should be at least {len(output_size) + 1}")
    wanted = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if input.dim() not in (3, 4):
        raise RuntimeError(f"adaptive_max_pool2d(): Expected 3D or 4D tensor, but got: {list(input.shape)}")
    for d in range(1, input.dim()):
        if input.shape[d] == 0:
            raise RuntimeError(
                "adaptive_max_pool2d(): Expected input to have non-zero size for non-batch dimensions, "
                f"but input has sizes {list(input.shape)} with dimension {d} being empty"
            )
    if len(wanted) != 2:
        raise RuntimeError("adaptive_max_pool2d(): internal error: output_size.size() must be 2")
    rows, columns = (n if size is None else integer(size) for n, size in zip(input.shape[-2:], wanted, strict=True))
    shape = [*input.shape[:-2], rows, columns]
    if min(rows, columns) < 0:
        raise RuntimeError(f"Trying to create tensor with negative dimension {min(shape)}: {shape}")
    check_floating("adaptive_max_pool2d", input)
    return _pool(input, Grid((rows, columns)), return_indices, key)


def _plan_line(
    input: Tensor, kernel_size: Size, stride: Size | None, padding: Size, dilation: Size, ceil_mode: bool
) -> Windows:
    """The windows of ``max_pool1d``, as rows of one; its checks have words of their own."""
    if input.dim() not in (2, 3) or 0 in input.shape[-2:]:
        raise RuntimeError(
            "max_pool1d: Expected 2D or 3D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got:{list(input.shape)}"
        )
    numbers: dict[str, int] = {}
    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, option in options.items():
        given = kernel_size if name == "stride" and left_out(stride) else option
        values = as_tuple(given)
        if len(values) != 1:
            kinds = {
                "stride": "None, an int, list of ints, or tuple of ints",
                "padding": "an int, list of ints, or tuple of ints",
            }.get(name, "an int, list of ints or tuple of ints")
            raise RuntimeError(f"max_pool1d() {name} must be {kinds} of size 1 but got size {len(values)}")
        numbers[name] = values[0]
    for name in ("kernel_size", "stride"):
        if numbers[name] <= 0:
            raise RuntimeError(f"max_pool1d() {name} must be greater than zero, but got {numbers[name]}")
    kernel, step, pad, dil = numbers.values()
    if pad < 0:
        raise RuntimeError(f"max_pool1d() padding must be non-negative, but got {pad}")
    if pad > kernel // 2:
        raise RuntimeError(
            "max_pool1d() padding should be at most half of kernel size, "
            f"but got padding={pad} and kernel_size={kernel}"
        )
    if dil <= 0:
        raise RuntimeError(f"max_pool1d() dilation must be greater than zero, but got {dil}")
    reach = dil * (kernel - 1) + 1
    check_reach(reach, kernel, dil)
    length = window_count(input.shape[-1], reach, step, pad, ceil_mode)
    if length <= 0:
        raise RuntimeError(f"max_pool1d() Invalid computed output size: {length}")
    return Windows((1, kernel), (1, step), (0, pad), (1, dil), (1, length))


def _refuse_windows_of_padding(input: Tensor, windows: Windows) -> None:
    for size, kernel, stride, pad, dilation in zip(
        input.shape[-2:], windows.kernel, windows.stride, windows.padding, windows.dilation, strict=True
    ):
        if any(start % dilation >= size for start in range(-pad, 0, stride)):
            raise RuntimeError(
                f"pad={pad}, kernel_size={kernel} and dilation={dilation} over an input of size {size} "
                "leave a window in the padding alone, and every window must hold an element of the input"
            )


def _pool(input: Tensor, windows: Windows | Grid, return_indices: bool, key: tuple[object, ...] | None = None) -> Any:
    operator = _operator if isinstance(windows, Windows) and input.is_cpu and input.is_floating_point() else None
    values, indices = call(_MaxPool, _composition, input, windows, not return_indices, operator=operator)
    layout = memory_format_of(input)
    values = values.contiguous(memory_format=layout)
    learn(key, input, values, windows)
    return (values, indices.contiguous(memory_format=layout)) if return_indices else values


def _operator(input: Tensor, windows: Windows, steps: bool) -> tuple[Tensor, Tensor]:
    return max_pool(input, windows)


def _composition(input: Tensor, windows: Windows | Grid, steps: bool) -> tuple[Tensor, Tensor]:
    _, places = search(input.detach(), windows)
    values = input.flatten(-2).gather(-1, places.flatten(-2))
    return values.unflatten(-1, windows.output), places


class _MaxPool(torch.autograd.Function):
    r"""The gradient of each maximum goes to where it stood."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, windows: Windows | Grid, steps: bool) -> tuple[Tensor, Tensor]:
        return search(input, windows, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        input, ctx.windows, _ = inputs
        ctx.plane, ctx.layout = (input.shape[-2], input.shape[-1]), memory_format_of(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return spread(grad, places, ctx.plane, ctx.windows, ctx.layout), None, None
