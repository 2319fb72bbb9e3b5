"""Oracle of Nesterov's momentum with a true look-ahead (O4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def nesterov_lookahead(
    param: Array, gradient: Callable[[Array], Array], rates: Sequence[float], momentum: float, *, maximize: bool = False
) -> tuple[list[Array], list[Array]]:
    """θ and v after each step: v ← αv - εg(θ + αv), θ ← θ + v."""
    alpha, sign = param.dtype.type(momentum), -1 if maximize else 1
    theta, v = param, np.zeros_like(param)
    thetas, velocities = [], []
    for rate in rates:
        v = alpha * v - sign * param.dtype.type(rate) * gradient(theta + alpha * v)
        theta = theta + v
        thetas.append(theta)
        velocities.append(v)
    return thetas, velocities
