"""Adamax (catalogue O16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import RuleOptimizer, State
from ._ops import maximum_, real_views, shrink_or_penalise
from ._torch import Namespace, ParamsT


class Adamax(RuleOptimizer):
    r"""Adam with the largest recent gradient in place of the root mean square.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad u \leftarrow \max(\beta_2 u, |g| + \epsilon) \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 - \beta_1^t} \, m / u

    with m = ``exp_avg`` and u = ``exp_inf`` in the state. u needs no correction: it does not start too small.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        betas: β₁, β₂ in [0, 1).
        eps: ε, the least u that a gradient leaves behind.
        eps_inside_max: ``False`` is Keras's way: u ← max(β₂u, \|g\|), and m / (u + ε).
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, as in ``AdamW``.

    ``maximize``, the options that choose how a step runs, and the errors are those of :mod:`reimpl.optim`.

    Source: O16; Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_ (2015), algorithm 2.
    """

    dialects: ClassVar[Mapping[str, Any]] = {"fused": None, "eps_inside_max": True, "decoupled_weight_decay": False}
    torch_class = torch.optim.Adamax
    zero_state = ("exp_avg", "exp_inf")
    sparse_error = "Adamax does not support sparse gradients"
    foreach_captures_xla = False

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, foreach: bool | None = None, *, maximize: bool = False, differentiable: bool = False,
        capturable: bool = False, fused: bool | None = None, eps_inside_max: bool = True,
        decoupled_weight_decay: bool = False,
    ) -> None:  # fmt: skip
        _checks.adam_family(lr, eps, betas, weight_decay)
        super().__init__(params, _checks.arguments(locals()))

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        beta1, _ = h.betas
        if h.on_device:
            return Namespace(negative_inverse=(beta1**t - 1) / h.lr)
        return Namespace(step_size=h.lr / (1 - beta1**t))

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        g = shrink_or_penalise(p, g, h)
        p, g, s = real_views(p, g, s)
        beta1, beta2 = h.betas
        exp_avg = s["exp_avg"].lerp_(g, 1 - beta1)
        magnitude = g.abs().add_(h.eps) if h.eps_inside_max else g.abs()
        exp_inf = maximum_(s["exp_inf"].mul_(beta2), magnitude, h)
        denom = exp_inf if h.eps_inside_max else exp_inf.add(h.eps)
        if h.on_device:
            # value= takes a number, and the step size is a tensor here
            p.addcdiv_(exp_avg, denom * c.negative_inverse)
        else:
            p.addcdiv_(exp_avg, denom, value=-c.step_size)
