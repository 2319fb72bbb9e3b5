"""Losses and penalties in NumPy alone, with their gradients; the conventions are those of the functional oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from parity_tests.oracle.functional import Array, Result

Back = Callable[[Array], Array]


def _reduced(losses: Array, reduction: str, count: Array | float | None = None) -> tuple[Array, Back]:
    """The reduction, and the gradient of each loss for a gradient of the result."""
    divisor = losses.dtype.type(losses.size if count is None else count)
    with np.errstate(invalid="ignore", divide="ignore"):
        if reduction == "none":
            return losses, lambda grad: grad
        if reduction == "sum":
            return np.asarray(losses.sum()), lambda grad: np.broadcast_to(grad, losses.shape)
        return np.asarray(losses.sum() / divisor), lambda grad: np.broadcast_to(grad / divisor, losses.shape)


def _as_shape(grad: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of an array that was broadcast, summed back to its shape."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(i for i, (n, m) in enumerate(zip(grad.shape, shape, strict=True)) if n != m)
    return grad.sum(axis=stretched, keepdims=True) if stretched else grad


def _squared(
    input: Array, target: Array, reduction: str, weight: Array | None, factor: float, magnitude: bool
) -> Result:
    difference = np.abs(input - target) if magnitude else input - target
    w = np.ones_like(difference) if weight is None else np.broadcast_to(weight, difference.shape)
    output, back = _reduced(factor * w * difference**2, reduction, w.sum() if weight is not None else None)

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        slope = back(grad) * w * factor * 2 * difference
        return _as_shape(slope, input.shape), _as_shape(slope if magnitude else -slope, target.shape)

    return output, vjp


def mse_loss(input: Array, target: Array, reduction: str = "mean", weight: Array | None = None) -> Result:
    """w (x - t)²; the mean divides by the sum of w."""
    return _squared(input, target, reduction, weight, 1.0, False)


def mse_loss_magnitude(input: Array, target: Array, reduction: str = "mean", weight: Array | None = None) -> Result:
    """x and t are exact, so that their difference has a small relative error."""
    return _squared(input, target, reduction, weight, 1.0, True)


def half_squared_error(input: Array, target: Array, reduction: str = "sum") -> Result:
    """(x - t)²/2."""
    return _squared(input, target, reduction, None, 0.5, False)


def half_squared_error_magnitude(input: Array, target: Array, reduction: str = "sum") -> Result:
    """As for the whole square."""
    return _squared(input, target, reduction, None, 0.5, True)


def _picked(input: Array, target: Array) -> tuple[Array, Array, tuple[Array, ...]]:
    """Input and target with a batch dimension, and the places of the target classes."""
    x = input[None] if input.ndim == 1 else input
    t = target.reshape(1) if input.ndim == 1 else target
    grid = np.meshgrid(*(np.arange(n) for n in t.shape), indexing="ij")
    return x, t, (grid[0], np.where((t >= 0) & (t < x.shape[1]), t, 0), *grid[1:])


def nll_loss(
    input: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Result:
    """-w[t] x[t], sample after sample; ignored ones count nothing."""
    x, t, places = _picked(input, target)
    w = (np.ones(x.shape[1], x.dtype) if weight is None else weight)[places[1]] * (t != ignore_index)
    # 0 times an infinity that nobody asked for is no loss.
    losses = np.where(w == 0, 0, -w * np.where(w == 0, 0, x[places]))
    output, back = _reduced(losses, reduction, w.sum())
    if reduction == "none" and input.ndim == 1:
        output = output.reshape(())

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        spread = np.zeros_like(x)
        np.add.at(spread, places, -w * back(grad.reshape(losses.shape) if reduction == "none" else grad))
        return spread.reshape(input.shape), None, None

    return output, vjp


def _guarded(input: Array, target: Array, eps: float, reduction: str, magnitude: bool) -> Result:
    if target.shape == input.shape:
        t = target.astype(input.dtype)
    else:
        x, _, places = _picked(input, target)
        t = np.zeros_like(x)
        t[places] = 1
        t = t.reshape(input.shape)
    axis = 0 if input.ndim == 1 else 1
    shifted = input + input.dtype.type(eps)
    logs = np.abs(np.log(shifted)) + 1 if magnitude else -np.log(shifted)
    losses = (t * logs).sum(axis)
    output, back = _reduced(losses, reduction)

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = np.expand_dims(back(grad), axis)
        return (g if magnitude else -g) * t / shifted, g * logs

    return output, vjp


def cross_entropy_of_probabilities(input: Array, target: Array, eps: float = 1e-7, reduction: str = "mean") -> Result:
    """-sum t log(y + eps)."""
    return _guarded(input, target, eps, reduction, False)


def cross_entropy_of_probabilities_magnitude(
    input: Array, target: Array, eps: float = 1e-7, reduction: str = "mean"
) -> Result:
    """A relative error of y + eps is an absolute error of its logarithm: hence the 1."""
    return _guarded(input, target, eps, reduction, True)


def zero_one_loss(input: Array, target: Array, ignore_index: int = -100, reduction: str = "mean") -> Result:
    """1 where the first of the largest scores is not the target's."""
    x, t, _ = _picked(input, target)
    kept = t != ignore_index
    wrong = ((x.argmax(axis=1) != t) & kept).astype(x.dtype)
    output, _ = _reduced(wrong, reduction, kept.sum())
    return output.reshape(target.shape) if reduction == "none" else output, lambda grad: (None, None)


