"""RMSprop (catalogue O8, O8i, O8m)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._momentum import check_form, velocity_step_
from ._ops import descend, filled_like, real_views, saved, shrink_or_penalise
from ._torch import ParamsT


class RMSprop(RuleOptimizer):
    r"""Divides the gradient by the running root mean square of its past.

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        d &= g \,/\, (\sqrt{v} + \epsilon) \\
        \theta &\leftarrow \theta - \gamma d

    with v = ``square_avg``. ``centered`` takes v − ḡ² under the root, ḡ = ``grad_avg`` the running mean
    of g. With ``momentum`` μ a buffer b = ``momentum_buffer`` stands between d and θ:

    ============================  ============================  ===============================
    ``momentum_form``             buffer, 0 before              step (``nesterov``)
    ============================  ============================  ===============================
    ``"torch"``                   b ← μb + d                    θ ← θ − γb  (θ − γ(d + μb))
    ``"velocity"`` (O8m)          b ← μb − γd                   θ ← θ + b  (θ + μb − γd)
    ============================  ============================  ===============================

    The two agree at a constant γ, and take different paths once γ changes.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        alpha: α in [0, 1], the decay of the averages (the notes use 0.9).
        eps: ε, beside the root, or under it with ``eps_inside_sqrt``: d = g/√(v + ε) (O8i).
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        momentum: μ.
        centered: normalise by the variance instead of the second moment.
        eps_inside_sqrt: ε under the root, as in the notes, the book and TensorFlow.
        momentum_form: where γ enters, see the table.
        nesterov: look ahead along the buffer; needs ``momentum``.
        initial_accumulator_value: v before the first step; TensorFlow 1 and ``timm`` have 1.
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, as in ``AdamW``.

    ``maximize``, the options that choose how a step runs, and the errors are those of :mod:`reimpl.optim`.

    Source: O8, O8i (N0 eq. 4.68, N2 alg. 8.5), O8m (N2 §8.5.4); Hinton, lecture 6e (2012).
    """

    dialects: ClassVar[Mapping[str, Any]] = {
        "fused": None, "eps_inside_sqrt": False, "momentum_form": "torch", "nesterov": False,
        "initial_accumulator_value": 0, "decoupled_weight_decay": False,
    }  # fmt: skip
    torch_class = torch.optim.RMSprop
    late_options: ClassVar[Mapping[str, Any]] = {"momentum": 0, "centered": False}
    decays = ("alpha",)
    sparse_error = "RMSprop does not support sparse gradients"

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
        weight_decay: float = 0, momentum: float = 0, centered: bool = False, capturable: bool = False,
        foreach: bool | None = None, maximize: bool = False, differentiable: bool = False, *, fused: bool | None = None,
        eps_inside_sqrt: bool = False, momentum_form: str = "torch", nesterov: bool = False,
        initial_accumulator_value: float = 0, decoupled_weight_decay: bool = False,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        _checks.each_at_least_zero(epsilon=eps, momentum=momentum, weight_decay=weight_decay)
        _checks.decay("alpha", alpha)
        _checks.each_at_least_zero(initial_accumulator_value=initial_accumulator_value)
        super().__init__(params, _checks.arguments(locals()))

    @classmethod
    def check_dialects(cls, options: Mapping[str, Any]) -> None:
        super().check_dialects(options)
        check_form(options, ("torch", "velocity"))
        if options["nesterov"] and options["momentum"] <= 0:
            raise ValueError("Nesterov momentum requires a momentum")

    def init_state(self, p: Tensor, group: Group) -> State:
        state = {"step": self.new_step(p, group), "square_avg": filled_like(p, group["initial_accumulator_value"])}
        if group["momentum"] > 0:
            state["momentum_buffer"] = self.like(p)
        if group["centered"]:
            state["grad_avg"] = self.like(p)
        return state

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        g = shrink_or_penalise(p, g, h)
        p, g, s = real_views(p, g, s)
        variance = s["square_avg"].mul_(h.alpha).addcmul_(g, g, value=1 - h.alpha)
        if h.centered:
            grad_avg = s["grad_avg"].lerp_(g, 1 - h.alpha)
            variance = variance.addcmul(grad_avg, grad_avg, value=-1)
        avg = variance.add(h.eps).sqrt() if h.eps_inside_sqrt else saved(variance.sqrt(), h).add_(h.eps)
        if h.momentum == 0:
            p.addcdiv_(g, avg, value=-h.lr)
        elif h.momentum_form == "velocity":
            velocity_step_(p, s["momentum_buffer"], h, lambda x: x.addcdiv_(g, avg, value=-h.lr))
        else:
            buf = s["momentum_buffer"].mul_(h.momentum).addcdiv_(g, avg)
            descend(p, (g / avg).add_(buf, alpha=h.momentum) if h.nesterov else buf, h.lr)
