"""Oracles of the optimizers that are not elementwise; signatures as in :mod:`parity_tests.oracle.optim`.

The updates of Adafactor and Muon depend on norms, so that the oracle run on absolute values is not the scale of what is
added up: their magnitudes are |θ₀| plus the absolute values of the exact updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parity_tests.oracle.optim import Array, Grads, Rate, State, _Path


def sparse_adam(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    maximize: bool = False,
) -> tuple[Array, State]:
    """Adam where the gradient has rows: those that hold a number other than 0."""
    path = _Path(param, grads, lr, state)
    beta1, beta2 = path.scalar(betas[0]), path.scalar(betas[1])
    path.begin("exp_avg")
    path.begin("exp_avg_sq")
    path.state.setdefault("step", np.array(0))
    for rate, g in path.steps(maximize=maximize, weight_decay=0.0):
        step = path.count()
        row = np.any(g != 0, axis=tuple(range(1, g.ndim)), keepdims=True)
        path["exp_avg"] = np.where(row, beta1 * path["exp_avg"] + (1 - beta1) * g, path["exp_avg"])
        path["exp_avg_sq"] = np.where(row, beta2 * path["exp_avg_sq"] + (1 - beta2) * g * g, path["exp_avg_sq"])
        size = rate * np.sqrt(1 - beta2**step) / (1 - beta1**step)
        update = size * path["exp_avg"] / (np.sqrt(path["exp_avg_sq"]) + path.scalar(eps))
        path.theta = path.theta - np.where(row, update, 0)
    return path.result()


def adafactor(
    param: Array,
    grads: Grads,
    *,
    machine_eps: float,
    state: State | None = None,
    lr: Rate = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
    updates: list[Array] | None = None,
) -> tuple[Array, State]:
    """Shazeer and Stern's algorithms 4 and 5 as PyTorch has them; ``updates`` collects what is added to θ."""
    path = _Path(param, grads, lr, state)
    path.state.setdefault("step", np.array(0))
    eps1, eps2 = path.scalar(machine_eps if eps[0] is None else eps[0]), path.scalar(eps[1])
    for rate, g in path.steps(maximize=maximize, weight_decay=0.0):
        t = path.scalar(path.count())
        weight = t ** path.scalar(beta2_decay)
        alpha = max(eps2, _rms(path.theta)) * min(rate, 1 / np.sqrt(t))
        square = g * g
        if g.ndim > 1:
            for key, axis in (("row_var", -1), ("col_var", -2)):
                mean = square.mean(axis=axis, keepdims=True)
                path[key] = path.state.get(key, np.zeros_like(mean)) * (1 - weight) + weight * mean
            row = path["row_var"]
            second = row @ path["col_var"] / np.maximum(row.mean(axis=-2, keepdims=True), eps1)
        else:
            path.begin("variance")
            second = path["variance"] = (1 - weight) * path["variance"] + weight * square
        u = g / np.sqrt(np.maximum(second, eps1 * eps1))
        decayed = path.theta * (1 - rate * path.scalar(weight_decay))
        update = -alpha / max(path.scalar(1), _rms(u) / path.scalar(d)) * u
        _collect(updates, decayed - path.theta, update)
        path.theta = decayed + update
    return path.result()


def _rms(x: Array) -> Any:
    return np.sqrt((x * x).mean())


def muon(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: Sequence[float] = (3.4445, -4.775, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    updates: list[Array] | None = None,
) -> tuple[Array, State]:
    """Jordan's Muon, the iteration in the precision of the arrays; ``updates`` collects what is added to θ."""
    path = _Path(param, grads, lr, state)
    mu = path.scalar(momentum)
    for rate, g in path.steps(maximize=False, weight_decay=0.0):
        path.begin("momentum_buffer")
        path["momentum_buffer"] = mu * path["momentum_buffer"] + (1 - mu) * g
        direction = (1 - mu) * g + mu * path["momentum_buffer"] if nesterov else path["momentum_buffer"]
        rows, columns = g.shape
        ratio = {
            "match_rms_adamw": 0.2 * np.sqrt(max(rows, columns)),
            "spectral_unclamped": np.sqrt(rows / columns),
        }.get(adjust_lr_fn or "original", np.sqrt(max(1, rows / columns)))
        update = -rate * path.scalar(ratio) * newton_schulz(direction, ns_coefficients, ns_steps, eps)
        _collect(updates, -rate * path.scalar(weight_decay) * path.theta, update)
        path.theta = path.theta * (1 - rate * path.scalar(weight_decay)) + update
    return path.result()


def newton_schulz(x: Array, coefficients: Sequence[float], steps: int, eps: float) -> Array:
    """X ← aX + b(XXᵀ)X + c(XXᵀ)²X, by the singular values alone: U p(p(...S)) Vᵀ."""
    a, b, c = coefficients
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)  # LAPACK has no wider type
    s = s / max(np.sqrt((s * s).sum()), eps)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return np.asarray((u * s) @ vt, x.dtype)


def _collect(updates: list[Array] | None, *terms: Array) -> None:
    if updates is not None:
        updates.extend(terms)


def _magnitude(oracle: Callable[..., tuple[Array, State]], param: Array, grads: Grads, **hyper: Any) -> Any:
    updates: list[Array] = []
    _, state = oracle(param, grads, updates=updates, **hyper)
    return sum((np.abs(update) for update in updates), start=np.abs(param)), state


def adafactor_magnitude(param: Array, grads: Grads, **hyper: Any) -> tuple[Array, State]:
    """The scale of :func:`adafactor`; its state holds sums of squares, which are their own scale."""
    result: tuple[Array, State] = _magnitude(adafactor, param, grads, **hyper)
    return result


def muon_magnitude(param: Array, grads: Grads, **hyper: Any) -> tuple[Array, State]:
    """The scale of :func:`muon`; that of the momentum is the same average of absolute gradients."""
    theta, _ = _magnitude(muon, param, grads, **hyper)
    state = hyper.pop("state", None)
    past = None if state is None else {key: np.abs(value) for key, value in state.items()}
    absolute = [None if grad is None else np.abs(grad) for grad in grads]
    return theta, muon(param, absolute, state=past, **hyper)[1]