def binary_cross_entropy(input: Array, target: Array, weight: Array | None = None, reduction: str = "mean") -> Result:
    """-w (t log x + (1 - t) log(1 - x)) with each logarithm at least -100; x (1 - x) at least 1e-12 in the gradient."""
    return _binary(input, target, weight, reduction, False)


def binary_cross_entropy_magnitude(
    input: Array, target: Array, weight: Array | None = None, reduction: str = "mean"
) -> Result:
    """Both logarithms of one sign in the target's gradient."""
    return _binary(input, target, weight, reduction, True)


def _binary(input: Array, target: Array, weight: Array | None, reduction: str, magnitude: bool) -> Result:
    with np.errstate(divide="ignore"):
        yes, no = np.log(input), np.log1p(-input)
    w = np.ones_like(input) if weight is None else np.broadcast_to(weight, input.shape)
    losses = -w * (target * np.maximum(yes, -100) + (1 - target) * np.maximum(no, -100))
    output, back = _reduced(losses, reduction)

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = back(grad) * w
        slope = g * (input - target) / np.maximum(input * (1 - input), input.dtype.type(1e-12))
        if magnitude:
            return np.abs(slope), np.abs(g) * (np.abs(no) + np.abs(yes)), None
        return slope, g * (no - yes), None

    return output, vjp


def _with_logits(
    input: Array,
    target: Array,
    weight: Array | None,
    reduction: str,
    pos_weight: Array | None,
    magnitude: bool,
    count: Array | None = None,
) -> Result:
    w = np.ones_like(input) if weight is None else np.broadcast_to(weight, input.shape)
    q = np.ones_like(input) if pos_weight is None else np.broadcast_to(pos_weight, input.shape)
    positive = 1 + (q - 1) * target
    softplus = np.log1p(np.exp(-np.abs(input))) + np.maximum(-input, 0)
    linear = (1 - target) * input
    losses = w * ((np.abs(linear) if magnitude else linear) + positive * softplus)
    output, back = _reduced(losses, reduction, count)
    with np.errstate(over="ignore"):
        mirrored = 1 / (1 + np.exp(input))

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = back(grad) * w
        if magnitude:
            return g * (1 - target + positive * mirrored), g * (np.abs(q - 1) * softplus + np.abs(input)), None
        return g * (1 - target - positive * mirrored), g * ((q - 1) * softplus - input), None

    return output, vjp


def binary_cross_entropy_with_logits(
    input: Array,
    target: Array,
    weight: Array | None = None,
    reduction: str = "mean",
    pos_weight: Array | None = None,
) -> Result:
    """w ((1 - t) x + (1 + (q - 1) t) log(1 + exp(-x)))."""
    return _with_logits(input, target, weight, reduction, pos_weight, False)


