"""Activations as Triton kernels, alone and behind a bias: one pass over memory each way."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reimpl.functional._triton_common import (
    activate,
    blocks,
    dense,
    laid_out_as,
    launch,
    power_of_two,
    programs_wanted,
    through,
)

_BLOCK = 1_024
# Columns and rows of a program's part of a matrix: 128 bytes of float32 are read at once.
_COLUMNS, _ROWS = 32, 32


@triton.jit
def _forward(x, y, count, slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = lane < count - start
    value = activate(tl.load(x + start + lane, mask=live).to(tl.float32), slope, ACTIVATION)
    tl.store(y + start + lane, value.to(y.dtype.element_ty), mask=live)


@triton.jit
def _backward(grad, y, result, count, slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = lane < count - start
    g = tl.load(grad + start + lane, mask=live).to(tl.float32)
    value = through(g, tl.load(y + start + lane, mask=live).to(tl.float32), slope, ACTIVATION)
    tl.store(result + start + lane, value.to(result.dtype.element_ty), mask=live)


@triton.jit
def _bias_forward(u, bias, y, count, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    live = lane < count - start
    column = ((start % columns).to(tl.int32) + lane) % columns
    x = tl.load(u + start + lane, mask=live).to(tl.float32) + tl.load(bias + column, mask=live).to(tl.float32)
    tl.store(y + start + lane, activate(x, 0.0, ACTIVATION).to(y.dtype.element_ty), mask=live)


@triton.jit
def _bias_backward(
    grad,
    y,
    error,
    sums,
    rows,
    columns,
    rows_per_part,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The error before the activation, and its sum over a part of the rows."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    first = part * rows_per_part
    last = tl.minimum(first + rows_per_part, rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(first, last, ROWS):
        r = at + tl.arange(0, ROWS)
        live = (r < last)[:, None] & (c < columns)[None, :]
        place = r.to(tl.int64)[:, None] * columns + c[None, :]
        g = tl.load(grad + place, mask=live, other=0.0).to(tl.float32)
        value = through(g, tl.load(y + place, mask=live, other=0.0).to(tl.float32), 0.0, ACTIVATION)
        tl.store(error + place, value.to(error.dtype.element_ty), mask=live)
        total += value
    tl.store(sums + part * columns + c, tl.sum(total, 0), mask=c < columns)


def worth_it(input: Tensor) -> bool:
    """Whether there is anything to do."""
    return input.numel() > 0


def _activated(input: Tensor, name: str, slope: float = 0.0) -> Tensor:
    x = dense(input)
    y = torch.empty_like(x)
    count = x.numel()
    launch(_forward, (blocks(count, _BLOCK),), x, y, count, slope, ACTIVATION=name, BLOCK=_BLOCK)
    return y


def _error(grad: Tensor, output: Tensor, name: str, slope: float = 0.0) -> Tensor:
    output = dense(output)
    grad = laid_out_as(grad, output)
    result, count = torch.empty_like(output), output.numel()
    launch(_backward, (blocks(count, _BLOCK),), grad, output, result, count, slope, ACTIVATION=name, BLOCK=_BLOCK)
    return result


def relu(input: Tensor) -> Tensor:
    """``max(x, 0)``, NaN where ``x`` is, in the strides of ``input``."""
    return _activated(input, "relu")


def relu_backward(grad: Tensor, output: Tensor) -> Tensor:
    """``grad`` where the output is not 0 or less, else 0."""
    return _error(grad, output, "relu")


def leaky_relu(input: Tensor, slope: float) -> Tensor:
    """``x`` where it is positive, else ``slope x``."""
    return _activated(input, "leaky_relu", slope)


def leaky_relu_backward(grad: Tensor, signed: Tensor, slope: float) -> Tensor:
    """``grad`` where ``signed`` (the input, or an output of its sign) is positive, else ``slope grad``."""
    return _error(grad, signed, "leaky_relu", slope)


def sigmoid(input: Tensor) -> Tensor:
    """``1/(1 + exp(-x))``."""
    return _activated(input, "sigmoid")


def sigmoid_backward(grad: Tensor, output: Tensor) -> Tensor:
    """``grad y (1 - y)``."""
    return _error(grad, output, "sigmoid")


def tanh(input: Tensor) -> Tensor:
    """``-t/(t + 2)``, ``t = exp(-2|x|) - 1``, with the sign of ``x``."""
    return _activated(input, "tanh")


def tanh_backward(grad: Tensor, output: Tensor) -> Tensor:
    """``grad (1 - y^2)``."""
    return _error(grad, output, "tanh")


def bias_activation(product: Tensor, bias: Tensor, activation: str) -> Tensor:
    """``f(u + b)`` for rows ``u`` of shape (*, out), ``f`` one of relu, sigmoid and tanh, or ``""`` for none."""
    u, count = product.contiguous(), product.numel()
    y = u.new_empty(u.shape)
    grid = (blocks(count, _BLOCK),)
    launch(_bias_forward, grid, u, bias.contiguous(), y, count, u.shape[-1], ACTIVATION=activation, BLOCK=_BLOCK)
    return y


def bias_activation_backward(grad: Tensor, output: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The error before the activation, and the gradient of the bias, its sum over all rows, in float32."""
    grad, output = grad.contiguous(), output.contiguous()
    columns = grad.shape[-1]
    rows = grad.numel() // columns if columns else 0
    width = power_of_two(columns, 1, _COLUMNS)
    height = _ROWS * _COLUMNS // width
    parts = max(1, min(blocks(rows, height), programs_wanted(grad.device) // max(1, blocks(columns, width))))
    rows_per_part = blocks(blocks(rows, height), parts) * height
    parts = blocks(rows, rows_per_part) if rows else 0
    error, sums = grad.new_empty(grad.shape), grad.new_empty((parts, columns), dtype=torch.float32)
    launch(
        _bias_backward, (blocks(columns, width), parts), grad, output, error, sums, rows, columns, rows_per_part,
        ACTIVATION=activation, ROWS=height, COLUMNS=width,
    )  # fmt: skip
    return error, sums.sum(0)
