"""Max pooling as operators of PyTorch, which compilers leave whole: its search and its scattered gradient do not fuse.

Measured over 64 planes of 32 x 32 times 32 channels: Inductor's loops for the composition take 5 times the eager code's
time, those for PyTorch's own pooling 3 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import memory_format_of
from reimpl.functional._windows import Windows

_WINDOWS = "SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] output"


def max_pool(input: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Maxima and their places by the operator."""
    words = windows.kernel, windows.stride, windows.padding, windows.dilation, windows.output
    return _max_pool(input, *words)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "reimpl::max_pool", mutates_args=(), schema=f"(Tensor input, {_WINDOWS}) -> (Tensor values, Tensor places)"
)
def _max_pool(input: Tensor, *words: Sequence[int]) -> tuple[Tensor, Tensor]:
    from reimpl.functional.max_pooling import search

    layout = memory_format_of(input)
    values, places = search(input, Windows(*((first, second) for first, second in words)))
    return values.contiguous(memory_format=layout), places.contiguous(memory_format=layout)


@torch.library.custom_op(
    "reimpl::max_pool_spread", mutates_args=(), schema="(Tensor grad, Tensor places, SymInt[] plane) -> Tensor"
)
def _max_pool_spread(grad: Tensor, places: Tensor, plane: Sequence[int]) -> Tensor:
    from reimpl.functional.max_pooling import spread

    return spread(grad, places, (plane[0], plane[1]))


@_max_pool.register_fake
def _(input: Tensor, *words: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape, layout = (*input.shape[:-2], *words[-1]), memory_format_of(input)
    values, places = (
        torch.empty(shape, dtype=dtype, device=input.device, memory_format=layout)
        for dtype in (input.dtype, torch.int64)
    )
    return values, places


@_max_pool_spread.register_fake
def _(grad: Tensor, places: Tensor, plane: Sequence[int]) -> Tensor:
    return grad.new_empty(*grad.shape[:-2], *plane)


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.plane = [inputs[0].shape[-2], inputs[0].shape[-1]]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _max_pool_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _max_pool_spread(grad, ctx.saved_tensors[0], ctx.plane), *(None,) * 5


def _keep_its_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _max_pool_spread_backward(ctx: Any, other: Tensor) -> tuple[Tensor | None, ...]:
    (places,) = ctx.saved_tensors
    return other.flatten(-2).gather(-1, places.flatten(-2)).unflatten(-1, places.shape[-2:]), None, None


_max_pool.register_autograd(_max_pool_backward, setup_context=_keep_places)
_max_pool_spread.register_autograd(_max_pool_spread_backward, setup_context=_keep_its_places)
