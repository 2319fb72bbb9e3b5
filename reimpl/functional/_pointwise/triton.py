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


def worth_it(*tensors: Tensor) -> bool:
    """Whether there is anything to do."""
    return tensors[0].numel() > 0


def forward(name: str, input: Tensor, slope: float = 0.0, out: Tensor | None = None) -> Tensor:
    """relu, leaky_relu, sigmoid or tanh of the input, in its strides, into ``out`` of the same where given."""
    x = dense(input)
    y, count = torch.empty_like(x) if out is None else out, x.numel()
    launch(_forward, (blocks(count, _BLOCK),), x, y, count, float(slope), ACTIVATION=name, BLOCK=_BLOCK)
    return y


def backward(name: str, grad: Tensor, kept: Tensor, slope: float = 0.0, out: Tensor | None = None) -> Tensor:
    """The gradient of the input, given that of the output, and the output (for leaky_relu what has its sign)."""
    y = dense(kept)
    g = laid_out_as(grad, y)
    result, count = torch.empty_like(y) if out is None else out, y.numel()
    launch(_backward, (blocks(count, _BLOCK),), g, y, result, count, float(slope), ACTIVATION=name, BLOCK=_BLOCK)
    return result


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
