"""Steps that several rules share, each written once over a tensor, a ``TensorList`` or a traced value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._tensorlist import TensorList
from ._torch import step_value
from ._trace import StateScalar

_TENSORS = (Tensor, TensorList)


def l2_penalty(p: Any, g: Any, h: Any) -> Any:
    """g + λp, the gradient of the penalty (λ/2)‖p‖² added to g (catalogue O10); g itself where λ is 0."""
    weight_decay = h.weight_decay
    if weight_decay == 0:
        return g
    if isinstance(weight_decay, Tensor) and weight_decay.requires_grad:
        # alpha= would cut weight_decay out of the graph
        return g.addcmul(p.clone(), weight_decay)
    return g.add(p, alpha=weight_decay)


def shrink_or_penalise(p: Any, g: Any, h: Any) -> Any:
    """p ← (1 − γλ)p in place and g as it is where weight decay is decoupled; else g + λp (catalogue O10)."""
    if h.weight_decay == 0:
        return g
    if not h.decoupled_weight_decay:
        return l2_penalty(p, g, h)
    p.mul_(1 - h.lr * h.weight_decay)
    return g


def descend(p: Any, direction: Any, lr: Any) -> None:
    """p ← p − lr·direction, in place; differentiable in ``lr`` where that is a tensor that asks for it."""
    if isinstance(lr, Tensor) and lr.requires_grad:
        p.addcmul_(direction, lr, value=-1)
    else:
        p.add_(direction, alpha=-lr)


def saved(x: Any, h: Any) -> Any:
    """``x``, or a copy of it where autograd is going to need the value that it has now."""
    return x.clone() if h.differentiable else x


def maximum_(a: Any, b: Any, h: Any) -> Any:
    """a ← max(a, b) in place, NaN where either is."""
    if isinstance(a, Tensor):
        # out= is closed to autograd
        copies = h.on_device or h.differentiable
        return a.copy_(torch.maximum(saved(a, h), b)) if copies else torch.maximum(a, b, out=a)
    return a.maximum_(b)


def root(x: Any) -> Any:
    """√x of a number or of a tensor of one."""
    return x.sqrt() if isinstance(x, Tensor | TensorList) else x**0.5


def is_complex(p: Any) -> bool:
    """Whether ``p``, a tensor or a list of them, holds complex numbers."""
    if isinstance(p, Tensor):
        return p.is_complex()
    return isinstance(p, TensorList) and len(p) > 0 and p[0].is_complex()


def as_real(x: Any) -> Any:
    """Complex numbers as pairs of reals, sharing memory."""
    return torch.view_as_real(x) if isinstance(x, Tensor) else x.view_as_real()


def real_views(p: Any, g: Any, s: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Parameter, gradient and state as pairs of reals where the parameter is complex; as they are otherwise."""
    if not is_complex(p):
        return p, g, s
    return as_real(p), as_real(g), {k: as_real(v) if is_complex(v) else v for k, v in s.items()}


def as_complex(x: Any) -> Any:
    """Pairs of reals as complex numbers, sharing memory."""
    return torch.view_as_complex(x) if isinstance(x, Tensor) else x.view_as_complex()


def filled_like(p: Tensor, value: float) -> Tensor:
    """A tensor of the parameter's shape, dtype and strides full of ``value``; complex numbers of both parts that."""
    part = complex(value, value) if p.is_complex() else value
    return torch.full_like(p, part, memory_format=torch.preserve_format)


def matching(x: Any, p: Any) -> Any:
    """A tensor of one number in the parameter's dtype and on its device; a plain number as it is."""
    return x.to(device=p.device, dtype=p.dtype) if isinstance(x, Tensor) and isinstance(p, Tensor) else x


def moments_(p: Any, g: Any, s: dict[str, Any], betas: Any) -> tuple[Any, Any]:
    """m ← β₁m + (1 − β₁)g and v ← β₂v + (1 − β₂)g², in place: the state's ``exp_avg`` and ``exp_avg_sq``."""
    beta1, beta2 = betas
    exp_avg = s["exp_avg"].lerp_(g, 1 - (beta1 if isinstance(beta1, float) else matching(beta1, p)))
    return exp_avg, s["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)


def number(x: Any, h: Any) -> Any:
    """What a number of the state, a tensor of one, is now; a copy of it where it has to stay a tensor."""
    if not h.on_device and not isinstance(x, StateScalar):
        x = step_value(x[0] if isinstance(x, TensorList) else x)
    return x if isinstance(x, float) else x.clone()


def assign(x: Any, value: Any) -> None:
    """Set a number of the state, a tensor of one, to ``value``, by way of the default dtype as PyTorch does."""
    is_plain = isinstance(x, _TENSORS) and not isinstance(value, _TENSORS)
    if is_plain and isinstance(x, Tensor) and x.dtype == torch.get_default_dtype():
        x.fill_(value)  # a fifth of copy_'s time
    else:
        x.copy_(torch.as_tensor(value) if is_plain else value)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition holds and ``b`` elsewhere; both have been computed."""
    if isinstance(condition, Tensor) and not isinstance(a, TensorList) and not isinstance(b, TensorList):
        return torch.where(condition, a, b)
    lists = [x for x in (condition, a, b) if isinstance(x, TensorList)]
    if not lists:
        return condition.where(a, b)
    columns = [x if isinstance(x, TensorList) else [x] * len(lists[0]) for x in (condition, a, b)]
    return TensorList([torch.where(*row) for row in zip(*columns, strict=True)])


def choose(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """``then()`` where the condition holds, else ``otherwise()``; of a plain condition's two only one is computed."""
    if isinstance(condition, bool):
        return then() if condition else otherwise()
    return where(condition, then(), otherwise())


def either_(x: Any, condition: Any, then: Callable[[Any], Any], otherwise: Callable[[Any], Any]) -> Any:
    """Change ``x`` in place by ``then(x)`` where the condition holds, else by ``otherwise(x)``."""
    if isinstance(condition, bool):
        (then if condition else otherwise)(x)
        return x
    return x.copy_(where(condition, then(x.clone()), otherwise(x.clone())))
