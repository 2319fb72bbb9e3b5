"""One step of a recurrent network: the simple cells and the LSTM cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_to_lower, call, opmath_dtype
from reimpl.functional._losses.plain import final, runs_plainly
from reimpl.functional.activation import hyperbolic_tangent, logistic, relu, sigmoid, tanh
from reimpl.functional.linear import linear


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    r"""Simple recurrent cell :math:`h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`.

    Over time the gradient passes through :math:`W_{hh}` once a step: powers of its eigenvalues vanish or explode.

    Args:
        input: :math:`x`, shape :math:`(N, \text{in})`.
        hx: :math:`h`, shape :math:`(N, \text{hidden})`.
        w_ih, w_hh: shapes :math:`(\text{hidden}, \text{in})` and :math:`(\text{hidden}, \text{hidden})`.
        b_ih, b_hh: shape :math:`(\text{hidden})`.

    Raises:
        RuntimeError: shapes do not fit; the text is PyTorch's.

    Source: F14; N2 eq. 8.11. PyTorch: :func:`torch.rnn_tanh_cell`.
    """
    _check(input, w_ih, w_hh, hx)
    return tanh(linear(input, w_ih, b_ih) + linear(hx, w_hh, b_hh))


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    r""":func:`rnn_tanh_cell` with a rectifier: :math:`h' = \max(0, W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`.

    Source: F14; N2. PyTorch: :func:`torch.rnn_relu_cell`.
    """
    _check(input, w_ih, w_hh, hx)
    return relu(linear(input, w_ih, b_ih) + linear(hx, w_hh, b_hh))


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""LSTM cell: a memory :math:`c` that is added to, so that its gradient need not vanish.

    .. math::
        (i, f, g, o) = W_{ih} x + b_{ih} + W_{hh} h + b_{hh}, \qquad
        c' = \sigma(f) \odot c + \sigma(i) \odot \tanh g, \qquad h' = \sigma(o) \odot \tanh c'

    Args:
        input: :math:`x`, shape :math:`(N, \text{in})`.
        hx: :math:`(h, c)`, each of shape :math:`(N, \text{hidden})`.
        w_ih, w_hh, b_ih, b_hh: as in :func:`rnn_tanh_cell`, with four times the rows, in the order i, f, g, o.

    Returns:
        :math:`(h', c')`.

    Raises:
        RuntimeError: shapes do not fit; the text is PyTorch's.

    Source: F14; N2. PyTorch: :func:`torch.lstm_cell`.
    """
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    hidden, cell = hx
    _check(input, w_ih, w_hh, hidden, cell)
    gates = linear(input, w_ih, b_ih) + linear(hidden, w_hh, b_hh)
    if cell.device.type == "cuda":
        (cell,) = autocast_to_lower(cell)  # PyTorch's fused kernel takes all in one dtype, its CPU cell promotes
    if gates.dtype is cell.dtype and runs_plainly(gates, cell):
        new_hidden, new_cell, _ = _PlainLSTM.apply(gates, cell)
    else:
        new_hidden, new_cell = call(_LSTM, _lstm, gates, cell)
    return new_hidden, new_cell


def _check(input: Tensor, w_ih: Tensor, w_hh: Tensor, *states: Tensor) -> None:
    """Raise PyTorch's ``RuntimeError`` where the sizes of input and state do not fit."""
    if input.dim() != 2:
        raise RuntimeError(f"Expected 2D input (batch x feature), but got {input.dim()}D input")
    if input.size(1) != w_ih.size(1):
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {w_ih.size(1)}")
    for i, state in enumerate(states):
        if state.dim() != 2:
            raise RuntimeError(f"Expected 2D hidden{i} (batch x hidden_size), but got {state.dim()}D tensor")
        if input.size(0) != state.size(0):
            raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{i} batch size {state.size(0)}")
        if state.size(1) != w_hh.size(1):
            raise RuntimeError(f"hidden{i} has inconsistent hidden_size: got {state.size(1)}, expected {w_hh.size(1)}")


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(gates.dtype, cell.dtype)
    wide = opmath_dtype(dtype)
    i, f, g, o = gates.to(wide).chunk(4, 1)
    new_cell = logistic(f) * cell.to(wide) + logistic(i) * hyperbolic_tangent(g)
    new_hidden = logistic(o) * hyperbolic_tangent(new_cell)
    return new_hidden.to(dtype), new_cell.to(dtype)


