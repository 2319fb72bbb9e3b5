"""ASGD: averaged stochastic gradient descent (catalogue O16)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._ops import assign, choose, either_, l2_penalty, number, real_views
from ._torch import Namespace, ParamsT, plain_scalar, step_dtype


class ASGD(RuleOptimizer):
    r"""Descent at a falling rate that keeps the mean of where it has been since step t₀.

    .. math::
        \theta &\leftarrow (1 - \lambda_0 \eta) \theta - \eta g, \qquad a \leftarrow a + \mu (\theta - a) \\
        \eta &\leftarrow \gamma / (1 + \lambda_0 \gamma t)^{\alpha}, \qquad \mu \leftarrow 1 / \max(1, t - t_0)

    with a = ``ax``, η = ``eta`` (γ at first) and μ = ``mu`` (1 at first) in the state. The mean a is for the user to
    take; the step does not use it. A new γ counts from the second step after the change on.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        lambd: λ₀, the decay of the parameter and, with α, of the rate.
        alpha: α.
        t0: t₀.
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).

    ``maximize``, the options that choose how a step runs, and the errors are those of :mod:`reimpl.optim`.

    Source: O16; Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging
    <https://doi.org/10.1137/0330046>`_ (1992).
    """

    dialects: ClassVar[Mapping[str, Any]] = {"fused": None}
    torch_class = torch.optim.ASGD
    sparse_error = "ASGD does not support sparse gradients"
    scalar_state = ("eta", "mu")
    for_loop_captured = foreach_captured = "params, mus, etas, and state_steps"
    foreach_captures_xla = False

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, lambd: float = 1e-4, alpha: float = 0.75, t0: float = 1e6,
        weight_decay: float = 0, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False,
        capturable: bool = False, *, fused: bool | None = None,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        _checks.each_at_least_zero(lambd=lambd, alpha=alpha)
        if math.isnan(t0):
            raise ValueError(f"Invalid t0: {t0}")
        _checks.each_at_least_zero(weight_decay=weight_decay)
        super().__init__(params, _checks.arguments(locals()))

    def new_step(self, p: Tensor, group: Group) -> Tensor:
        return torch.zeros((), dtype=step_dtype(is_fused=group.get("fused")), device=p.device)

    def init_state(self, p: Tensor, group: Group) -> State:
        step = self.new_step(p, group)
        eta = torch.full_like(step, plain_scalar(group["lr"]))
        return {"step": step, "eta": eta, "mu": torch.ones_like(step), "ax": self.like(p)}

    @staticmethod
    def prologue(h: Any, t: Any, eta: Any, mu: Any) -> Any:
        c = Namespace(eta=number(eta, h), mu=number(mu, h))
        assign(eta, h.lr / ((1 + h.lambd * h.lr * t) ** h.alpha))
        late = t - h.t0
        assign(mu, 1 / choose(late > 1, lambda: late, lambda: 1.0))
        return c

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        p, g, s = real_views(p, g, s)
        g = l2_penalty(p, g, h)
        p.mul_(1 - h.lambd * c.eta)
        if h.on_device:
            # alpha= takes a number, and η is a tensor here
            p.addcmul_(g, c.eta, value=-1)
        else:
            p.add_(g, alpha=-c.eta)
        either_(
            s["ax"],
            True if h.on_device else c.mu != 1,
            lambda ax: ax.add_((p - ax).mul_(c.mu)),
            lambda ax: ax.copy_(p),
        )