def binary_cross_entropy_with_logits_magnitude(
    input: Array,
    target: Array,
    weight: Array | None = None,
    reduction: str = "mean",
    pos_weight: Array | None = None,
) -> Result:
    """Both terms, and both parts of the gradients, in absolute values."""
    return _with_logits(input, target, weight, reduction, pos_weight, True)


def _masked(
    input: Array, target: Array, mask: Array | None, reduction: str, pos_weight: Array | None, magnitude: bool
) -> Result:
    known = ~np.isnan(target) if mask is None else mask
    x, t = np.where(known, input, 0), np.where(known, target, 0)
    output, vjp = _with_logits(x, t, known.astype(x.dtype), reduction, pos_weight, magnitude, known.sum())
    return output, lambda grad: (*vjp(grad)[:2], None)


def masked_multilabel_loss(
    input: Array,
    target: Array,
    mask: Array | None = None,
    reduction: str = "mean",
    pos_weight: Array | None = None,
) -> Result:
    """Binary cross-entropy with weight 0 where the label is unknown; the mean over the others."""
    return _masked(input, target, mask, reduction, pos_weight, False)


def masked_multilabel_loss_magnitude(
    input: Array,
    target: Array,
    mask: Array | None = None,
    reduction: str = "mean",
    pos_weight: Array | None = None,
) -> Result:
    """As without a mask."""
    return _masked(input, target, mask, reduction, pos_weight, True)


def _penalty(input: Array, p: float, weight: float, power: bool, magnitude: bool) -> Result:
    exponent, scale = input.dtype.type(p), input.dtype.type(weight) / input.dtype.type(p)
    size = np.abs(input)
    total = (size**exponent).sum()
    value = total if power else total ** (1 / exponent)
    slope = (1 if magnitude else np.sign(input)) * size ** (exponent - 1) * exponent
    if not power:
        slope = slope * (value / total / exponent if total > 0 else 0)
    # An error of the exponent's last digit is one of log(total) in the result.
    factor = 1 + abs(np.log(total)) if magnitude and total > 0 else 1
    return np.asarray(scale * value * factor), lambda grad: (grad * scale * slope * factor,)


def lp_penalty(input: Array, p: float = 2.0, weight: float = 1.0, *, power: bool = False) -> Result:
    """(λ/p) (sum |x|^p)^(1/p), or without the root."""
    return _penalty(input, p, weight, power, False)


def lp_penalty_magnitude(input: Array, p: float = 2.0, weight: float = 1.0, *, power: bool = False) -> Result:
    """Nothing cancels; powers and roots by a rounded exponent lose a digit a logarithm."""
    return _penalty(input, p, weight, power, True)


def edge_filters(*names: str, channels: int = 1, dtype: Any = None, device: Any = None) -> Result:
    """Outer products of a difference and a smoothing; the Laplacian and the diagonal spelt out. No gradient."""
    difference = np.array([1, 0, -1])
    smoothing = {"": [1, 1, 1], "sobel_": [1, 2, 1], "scharr_": [3, 10, 3]}
    known = {"laplacian": 4 * np.outer([0, 1, 0], [0, 1, 0]) - _neighbours(), "diagonal": _diagonal()}
    for prefix, weights in smoothing.items():
        known[f"{prefix}vertical"] = np.outer(weights, difference)
        known[f"{prefix}horizontal"] = np.outer(difference, weights)
    stack = np.stack([known[name] for name in names or ("vertical", "horizontal")]).astype(np.float64)
    return np.repeat(stack[:, None], channels, axis=1), lambda grad: ()


def _neighbours() -> Array:
    """1 at the four neighbours of the centre."""
    i, j = np.indices((3, 3)) - 1
    return (np.abs(i) + np.abs(j) == 1).astype(int)


def _diagonal() -> Array:
    """The sign of the distance from the main diagonal."""
    i, j = np.indices((3, 3))
    return np.sign(j - i)
