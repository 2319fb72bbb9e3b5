"""Adam (catalogue O9, O9b)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._ops import matching, maximum_, real_views, root, saved, shrink_or_penalise
from ._torch import Optimizer, ParamsT, to_scalar


class Adam(RuleOptimizer):
    r"""Running mean over running root mean square of the gradient, both corrected for their start at 0.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \hat m &= m / (1 - \beta_1^t), \qquad \hat v = v / (1 - \beta_2^t) \\
        \theta &\leftarrow \theta - \gamma \hat m \,/\, (\sqrt{\hat v} + \epsilon)

    with m = ``exp_avg``, v = ``exp_avg_sq``. ``amsgrad`` puts the largest v so far, ``max_exp_avg_sq``, in v's place.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        betas: β₁, β₂ in [0, 1), two numbers or two tensors of one element.
        eps: ε, beside the root.
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        amsgrad: never let the second moment shrink.
        foreach: run over all tensors at once; ``None`` takes PyTorch's choice.
        maximize: ascend.
        capturable: keep the step count on the device, so that a CUDA graph can hold the step.
        differentiable: let autograd through the step.
        fused: one kernel for the whole step.
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, which makes it ``AdamW``.
        bias_correction: ``False`` leaves m and v as they are, to show what the correction is for (O9b).

    Raises:
        ValueError: an argument outside its range, or a tensor ``lr`` with ``foreach`` and without ``capturable``.
        RuntimeError: a sparse gradient at ``step``; ``fused`` with ``foreach``, ``differentiable`` or complex
            parameters.

    Source: O9, O9b; N0 eq. 4.69-4.77; Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_ (2015); Reddi et al.,
    `On the Convergence of Adam and Beyond <https://openreview.net/forum?id=ryQu7f-RZ>`_ (2018) for ``amsgrad``.
    """

    dialects: ClassVar[Mapping[str, Any]] = {"bias_correction": True}
    torch_class: ClassVar[Callable[..., Optimizer] | None] = torch.optim.Adam
    sparse_error = "Adam does not support sparse gradients, please consider SparseAdam instead"
    differentiates_step = True
    foreach_captures_xla = False
    foreach_takes_tensor_lr = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
    ) -> None:
        eager_foreach = bool(foreach) and not capturable
        if isinstance(lr, Tensor) and eager_foreach:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        _checks.learning_rate(lr)
        _checks.at_least_zero("epsilon value", eps)
        _checks.betas(betas)
        _checks.at_least_zero("weight_decay value", weight_decay)
        _check_beta_types(betas, eager_foreach)
        _checks.flag("bias_correction", bias_correction)
        defaults = {
            "lr": lr, "betas": (to_scalar(betas[0]), to_scalar(betas[1])), "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "maximize": maximize, "foreach": foreach, "capturable": capturable,
            "differentiable": differentiable, "fused": fused, "decoupled_weight_decay": decoupled_weight_decay,
            "bias_correction": bias_correction,
        }  # fmt: skip
        super().__init__(params, defaults)

    def check_group(self, group: Group) -> None:
        if group["foreach"] and isinstance(group["lr"], Tensor) and not group["capturable"]:
            raise RuntimeError("lr as a Tensor is not supported for capturable=False and foreach=True")

    def init_state(self, p: Tensor, group: Group) -> State:
        state = {"step": self.new_step(p, group), "exp_avg": self.like(p), "exp_avg_sq": self.like(p)}
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = self.like(p)
        return state

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        if not h.bias_correction:
            return SimpleNamespace(step_size=h.lr, correction2_sqrt=None)
        beta1, beta2 = h.betas
        return SimpleNamespace(step_size=h.lr / (1 - beta1**t), correction2_sqrt=root(1 - beta2**t))

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        g = shrink_or_penalise(p, g, h)
        p, g, s = real_views(p, g, s)
        beta1, beta2 = h.betas
        exp_avg, exp_avg_sq = s["exp_avg"], s["exp_avg_sq"]
        exp_avg.lerp_(g, 1 - matching(beta1, p))
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        second = maximum_(s["max_exp_avg_sq"], exp_avg_sq, h) if h.amsgrad else exp_avg_sq
        denom = second.sqrt()
        if h.on_device and h.bias_correction:
            # the step size is a tensor here: it goes into the denominator, since value= takes a number
            negative = -c.step_size
            denom = (denom / (c.correction2_sqrt * negative)).add_(h.eps / negative)
            p.addcdiv_(saved(exp_avg, h), denom)
            return
        if h.bias_correction:
            denom = denom / c.correction2_sqrt
        p.addcdiv_(saved(exp_avg, h), denom.add_(h.eps), value=-c.step_size)


def _check_beta_types(betas: tuple[float | Tensor, float | Tensor], eager_foreach: bool) -> None:
    if not (all(isinstance(beta, float) for beta in betas) or all(isinstance(beta, Tensor) for beta in betas)):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            if eager_foreach:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
