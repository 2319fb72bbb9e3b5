"""Maximum pooling as operators of PyTorch, which compilers leave whole and call.

Inductor's own loop over the traced search took 23 of the 43 ms of a small network's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import memory_format_of
from reimpl.functional._inductor import best_channels_last, tell_inductor
from reimpl.functional._pooling.largest import search, spread
from reimpl.functional._pooling.windows import Windows
from reimpl.functional.kernels import in_compiled_code

# Windows as a schema can say them.
_WINDOWS = "SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt[] output"


def max_pool(input: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Maxima and their places by the operator."""
    words = windows.kernel, windows.stride, windows.padding, windows.dilation, windows.output
    return _max_pool(input, *words)  # type: ignore[no-any-return]


def _windows(*words: Sequence[int]) -> Windows:
    return Windows(*((rows, columns) for rows, columns in words))


@best_channels_last(0)
@torch.library.custom_op("reimpl::max_pool", mutates_args=(), schema=f"(Tensor input, {_WINDOWS}) -> (Tensor, Tensor)")
@in_compiled_code
def _max_pool(input: Tensor, *words: Any) -> tuple[Tensor, Tensor]:
    layout = memory_format_of(input)
    with torch.no_grad():
        values, places = search(input, _windows(*words))
    return values.contiguous(memory_format=layout), places.contiguous(memory_format=layout)


@best_channels_last(0, 1)
@torch.library.custom_op(
    "reimpl::max_pool_input",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor places, SymInt[] plane, {_WINDOWS}) -> Tensor",
)
@in_compiled_code
def _max_pool_input(grad: Tensor, places: Tensor, plane: Sequence[int], *words: Any) -> Tensor:
    with torch.no_grad():
        return spread(grad, places, (plane[0], plane[1]), _windows(*words), memory_format_of(grad))


@_max_pool.register_fake
def _(input: Tensor, *words: Any) -> tuple[Tensor, Tensor]:
    values = _empty(input, words[-1])
    return values, torch.empty_like(values, dtype=torch.int64)


@_max_pool_input.register_fake
def _(grad: Tensor, places: Tensor, plane: Sequence[int], *words: Any) -> Tensor:
    return _empty(grad, plane)


def _empty(like: Tensor, plane: Sequence[int]) -> Tensor:
    tell_inductor()
    shape = (*like.shape[:-2], *plane)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format_of(like))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, *ctx.words = inputs
    ctx.plane = [input.shape[-2], input.shape[-1]]
    ctx.save_for_backward(output[1])


def _max_pool_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (places,) = ctx.saved_tensors
    return _max_pool_input(grad, places, ctx.plane, *ctx.words), *(None,) * 5


def _keep_places(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _max_pool_input_backward(ctx: Any, other: Tensor) -> tuple[Tensor | None, ...]:
    (places,) = ctx.saved_tensors
    return other.flatten(-2).gather(-1, places.flatten(-2)).reshape(places.shape), *(None,) * 7


_max_pool.register_autograd(_max_pool_backward, setup_context=_keep)
_max_pool_input.register_autograd(_max_pool_input_backward, setup_context=_keep_places)
