"""The derivatives of batch normalisation as the notes derive them, from sums over each channel."""

from __future__ import annotations

import torch
from torch import Tensor


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A number for each channel, laid along dimension 1 of ``like``."""
    return vector.reshape(1, -1, *(1,) * (like.dim() - 2))


def other_dims(input: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [d for d in range(input.dim()) if d != 1]


def like(grad: Tensor, target: Tensor | torch.dtype | None) -> Tensor | None:
    """A parameter's gradient in the parameter's dtype; none where there is no parameter."""
    if target is None:
        return None
    return grad.to(target.dtype if isinstance(target, Tensor) else target)


class Chain:
    r"""The derivatives of batch normalisation, (4.83-4.94), from sums over a channel.

    With :math:`g = \partial E/\partial y`, :math:`s = (\sigma^2 + \epsilon)^{-1/2}` and :math:`\hat x = s (x - \mu)`:

    .. math::
        \partial E/\partial \gamma &= \sum g \hat x = s \sum g (x - \mu)                          && (4.84) \\
        \partial E/\partial \beta &= \sum g                                                       && (4.85) \\
        \partial E/\partial \hat x &= g \gamma                                                    && (4.90) \\
        \partial E/\partial \sigma^2 &= \sum \frac{\partial E}{\partial \hat x} (x - \mu)
            \left(-\tfrac12\right) s^3 = -\tfrac12 \gamma s^3 \sum g (x - \mu)                     && (4.92) \\
        \partial E/\partial \mu &= -s \sum \frac{\partial E}{\partial \hat x}
            - \frac{\partial E}{\partial \sigma^2} \frac2m \sum (x - \mu) = -\gamma s \sum g        && (4.94) \\
        \partial E/\partial x &= \frac{\partial E}{\partial \hat x} s
            + \frac{\partial E}{\partial \sigma^2} \frac{2 (x - \mu)}{m}
            + \frac{\partial E}{\partial \mu} \frac1m                                            && (4.88)

    The second sum of (4.94) is left out, since :math:`\sum (x - \mu) = 0`.

    Args:
        sum_g: :math:`\sum g`, channel by channel.
        sum_g_centred: :math:`\sum g (x - \mu)`.
        var: :math:`\sigma^2`.
        weight: :math:`\gamma`, ``None`` for 1.
        eps: :math:`\epsilon`.
    """

    def __init__(self, sum_g: Tensor, sum_g_centred: Tensor, var: Tensor, weight: Tensor | None, eps: float) -> None:
        self.sum_g, self.weight = sum_g, weight
        self.s = torch.rsqrt(var + eps)
        r""":math:`(\sigma^2 + \epsilon)^{-1/2}`"""
        self.scale = self.s if weight is None else self.s * weight.to(self.s.dtype)
        r""":math:`\gamma s`, (4.90) of :math:`s`"""
        self.to_weight = self.s * sum_g_centred
        """(4.84)"""

    def to_normalized(self, g: Tensor) -> Tensor:
        """(4.90)"""
        return g if self.weight is None else g * per_channel(self.weight.to(g.dtype), g)

    @property
    def to_var(self) -> Tensor:
        """(4.92)"""
        return -0.5 * (self.scale * self.s * self.to_weight)

    @property
    def to_mean(self) -> Tensor:
        """(4.94)"""
        return -(self.scale * self.sum_g)

    def to_input(self, g: Tensor, centred: Tensor, to_mean: Tensor, to_var: Tensor, count: Tensor | int) -> Tensor:
        """(4.88), given (4.94) and (4.92) with whatever else depends on the statistics."""
        offset = torch.addcmul(per_channel(to_mean / count, g), centred, per_channel(to_var * (2 / count), g))
        return torch.addcmul(offset, g, per_channel(self.scale, g))
