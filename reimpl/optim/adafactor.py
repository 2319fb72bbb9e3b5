"""Adafactor (catalogue O16)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from . import _checks
from ._engine import Group, State
from ._torch import Namespace, ParamsT
from ._whole import WholeTensorRule, each, root_mean_squares


class Adafactor(WholeTensorRule):
    r"""Adam without momentum, its second moment kept as one row and one column a matrix, its step relative to θ.

    .. math::
        R &\leftarrow R + t^\tau (\overline{g^2}^{\,row} - R), \qquad
        C \leftarrow C + t^\tau (\overline{g^2}^{\,col} - C), \qquad
        \hat V = R C \,/\, \max(\overline R, \epsilon_1) \\
        U &= g \,/\, \sqrt{\max(\hat V, \epsilon_1^2)}, \qquad
        \alpha = \max(\epsilon_2, \mathrm{RMS}(\theta)) \min(\gamma, 1/\sqrt t) \\
        \theta &\leftarrow (1 - \gamma\lambda)\,\theta - \alpha \, U \,/\, \max(1, \mathrm{RMS}(U)/d)

    over the last two dimensions, R = ``row_var`` and C = ``col_var`` in the state, t = ``step``. Vectors and scalars
    keep the whole moment, V = ``variance``. RMS(x) = ‖x‖/√n, that of θ before it decays.

    Args:
        params: real parameters, named parameters or parameter groups.
        lr: γ, a number or a tensor of one element.
        beta2_decay: τ, at most 0.
        eps: (ε₁, ε₂); ``None`` for ε₁ is the machine epsilon of the parameter's dtype. (PyTorch takes that of the
            group's first parameter for all of them.)
        d: the clipping threshold, at least 1.
        weight_decay: λ, decoupled.
        foreach: over all tensors at once, with one synchronisation instead of two a tensor; ``None`` is no.
        maximize: ascend.

    An empty parameter is left alone, where PyTorch divides by zero; a ``DTensor`` is stepped, which PyTorch's cannot.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: a complex parameter or a sparse gradient at ``step``.

    Source: O16; ``torch.optim.Adafactor``, after Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_
    (2018), without its momentum.
    """

    torch_class = torch.optim.Adafactor
    complex_error = "Adafactor does not support complex parameters"
    sparse_error = "Adafactor does not support sparse gradients"

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-2, beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0, weight_decay: float = 0.0, *,
        foreach: bool | None = None, maximize: bool = False,
    ) -> None:  # fmt: skip
        _checks.learning_rate(lr, "Learning rate should be >= 0 but is:")
        _checks.should_be("beta2_decay", "<= 0", beta2_decay, beta2_decay <= 0.0)
        _checks.should_be("epsilon1", ">= 0", eps[0], eps[0] is None or _checks.is_magnitude(eps[0]))
        _checks.should_be("epsilon2", ">= 0", eps[1], _checks.is_magnitude(eps[1]))
        _checks.should_be("Clipping threshold d", ">= 1", d, d >= 1.0)
        _checks.should_be("weight_decay", ">= 0", weight_decay, _checks.is_magnitude(weight_decay))
        super().__init__(params, _checks.arguments(locals()))

    def init_state(self, p: Tensor, group: Group) -> State:
        g = p if p.grad is None else p.grad
        if g.dim() < 2:
            return {"step": self.new_step(p, group), "variance": self.like(g)}
        rows, columns = (*g.shape[:-1], 1), (*g.shape[:-2], 1, g.shape[-1])
        return {"step": self.new_step(p, group), "row_var": g.new_zeros(rows), "col_var": g.new_zeros(columns)}

    @staticmethod
    def prologue(h: Any, t: Any) -> Any:
        return Namespace(weight=t**h.beta2_decay, rho=min(h.lr, 1 / (t**0.5)))

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        params = [p] if isinstance(p, Tensor) else list(p)
        eps1, eps2 = h.eps
        eps1 = _epsilon(params[0].dtype) if eps1 is None else eps1
        sizes = root_mean_squares(params)
        if h.weight_decay != 0:
            p.mul_(1 - h.lr * h.weight_decay)
        u = each(lambda v: v.clamp_(min=eps1 * eps1).rsqrt_(), _second_moment(g, s, c.weight, eps1)).mul_(g)
        updates = [u] if isinstance(u, Tensor) else list(u)
        for param, update, size, rms in zip(params, updates, sizes, root_mean_squares(updates, h.d), strict=True):
            param.add_(update, alpha=-max(eps2, size) * c.rho / max(1.0, rms))


@cache
def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _second_moment(g: Any, s: State, weight: float, eps1: float) -> Any:
    """The estimate of g², in new memory, after the state has taken g in."""
    if "variance" in s:
        return s["variance"].lerp_(g * g, weight).clone()
    for key, dim in (("row_var", -1), ("col_var", -2)):
        # a norm needs no memory of the gradient's size, where the mean of g * g does
        mean = each(lambda x, dim=dim: vector_norm(x, dim=dim, keepdim=True).square().div_(max(1, x.size(dim))), g)
        s[key].lerp_(mean, weight)
    mean = each(lambda row: row.mean(dim=-2, keepdim=True).clamp_(min=eps1), s["row_var"])
    return each(torch.matmul, s["row_var"], s["col_var"]).div_(mean)
