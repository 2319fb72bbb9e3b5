"""``ewa``, the exponentially weighted average of a sequence (catalogue O15)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ewa(x: Tensor | Sequence[Tensor] | Sequence[float], beta: float, bias_correction: bool = True) -> Tensor:
    r"""The exponentially weighted averages of a sequence, at each of its steps.

    .. math:: v_0 = 0, \qquad v_t = \beta v_{t-1} + (1 - \beta) x_t, \qquad \hat v_t = v_t / (1 - \beta^t)

    v_t looks back over about 1/(1 - β) steps: the weight of a step has fallen to 1/e after that many (β = 0.9: 10,
    β = 0.98: 50). It begins near 0, because v₀ is 0; the correction makes it a weighted mean from the first step on,
    :math:`\hat v_1 = x_1`.

    Differentiable in ``x``. The sum is taken by doubling, log₂ n operations on the whole sequence, not step by step.

    Args:
        x: (n, ...) numbers along the first dimension, or a sequence of n numbers or of n tensors of one shape;
            integers become the default dtype.
        beta: β, in [0, 1).
        bias_correction: v̂ instead of v.

    Returns:
        (n, ...), the average after each step.

    Raises:
        ValueError: ``beta`` outside [0, 1); a tensor without a dimension.

    Source: O15 (N4); the first moment of ``Adam`` and, for weights, ``swa_utils.get_ema_multi_avg_fn``.
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    if not isinstance(x, Tensor):
        x = torch.stack([torch.as_tensor(item) for item in x]) if len(x) else torch.empty(0)
    if x.dim() == 0:
        raise ValueError("x must have a first dimension to average along, got a tensor of shape ()")
    if not (x.is_floating_point() or x.is_complex()):
        x = x.to(torch.get_default_dtype())
    v, reach = (1 - beta) * x, 1
    while reach < len(x):  # v_t is the sum over the last `reach` steps
        v = torch.cat([v[:reach], v[reach:] + beta**reach * v[:-reach]])
        reach *= 2
    if not bias_correction:
        return v
    steps = torch.arange(1, len(x) + 1, dtype=torch.float64, device=x.device)
    weight = -torch.expm1(steps * (math.log(beta) if beta else -math.inf))  # 1 - βᵗ, exact where it is small too
    return v / weight.to(x.real.dtype if x.is_complex() else x.dtype).reshape(-1, *[1] * (x.dim() - 1))
