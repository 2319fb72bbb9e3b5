"""Convolution over planes: arguments, the autograd Functions and the plain composition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv_kernels import Geometry, convolve, convolve_input, convolve_weight
from reimpl.functional._dispatch import (
    autocast_disabled,
    autocast_to_lower,
    call,
    memory_format_of,
    opmath_dtype,
    scalar_type_name,
)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Convolution (cross-correlation) of planes.

    .. math::
        y_{n o i j} = b_o + \sum_{c, k, l} w_{o c k l}\, x_{n,\, c,\, i s + k d - p,\, j s + l d - p}

    with :math:`c` over the channels of :math:`o`'s group and zeros outside :math:`x`. The output has
    :math:`\lfloor (h + 2p - d(f - 1) - 1)/s \rfloor + 1` rows.

    Args:
        input: shape :math:`(N, C, H, W)` or :math:`(C, H, W)`.
        weight: shape :math:`(O, C/\text{groups}, f_h, f_w)`.
        bias: shape :math:`(O)`.
        stride, dilation: a number or a pair (rows, columns).
        padding: a number, a pair, ``"valid"`` (none) or ``"same"`` (output as large as the input; of an odd total the
            larger half goes below and to the right).
        groups: number of groups of channels that do not see each other.

    Returns:
        shape :math:`(N, O, H', W')` or :math:`(O, H', W')`, ``channels_last`` where ``input`` or ``weight`` is.

    Raises:
        RuntimeError: shapes, dtypes or options do not fit; the text is PyTorch's.

    Source: F7; N1, N4. PyTorch: :func:`torch.nn.functional.conv2d`.
    """
    input, weight, bias = autocast_to_lower(input, weight, bias)
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(input.shape)}"
        )
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    geometry = _geometry(weight, stride, padding, dilation, groups)
    _check(batch, weight, bias, geometry)
    with autocast_disabled(input.device):
        output: Tensor = call(_Conv2d, _composition, batch, weight, bias, geometry)
    output = output.contiguous(memory_format=memory_format_of(batch, weight))
    return output if input.dim() == 4 else output.squeeze(0)


def _geometry(
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry:
    stride_, dilation_ = _pair("stride", stride), _pair("dilation", dilation)
    if groups <= 0:
        raise RuntimeError("non-positive groups is not supported")
    if min(stride_) <= 0:
        raise RuntimeError("non-positive stride is not supported")
    if min(dilation_) <= 0:
        raise RuntimeError("non-positive dilation is not supported")
    if not isinstance(padding, str):
        rows, columns = _pair("padding", padding)
        if min(rows, columns) < 0:
            raise RuntimeError("negative padding is not supported")
        return Geometry(stride_, (rows, rows, columns, columns), dilation_, groups)
    if padding == "valid":
        return Geometry(stride_, (0, 0, 0, 0), dilation_, groups)
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    if stride_ != (1, 1):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    totals = [d * (k - 1) for d, k in zip(dilation_, weight.shape[2:], strict=False)]
    sides = [side for total in totals for side in (total // 2, total - total // 2)]
    return Geometry(stride_, (sides[0], sides[1], sides[2], sides[3]), dilation_, groups)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    if len(values) == 1:
        return values[0], values[0]
    if len(values) != 2:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of 2 values "
            f"to match the convolution dimensions, but got {name}={list(values)}"
        )
    return values[0], values[1]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    size, groups = list(weight.shape), geometry.groups
    if weight.dim() != 4:
        raise RuntimeError(f"Expected 4D weight to conv2d, but got weight of size: {size}")
    if weight.dtype != input.dtype:
        raise RuntimeError(
            f"Input type ({_tensor_type(input)}) and weight type ({_tensor_type(weight)}) should be the same"
        )
    if bias is not None and bias.dtype != input.dtype:
        names = [scalar_type_name(t.dtype).lower() for t in (input, bias)]
        raise RuntimeError(f"Input type ({names[0]}) and bias type ({names[1]}) should be the same")
    if size[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {size} instead"
        )
    if size[0] % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size [{size}] instead"
        )
    if input.shape[1] != size[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {size}, expected input{list(input.shape)} "
            f"to have {size[1] * groups} channels, but got {input.shape[1]} channels instead"
        )
    if bias is not None and tuple(bias.shape) != (size[0],):
        raise RuntimeError(
            f"Given weight of size {size}, expected bias to be 1-dimensional with {size[0]} elements, "
            f"but got bias of size {list(bias.shape)} instead"
        )
    _check_reach(input, weight, geometry)


def _check_reach(input: Tensor, weight: Tensor, geometry: Geometry) -> None:
    if 0 in weight.shape[2:]:
        raise RuntimeError(f"Expected a kernel of at least 1 x 1, but got weight of size {list(weight.shape)}")
    padded = geometry.padded(input.shape[2], input.shape[3])
    reach = geometry.reach(weight.shape[2], weight.shape[3])
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded[0]} x {padded[1]}). "
            f"Kernel size: ({reach[0]} x {reach[1]}). Kernel size can't be greater than actual input size"
        )


def _tensor_type(tensor: Tensor) -> str:
    return tensor.type() if tensor.device.type in ("cpu", "cuda") else scalar_type_name(tensor.dtype)


