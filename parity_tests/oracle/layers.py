"""Recurrent cells, embedding, skip-gram and dropout in NumPy alone, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parity_tests.oracle.functional import Array, Result
from parity_tests.oracle.tracked import Tracked, concatenate, exact, rectify, sigmoid, softplus, tanh

TrackedResult = tuple[Tracked, Callable[[Array], tuple[Tracked | None, ...]]]


def _values(result: TrackedResult) -> Result:
    output, vjp = result
    return output.value, lambda grad: tuple(None if g is None else g.value for g in vjp(grad))


def _scales(result: TrackedResult) -> Result:
    output, vjp = result
    return output.scale, lambda grad: tuple(None if g is None else g.scale for g in vjp(grad))


def _affine(arguments: Sequence[Array | None]) -> tuple[Tracked, list[Tracked | None]]:
    """x W_ihᵀ + b_ih + h W_hhᵀ + b_hh, and its arguments."""
    x, h, w_ih, w_hh, b_ih, b_hh = (None if a is None else exact(a) for a in arguments)
    assert x is not None and h is not None and w_ih is not None and w_hh is not None
    total = x @ w_ih.T + h @ w_hh.T
    for bias in (b_ih, b_hh):
        total = total if bias is None else total + bias
    return total, [x, h, w_ih, w_hh, b_ih, b_hh]


def _through_affine(delta: Tracked, arguments: list[Tracked | None]) -> tuple[Tracked | None, ...]:
    """Gradients of the arguments from that of the sum, in their order."""
    x, h, w_ih, w_hh, b_ih, b_hh = arguments
    assert x is not None and h is not None and w_ih is not None and w_hh is not None
    biases = [None if bias is None else delta.sum(0) for bias in (b_ih, b_hh)]
    return delta @ w_ih, delta @ w_hh, delta.T @ x, delta.T @ h, *biases


def _rnn(arguments: tuple[Array | None, ...], relu: bool) -> TrackedResult:
    total, tracked = _affine((*arguments, *(None,) * (6 - len(arguments))))
    output = rectify(total) if relu else tanh(total)

    def vjp(grad: Array) -> tuple[Tracked | None, ...]:
        slope = exact((total.value > 0).astype(grad.dtype)) if relu else 1 - output * output
        return _through_affine(exact(grad) * slope, tracked)

    return output, vjp


def rnn_tanh_cell(*arguments: Array | None) -> Result:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return _values(_rnn(arguments, relu=False))


def rnn_tanh_cell_magnitude(*arguments: Array | None) -> Result:
    """The running error analysis of the same formula."""
    return _scales(_rnn(arguments, relu=False))


def rnn_relu_cell(*arguments: Array | None) -> Result:
    """h' = max(0, W_ih x + b_ih + W_hh h + b_hh)."""
    return _values(_rnn(arguments, relu=True))


def rnn_relu_cell_magnitude(*arguments: Array | None) -> Result:
    """The running error analysis of the same formula."""
    return _scales(_rnn(arguments, relu=True))


def _lstm(input: Array, hidden: Array, cell: Array, weights: tuple[Array | None, ...]) -> TrackedResult:
    total, tracked = _affine((input, hidden, *weights, *(None,) * (4 - len(weights))))
    size = hidden.shape[1]
    i, f, g, o = (total[:, k * size : (k + 1) * size] for k in range(4))
    i, f, g, o, c = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o), exact(cell)
    new_cell = f * c + i * g
    squashed = tanh(new_cell)
    new_hidden = o * squashed
    output = Tracked(np.stack([new_hidden.value, new_cell.value]), np.stack([new_hidden.scale, new_cell.scale]))

    def vjp(grad: Array) -> tuple[Tracked | None, ...]:
        grad_hidden, grad_cell = exact(grad[0]), exact(grad[1])
        error = grad_cell + grad_hidden * o * (1 - squashed * squashed)
        gates = concatenate(
            [
                error * g * i * (1 - i),
                error * c * f * (1 - f),
                error * i * (1 - g * g),
                grad_hidden * squashed * o * (1 - o),
            ],
            1,
        )
        grads = _through_affine(gates, tracked)
        return grads[0], grads[1], error * f, *grads[2:]

    return output, vjp


def lstm_cell(input: Array, hidden: Array, cell: Array, *weights: Array | None) -> Result:
    """(h', c') stacked: c' = σ(f) c + σ(i) tanh(g), h' = σ(o) tanh(c')."""
    return _values(_lstm(input, hidden, cell, weights))


def lstm_cell_magnitude(input: Array, hidden: Array, cell: Array, *weights: Array | None) -> Result:
    """The running error analysis of the same formula."""
    return _scales(_lstm(input, hidden, cell, weights))


def embedding(
    input: Array,
    weight: Array,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Result:
    """Row after row, shrunk to the largest norm where one is given; each number's gradient is added into its row."""
    table = weight.copy()
    if max_norm is not None:
        for row in np.unique(input):
            norm = (np.abs(table[row]) ** norm_type).sum() ** (1 / weight.dtype.type(norm_type))
            if norm > max_norm:
                table[row] *= weight.dtype.type(max_norm) / (norm + weight.dtype.type(1e-7))
    output = table[input]

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        total = np.zeros_like(weight)
        for place in np.ndindex(*input.shape):
            row = input[place]
            if padding_idx is None or row != padding_idx % len(weight):
                total[row] += grad[place] / ((input == row).sum() if scale_grad_by_freq else 1)
        return None, total

    return output, vjp


def _skip_gram(center: Array, context: Array, negative: Array, reduction: str) -> TrackedResult:
    v, u, drawn = exact(center), exact(context), exact(negative)
    true, scores = (v * u).sum(1), (drawn * v[:, None]).sum(2)
    losses = softplus(-true) + softplus(scores).sum(1)
    count = center.dtype.type(len(center))
    output = losses if reduction == "none" else losses.sum(0)
    if reduction == "mean":
        output = output * (1 / count)

    def vjp(grad: Array) -> tuple[Tracked | None, ...]:
        g = exact(np.broadcast_to(grad / count if reduction == "mean" else grad, true.value.shape))
        true_error, errors = -(g * sigmoid(-true)), g[:, None] * sigmoid(scores)
        grad_center = true_error[:, None] * u + (errors[:, :, None] * drawn).sum(1)
        return grad_center, true_error[:, None] * v, errors[:, :, None] * v[:, None]

    return output, vjp


def skip_gram_loss(center: Array, context: Array, negative: Array, reduction: str = "mean") -> Result:
    """-log σ(v·u) - sum log σ(-v·ũ)."""
    return _values(_skip_gram(center, context, negative, reduction))


def skip_gram_loss_magnitude(center: Array, context: Array, negative: Array, reduction: str = "mean") -> Result:
    """The running error analysis of the same formula."""
    return _scales(_skip_gram(center, context, negative, reduction))


def dropout(input: Array, p: float = 0.5, training: bool = True, **_: Any) -> Result:
    """What does not depend on chance: nothing dropped, or everything."""
    assert not training or p in (0, 1)
    kept = 0 if training and p == 1 else 1
    return input * kept, lambda grad: (grad * kept,)
