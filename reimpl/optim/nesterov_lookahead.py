"""NesterovLookahead (catalogue O4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, RuleOptimizer, State
from ._torch import ParamsT


class NesterovLookahead(RuleOptimizer):
    r"""Nesterov's momentum as the notes have it: the gradient is taken where the velocity is about to lead.

    .. math::
        g &= \nabla f(\theta + \alpha v) \\
        v &\leftarrow \alpha v - \gamma g \\
        \theta &\leftarrow \theta + v

    with v = ``momentum_buffer`` in the state. ``step`` needs a closure: it moves the parameters to θ + αv, calls the
    closure, and moves them back before it applies the rule, also where the closure raises. The loss that it returns is
    that of θ + αv.

    ``SGD(nesterov=True)`` (O5) needs no closure because what it keeps is φ = θ + αv itself: at a constant rate its
    parameters are this class's φ, after every step.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        momentum: α.
        maximize: ascend.
        foreach: run over all tensors at once; ``None`` takes PyTorch's choice.
        fused: one kernel for the rule.

    Raises:
        TypeError: ``step`` without a closure.
        ValueError: an argument outside its range.
        RuntimeError: a sparse gradient; ``fused`` with ``foreach`` or complex parameters.

    Source: O4 (N0 eq. 4.53, N2 alg. 8.3); Sutskever et al.,
    `On the importance of initialization and momentum <http://proceedings.mlr.press/v28/sutskever13.html>`_ (2013).
    """

    sparse_error = "NesterovLookahead does not support sparse gradients"
    fused_sparse_error = sparse_error

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, momentum: float = 0.9, *, maximize: bool = False,
        foreach: bool | None = None, fused: bool | None = None,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr)
        _checks.at_least_zero("momentum value", momentum)
        super().__init__(params, _checks.arguments(locals()))

    def init_state(self, p: Tensor, group: Group) -> State:
        return {"momentum_buffer": self.like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            TypeError: there is none.
        """
        if closure is None:
            raise TypeError(
                "NesterovLookahead.step() needs a closure, which computes the gradient at θ + αv, but got None"
            )

        def evaluate() -> Any:
            here = self._look_ahead()
            try:
                return closure()
            finally:
                with torch.no_grad():
                    for p, value in here:
                        p.copy_(value)

        return self._step_all(evaluate)

    @torch.no_grad()
    def _look_ahead(self) -> list[tuple[Tensor, Tensor]]:
        """Move parameters that have a velocity by αv; return where they were."""
        here: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].get("momentum_buffer") if p in self.state else None
                if velocity is not None:
                    here.append((p, p.clone()))
                    p.add_(velocity, alpha=group["momentum"])
        return here

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        velocity = s["momentum_buffer"].mul_(h.momentum).add_(g, alpha=-h.lr)
        p.add_(velocity)