def _composition(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution as one product over stacked, shifted views; every step differentiable to any order."""
    top, bottom, left, right = geometry.padding
    (s_h, s_w), (d_h, d_w), groups = geometry.stride, geometry.dilation, geometry.groups
    k_h, k_w = weight.shape[2:]
    o_h, o_w = geometry.output(input.shape[2], input.shape[3], k_h, k_w)
    # Overlapping windows are added up in the backward pass: let that happen in the accumulation dtype.
    padded = pad_constant(input.to(opmath_dtype(input.dtype)), (left, right, top, bottom))
    taps = [
        padded[:, :, k * d_h : k * d_h + (o_h - 1) * s_h + 1 : s_h, j * d_w : j * d_w + (o_w - 1) * s_w + 1 : s_w]
        for k in range(k_h)
        for j in range(k_w)
    ]
    length = weight.shape[1] * k_h * k_w
    columns = torch.stack(taps, 2).to(input.dtype).reshape(input.shape[0], groups, length, o_h * o_w)
    filters = weight.reshape(groups, weight.shape[0] // groups, length)
    output = (filters @ columns).reshape(input.shape[0], weight.shape[0], o_h, o_w)
    return output if bias is None else output + bias.reshape(-1, 1, 1)


class _Conv2d(torch.autograd.Function):
    r"""The convolution :math:`y = C(x, w) + b`.

    It is bilinear in :math:`x` and :math:`w`, and so are the two maps of its gradient,
    :math:`\bar x = T(\bar y, w)` and :math:`\bar w = W(\bar y, x)`. The trilinear form
    :math:`\langle g, C(x, w) \rangle` gives each of the three as the derivative of the other two, so that the three
    Functions differentiate into each other to any order.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        return convolve(input, weight, bias, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _transposed(grad, weight.conj(), input, ctx.geometry) if needs[0] else None,
            _of_weight(grad, input.conj(), weight, ctx.geometry) if needs[1] else None,
            grad.sum((0, 2, 3)) if needs[2] else None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        input, weight, bias, geometry = args
        size, (x_dim, w_dim, b_dim, _) = info.batch_size, in_dims
        if w_dim is None and b_dim is None:
            output = _Conv2d.apply(input.movedim(x_dim, 0).flatten(0, 1), weight, bias, geometry)
            return output.unflatten(0, (size, -1)), 0
        bias = None if bias is None else _batched(bias, b_dim, size).flatten(0, 1)
        weight = _batched(weight, w_dim, size).flatten(0, 1)
        output = _Conv2d.apply(_as_channels(input, x_dim, size), weight, bias, geometry.repeated(size))
        return output.unflatten(1, (size, -1)), 1


class _Conv2dInput(torch.autograd.Function):
    r""":math:`T(g, w)`, the gradient of the input: the transposed convolution."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
        return convolve_input(grad, weight, size, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, weight, _, ctx.geometry = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, other: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _Conv2d.apply(other, weight.conj(), None, ctx.geometry) if needs[0] else None,
            _of_weight(grad.conj(), other, weight, ctx.geometry) if needs[1] else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        grad, weight, size, geometry = args
        if in_dims[1] is None:
            output = _Conv2dInput.apply(grad.movedim(in_dims[0], 0).flatten(0, 1), weight, size, geometry)
            return output.unflatten(0, (info.batch_size, -1)), 0
        weight = _batched(weight, in_dims[1], info.batch_size).flatten(0, 1)
        grad = _as_channels(grad, in_dims[0], info.batch_size)
        output = _Conv2dInput.apply(grad, weight, size, geometry.repeated(info.batch_size))
        return output.unflatten(1, (info.batch_size, -1)), 1


class _Conv2dWeight(torch.autograd.Function):
    r""":math:`W(g, x)`, the gradient of the weight: the correlation of the input with the output's gradient."""

    @staticmethod
    def forward(grad: Tensor, input: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
        return convolve_weight(grad, input, size, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, input, _, ctx.geometry = inputs
        ctx.save_for_backward(grad, input)

    @staticmethod
    def backward(ctx: Any, other: Tensor) -> tuple[Tensor | None, ...]:
        grad, input = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            _Conv2d.apply(input.conj(), other, None, ctx.geometry) if needs[0] else None,
            _transposed(grad.conj(), other, input, ctx.geometry) if needs[1] else None,
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        grad, input, size, geometry = args
        grad, input = (_as_channels(t, dim, info.batch_size) for t, dim in zip((grad, input), in_dims, strict=False))
        output = _Conv2dWeight.apply(grad, input, size, geometry.repeated(info.batch_size))
        return output.unflatten(0, (info.batch_size, -1)), 0


def _transposed(grad: Tensor, weight: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    size = (input.shape[2], input.shape[3])
    return _Conv2dInput.apply(grad, weight, size, geometry)  # type: ignore[no-any-return]


def _of_weight(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    size = (weight.shape[2], weight.shape[3])
    return _Conv2dWeight.apply(grad, input, size, geometry)  # type: ignore[no-any-return]


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """``tensor`` with its mapped dimension first, repeated where it is not mapped."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _as_channels(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of a batch of planes folded into the channels, where groups keep it apart."""
    return _batched(tensor, dim, size).movedim(0, 1).flatten(1, 2)
