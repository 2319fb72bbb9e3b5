"""Adadelta (catalogue O7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import RuleOptimizer, State
from ._ops import as_complex, descend, is_complex, real_views, saved, shrink_or_penalise
from ._torch import ParamsT


class Adadelta(RuleOptimizer):
    r"""Steps in the parameter's own units: the running size of past steps over that of the gradient.

    .. math::
        v &\leftarrow \rho v + (1 - \rho) g^2 \\
        \Delta &= \sqrt{u + \epsilon} \,/\, \sqrt{v + \epsilon} \odot g \\
        u &\leftarrow \rho u + (1 - \rho) \Delta^2 \\
        \theta &\leftarrow \theta - \gamma \Delta

    with v = ``square_avg`` and u = ``acc_delta`` in the state, both 0 at first; γ = 1 is the notes' rule.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        rho: ρ in [0, 1], the decay of both averages.
        eps: ε, under both roots.
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, as in ``AdamW``.

    ``maximize``, the options that choose how a step runs, and the errors are those of :mod:`reimpl.optim`.

    Source: O7; N0 eq. 4.59-4.66; Zeiler, `ADADELTA <https://arxiv.org/abs/1212.5701>`_ (2012).
    """

    dialects: ClassVar[Mapping[str, Any]] = {"fused": None, "decoupled_weight_decay": False}
    torch_class = torch.optim.Adadelta
    zero_state = ("square_avg", "acc_delta")
    decays = ("rho",)
    sparse_error = "Adadelta does not support sparse gradients"
    for_loop_captures_xla = foreach_captures_xla = False

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0,
        foreach: bool | None = None, *, capturable: bool = False, maximize: bool = False, differentiable: bool = False,
        fused: bool | None = None, decoupled_weight_decay: bool = False,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        _checks.decay("rho", rho)
        _checks.each_at_least_zero(epsilon=eps, weight_decay=weight_decay)
        super().__init__(params, _checks.arguments(locals()))

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        g = shrink_or_penalise(p, g, h)
        _, g, s = real_views(p, g, s)
        square_avg, acc_delta = s["square_avg"], s["acc_delta"]
        square_avg.mul_(h.rho).addcmul_(g, g, value=1 - h.rho)
        std = square_avg.add(h.eps).sqrt_()
        delta = saved(acc_delta.add(h.eps).sqrt_(), h)
        delta.div_(std).mul_(g)
        acc_delta.mul_(h.rho).addcmul_(delta, delta, value=1 - h.rho)
        descend(p, as_complex(delta) if is_complex(p) else delta, h.lr)
