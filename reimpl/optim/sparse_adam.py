"""SparseAdam (catalogue O16)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, State
from ._torch import Namespace, ParamsT, StateDict
from ._whole import WholeTensorRule


class SparseAdam(WholeTensorRule):
    r"""Adam over the rows that a sparse gradient has; the others keep their parameters and their averages.

    .. math::
        m_i &\leftarrow m_i + (1 - \beta_1)(g_i - m_i), \qquad v_i \leftarrow v_i + (1 - \beta_2)(g_i^2 - v_i) \\
        \theta_i &\leftarrow \theta_i
        - \gamma \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \, m_i / (\sqrt{v_i} + \epsilon)
        \qquad \text{for the indices } i \text{ of } g

    with m = ``exp_avg``, v = ``exp_avg_sq``, t = ``step`` (an integer) in the state. ε stands beside √v before v is
    corrected, where ``Adam`` has it after. t counts the parameter's steps, not a row's.

    Args:
        params: dense, real parameters whose gradients are sparse (``nn.Embedding(sparse=True)``), or groups of them.
        lr: γ, a number above 0 or a tensor of one element.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε, above 0.
        maximize: ascend.

    Raises:
        ValueError: an argument outside its range; sparse or complex parameters.
        RuntimeError: a dense gradient at ``step``.

    Source: O16; ``torch.optim.SparseAdam``, after Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_ (2014).
    """

    torch_class = torch.optim.SparseAdam
    dense_error = "SparseAdam does not support dense gradients, please consider Adam instead"

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        if not lr > 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 < eps < math.inf:
            raise ValueError(f"Invalid epsilon value: {eps}")
        _checks.betas(betas)
        super().__init__(params, _checks.arguments(locals()))
        self._refuse("Sparse", "requires dense parameter tensors", lambda p: p.is_sparse)
        self._refuse("Complex", "does not support complex parameters", Tensor.is_complex)

    def _refuse(self, kind: str, reason: str, is_bad: Any) -> None:
        where = [
            [i, j] for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"]) if is_bad(p)
        ]
        if where:
            raise ValueError(f"{kind} params at indices {where}: SparseAdam {reason}")

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for entry in self.state.values():
            if "step" in entry:
                entry["step"] = int(entry["step"])

    def init_state(self, p: Tensor, group: Group) -> State:
        return {"step": 0, "exp_avg": self.like(p), "exp_avg_sq": self.like(p)}

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        beta1, beta2 = h.betas
        return Namespace(step_size=h.lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t))

    @staticmethod
    def update(p: Tensor, g: Tensor, s: State, h: Any, c: Any) -> None:
        g = g.coalesce()  # squaring is not linear, so an index must occur once
        indices, values = g.indices(), g.values()
        if values.numel() == 0:
            return

        def rows(x: Tensor) -> Tensor:
            # the indices need no check, nor another sort: they are a coalesced tensor's
            return torch.sparse_coo_tensor(indices, x, g.size(), check_invariants=False, is_coalesced=True)

        def average_(average: Tensor, new: Tensor, beta: float) -> Tensor:
            old = average.sparse_mask(g).values()
            change = new.sub(old).mul_(1 - beta)
            average.add_(rows(change))
            return change.add_(old)

        beta1, beta2 = h.betas
        m = average_(s["exp_avg"], values, beta1)
        v = average_(s["exp_avg_sq"], values.pow(2), beta2)
        p.add_(rows(-c.step_size * m.div_(v.sqrt_().add_(h.eps))))
