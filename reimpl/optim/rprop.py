"""Rprop: resilient backpropagation (catalogue O16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._ops import filled_like, real_views, saved
from ._torch import ParamsT, plain_scalar


class Rprop(RuleOptimizer):
    r"""Steps by the gradient's sign alone; each element's step grows while the sign lasts and shrinks when it turns.

    .. math::
        (\eta, g) &\leftarrow \begin{cases} (\min(\eta_+ \eta, \eta_{\max}),\ g) & g' g > 0 \\
            (\max(\eta_- \eta, \eta_{\min}),\ 0) & g' g < 0 \\ (\eta,\ g) & \text{else} \end{cases} \\
        \theta &\leftarrow \theta - \eta \operatorname{sign}(g), \qquad g' \leftarrow g

    with η = ``step_size`` (γ at first) and g' = ``prev`` (0 at first) in the state. It is made for the gradient of all
    the data: the sign of a noisy gradient turns for no reason.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        etas: η₋ in (0, 1) and η₊ above 1.
        step_sizes: the smallest and the largest η.

    ``maximize``, the options that choose how a step runs, and the errors are those of :mod:`reimpl.optim`.

    Source: O16; Riedmiller and Braun, `A Direct Adaptive Method for Faster Backpropagation Learning
    <https://doi.org/10.1109/ICNN.1993.298623>`_ (1993).
    """

    dialects: ClassVar[Mapping[str, Any]] = {"fused": None}
    torch_class = torch.optim.Rprop
    sparse_error = "Rprop does not support sparse gradients"

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50), *, capturable: bool = False, foreach: bool | None = None,
        maximize: bool = False, differentiable: bool = False, fused: bool | None = None,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        _checks.etas(etas)
        _checks.step_sizes(step_sizes)
        super().__init__(params, _checks.arguments(locals()))

    def _collect(self, group: Group) -> tuple[list[Tensor], list[Tensor], list[State]]:
        params, grads, states = super()._collect(group)
        for p, g, s in zip(params, grads, states, strict=True):
            if g.numel() == 1 != s["step_size"].numel():
                # PyTorch indexes where this rule selects, and so does not spread one number over all
                raise IndexError(f"a gradient of shape {list(g.shape)} does not fit the parameter's {list(p.shape)}")
        return params, grads, states

    def init_state(self, p: Tensor, group: Group) -> State:
        # asked for the keys alone it is on the meta device; that it has no gradient Dynamo of torch 2.11 cannot tell
        like = p if p.is_meta or p.grad is None else p.grad
        step_size = filled_like(like, plain_scalar(group["lr"]))
        return {"step": self.new_step(p, group), "prev": self.like(p), "step_size": step_size}

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        p, g, s = real_views(p, g, s)
        (shrink, grow), (smallest, largest) = h.etas, h.step_sizes
        factor = (g * saved(s["prev"], h)).sign()
        factor.masked_fill_(factor > 0, grow).masked_fill_(factor < 0, shrink).masked_fill_(factor.eq(0), 1)
        step_size = s["step_size"].mul_(factor).clamp_(smallest, largest)
        g = g.masked_fill(factor.eq(shrink), 0)
        p.addcmul_(g.sign(), step_size, value=-1)
        s["prev"].copy_(g)
