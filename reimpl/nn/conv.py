"""Convolutions as modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from types import FunctionType
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import pad

from reimpl import functional as F
from reimpl import init
from reimpl.functional._conv.arguments import check_algorithm
from reimpl.nn.linear import reset_bias

_F = TypeVar("_F", bound=Callable[..., None])
_PADDING_STRINGS = {"same", "valid"}
_PADDING_MODES = {"zeros", "reflect", "replicate", "circular"}


class _Conv(Module):
    """What the convolutions over one and two dimensions of space share."""

    __constants__: ClassVar[list[str]] = [
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "output_padding",
        "in_channels",
        "out_channels",
        "kernel_size",
    ]
    _dims: ClassVar[int]
    weight: Tensor
    bias: Tensor | None
    algorithm: str | None = None  # of modules that were PyTorch's

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        algorithm: str | None = None,
    ) -> None:
        Module.__init__(self)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = self._each(kernel_size)
        self.stride = self._each(stride)
        self.padding = padding if isinstance(padding, str) else self._each(padding)
        self.dilation = self._each(dilation)
        self.transposed = False
        self.output_padding = self._each(0)
        self.groups = groups
        self.padding_mode = padding_mode
        self.algorithm = algorithm
        self._check()
        self._reversed_padding_repeated_twice = self._sides()
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias", Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def _check(self) -> None:
        if self.groups <= 0:
            raise ValueError("groups must be a positive integer")
        if self.in_channels % self.groups != 0:
            raise ValueError("in_channels must be divisible by groups")
        if self.out_channels % self.groups != 0:
            raise ValueError("out_channels must be divisible by groups")
        if isinstance(self.padding, str):
            if self.padding not in _PADDING_STRINGS:
                raise ValueError(f"Invalid padding string {self.padding!r}, should be one of {_PADDING_STRINGS}")
            if self.padding == "same" and any(s != 1 for s in self.stride):
                raise ValueError("padding='same' is not supported for strided convolutions")
        if self.padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"padding_mode must be one of {_PADDING_MODES}, but got padding_mode='{self.padding_mode}'"
            )
        if self.algorithm is not None:
            check_algorithm(self.algorithm)

    def _sides(self) -> list[int]:
        """Padding before and after, the last dimension first: the order of :func:`torch.nn.functional.pad`."""
        if not isinstance(self.padding, str):
            return [side for side in reversed(self.padding) for _ in (0, 1)]
        if self.padding == "valid":
            return [0, 0] * self._dims
        totals = [d * (k - 1) for d, k in zip(reversed(self.dilation), reversed(self.kernel_size), strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, in row-major order whatever the layout of the weight."""
        with torch.no_grad():
            if self.weight.is_contiguous():
                init.kaiming_uniform_(self.weight, a=sqrt(5))
            else:
                drawn = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
                self.weight.copy_(init.kaiming_uniform_(drawn, a=sqrt(5)))
        reset_bias(self.bias, self.weight)

    def _function(self, *args: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = self._each(0)
        chosen = {} if self.algorithm is None else {"algorithm": self.algorithm}
        return self._function(input, weight, bias, self.stride, padding, self.dilation, self.groups, **chosen)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if self.padding != (0,) * len(self.padding):
            parts.append(f"padding={self.padding}")
        if self.dilation != self._each(1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        if self.algorithm is not None:
            parts.append(f"algorithm={self.algorithm}")
        return ", ".join(parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Module.__setstate__(self, state)
        if not hasattr(self, "padding_mode"):
            self.padding_mode = "zeros"

    @classmethod
    def _each(cls, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * cls._dims if isinstance(value, int) else tuple(value)


def _named(function: _F, name: str) -> _F:
    """The same function under the name that Python's texts about a wrong call should give."""
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copied.__kwdefaults__, copied.__annotations__ = function.__kwdefaults__, function.__annotations__
    copied.__qualname__ = name
    return cast(_F, copied)


class Conv1d(_Conv, torch.nn.Conv1d):  # type: ignore[misc]
    r"""Convolution of sequences, :func:`reimpl.functional.conv1d`, from :math:`(N, C, L)` to :math:`(N, O, L')`.

    Weight :math:`(O, C/\text{groups}, f)`; arguments and start as :class:`Conv2d`'s, with numbers or sequences of one.

    Source: F7; N1, N4. PyTorch: :class:`torch.nn.Conv1d`.
    """

    _dims = 1
    __init__ = _named(_Conv.__init__, "Conv1d.__init__")

    def _function(self, *args: Any, **options: Any) -> Tensor:
        return F.conv1d(*args, **options)


class Conv2d(_Conv, torch.nn.Conv2d):  # type: ignore[misc]
    r"""Convolution of planes, :func:`reimpl.functional.conv2d`, from :math:`(N, C, H, W)` to :math:`(N, O, H', W')`.

    Weight :math:`(O, C/\text{groups}, f_h, f_w)` and bias start from :math:`U(-k, k)`,
    :math:`k = 1/\sqrt{\text{fan\_in}}`, with PyTorch's bits for a seed.

    Args:
        in_channels, out_channels, kernel_size: sizes.
        stride, padding, dilation, groups: see the function.
        bias: whether there is a bias.
        padding_mode: what stands in the padding, ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device, dtype: of the parameters.
        algorithm: see the function; no part of the state dict, and of no effect while the module is PyTorch's.

    Raises:
        ValueError: channels not divisible by ``groups``, or an unknown padding or algorithm.

    Source: F7; N1, N4. PyTorch: :class:`torch.nn.Conv2d`.
    """

    _dims = 2
    __init__ = _named(_Conv.__init__, "Conv2d.__init__")

    def _function(self, *args: Any, **options: Any) -> Tensor:
        return F.conv2d(*args, **options)
