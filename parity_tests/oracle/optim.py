"""Oracles of the optimizers: one parameter through a sequence of gradients, in the dtype of the arrays given.

Every oracle has the signature ``oracle(param, grads, *, state=None, **hyperparameters) -> (param, state)``. A gradient
of ``None`` skips the step; ``lr`` is a number, or a sequence with one for each gradient; ``state`` continues from an
earlier state. ``common`` is what :meth:`_Path.steps` takes: ``maximize``, ``weight_decay``, ``decoupled_weight_decay``.
Complex arrays are pairs of reals, as PyTorch takes them.

The scale of an error comes from the same function, run on absolute values with the learning rate negated, so that every
term is added and nothing cancels (``reimpl.testing.optimizer_checks.magnitude``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, Array]
Grads = Sequence[Array | None]
Rate = float | Sequence[float]


NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
"""State of one number for the whole parameter."""


def _pairs(array: Array) -> Array:
    """Complex numbers as pairs of reals in a last dimension; a copy in either case."""
    return np.stack([array.real, array.imag], axis=-1) if np.iscomplexobj(array) else np.array(array, copy=True)


class _Path:
    """What all oracles share: views as reals, scalars in the array's precision, skipped steps, the state at the end."""

    def __init__(self, param: Array, grads: Grads, lr: Rate, state: Mapping[str, Array] | None) -> None:
        self.complex = np.iscomplexobj(param)
        self.theta = _pairs(param)
        self.scalar = self.theta.dtype.type
        self.grads = grads
        self.rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
        self.state = {key: value if key in NUMBERS else _pairs(value) for key, value in (state or {}).items()}

    def __getitem__(self, key: str) -> Array:
        return self.state[key]

    def __setitem__(self, key: str, value: Array) -> None:
        self.state[key] = value

    def begin(self, key: str, value: float = 0.0) -> None:
        """Fill a state that is not there yet."""
        self.state.setdefault(key, np.full_like(self.theta, value))

    def steps(
        self, *, maximize: bool = False, weight_decay: float = 0.0, decoupled_weight_decay: bool = False
    ) -> Iterator[tuple[Any, Array]]:
        """Learning rate and gradient of each step that happens, with the L2 penalty's gradient or after the decay."""
        decay = self.scalar(weight_decay)
        for rate, grad in zip(map(self.scalar, self.rates), self.grads):
            if grad is None:
                continue
            g = -_pairs(grad) if maximize else _pairs(grad)
            if decoupled_weight_decay:
                self.theta = self.theta * (1 - rate * decay)
            elif weight_decay:
                g = g + decay * self.theta
            yield rate, g

    def count(self) -> int:
        """Raise the step count and return it."""
        step = int(self.state.get("step", np.array(0))) + 1
        self.state["step"] = np.array(step)
        return step

    def result(self) -> tuple[Array, State]:
        return self._whole(self.theta), {k: v if k in NUMBERS else self._whole(v) for k, v in self.state.items()}

    def _whole(self, array: Array) -> Array:
        return array[..., 0] + 1j * array[..., 1] if self.complex else array


def sgd(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    momentum_form: str = "torch",
    bias_correction: bool = False,
    **common: Any,
) -> tuple[Array, State]:
    """O1, and momentum as a buffer of gradients (O2t), as a velocity (O2) or as an average (O3)."""
    path = _Path(param, grads, lr, state)
    mu, tau = path.scalar(momentum), path.scalar(dampening)
    for rate, g in path.steps(**common):
        if momentum == 0:
            path.theta = path.theta - rate * g
        elif momentum_form == "torch":
            first = "momentum_buffer" not in path.state
            path["momentum_buffer"] = g if first else mu * path["momentum_buffer"] + (1 - tau) * g
            path.theta = path.theta - rate * (g + mu * path["momentum_buffer"] if nesterov else path["momentum_buffer"])
        elif momentum_form == "velocity":
            path.begin("momentum_buffer")
            path["momentum_buffer"] = mu * path["momentum_buffer"] - rate * g
            path.theta = path.theta + (mu * path["momentum_buffer"] - rate * g if nesterov else path["momentum_buffer"])
        else:
            path.begin("momentum_buffer")
            path["momentum_buffer"] = mu * path["momentum_buffer"] + (1 - mu) * g
            correction = 1 - mu ** path.count() if bias_correction else path.scalar(1)
            path.theta = path.theta - rate * path["momentum_buffer"] / correction
    return path.result()


