"""RAdam (catalogue O16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import RuleOptimizer, State
from ._ops import choose, moments_, real_views, saved, shrink_or_penalise
from ._torch import Namespace, ParamsT


class RAdam(RuleOptimizer):
    r"""Adam that leaves the denominator out until enough gradients are in it, and then rectifies its variance.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
            \hat m = m / (1 - \beta_1^t) \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        \theta &\leftarrow \theta - \gamma \hat m \cdot \begin{cases}
            \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho_t}}
            \sqrt{1 - \beta_2^t} \,/\, (\sqrt{v} + \epsilon) & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    with m = ``exp_avg`` and v = ``exp_avg_sq`` in the state.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        betas: β₁, β₂ in [0, 1).
        eps: ε, beside the root.
        eps_hat: ``False`` is optax's way: ε beside √v̂, v̂ = v / (1 − β₂ᵗ), and not beside √v.
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, as in ``AdamW``.

    ``maximize``, the options that choose how a step runs, and the errors are those of :mod:`reimpl.optim`.

    Source: O16; Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond
    <https://arxiv.org/abs/1908.03265>`_ (2020), algorithm 2.
    """

    dialects: ClassVar[Mapping[str, Any]] = {"fused": None, "eps_hat": True}
    torch_class = torch.optim.RAdam
    zero_state = ("exp_avg", "exp_avg_sq")
    sparse_error = "RAdam does not support sparse gradients"
    foreach_captures_xla = False

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, decoupled_weight_decay: bool = False, *, foreach: bool | None = None,
        maximize: bool = False, capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        eps_hat: bool = True,
    ) -> None:  # fmt: skip
        _checks.adam_family(lr, eps, betas, weight_decay)
        super().__init__(params, _checks.arguments(locals()))

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        beta1, beta2 = h.betas
        correction2 = 1 - beta2**t
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * (beta2**t) / correction2
        is_rectified = length > 5.0

        def rectification() -> Any:
            scale = (longest - 4) * (longest - 2) * length
            return ((length - 4) * (length - 2) * longest / scale) ** 0.5

        return Namespace(
            correction1=1 - beta1**t,
            correction2_sqrt=correction2**0.5,
            eps=h.eps if h.eps_hat else h.eps * correction2**0.5,
            is_rectified=is_rectified,
            rectification=choose(is_rectified, rectification, lambda: 1.0),
        )

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        p, g, s = real_views(p, g, s)
        g = shrink_or_penalise(p, g, h)
        exp_avg, exp_avg_sq = moments_(p, g, s, h.betas)
        plain = exp_avg / c.correction1 * h.lr

        def rectified() -> Any:
            adaptive = c.correction2_sqrt / saved(exp_avg_sq.sqrt(), h).add_(c.eps)
            return plain * adaptive * c.rectification

        p.add_(choose(c.is_rectified, rectified, lambda: plain), alpha=-1.0)
