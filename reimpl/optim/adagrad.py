"""Adagrad (catalogue O6, O6i)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._ops import filled_like, real_views, saved, shrink_or_penalise
from ._torch import Namespace, ParamsT


class Adagrad(RuleOptimizer):
    r"""Divides each parameter's rate by the root of its summed squared gradients.

    .. math::
        r &\leftarrow r + g^2 \\
        \theta &\leftarrow \theta - \frac{\gamma}{1 + (t - 1)\eta} \, g \,/\, (\sqrt{r} + \epsilon)

    with r = ``sum`` in the state. For a sparse gradient only the rows that it has are touched.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        lr_decay: η.
        weight_decay: λ of the penalty (λ/2)‖θ‖², added to the gradient as λθ (O10).
        initial_accumulator_value: r before the first step.
        eps: ε, beside the root, or under it with ``eps_inside_sqrt``: g/√(r + ε) (O6i).
        eps_inside_sqrt: ε under the root, as in N0, Keras and optax.
        decoupled_weight_decay: θ ← (1 − γλ)θ before the step in place of the penalty, as in ``AdamW``.

    ``maximize`` and the options that choose how a step runs are those of :mod:`reimpl.optim`.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: ``weight_decay`` with a sparse gradient; ``fused`` with ``foreach``, ``differentiable``, sparse
            gradients or complex parameters.

    Source: O6 (N1, N2 alg. 8.4), O6i (N0 eq. 4.56); Duchi, Hazan, Singer,
    `Adaptive Subgradient Methods <http://jmlr.org/papers/v12/duchi11a.html>`_ (2011).
    """

    dialects: ClassVar[Mapping[str, Any]] = {"eps_inside_sqrt": False, "decoupled_weight_decay": False}
    torch_class = torch.optim.Adagrad
    fused_sparse_error = "`fused` does not support sparse grad or complex param"

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, lr_decay: float = 0, weight_decay: float = 0,
        initial_accumulator_value: float = 0, eps: float = 1e-10, foreach: bool | None = None, *,
        maximize: bool = False, differentiable: bool = False, fused: bool | None = None, eps_inside_sqrt: bool = False,
        decoupled_weight_decay: bool = False,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        _checks.each_at_least_zero(lr_decay=lr_decay, weight_decay=weight_decay)
        _checks.each_at_least_zero(initial_accumulator_value=initial_accumulator_value, epsilon=eps)
        super().__init__(params, _checks.arguments(locals()))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self.init_state(p, group)

    def init_state(self, p: Tensor, group: Group) -> State:
        start = filled_like(p, self.defaults["initial_accumulator_value"])
        return {"step": self.new_step(p, group), "sum": start}

    def share_memory(self) -> None:
        """Move the accumulators to shared memory, for workers of ``torch.multiprocessing``."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"].share_memory_()
        self.forget_plans()

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        return Namespace(lr=h.lr / (1 + (t - 1) * h.lr_decay))

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        if isinstance(g, Tensor) and g.is_sparse:
            _update_rows(p, g, s["sum"], h, c)
            return
        g = shrink_or_penalise(p, g, h)
        p, g, s = real_views(p, g, s)
        total = s["sum"].addcmul_(g, g, value=1)
        std = total.add(h.eps).sqrt() if h.eps_inside_sqrt else saved(total.sqrt(), h).add_(h.eps)
        p.addcdiv_(g, std, value=-c.lr)


def _update_rows(p: Tensor, g: Tensor, total: Tensor, h: Any, c: Any) -> None:
    if h.weight_decay != 0:
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    g = g.coalesce()  # squaring is not linear, so an index must occur once
    indices, values = g.indices(), g.values()

    def rows(x: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(indices, x, g.size(), check_invariants=False)  # they are a coalesced tensor's

    total.add_(rows(values.pow(2)))
    std = total.sparse_mask(g).values()
    std = std.add(h.eps).sqrt() if h.eps_inside_sqrt else std.sqrt().add_(h.eps)
    p.add_(rows(values / std), alpha=-c.lr)
