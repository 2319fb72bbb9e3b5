"""Layers and losses in NumPy alone: direct loops over windows, kernel taps and classes, with their gradients.

Each function returns the output and ``vjp(grad_output)``, which gives the gradients in the order of the arguments
(``None`` where there is none). Functions ``*_magnitude`` work the same way and give, element by element, the sum of the
absolute values that a computation in floating point adds up on its way; where there is none the function itself, run
on absolute values, is that sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Result = tuple[Array, Callable[[Array], tuple[Array | None, ...]]]


def linear(input: Array, weight: Array, bias: Array | None = None) -> Result:
    """y[..., o] = sum_i w[o, i] x[..., i] + b[o]."""
    matrix = np.atleast_2d(weight)
    output = np.einsum("...i,oi->...o", input, matrix)
    if bias is not None:
        output = output + bias

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = grad[..., None] if weight.ndim == 1 else grad
        rows, grad_rows = (a.reshape(int(np.prod(a.shape[:-1])), a.shape[-1]) for a in (input, g))
        grad_weight = np.einsum("no,ni->oi", grad_rows, rows)
        grad_bias = None if bias is None else grad_rows.sum(0)
        return np.einsum("...o,oi->...i", g, matrix), grad_weight.reshape(weight.shape), grad_bias

    return (output[..., 0] if weight.ndim == 1 else output), vjp


def relu(input: Array) -> Result:
    """y = x where x > 0, else 0."""
    return np.where(input > 0, input, 0), lambda grad: (np.where(input > 0, grad, 0),)


def relu_magnitude(input: Array) -> Result:
    """Nothing is added up: the output is the input, or an exact 0."""
    return np.where(input > 0, input, 0), lambda grad: (np.where(input > 0, np.abs(grad), 0),)


def _exp_of_minus(x: Array) -> Array:
    """exp(-x) without the warning of its overflow, which the callers mean."""
    with np.errstate(over="ignore"):
        return np.exp(-x)


def sigmoid(input: Array) -> Result:
    """y = 1/(1 + exp(-x)) and y' = y(x) y(-x), which does not cancel for large x."""
    output, mirrored = 1 / (1 + _exp_of_minus(input)), 1 / (1 + _exp_of_minus(-input))
    return output, lambda grad: (grad * output * mirrored,)


def sigmoid_magnitude(input: Array) -> Result:
    """The output itself; the gradient comes from y - y²."""
    output, _ = sigmoid(input)
    return output, lambda grad: (np.abs(grad) * (output + output * output),)


def _softmax(x: Array, dim: int) -> Array:
    weights = np.exp(x - x.max(axis=dim, keepdims=True, initial=-np.inf))
    return weights / weights.sum(axis=dim, keepdims=True)


def softmax(input: Array, dim: int) -> Result:
    """y_i = exp(x_i)/sum_j exp(x_j); its Jacobian is diag(y) - y yᵀ."""
    output = _softmax(input, dim)
    return output, lambda grad: (output * grad - output * (output * grad).sum(axis=dim, keepdims=True),)


def softmax_magnitude(input: Array, dim: int) -> Result:
    """The rounding of the exponent, of the size of x - max, is a relative error of the exponential."""
    factor = 1 + np.abs(input - input.max(axis=dim, keepdims=True, initial=-np.inf))
    output = _softmax(input, dim) * factor
    return output, lambda g: (output * np.abs(g) + output * (output * np.abs(g)).sum(axis=dim, keepdims=True),)


def _log_softmax(x: Array, dim: int) -> tuple[Array, Array]:
    """The logarithm of the softmax and the scale of what it is made from.

    A relative error of the sum of exponentials is an absolute error of its logarithm: hence the 1 in the scale.
    """
    shifted = x - x.max(axis=dim, keepdims=True, initial=-np.inf)
    log_sum = np.log(np.exp(shifted).sum(axis=dim, keepdims=True))
    return shifted - log_sum, np.abs(shifted) + np.abs(log_sum) + 1


def log_softmax(input: Array, dim: int) -> Result:
    """y_i = x_i - log sum_j exp(x_j)."""
    output, probabilities = _log_softmax(input, dim)[0], _softmax(input, dim)
    return output, lambda grad: (grad - probabilities * grad.sum(axis=dim, keepdims=True),)


