"""Stochastic gradient descent with the dialects of momentum (catalogue O1, O2, O2t, O3, O5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._momentum import check_form, velocity_step_
from ._ops import descend, shrink_or_penalise
from ._torch import Namespace, ParamsT


class SGD(RuleOptimizer):
    r"""θ ← θ − γg, with momentum μ in one of three forms; b = ``momentum_buffer`` in the state.

    ========================  ==================================  ==================================
    ``momentum_form``         buffer                              step (``nesterov``)
    ========================  ==================================  ==================================
    ``"torch"`` (O2t, O5)     b ← μb + (1 − τ)g, b = g at first   θ ← θ − γb  (θ − γ(g + μb))
    ``"velocity"`` (O2)       b ← μb − γg, b = 0 before           θ ← θ + b  (θ + μb − γg)
    ``"ewa"`` (O3)            b ← μb + (1 − μ)g, b = 0 before     θ ← θ − γb/(1 − μᵗ) if corrected, else θ − γb
    ========================  ==================================  ==================================

    ``"velocity"`` has the rate inside the buffer: b is −γ times PyTorch's at a constant γ, and another path once γ
    changes. ``"ewa"`` is an exponentially weighted average; PyTorch's nearest, ``dampening=momentum``, differs through
    its first buffer.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        momentum: μ.
        dampening: τ, of the ``"torch"`` form alone.
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        nesterov: look ahead along the buffer.
        momentum_form: see the table.
        bias_correction: divide the average by 1 − μᵗ; of the ``"ewa"`` form alone.
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, as in ``AdamW``.

    ``maximize`` and the options that choose how a step runs are those of :mod:`reimpl.optim`.

    Raises:
        ValueError: an argument outside its range, or one that the form of momentum does not have.
        RuntimeError: ``fused`` with ``foreach``, ``differentiable``, sparse gradients or complex parameters.

    Source: O1, O2 (N0 eq. 4.49, N2 alg. 8.2), O3 (N4), O5 (N0); Sutskever et al. (2013) for ``nesterov``.
    """

    dialects: ClassVar[Mapping[str, Any]] = {
        "momentum_form": "torch", "bias_correction": False, "decoupled_weight_decay": False,
    }  # fmt: skip
    torch_class = torch.optim.SGD
    fused_sparse_error = "`_fused_sgd` does not support sparse gradients"
    lazy_state = ("momentum_buffer",)
    late_options: ClassVar[Mapping[str, Any]] = {"fused": False}
    foreach_refuses_autograd = False

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
        weight_decay: float | Tensor = 0, nesterov: bool = False, *, maximize: bool = False,
        foreach: bool | None = None, differentiable: bool = False, fused: bool | None = None,
        momentum_form: str = "torch", bias_correction: bool = False, decoupled_weight_decay: bool = False,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        _checks.each_at_least_zero(momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super().__init__(params, _checks.arguments(locals()))

    @classmethod
    def check_dialects(cls, options: Mapping[str, Any]) -> None:
        super().check_dialects(options)
        check_form(options, ("torch", "velocity", "ewa"))

    def is_stateful(self, group: Group) -> bool:
        return bool(group["momentum"] != 0)

    def init_state(self, p: Tensor, group: Group) -> State:
        state: State = {"step": self.new_step(p, group)} if group["bias_correction"] else {}
        if group["momentum_form"] != "torch":
            state["momentum_buffer"] = self.like(p)
        return state

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        return Namespace(lr=h.lr / (1 - h.momentum**t) if h.bias_correction and h.momentum != 0 else h.lr)

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        g = shrink_or_penalise(p, g, h)
        if h.momentum == 0:
            descend(p, g, h.lr)
            return
        buf: Any = s.get("momentum_buffer")
        if h.momentum_form == "velocity":
            velocity_step_(p, buf, h, lambda x: descend(x, g, h.lr))
            return
        if h.momentum_form == "ewa":
            buf.mul_(h.momentum).add_(g, alpha=1 - h.momentum)
        elif buf is None:
            buf = s["momentum_buffer"] = g.detach().clone()
        else:
            buf.mul_(h.momentum).add_(g, alpha=1 - h.dampening)
        descend(p, g.add(buf, alpha=h.momentum) if h.nesterov else buf, c.lr)
