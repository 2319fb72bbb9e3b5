"""Pooling as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module

from reimpl import functional as F

Size = int | Sequence[int]


class _MaxPool(Module):
    __constants__: ClassVar[list[str]] = ["kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"]
    return_indices: bool
    ceil_mode: bool

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        dilation: Size = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        Module.__init__(self)
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.dilation = dilation
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    def _options(self) -> tuple[Any, ...]:
        """The options in the function's order."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
            f", dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


class MaxPool1d(_MaxPool, torch.nn.MaxPool1d):  # type: ignore[misc]
    """:func:`reimpl.functional.max_pool1d`; ``stride`` defaults to ``kernel_size``.

    PyTorch: :class:`torch.nn.MaxPool1d`.
    """

    def forward(self, input: Tensor) -> Any:
        return F.max_pool1d(input, *self._options())


class MaxPool2d(_MaxPool, torch.nn.MaxPool2d):  # type: ignore[misc]
    """:func:`reimpl.functional.max_pool2d`; ``stride`` defaults to ``kernel_size``.

    PyTorch: :class:`torch.nn.MaxPool2d`.
    """

    def forward(self, input: Tensor) -> Any:
        return F.max_pool2d(input, *self._options())


class _AvgPool(Module):
    kernel_size: Size
    stride: Size
    padding: Size
    ceil_mode: bool
    count_include_pad: bool

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AvgPool1d(_AvgPool, torch.nn.AvgPool1d):  # type: ignore[misc]
    """:func:`reimpl.functional.avg_pool1d`; ``stride`` defaults to ``kernel_size``.

    PyTorch: :class:`torch.nn.AvgPool1d`.
    """

    __constants__: ClassVar[list[str]] = ["kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"]  # type: ignore[misc]

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        Module.__init__(self)
        self.kernel_size = _single(kernel_size)
        self.stride = _single(stride if stride is not None else kernel_size)
        self.padding = _single(padding)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


def _single(size: Size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


class AvgPool2d(_AvgPool, torch.nn.AvgPool2d):  # type: ignore[misc]
    """:func:`reimpl.functional.avg_pool2d`; ``stride`` defaults to ``kernel_size``.

    PyTorch: :class:`torch.nn.AvgPool2d`.
    """

    __constants__: ClassVar[list[str]] = [*AvgPool1d.__constants__, "divisor_override"]  # type: ignore[misc]
    divisor_override: int | None

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        Module.__init__(self)
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool1d(torch.nn.AdaptiveAvgPool1d):
    """:func:`reimpl.functional.adaptive_avg_pool1d` to ``output_size``.

    PyTorch: :class:`torch.nn.AdaptiveAvgPool1d`.
    """

    __constants__: ClassVar[list[str]] = ["output_size"]  # type: ignore[misc]

    def __init__(self, output_size: Size) -> None:
        Module.__init__(self)
        self.output_size = output_size  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """:func:`reimpl.functional.adaptive_avg_pool2d` to ``output_size``.

    PyTorch: :class:`torch.nn.AdaptiveAvgPool2d`.
    """

    __constants__: ClassVar[list[str]] = ["output_size"]  # type: ignore[misc]

    def __init__(self, output_size: int | Sequence[int | None]) -> None:
        Module.__init__(self)
        self.output_size = output_size  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """:func:`reimpl.functional.adaptive_max_pool2d` to ``output_size``.

    PyTorch: :class:`torch.nn.AdaptiveMaxPool2d`.
    """

    __constants__: ClassVar[list[str]] = ["output_size", "return_indices"]  # type: ignore[misc]
    return_indices: bool

    def __init__(self, output_size: int | Sequence[int | None], return_indices: bool = False) -> None:
        Module.__init__(self)
        self.output_size = output_size  # type: ignore[assignment]
        self.return_indices = return_indices

    def forward(self, input: Tensor) -> Any:
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"
