"""Triton's kernels as functions with gradients, and how one is held against PyTorch's; for triton_layers.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import memory_format_of
from reimpl.functional._losses import triton as _triton_losses
from reimpl.functional._pointwise import triton as _triton_pointwise
from reimpl.functional._pooling import triton as _triton_pooling
from reimpl.functional._pooling.triton import Lines
from reimpl.testing import random_tensor, seeded_generator


class _Kernels(torch.autograd.Function):
    """A kernel and that of its gradient; ``backward`` gets the gradient, the input and the results."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, forward: Callable[..., Any], backward: Callable[..., Any]) -> Tensor:
        results = forward(input)
        results = results if isinstance(results, tuple) else (results,)
        ctx.save_for_backward(input, *results)
        ctx.differentiate = backward
        return results[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.differentiate(grad, *ctx.saved_tensors), None, None


def pointwise(name: str) -> Callable[..., Tensor]:
    def function(input: Tensor, negative_slope: float = 0.01) -> Tensor:
        slope = negative_slope
        return _Kernels.apply(  # type: ignore[no-any-return]
            input,
            lambda x: _triton_pointwise.forward(name, x, slope),
            # an output of another sign than the input tells nothing
            lambda grad, x, y: _triton_pointwise.backward(name, grad, x if slope < 0 else y, slope),
        )

    return function


def softmax(log: bool) -> Callable[..., Tensor]:
    def function(input: Tensor, dim: int) -> Tensor:
        return _Kernels.apply(  # type: ignore[no-any-return]
            input,
            lambda x: _triton_losses.softmax(x, dim, log),
            lambda grad, x, y: _triton_losses.softmax_gradient(grad, y, dim, log),
        )

    return function


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    options = (ignore_index, weight, label_smoothing)
    return _Kernels.apply(  # type: ignore[no-any-return]
        input,
        lambda x: _triton_losses.index_loss(x, target, *options, reduction),
        lambda grad, x, loss, probabilities, divisor: _triton_losses.index_loss_gradient(
            grad, probabilities, target, *options, divisor
        ),
    )


def max_pool2d(input: Tensor, lines: Lines, output: tuple[int, int], step: tuple[int, int]) -> Tensor:
    plane, layout = (input.shape[-2], input.shape[-1]), memory_format_of(input)
    return _Kernels.apply(  # type: ignore[no-any-return]
        input,
        lambda x: _triton_pooling.largest(x, lines, output, step),
        lambda grad, x, y, places: _triton_pooling.scatter(grad, places, plane, lines, layout),
    )


def avg_pool2d(input: Tensor, lines: Lines, output: tuple[int, int]) -> Tensor:
    plane, layout = (input.shape[-2], input.shape[-1]), memory_format_of(input)
    return _Kernels.apply(  # type: ignore[no-any-return]
        input,
        lambda x: _triton_pooling.means(x, lines, output),
        lambda grad, x, y: _triton_pooling.spread(grad, lines, plane, layout),
    )


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *key: object) -> Tensor:
    return random_tensor(shape, dtype, seeded_generator(0, *key), device).requires_grad_()


def hold(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    args: tuple[Tensor, ...],
    additions: int,
    case: object,
) -> Tensor:
    """Hold output and gradients against those in float64: the sums are float32, the result is rounded once.

    Args:
        additions: how many numbers of the results' size are added up one after the other, at most.

    Returns:
        the output.
    """
    output = ours(*args)
    grad = random_tensor(output.shape, output.dtype, seeded_generator(1, str(case)), output.device)
    doubles = tuple(arg.detach().double().requires_grad_() for arg in args)
    expected = reference(*doubles)
    results = [output, *torch.autograd.grad(output, args, grad)]
    exact = [expected, *torch.autograd.grad(expected, doubles, grad.double())]
    for mine, other in zip(results, exact, strict=True):
        largest = float(other.detach().abs().max().clamp_min(1)) if other.numel() else 1.0
        # half an eps of the sum for each addition, and 1 (the interpreter cuts bfloat16 off) for the rounding
        eps = torch.finfo(mine.dtype).eps + (additions / 2 + 1) * torch.finfo(torch.float32).eps
        error = float((mine.detach().double() - other.detach()).abs().max()) if other.numel() else 0.0
        assert error <= eps * largest, f"{case}, {mine.dtype}: {error / (eps * largest):.3g} times the limit"
    return output