class _LSTM(torch.autograd.Function):
    r"""With the total error of the memory :math:`\delta = \bar c' + \bar h' \sigma(o) (1 - \tanh^2 c')`:
    :math:`\bar c = \delta\, \sigma(f)`, :math:`\bar f = \delta\, c\, \sigma'(f)`,
    :math:`\bar i = \delta \tanh(g)\, \sigma'(i)`, :math:`\bar g = \delta\, \sigma(i) (1 - \tanh^2 g)`,
    :math:`\bar o = \bar h' \tanh(c')\, \sigma'(o)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        return _lstm(gates, cell)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_hidden: Tensor, grad_cell: Tensor) -> tuple[Tensor, Tensor]:
        gates, cell = ctx.saved_tensors
        wide = opmath_dtype(torch.promote_types(gates.dtype, cell.dtype))
        gate_i, gate_f, gate_g, gate_o = gates.to(wide).chunk(4, 1)
        i, f, o = logistic(gate_i), logistic(gate_f), logistic(gate_o)
        g, c = hyperbolic_tangent(gate_g), cell.to(wide)
        squashed = hyperbolic_tangent(f * c + i * g)
        error_h = grad_hidden.to(wide)
        error = grad_cell.to(wide) + error_h * o * (1 - squashed * squashed)
        grad_gates = torch.cat(
            (
                error * g * i * (1 - i),
                error * c * f * (1 - f),
                error * i * (1 - g * g),
                error_h * squashed * o * (1 - o),
            ),
            1,
        )
        return grad_gates.to(gates.dtype), (error * f).to(cell.dtype)


class _PlainLSTM(torch.autograd.Function):
    r""":class:`_LSTM` in place. The gates after their squashing are a differentiable output, so that the gradient,
    which is made from them, can itself be differentiated."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squashed = sigmoid(gates)
        i, f, g, o = squashed.chunk(4, 1)
        g.copy_(tanh(gates.chunk(4, 1)[2]))
        new_cell = (f * cell).addcmul_(i, g)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(squashed, cell, new_cell)
        return tanh(new_cell).mul_(o), new_cell, squashed

    @staticmethod
    def backward(
        ctx: Any, grad_hidden: Tensor | None, grad_cell: Tensor | None, grad_squashed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        squashed, cell, new_cell = ctx.saved_tensors
        grad_hidden, grad_cell = (torch.zeros_like(cell) if g is None else g for g in (grad_hidden, grad_cell))
        if grad_squashed is None and final(grad_hidden, grad_cell):
            return _lstm_gradient(grad_hidden, grad_cell, squashed, cell, new_cell)
        i, f, g, o = squashed.chunk(4, 1)
        tanh_cell = hyperbolic_tangent(new_cell)
        error = grad_cell + grad_hidden * o * (1 - tanh_cell * tanh_cell)
        total = torch.cat((error * g, error * cell, error * i, grad_hidden * tanh_cell), 1)
        if grad_squashed is not None:
            total = total + grad_squashed
        slopes = torch.cat((i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)), 1)
        return total * slopes, error * f


def _lstm_gradient(
    grad_hidden: Tensor, grad_cell: Tensor, squashed: Tensor, cell: Tensor, new_cell: Tensor
) -> tuple[Tensor, Tensor]:
    i, f, g, o = squashed.chunk(4, 1)
    tanh_cell, result = tanh(new_cell), torch.empty_like(squashed)
    grad_i, grad_f, grad_g, grad_o = result.chunk(4, 1)
    torch.mul(grad_hidden, tanh_cell, out=grad_o)
    error = tanh_cell.square_().neg_().add_(1).mul_(o).mul_(grad_hidden).add_(grad_cell)
    torch.mul(error, g, out=grad_i)
    torch.mul(error, cell, out=grad_f)
    torch.mul(error, i, out=grad_g)
    slopes = torch.addcmul(squashed, squashed, squashed, value=-1)
    slope_g = slopes.chunk(4, 1)[2]
    torch.mul(g, g, out=slope_g).neg_().add_(1)
    return result.mul_(slopes), error.mul_(f)