def log_softmax_magnitude(input: Array, dim: int) -> Result:
    """The gradient holds exp(y), in which the rounding of y, of the size of y, is a relative error."""
    _, size = _log_softmax(input, dim)
    probabilities = _softmax(input, dim) * size
    return size, lambda grad: (np.abs(grad) + probabilities * np.abs(grad).sum(axis=dim, keepdims=True),)


def _targets(
    input: Array, target: Array, weight: Array | None, ignore_index: int, smoothing: float
) -> tuple[Array, Array, Array]:
    """w q with the classes in axis 1, the weights w laid along it, and what "mean" divides by."""
    classes = input.shape[1]
    w = (np.ones(classes) if weight is None else weight).astype(input.dtype)
    w = w.reshape(1, -1, *(1,) * (input.ndim - 2))
    if target.shape == input.shape:
        return w * ((1 - smoothing) * target + smoothing / classes), w, np.asarray(input.size / classes, input.dtype)
    one_hot = np.arange(classes).reshape(w.shape) == target[:, None]
    kept = (target != ignore_index)[:, None]
    q = (1 - smoothing) * one_hot.astype(input.dtype) + input.dtype.type(smoothing) / classes
    return w * q * kept, w, (w * one_hot * kept).sum()


def cross_entropy(
    input: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Result:
    """l_n = -sum_c w_c q_nc log softmax(x_n)_c, then the reduction."""
    return _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, False)


def cross_entropy_magnitude(
    input: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Result:
    """The same sums over absolute values of the log-probabilities' terms."""
    return _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, True)


def _cross_entropy(
    input: Array,
    target: Array,
    weight: Array | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    magnitude: bool,
) -> Result:
    x = input[None] if input.ndim == 1 else input
    t = target[None] if input.ndim == 1 and target.ndim == input.ndim else target
    t = t.reshape(1) if input.ndim == 1 and t.shape != x.shape else t
    wq, w, divisor = _targets(x, t, weight, ignore_index, smoothing)
    log_probs, size = _log_softmax(x, 1)
    probabilities, sign = _softmax(x, 1), -1
    if magnitude:
        log_probs, wq, w = size, np.abs(wq), np.abs(w)
        probabilities, sign = probabilities * size, 1
    terms = sign * wq * log_probs
    losses = terms.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        output = {"none": lambda: losses, "sum": losses.sum, "mean": lambda: losses.sum() / divisor}[reduction]()

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = np.abs(grad) if magnitude else grad
        g = np.broadcast_to(g / divisor if reduction == "mean" else g, losses.shape)[:, None]
        grad_input = g * (probabilities * wq.sum(axis=1, keepdims=True) + sign * wq)
        if t.shape != x.shape:
            return grad_input.reshape(input.shape), None, None
        grad_target = sign * g * w * log_probs * (1 - smoothing)
        bare = (1 - smoothing) * (np.abs(t) if magnitude else t) + smoothing / x.shape[1]
        grad_weight = np.moveaxis(sign * g * bare * log_probs, 1, 0).reshape(x.shape[1], -1).sum(axis=1)
        return grad_input.reshape(input.shape), grad_target.reshape(target.shape), grad_weight

    if reduction == "none" and input.ndim == 1:
        output = output.reshape(() if t.shape == x.shape else target.shape)
    return np.asarray(output), vjp


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _padding(
    padding: int | Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0), (0, 0)]
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    assert not isinstance(padding, str)
    return [(p, p) for p in _pair(padding)]


