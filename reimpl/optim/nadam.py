"""NAdam (catalogue O16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._ops import moments_, number, real_views, saved, shrink_or_penalise
from ._torch import Namespace, ParamsT


class NAdam(RuleOptimizer):
    r"""Adam with Nesterov's momentum, which warms up.

    .. math::
        \mu_t &= \beta_1 (1 - \tfrac{1}{2} 0.96^{t\psi}), \qquad \Pi_t = \mu_1 \mu_2 \cdots \mu_t \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
            \hat v = v / (1 - \beta_2^t) \\
        \theta &\leftarrow \theta - \gamma \left( \frac{1 - \mu_t}{1 - \Pi_t} g
            + \frac{\mu_{t+1}}{1 - \Pi_{t+1}} m \right) / (\sqrt{\hat v} + \epsilon)

    with m = ``exp_avg``, v = ``exp_avg_sq`` and Π = ``mu_product`` in the state.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        betas: β₁, β₂ in [0, 1).
        eps: ε, beside the root.
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        momentum_decay: ψ; the larger, the sooner μ comes to β₁. Keras has 1, optax in effect infinity.
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, as in ``AdamW``.

    ``maximize``, the options that choose how a step runs, and the errors are those of :mod:`reimpl.optim`.

    Source: O16; Dozat, `Incorporating Nesterov Momentum into Adam
    <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_ (2016).
    """

    dialects: ClassVar[Mapping[str, Any]] = {"fused": None}
    torch_class = torch.optim.NAdam
    zero_state = ("exp_avg", "exp_avg_sq")
    sparse_error = "NAdam does not support sparse gradients"
    scalar_state = ("mu_product",)
    for_loop_captured = "params, mu_products and state_steps"
    foreach_captured = "params, mu_products, and state_steps"
    foreach_captures_xla = False

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, momentum_decay: float = 4e-3, decoupled_weight_decay: bool = False, *,
        foreach: bool | None = None, maximize: bool = False, capturable: bool = False, differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:  # fmt: skip
        _checks.adam_family(lr, eps, betas, weight_decay)
        _checks.each_at_least_zero(momentum_decay=momentum_decay)
        super().__init__(params, _checks.arguments(locals()))

    def init_state(self, p: Tensor, group: Group) -> State:
        state = super().init_state(p, group)
        return {"step": state["step"], "mu_product": torch.ones_like(state["step"]), **state}

    @staticmethod
    def prologue(h: Any, t: Any, mu_product: Any) -> Any:
        beta1, beta2 = h.betas
        mu = beta1 * (1.0 - 0.5 * (0.96 ** (t * h.momentum_decay)))
        mu_next = beta1 * (1.0 - 0.5 * (0.96 ** ((t + 1) * h.momentum_decay)))
        mu_product.mul_(mu)
        product = mu_product if h.differentiable else number(mu_product, h)
        return Namespace(
            correction2=1 - beta2**t,
            grad_size=-h.lr * (1.0 - mu) / (1.0 - product),
            avg_size=-h.lr * mu_next / (1.0 - product * mu_next),
        )

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        p, g, s = real_views(p, g, s)
        g = shrink_or_penalise(p, g, h)
        exp_avg, exp_avg_sq = moments_(p, g, s, h.betas)
        denom = saved((exp_avg_sq / c.correction2).sqrt_(), h).add_(h.eps)
        if h.on_device or h.differentiable:
            # value= takes a number, and the sizes are tensors here
            p.addcdiv_(g * c.grad_size, denom).addcdiv_(exp_avg * c.avg_size, denom)
        else:
            p.addcdiv_(g, denom, value=c.grad_size).addcdiv_(exp_avg, denom, value=c.avg_size)
