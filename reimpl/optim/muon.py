"""Muon (catalogue O16)."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._engine import Group, State
from ._torch import ParamsT
from ._whole import WholeTensorRule

ADJUSTMENTS = {
    "original": lambda a, b: math.sqrt(max(1, a / b)),
    "match_rms_adamw": lambda a, b: 0.2 * math.sqrt(max(a, b)),
    "spectral_unclamped": lambda a, b: math.sqrt(a / b),
}
"""What the rate of an A × B matrix is multiplied by."""


class Muon(WholeTensorRule):
    r"""Momentum whose matrix is replaced by the nearest semi-orthogonal one, roughly, before it is applied.

    .. math::
        B &\leftarrow B + (1 - \mu)(g - B), \qquad
        U = \begin{cases} g + \mu(B - g) & \text{nesterov} \\ B & \text{otherwise} \end{cases} \\
        \theta &\leftarrow (1 - \gamma\lambda)\,\theta - \gamma \, r(A, B) \, \mathrm{NS}_k(U)

    with B = ``momentum_buffer`` in the state and r the adjustment for the shape. NS divides by the Frobenius norm and
    applies X ← aX + b(XXᵀ)X + c(XXᵀ)²X k times, in bfloat16 whatever the parameter's dtype, which drives the singular
    values to between about 0.7 and 1.2; see :func:`orthogonalize`.

    Args:
        params: matrices (two dimensions), or parameter groups of them; other parameters want another optimizer.
        lr: γ, a number or a tensor of one element.
        weight_decay: λ, decoupled.
        momentum: μ.
        nesterov: look ahead.
        ns_coefficients: (a, b, c).
        eps: the least norm that U is divided by.
        ns_steps: k, under 100.
        adjust_lr_fn: ``"original"`` (r = √max(1, A/B), also for ``None``), ``"match_rms_adamw"``
            (r = 0.2 √max(A, B)) or ``"spectral_unclamped"`` (r = √(A/B)).

    Of a ``DTensor`` the iteration's products are ``DTensor``'s own, whose bfloat16 sums come in another order: a
    sharded step has PyTorch's sharded bits, a few bfloat16 roundings from the whole matrix's step.

    Raises:
        ValueError: an argument outside its range; a parameter that is no matrix.
        RuntimeError: a complex parameter or a sparse gradient at ``step``.

    Source: O16; ``torch.optim.Muon``, after Jordan, `Muon <https://kellerjordan.github.io/posts/muon/>`_ (2024).
    """

    torch_class = torch.optim.Muon
    complex_error = "Muon does not support complex parameters"
    sparse_error = "Muon does not support sparse gradients"

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
        nesterov: bool = True, ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7, ns_steps: int = 5, adjust_lr_fn: str | None = None,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr, "Learning rate should be >= 0 but is:")
        _checks.should_be("momentum", ">= 0", momentum, _checks.is_magnitude(momentum))
        _checks.should_be("weight decay", ">= 0", weight_decay, _checks.is_magnitude(weight_decay))
        _checks.at_least_zero("epsilon value", eps)
        if adjust_lr_fn is not None and adjust_lr_fn not in ADJUSTMENTS:
            raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
        super().__init__(params, _checks.arguments(locals()))
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if p.ndim != 2:
                raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}")

    def init_state(self, p: Tensor, group: Group) -> State:
        return {"momentum_buffer": self.like(p if p.grad is None else p.grad)}

    @staticmethod
    def update(p: Tensor, g: Tensor, s: State, h: Any, c: Any) -> None:
        if g.ndim != 2:
            raise ValueError("Param gradient must be a 2D matrix")
        buffer = s["momentum_buffer"].lerp_(g, 1 - h.momentum)
        direction = g.lerp(buffer, h.momentum) if h.nesterov else buffer
        direction = orthogonalize(direction, h.ns_coefficients, h.ns_steps, h.eps)
        rate = h.lr * ADJUSTMENTS[h.adjust_lr_fn or "original"](*p.shape)
        p.mul_(1 - h.lr * h.weight_decay)
        p.add_(direction, alpha=-rate)


def orthogonalize(g: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton–Schulz iteration of :class:`Muon`: a bfloat16 matrix with g's singular vectors and values near 1.

    Raises:
        ValueError: 100 steps or more; not three coefficients.
    """
    if steps >= 100:
        raise ValueError("Number of steps must be less than 100 for computational efficiency")
    if len(coefficients) != 3:
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    a, b, c = coefficients
    is_tall = g.size(0) > g.size(1)
    x = g.to(torch.bfloat16, copy=True)
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=eps))  # no singular value is now above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