def conv2d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Result:
    """One kernel tap after the other, group by group: y += w[:, :, k, l] x[shifted by (k, l)]."""
    x = input if input.ndim == 4 else input[None]
    s, d = _pair(stride), _pair(dilation)
    sides = _padding(padding, weight.shape[2:], d)
    padded = np.pad(x, [(0, 0), (0, 0), *sides])
    rows, columns = ((padded.shape[i + 2] - d[i] * (weight.shape[i + 2] - 1) - 1) // s[i] + 1 for i in (0, 1))
    outputs, channels = weight.shape[0] // groups, weight.shape[1]

    def taps() -> Iterator[tuple[Any, ...]]:
        """Kernel tap, the input's elements it meets, and its group's input and output channels."""
        for k in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                window = np.s_[:, :, k * d[0] :: s[0], j * d[1] :: s[1]]
                for group in range(groups):
                    into = slice(group * channels, (group + 1) * channels)
                    out = slice(group * outputs, (group + 1) * outputs)
                    yield (k, j), window, into, out

    output = np.zeros((x.shape[0], weight.shape[0], rows, columns), input.dtype)
    for (k, j), window, into, out in taps():
        met = padded[window][:, into, :rows, :columns]
        output[:, out] += np.einsum("nchw,oc->nohw", met, weight[out, :, k, j])
    if bias is not None:
        output += bias[:, None, None]

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = grad if grad.ndim == 4 else grad[None]
        grad_padded, grad_weight = np.zeros_like(padded), np.zeros_like(weight)
        for (k, j), window, into, out in taps():
            met = padded[window][:, into, :rows, :columns]
            grad_weight[out, :, k, j] = np.einsum("nohw,nchw->oc", g[:, out], met)
            grad_padded[window][:, into, :rows, :columns] += np.einsum("nohw,oc->nchw", g[:, out], weight[out, :, k, j])
        inner = [slice(low, low + n) for (low, _), n in zip(sides, x.shape[2:], strict=True)]
        grad_input = grad_padded[:, :, inner[0], inner[1]]
        return grad_input.reshape(input.shape), grad_weight, None if bias is None else g.sum(axis=(0, 2, 3))

    return output.reshape(*input.shape[:-3], *output.shape[1:]), vjp


def batch_norm(
    input: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Result:
    """Channel by channel, each flattened into one vector; the gradient through the Jacobian of x̂.

    In training d x̂_i/d x_j = s (δ_ij - 1/m - x̂_i x̂_j/m) with s = 1/sqrt(σ² + ε), else s δ_ij. ``momentum`` moves only
    the running averages, which :func:`moved_averages` gives.
    """
    x = np.moveaxis(input, 1, 0).reshape(input.shape[1], -1)
    if training:
        mean, var = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean[:, None], running_var[:, None]
    s = 1 / np.sqrt(var + np.asarray(eps, input.dtype))
    normal = (x - mean) * s
    gamma = np.ones_like(mean) if weight is None else weight[:, None]
    output = gamma * normal + (0 if bias is None else bias[:, None])

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = np.moveaxis(grad, 1, 0).reshape(x.shape)
        h = gamma * g
        if training:
            h = h - h.mean(axis=1, keepdims=True) - normal * (h * normal).mean(axis=1, keepdims=True)
        grad_weight = None if weight is None else (g * normal).sum(axis=1)
        return _planes(h * s, input), None, None, grad_weight, None if bias is None else g.sum(axis=1)

    return _planes(output, input), vjp


def batch_norm_magnitude(
    input: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Result:
    """x̂ is made from x and μ, so that its scale is s(|x| + |μ|); every sum is over absolute values."""
    x = np.moveaxis(input, 1, 0).reshape(input.shape[1], -1)
    if training:
        mean, var = np.abs(x).mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = np.abs(running_mean)[:, None], running_var[:, None]
    s = 1 / np.sqrt(var + eps)
    normal = (np.abs(x) + mean) * s
    gamma = np.ones_like(mean) if weight is None else np.abs(weight)[:, None]
    output = gamma * normal + (0 if bias is None else np.abs(bias)[:, None])

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        g = np.abs(np.moveaxis(grad, 1, 0).reshape(x.shape))
        h = gamma * g
        if training:
            h = h + h.mean(axis=1, keepdims=True) + normal * (h * normal).mean(axis=1, keepdims=True)
        return _planes(h * s, input), None, None, (g * normal).sum(axis=1), g.sum(axis=1)

    return _planes(output, input), vjp


def moved_averages(input: Array, running_mean: Array, running_var: Array, momentum: float = 0.1) -> tuple[Array, Array]:
    """The running averages after a batch: r + α (statistic - r), the variance with m - 1 below."""
    x = np.moveaxis(input, 1, 0).reshape(input.shape[1], -1)
    statistics = (running_mean, x.mean(axis=1)), (running_var, x.var(axis=1, ddof=1))
    mean, var = (r + np.asarray(momentum, r.dtype) * (new - r) for r, new in statistics)
    return mean, var


def _planes(channels: Array, like: Array) -> Array:
    """Channels flattened into vectors, back in the shape of ``like``."""
    return np.moveaxis(channels.reshape(like.shape[1], like.shape[0], *like.shape[2:]), 0, 1)
