"""Adam (catalogue O9, O9b)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._ops import maximum_, moments_, real_views, root, saved, shrink_or_penalise
from ._torch import Namespace, Optimizer, ParamsT, to_scalar


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
        eps: ε, beside the root, or under it with ``eps_inside_sqrt``: √(v̂ + ε).
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        amsgrad: never let the second moment shrink.
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, which makes it ``AdamW``.
        bias_correction: ``False`` leaves m and v as they are, to show what the correction is for (O9b).
        eps_inside_sqrt: ε under the root, as optax's ``eps_root``.
        eps_hat: ε meets v before the correction: √v + ε, both over √(1 − β₂ᵗ). So do Keras, TensorFlow and the paper's
            shorter form (the end of its section 2, where it is called ε̂). With ``eps_inside_sqrt`` too:
            √(v + ε) / √(1 − β₂ᵗ).

    ``maximize`` and the options that choose how a step runs are those of :mod:`reimpl.optim`.

    Raises:
        ValueError: an argument outside its range, or a tensor ``lr`` with ``foreach`` and without ``capturable``.
        RuntimeError: a sparse gradient at ``step``; ways of running that exclude each other.

    Source: O9, O9b; N0 eq. 4.69-4.77; Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_ (2015); Reddi et al.,
    `On the Convergence of Adam and Beyond <https://openreview.net/forum?id=ryQu7f-RZ>`_ (2018) for ``amsgrad``.
    """

    dialects: ClassVar[Mapping[str, Any]] = {"bias_correction": True, "eps_inside_sqrt": False, "eps_hat": False}
    torch_class: ClassVar[Callable[..., Optimizer] | None] = torch.optim.Adam
    zero_state = ("exp_avg", "exp_avg_sq")
    sparse_error = "Adam does not support sparse gradients, please consider SparseAdam instead"
    differentiates_step = True
    foreach_captures_xla = False
    foreach_takes_tensor_lr = False

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0, amsgrad: bool = False, *, foreach: bool | None = None,
        maximize: bool = False, capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
        decoupled_weight_decay: bool = False, bias_correction: bool = True, eps_inside_sqrt: bool = False,
        eps_hat: bool = False,
    ) -> None:  # fmt: skip
        _checks.rate_of_foreach(lr, foreach, capturable, ValueError)
        _checks.adam_family(lr, eps, betas, weight_decay)
        _checks.beta_types(betas, takes_tensors=capturable or not foreach)
        betas = (to_scalar(betas[0]), to_scalar(betas[1]))
        super().__init__(params, _checks.arguments(locals()))

    def check_group(self, group: Group) -> None:
        _checks.rate_of_foreach(group["lr"], group["foreach"], group["capturable"], RuntimeError)

    def init_state(self, p: Tensor, group: Group) -> State:
        state = super().init_state(p, group)
        return {**state, "max_exp_avg_sq": self.like(p)} if group["amsgrad"] else state

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        if not h.bias_correction:
            return Namespace(step_size=h.lr, correction2_sqrt=None, eps=h.eps)
        beta1, beta2 = h.betas
        correction2 = 1 - beta2**t
        c = Namespace(step_size=h.lr / (1 - beta1**t), correction2_sqrt=root(correction2), eps=h.eps)
        # v is corrected after the root: what is added under it is corrected with it, what is added beside it is not
        if h.eps_inside_sqrt and not h.eps_hat:
            c.eps = h.eps * correction2
        elif h.eps_hat and not h.eps_inside_sqrt:
            c.eps = h.eps / c.correction2_sqrt
        return c

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        g = shrink_or_penalise(p, g, h)
        p, g, s = real_views(p, g, s)
        exp_avg, exp_avg_sq = moments_(p, g, s, h.betas)
        second = maximum_(s["max_exp_avg_sq"], exp_avg_sq, h) if h.amsgrad else exp_avg_sq
        denom, eps = (second.add(c.eps).sqrt(), 0.0) if h.eps_inside_sqrt else (second.sqrt(), c.eps)
        if h.on_device and h.bias_correction:
            # the step size is a tensor here: it goes into the denominator, since value= takes a number
            negative = -c.step_size
            denom = (denom / (c.correction2_sqrt * negative)).add_(eps / negative)
            p.addcdiv_(saved(exp_avg, h), denom)
            return
        denom = denom / c.correction2_sqrt if h.bias_correction else saved(denom, h)
        p.addcdiv_(saved(exp_avg, h), denom.add_(eps), value=-c.step_size)
