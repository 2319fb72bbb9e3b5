"""Oracles of the optimizers of ``torch.optim`` that lie beyond the notes; their form is that of ``oracle.optim``.

The numbers that NAdam and ASGD keep in their state are rounded to float32 after each step, as PyTorch's tensors are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.oracle.optim import NUMBERS, Array, Grads, Rate, State, _Path


def _single(value: Any) -> Array:
    return np.array(np.float32(value))


def adamax(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_inside_max: bool = True,
    **common: Any,
) -> tuple[Array, State]:
    """Kingma and Ba's algorithm 2, with ε beside the gradient or beside the maximum."""
    path = _Path(param, grads, lr, state)
    beta1, beta2 = map(path.scalar, betas)
    path.begin("exp_avg")
    path.begin("exp_inf")
    path.state.setdefault("step", np.array(0))
    for rate, g in path.steps(**common):
        step = path.count()
        path["exp_avg"] = beta1 * path["exp_avg"] + (1 - beta1) * g
        under, beside = (path.scalar(eps), 0) if eps_inside_max else (0, path.scalar(eps))
        path["exp_inf"] = np.maximum(beta2 * path["exp_inf"], np.abs(g) + under)
        path.theta = path.theta - rate / (1 - beta1**step) * path["exp_avg"] / (path["exp_inf"] + beside)
    return path.result()


def nadam(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    **common: Any,
) -> tuple[Array, State]:
    """Dozat's rule with his schedule of the momentum."""
    path = _Path(param, grads, lr, state)
    beta1, beta2 = map(path.scalar, betas)
    path.begin("exp_avg")
    path.begin("exp_avg_sq")
    path.state.setdefault("step", np.array(0))
    path.state.setdefault("mu_product", _single(1))
    for rate, g in path.steps(**common):
        step = path.count()
        decay = path.scalar(momentum_decay)
        mu, mu_next = (beta1 * (1 - path.scalar(0.96) ** (t * decay) / 2) for t in (step, step + 1))
        path["mu_product"] = _single(np.float32(path["mu_product"]) * np.float32(mu))
        product = path.scalar(path["mu_product"])
        path["exp_avg"] = beta1 * path["exp_avg"] + (1 - beta1) * g
        path["exp_avg_sq"] = beta2 * path["exp_avg_sq"] + (1 - beta2) * g * g
        ahead = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * path["exp_avg"]
        path.theta = path.theta - rate * ahead / (np.sqrt(path["exp_avg_sq"] / (1 - beta2**step)) + path.scalar(eps))
    return path.result()


def radam(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_hat: bool = True,
    **common: Any,
) -> tuple[Array, State]:
    """Liu et al.'s algorithm 2, with ε beside the root of v (or of v̂) and 5 for its 4."""
    path = _Path(param, grads, lr, state)
    beta1, beta2 = map(path.scalar, betas)
    path.begin("exp_avg")
    path.begin("exp_avg_sq")
    path.state.setdefault("step", np.array(0))
    longest = 2 / (1 - beta2) - 1
    for rate, g in path.steps(**common):
        step = path.count()
        path["exp_avg"] = beta1 * path["exp_avg"] + (1 - beta1) * g
        path["exp_avg_sq"] = beta2 * path["exp_avg_sq"] + (1 - beta2) * g * g
        update = path["exp_avg"] / (1 - beta1**step)
        length = longest - 2 * step * beta2**step / (1 - beta2**step)
        if length > 5:
            variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            correction = np.sqrt(1 - beta2**step)
            root = np.sqrt(path["exp_avg_sq"]) / correction + path.scalar(eps) / (correction if eps_hat else 1)
            update = update * np.sqrt(variance) / root
        path.theta = path.theta - rate * update
    return path.result()


def asgd(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, State]:
    """Polyak and Juditsky's mean of the path, with Bottou's schedule of the rate."""
    path = _Path(param, grads, lr, state)
    for rate, g in path.steps(maximize=maximize, weight_decay=weight_decay):
        eta, mu = _begin_asgd(path, rate)
        path.theta = (1 - path.scalar(lambd) * eta) * path.theta - eta * g
        path["ax"] = path["ax"] + mu * (path.theta - path["ax"]) if mu != 1 else path.theta
        _reschedule(path, rate, lambd, alpha, t0)
    return path.result()


def asgd_magnitude(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-2,
    lambd: float = 1e-4,
    alpha: float = 0.75,
    t0: float = 1e6,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> tuple[Array, State]:
    """:func:`asgd` with every term's absolute value added; the numbers of the state are no sums."""
    size = {key: value if key in NUMBERS else _absolute(value) for key, value in (state or {}).items()}
    path = _Path(_absolute(param), [None if g is None else _absolute(g) for g in grads], lr, size)
    for rate, g in path.steps(maximize=False, weight_decay=weight_decay):
        eta, mu = _begin_asgd(path, rate)
        path.theta = (1 + path.scalar(lambd) * eta) * path.theta + eta * g
        path["ax"] = path["ax"] + mu * (path.theta + path["ax"]) if mu != 1 else path.theta
        _reschedule(path, rate, lambd, alpha, t0)
    return path.result()


def _begin_asgd(path: _Path, rate: Any) -> tuple[Any, Any]:
    """Raise the step count, and return η and μ of this step."""
    path.begin("ax")
    path.state.setdefault("eta", _single(rate))
    path.state.setdefault("mu", _single(1))
    path.count()
    return path.scalar(path["eta"]), path.scalar(path["mu"])


def _reschedule(path: _Path, rate: Any, lambd: float, alpha: float, t0: float) -> None:
    step = path.scalar(path["step"])
    path["eta"] = _single(rate / (1 + path.scalar(lambd) * rate * step) ** path.scalar(alpha))
    path["mu"] = _single(1 / max(path.scalar(1), step - path.scalar(t0)))


def rprop(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    maximize: bool = False,
) -> tuple[Array, State]:
    """Riedmiller and Braun's rule without its way back: a step whose sign turned is left out."""
    path = _Path(param, grads, lr, state)
    shrink, grow = map(path.scalar, etas)
    path.begin("prev")
    path.state.setdefault("step", np.array(0))
    for rate, g in path.steps(maximize=maximize, weight_decay=0.0):
        path.begin("step_size", rate)
        path.count()
        turn = np.sign(g) * np.sign(path["prev"])
        size = np.where(turn > 0, path["step_size"] * grow, path["step_size"])
        size = np.where(turn < 0, path["step_size"] * shrink, size)
        path["step_size"] = np.clip(size, *map(path.scalar, step_sizes))
        path["prev"] = np.where(turn < 0, path.scalar(0), g)
        path.theta = path.theta - path["step_size"] * np.sign(path["prev"])
    return path.result()


def rprop_magnitude(param: Array, grads: Grads, *, state: State | None = None, **hyper: Any) -> tuple[Array, State]:
    """|θ| and the length of the way that :func:`rprop` goes; its steps themselves are products."""
    here, size, known = param, _absolute(param), dict(state or {})
    for grad in grads:
        after, known = rprop(here, [grad], state=known, **hyper)
        size, here = size + _absolute(after - here), after
    return size, known


def _absolute(array: Array) -> Array:
    return np.abs(array.real) + 1j * np.abs(array.imag) if np.iscomplexobj(array) else np.abs(array)