def adagrad(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-2,
    lr_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    eps_inside_sqrt: bool = False,
    **common: Any,
) -> tuple[Array, State]:
    """O6 (δ beside the root) and O6i (δ inside)."""
    path = _Path(param, grads, lr, state)
    path.begin("sum", initial_accumulator_value)
    path.state.setdefault("step", np.array(0))
    for rate, g in path.steps(**common):
        rate = rate / (1 + (path.count() - 1) * path.scalar(lr_decay))
        path["sum"] = path["sum"] + g * g
        path.theta = path.theta - rate * g / _root(path["sum"], path.scalar(eps), eps_inside_sqrt)
    return path.result()


def _root(square: Array, eps: Any, inside: bool) -> Array:
    return np.sqrt(square + eps) if inside else np.sqrt(square) + eps


def adadelta(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    **common: Any,
) -> tuple[Array, State]:
    """O7."""
    path = _Path(param, grads, lr, state)
    decay, delta = path.scalar(rho), path.scalar(eps)
    path.begin("square_avg")
    path.begin("acc_delta")
    path.state.setdefault("step", np.array(0))
    for rate, g in path.steps(**common):
        path.count()
        path["square_avg"] = decay * path["square_avg"] + (1 - decay) * g * g
        update = np.sqrt(path["acc_delta"] + delta) / np.sqrt(path["square_avg"] + delta) * g
        path["acc_delta"] = decay * path["acc_delta"] + (1 - decay) * update * update
        path.theta = path.theta - rate * update
    return path.result()


def rmsprop(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    eps_inside_sqrt: bool = False,
    momentum_form: str = "torch",
    nesterov: bool = False,
    initial_accumulator_value: float = 0.0,
    **common: Any,
) -> tuple[Array, State]:
    """O8 (δ beside the root), O8i (δ inside), O8m (momentum with the rate outside or inside the buffer)."""
    path = _Path(param, grads, lr, state)
    decay, mu = path.scalar(alpha), path.scalar(momentum)
    path.begin("square_avg", initial_accumulator_value)
    path.state.setdefault("step", np.array(0))
    if centered:
        path.begin("grad_avg")
    if momentum > 0:
        path.begin("momentum_buffer")
    for rate, g in path.steps(**common):
        path.count()
        path["square_avg"] = decay * path["square_avg"] + (1 - decay) * g * g
        square = path["square_avg"]
        if centered:
            path["grad_avg"] = decay * path["grad_avg"] + (1 - decay) * g
            square = square - path["grad_avg"] ** 2
        scaled = g / _root(square, path.scalar(eps), eps_inside_sqrt)
        if momentum == 0:
            path.theta = path.theta - rate * scaled
        elif momentum_form == "torch":
            path["momentum_buffer"] = mu * path["momentum_buffer"] + scaled
            path.theta = path.theta - rate * (
                scaled + mu * path["momentum_buffer"] if nesterov else path["momentum_buffer"]
            )
        else:
            path["momentum_buffer"] = mu * path["momentum_buffer"] - rate * scaled
            path.theta = path.theta + (
                mu * path["momentum_buffer"] - rate * scaled if nesterov else path["momentum_buffer"]
            )
    return path.result()


def adam(
    param: Array,
    grads: Grads,
    *,
    state: State | None = None,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    bias_correction: bool = True,
    eps_inside_sqrt: bool = False,
    eps_hat: bool = False,
    **common: Any,
) -> tuple[Array, State]:
    """O9 and O9b (without bias correction), with the L2 penalty or decoupled decay (O10).

    ``eps_hat`` is Kingma and Ba's shorter form: v meets δ as it is, and the rate takes both corrections.
    """
    path = _Path(param, grads, lr, state)
    beta1, beta2, one = path.scalar(betas[0]), path.scalar(betas[1]), path.scalar(1)
    for key in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
        path.begin(key)
    path.state.setdefault("step", np.array(0))
    for rate, g in path.steps(**common):
        step = path.count()
        path["exp_avg"] = beta1 * path["exp_avg"] + (1 - beta1) * g
        path["exp_avg_sq"] = beta2 * path["exp_avg_sq"] + (1 - beta2) * g * g
        square = path["exp_avg_sq"]
        if amsgrad:
            square = path["max_exp_avg_sq"] = np.maximum(path["max_exp_avg_sq"], square)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (one, one)
        if eps_hat:
            rate, second = rate * np.sqrt(second), one
        root = _root(square / second, path.scalar(eps), eps_inside_sqrt)
        path.theta = path.theta - rate * (path["exp_avg"] / first) / root
    return path.result()


def adamw(param: Array, grads: Grads, *, weight_decay: float = 1e-2, **hyper: Any) -> tuple[Array, State]:
    """O10: :func:`adam` with decoupled decay and AdamW's own default for it."""
    return adam(param, grads, weight_decay=weight_decay, **{**hyper, "decoupled_weight_decay": True})
