"""Adamax (catalogue O16)."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._ops import l2_penalty, maximum_, real_views
from ._torch import ParamsT


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
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        foreach: run over all tensors at once; ``None`` takes PyTorch's choice.
        maximize: ascend.
        differentiable: let autograd through the step.
        capturable: keep the step count on the device, so that a CUDA graph can hold the step.
        fused: one kernel for the whole step; PyTorch has none for Adamax.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: a sparse gradient at ``step``; ``fused`` with ``foreach``, ``differentiable`` or complex
            parameters.

    Source: O16; Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_ (2015), algorithm 2.
    """

    dialects: ClassVar[Mapping[str, Any]] = {"fused": None}
    torch_class = torch.optim.Adamax
    sparse_error = "Adamax does not support sparse gradients"
    foreach_captures_xla = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _checks.learning_rate(lr)
        _checks.at_least_zero("epsilon value", eps)
        _checks.betas(betas)
        _checks.at_least_zero("weight_decay value", weight_decay)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "foreach": foreach,
            "maximize": maximize, "differentiable": differentiable, "capturable": capturable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)

    def init_state(self, p: Tensor, group: Group) -> State:
        return {"step": self.new_step(p, group), "exp_avg": self.like(p), "exp_inf": self.like(p)}

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        beta1, _ = h.betas
        if h.on_device:
            return SimpleNamespace(negative_inverse=(beta1**t - 1) / h.lr)
        return SimpleNamespace(step_size=h.lr / (1 - beta1**t))

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        g = l2_penalty(p, g, h)
        p, g, s = real_views(p, g, s)
        beta1, beta2 = h.betas
        exp_avg = s["exp_avg"].lerp_(g, 1 - beta1)
        exp_inf = maximum_(s["exp_inf"].mul_(beta2), g.abs().add_(h.eps), h)
        if h.on_device:
            # value= takes a number, and the step size is a tensor here
            p.addcdiv_(exp_avg, exp_inf * c.negative_inverse)
        else:
            p.addcdiv_(exp_avg, exp_inf, value=-c.step_size)
