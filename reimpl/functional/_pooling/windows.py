"""Where the windows of a pooling lie: sizes checked as PyTorch checks them, and the number of windows each way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import scalar_type_name
from reimpl.functional._options import integer

Size = int | Sequence[int]


@dataclass(frozen=True)
class Windows:
    """Numbers of rows and columns each: of a window, between windows, of padding, between taps, of the result."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    output: tuple[int, int]

    def overhang(self, plane: tuple[int, int]) -> tuple[int, int, int, int]:
        """How far the windows reach beyond the plane, in the order left, right, top, bottom."""
        beyond = [
            max(0, (n - 1) * s + d * (k - 1) + 1 - size - p)
            for n, s, d, k, size, p in zip(
                self.output, self.stride, self.dilation, self.kernel, plane, self.padding, strict=True
            )
        ]
        return self.padding[1], beyond[1], self.padding[0], beyond[0]


def options_key(name: str, *options: Any, flags: tuple[Any, ...] = ()) -> tuple[object, ...] | None:
    """The name and options of a layer as a key of a dictionary; ``None`` where they are not whole numbers, or pairs of
    them in a tuple, and the flags truth values: comparison takes others for these."""
    for option in options:
        kind = type(option)
        if kind is tuple:
            if not all(type(number) is int for number in option):
                return None
        elif kind is not int and option is not None:
            return None
    for flag in flags:
        if type(flag) is not bool:
            return None
    return name, *options, *flags


def plan_windows(
    name: str,
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
) -> Windows:
    """The windows of ``max_pool2d`` and ``avg_pool2d`` over a batch of planes.

    Raises:
        RuntimeError: shapes or options do not fit; the text is PyTorch's.
    """
    kernel = _pair(kernel_size, f"{name}: kernel_size must either be a single int, or a tuple of two ints")
    step = kernel
    if not left_out(stride):
        step = _pair(stride, f"{name}: stride must either be omitted, a single int, or a tuple of two ints")
    pad = _pair(padding, f"{name}: padding must either be a single int, or a tuple of two ints")
    dil = _pair(dilation, f"{name}: dilation must be either a single int, or a tuple of two ints")
    if name == "max_pool2d" and input.dim() not in (3, 4):
        raise RuntimeError("non-empty 3D or 4D (batch mode) tensor expected for input")
    plane = input.shape[-2:] if input.dim() > 2 else (input.size(-3), 0)  # size() has PyTorch's words
    lengths = [_length(plane[i], kernel[i], step[i], pad[i], dil[i], ceil_mode) for i in (0, 1)]
    _check(input, kernel, step, pad, dil, lengths)
    return Windows(kernel, step, pad, dil, (lengths[0], lengths[1]))


def _pair(value: Size | None, message: str) -> tuple[int, int]:
    values = as_tuple(value)
    if len(values) not in (1, 2):
        raise RuntimeError(message)
    if any(type(v) is int and not -(1 << 31) <= v < 1 << 31 for v in values):
        raise RuntimeError("value cannot be converted to type int without overflow")
    return values[0], values[-1]


def _check(
    input: Tensor,
    kernel: tuple[int, int],
    step: tuple[int, int],
    pad: tuple[int, int],
    dil: tuple[int, int],
    lengths: list[int],
) -> None:
    if min(kernel) <= 0:
        raise RuntimeError(f"kernel size should be greater than zero, but got kH: {kernel[0]} kW: {kernel[1]}")
    if min(step) <= 0:
        raise RuntimeError(f"stride should be greater than zero, but got dH: {step[0]} dW: {step[1]}")
    if min(dil) <= 0:
        raise RuntimeError(f"dilation should be greater than zero, but got dilationH: {dil[0]} dilationW: {dil[1]}")
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise RuntimeError(
            "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
            f"but got:{list(input.shape)}"
        )
    if 2 * pad[0] > kernel[0] or 2 * pad[1] > kernel[1]:
        raise RuntimeError(
            "pad should be smaller than or equal to half of kernel size, but got "
            f"padW = {pad[1]}, padH = {pad[0]}, kW = {kernel[1]}, kH = {kernel[0]}"
        )
    if min(lengths) < 1:
        planes, height, width = input.shape[-3:]
        raise RuntimeError(
            f"Given input size: ({planes}x{height}x{width}). "
            f"Calculated output size: ({planes}x{lengths[0]}x{lengths[1]}). Output size is too small"
        )


def _length(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil_mode: bool) -> int:
    if stride == 0:
        raise RuntimeError("stride should not be zero")
    if pad < 0:
        raise RuntimeError(f"pad must be non-negative, but got pad: {pad}")
    reach = dilation * (kernel - 1) + 1
    check_reach(reach, kernel, dilation)
    if pad > abs(reach) // 2 * (1 if reach >= 0 else -1):  # C++ rounds the half towards 0
        raise RuntimeError(
            "pad should be at most half of effective kernel size, "
            f"but got pad={pad}, kernel_size={kernel} and dilation={dilation}"
        )
    return window_count(size, reach, stride, pad, ceil_mode)


def check_reach(reach: int, kernel: int, dilation: int) -> None:
    """Raise PyTorch's ``RuntimeError`` where the distance over a window does not fit into its integers."""
    if reach > torch.iinfo(torch.int64).max:
        raise RuntimeError(f"effective kernel size overflows, but got kernel_size={kernel} and dilation={dilation}")


def window_count(size: int, reach: int, stride: int, pad: int, ceil_mode: bool) -> int:
    """Number of windows along one dimension, each ``reach`` elements from its first to its last."""
    length = (size + 2 * pad - reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    # A window that would begin beyond the input and its padding on the left is left out.
    return length - 1 if ceil_mode and (length - 1) * stride >= size + pad else length


def check_floating(name: str, input: Tensor) -> None:
    """Raise PyTorch's ``NotImplementedError`` where the dtype is not a real floating-point one, or has but 8 bits."""
    if not input.is_floating_point() or input.dtype.itemsize == 1:
        raise NotImplementedError(f"\"{name}\" not implemented for '{scalar_type_name(input.dtype)}'")


def check_real(name: str, input: Tensor) -> None:
    """The same where whole numbers will do too."""
    if input.dtype == torch.bool or input.is_complex() or input.is_floating_point():
        check_floating(name, input)


def check_two_or_three(name: str, input: Tensor) -> None:
    """Raise PyTorch's ``RuntimeError`` where the input of a 1-d pooling has another number of dimensions."""
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"Expected 2 to 3 dimensions, but got {input.dim()}-dimensional tensor for argument #1 'self' "
            f"(while checking arguments for {name})"
        )


def left_out(stride: Size | None) -> bool:
    """Whether the stride is the kernel's: not given, or an empty sequence."""
    return stride is None or (isinstance(stride, Sequence) and len(stride) == 0)


def as_tuple(value: Any) -> tuple[int, ...]:
    """An option as a tuple of numbers."""
    if value is None:
        return ()
    if isinstance(value, (tuple, list)):
        return tuple(map(integer, value))
    return (integer(value),)


def one(name: str, argument: str, value: Size | None) -> int:
    """The number that a 1-d pooling's option holds, given bare or in a sequence."""
    values = as_tuple(value)
    if len(values) != 1:
        raise RuntimeError(f"{name}() argument '{argument}' should contain one int (got {len(values)})")
    return values[0]


def adaptive_bounds(index: int, windows: int, length: int) -> tuple[int, int]:
    """First element of an adaptive window, and the one after its last."""
    return index * length // windows, -((index + 1) * length // -windows)
