"""Convolution over sequences and planes: the public functions, the autograd Functions and the plain composition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv.arguments import Geometry, check, check_dims, geometry_of
from reimpl.functional._conv.kernels import convolve, convolve_input, convolve_weight
from reimpl.functional._conv.operators import convolution, differentiable_by_operators
from reimpl.functional._dispatch import autocast_disabled, autocast_to_lower, call, memory_format_of, opmath_dtype
from reimpl.functional._plain import plain


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    algorithm: str | None = None,
) -> Tensor:
    r"""Convolution (cross-correlation) of sequences, :func:`conv2d` with one row.

    .. math::
        y_{n o j} = b_o + \sum_{c, l} w_{o c l}\, x_{n,\, c,\, j s + l d - p}

    Args:
        input: shape :math:`(N, C, L)` or :math:`(C, L)`.
        weight: shape :math:`(O, C/\text{groups}, f)`.
        bias: shape :math:`(O)`.
        stride, padding, dilation, groups, algorithm: as :func:`conv2d`'s, numbers or sequences of one.

    Returns:
        shape :math:`(N, O, L')` or :math:`(O, L')`, contiguous; :math:`L' = \lfloor (L + 2p - d(f - 1) - 1)/s \rfloor
        + 1`.

    Raises:
        RuntimeError: shapes, dtypes or options do not fit; the text is PyTorch's.
        NotImplementedError: the tensors are boolean, or ``algorithm`` does not do this geometry.

    Source: F7; N1, N4. PyTorch: :func:`torch.nn.functional.conv1d`.
    """
    return _convolution(1, input, weight, bias, stride, padding, dilation, groups, algorithm)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    algorithm: str | None = None,
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
        algorithm: ``"im2col"`` gathers the windows into rows of one matrix product; ``"views"`` takes a product for
            each kernel tap, over shifted views of the padded input, and copies nothing; ``"winograd"`` is the minimal
            filtering F(2x2, 3x3), which multiplies 2.25 times less and rounds more. ``None`` takes one of the first
            two, by shape, or compiled code under :func:`reimpl.functional.use_kernels`. The gradients follow.

    Returns:
        shape :math:`(N, O, H', W')` or :math:`(O, H', W')`, ``channels_last`` where ``input`` or ``weight`` is.

    Raises:
        RuntimeError: shapes, dtypes or options do not fit; the text is PyTorch's.
        ValueError: no such algorithm.
        NotImplementedError: the tensors are boolean, or ``algorithm`` does not do this geometry.

    Source: F7; N1, N4; Winograd: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, 2015. PyTorch:
    :func:`torch.nn.functional.conv2d`.
    """
    return _convolution(2, input, weight, bias, stride, padding, dilation, groups, algorithm)


def _convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    algorithm: str | None,
) -> Tensor:
    input, weight, bias = autocast_to_lower(input, weight, bias)
    check_dims(input, weight, dims)
    geometry = geometry_of(weight, stride, padding, dilation, groups, algorithm)
    batch = input if input.dim() == dims + 2 else input.unsqueeze(0)
    check(batch, weight, bias, geometry)
    layout = memory_format_of(batch, weight)
    if dims == 1:
        batch, weight, layout = _row(batch), _row(weight), torch.contiguous_format
    with autocast_disabled(input.device):
        operator = convolution if differentiable_by_operators(batch, weight, bias) else None
        output: Tensor = call(_Conv2d, _composition, batch, weight, bias, geometry, operator=operator)
    output = output.contiguous(memory_format=layout)
    if dims == 1:
        output = output.squeeze(2)
    return output if input.dim() == dims + 2 else output.squeeze(0)


def _row(sequences: Tensor) -> Tensor:
    """Sequences as planes of one row, which no memory format but the contiguous one describes."""
    planes = sequences.unsqueeze(2)
    return planes if memory_format_of(planes) is torch.contiguous_format else planes.contiguous()


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
            return _split(output, 0, size), 0
        bias = None if bias is None else _batched(bias, b_dim, size).flatten(0, 1)
        weight = _batched(weight, w_dim, size).flatten(0, 1)
        output = _Conv2d.apply(_as_channels(input, x_dim, size), weight, bias, geometry.repeated(size))
        return _split(output, 1, size), 1


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
            return _split(output, 0, info.batch_size), 0
        weight = _batched(weight, in_dims[1], info.batch_size).flatten(0, 1)
        grad = _as_channels(grad, in_dims[0], info.batch_size)
        output = _Conv2dInput.apply(grad, weight, size, geometry.repeated(info.batch_size))
        return _split(output, 1, info.batch_size), 1


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
        return _split(output, 0, info.batch_size), 0


def _transposed(grad: Tensor, weight: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of ``input``, in the layout of the output, as PyTorch's."""
    size, layout = (input.shape[2], input.shape[3]), memory_format_of(input, weight)
    if _for_good(grad, weight):
        return convolve_input(grad, weight, size, geometry, layout).contiguous(memory_format=layout)
    result: Tensor = _Conv2dInput.apply(grad, weight, size, geometry)
    return result.contiguous(memory_format=layout)


def _of_weight(grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of ``weight``, in the layout of the output, as PyTorch's."""
    size, layout = (weight.shape[2], weight.shape[3]), memory_format_of(input, weight)
    if _for_good(grad, input):
        return convolve_weight(grad, input, size, geometry).contiguous(memory_format=layout)
    result: Tensor = _Conv2dWeight.apply(grad, input, size, geometry)
    return result.contiguous(memory_format=layout)


def _for_good(*tensors: Tensor) -> bool:
    """Whether the product of ``tensors`` is not to be differentiated or mapped: it needs no Function around it."""
    return not torch.is_grad_enabled() and forward_ad._current_level < 0 and plain(*tensors)


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """``tensor`` with its mapped dimension first, repeated where it is not mapped."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _as_channels(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of a batch of planes folded into the channels, where groups keep it apart."""
    return _batched(tensor, dim, size).movedim(0, 1).flatten(1, 2)


def _split(output: Tensor, dim: int, size: int) -> Tensor:
    """``output`` with the mapped dimension folded out of ``dim``, as no view: such a result can be changed in place."""
    shape = output.shape
    split: Tensor = torch.ops.aten._unsafe_view(output, (*shape[:dim], size, shape[dim] // size, *shape[dim + 1 :]))
    return split
