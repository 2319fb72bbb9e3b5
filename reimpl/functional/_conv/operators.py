"""The three products of a convolution as operators of PyTorch, which compilers leave whole and call.

A compiler that traced :mod:`reimpl.functional._conv.kernels` would see views and matrix products, stack the windows
and keep them. The operators run the eager code instead, its compiled kernels included, and differentiate into each
other as the autograd Functions of :mod:`reimpl.functional.conv` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.kernels import convolve, convolve_input, convolve_weight
from reimpl.functional._dispatch import autocast_disabled, memory_format_of
from reimpl.functional._inductor import best_channels_last, tell_inductor
from reimpl.functional.kernels import in_compiled_code

# Geometry as a schema can say it: stride, padding, dilation, groups, algorithm.
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, str? algorithm"
_Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int, str | None]


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``C(x, w) + b`` by the operator."""
    return _convolution(input, weight, bias, *_words(geometry))  # type: ignore[no-any-return]


def differentiable_by_operators(*tensors: Tensor | None) -> bool:
    """Whether the operators' derivatives hold for such tensors: complex ones would have to be conjugated."""
    return all(t is None or t.is_floating_point() for t in tensors)


def _words(geometry: Geometry) -> _Geometry:
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.algorithm


def _geometry(stride: Any, padding: Any, dilation: Any, groups: int, algorithm: str | None) -> Geometry:
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups, algorithm)


@best_channels_last(0, filter=1)
@torch.library.custom_op(
    "reimpl::convolution",
    mutates_args=(),
    schema=f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
)
@in_compiled_code
def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *words: Any) -> Tensor:
    with autocast_disabled(input.device):
        output = convolve(input, weight, bias, _geometry(*words))
    return output.contiguous(memory_format=memory_format_of(input, weight))


@best_channels_last(0, filter=1)
@torch.library.custom_op(
    "reimpl::convolution_input",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor weight, SymInt[] size, {_GEOMETRY}) -> Tensor",
)
@in_compiled_code
def _convolution_input(grad: Tensor, weight: Tensor, size: Sequence[int], *words: Any) -> Tensor:
    with autocast_disabled(grad.device):
        output = convolve_input(grad, weight, (size[0], size[1]), _geometry(*words))
    return output.contiguous(memory_format=memory_format_of(grad, weight))


@best_channels_last(0, 1)
@torch.library.custom_op(
    "reimpl::convolution_weight",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor input, SymInt[] size, {_GEOMETRY}) -> Tensor",
)
@in_compiled_code
def _convolution_weight(grad: Tensor, input: Tensor, size: Sequence[int], *words: Any) -> Tensor:
    with autocast_disabled(grad.device):
        return convolve_weight(grad, input, (size[0], size[1]), _geometry(*words)).contiguous()


@_convolution.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None, *words: Any) -> Tensor:
    sizes = (input.shape[2], input.shape[3], weight.shape[2], weight.shape[3])
    return _empty(input, weight, weight.shape[0], _geometry(*words).output(*sizes))


@_convolution_input.register_fake
def _(grad: Tensor, weight: Tensor, size: Sequence[int], *words: Any) -> Tensor:
    return _empty(grad, weight, _geometry(*words).groups * weight.shape[1], size)


@_convolution_weight.register_fake
def _(grad: Tensor, input: Tensor, size: Sequence[int], *words: Any) -> Tensor:
    return grad.new_empty(grad.shape[1], input.shape[1] // _geometry(*words).groups, *size)


def _empty(planes: Tensor, weight: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    tell_inductor()
    shape, layout = (planes.shape[0], channels, *size), memory_format_of(planes, weight)
    return torch.empty(shape, dtype=planes.dtype, device=planes.device, memory_format=layout)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Both factors, and the geometry, which the last five arguments are."""
    first, second, *_ = inputs
    ctx.words = inputs[-5:]
    ctx.save_for_backward(first, second)


def _plane(tensor: Tensor) -> list[int]:
    return [tensor.shape[2], tensor.shape[3]]


def _convolution_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (input, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
    return (
        _convolution_input(grad, weight, _plane(input), *ctx.words) if needs[0] else None,
        _convolution_weight(grad, input, _plane(weight), *ctx.words) if needs[1] else None,
        grad.sum((0, 2, 3)) if needs[2] else None,
        *(None,) * 5,
    )


def _convolution_input_backward(ctx: Any, other: Tensor) -> tuple[Tensor | None, ...]:
    (grad, weight), needs = ctx.saved_tensors, ctx.needs_input_grad
    return (
        _convolution(other, weight, None, *ctx.words) if needs[0] else None,
        _convolution_weight(grad, other, _plane(weight), *ctx.words) if needs[1] else None,
        *(None,) * 6,
    )


def _convolution_weight_backward(ctx: Any, other: Tensor) -> tuple[Tensor | None, ...]:
    (grad, input), needs = ctx.saved_tensors, ctx.needs_input_grad
    return (
        _convolution(input, other, None, *ctx.words) if needs[0] else None,
        _convolution_input(grad, other, _plane(input), *ctx.words) if needs[1] else None,
        *(None,) * 6,
    )


_convolution.register_autograd(_convolution_backward, setup_context=_keep)
_convolution_input.register_autograd(_convolution_input_backward, setup_context=_keep)
_convolution_weight.register_autograd(_convolution_weight_backward, setup_context=_keep)
