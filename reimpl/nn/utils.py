"""``torch.nn.utils``: clipping of gradients as own functions, PyTorch's other utilities as they are.

Source: O13 (N2 §8.2.4): at a cliff of the loss the gradient is huge, and a step along it, cut to a size that is safe,
keeps the direction (by norm) or at least the signs (by value).
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.utils as _torch_utils
from torch import Tensor
from torch.utils._foreach_utils import (
    _device_has_foreach_support,
    _group_tensors_by_device_and_dtype,
    _has_foreach_support,
)

from reimpl._handed_on import handed_on

REIMPLEMENTED = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]
__all__ += [name for name in _torch_utils.__all__ if name not in __all__]


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""The p-norm of all tensors together, as if they were one vector: the norm of their norms.

    .. math:: \left(\sum_i \|g_i\|_p^p\right)^{1/p}

    Args:
        tensors: a tensor, or some.
        norm_type: p; ``inf`` for the largest absolute value.
        error_if_nonfinite: refuse a norm that is NaN or infinite.
        foreach: all tensors of a device and dtype at once; ``None`` where possible.

    Returns:
        a 0-d tensor on the first tensor's device; 0 for no tensors.

    Raises:
        RuntimeError: the norm is not finite, and that was to be refused; ``foreach`` where it is not supported.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = float(norm_type)
    if not tensors:
        return torch.tensor(0.0)
    norms: list[Tensor] = []
    for group, at_once in _groups(tensors, foreach):
        if at_once:
            norms.extend(torch._foreach_norm(group, norm_type))
        else:
            norms.extend(torch.linalg.vector_norm(x, norm_type) for x in group)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(tensors[0].device) for norm in norms]), norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from "
            "`parameters` is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, "
            "set `error_if_nonfinite=False`"
        )
    return total


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    r"""Scale the gradients, in place, whose total norm is known.

    .. math:: g \leftarrow g \min\left(1, \frac{c}{\|g\| + 10^{-6}}\right)

    Args:
        parameters: a parameter, or some; those without a gradient are passed over.
        max_norm: c, in the gradients' unit.
        total_norm: ‖g‖, from :func:`get_total_norm`.
        foreach: all tensors of a device and dtype at once; ``None`` where possible.

    Raises:
        RuntimeError: ``foreach`` where it is not supported.
    """
    grads = _gradients(parameters)
    if not grads:
        return
    # multiplied by even where it is 1: to ask whether it is would wait for the device
    factor = torch.clamp(float(max_norm) / (total_norm + 1e-6), max=1.0)
    for group, at_once in _groups(grads, foreach):
        on_device = factor.to(group[0].device)
        if at_once:
            torch._foreach_mul_(group, on_device)
        else:
            for g in group:
                g.mul_(on_device)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients, in place, so that their norm as one vector is at most ``max_norm``; keeps their direction.

    :func:`get_total_norm` and :func:`clip_grads_with_norm_` in one.

    Args:
        parameters: a parameter, or some; those without a gradient are passed over.
        max_norm: the largest norm, in the gradients' unit.
        norm_type: p of the norm; ``inf`` for the largest absolute value.
        error_if_nonfinite: refuse a norm that is NaN or infinite, and leave the gradients as they are.
        foreach: all tensors of a device and dtype at once; ``None`` where possible.

    Returns:
        the norm before clipping, a 0-d tensor.

    Raises:
        RuntimeError: the norm is not finite, and that was to be refused; ``foreach`` where it is not supported.

    Source: O13 (N2 §8.2.4); ``torch.nn.utils.clip_grad_norm_``.
    """
    if not isinstance(parameters, Tensor):
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    total_norm = get_total_norm(_gradients(parameters), norm_type, error_if_nonfinite, foreach)
    clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)
    return total_norm


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    r"""Cut every number of the gradients, in place, to [-c, c]; NaN stays NaN.

    .. math:: g \leftarrow \min(\max(g, -c), c)

    Args:
        parameters: a parameter, or some; those without a gradient are passed over.
        clip_value: c, in the gradients' unit.
        foreach: all tensors of a device and dtype at once; ``None`` where possible.

    Raises:
        RuntimeError: ``foreach`` where it is not supported.

    Source: O13 (N2 §8.2.4); ``torch.nn.utils.clip_grad_value_``.
    """
    clip_value = float(clip_value)
    for group, at_once in _groups(_gradients(parameters), foreach):
        if at_once:
            torch._foreach_clamp_min_(group, -clip_value)
            torch._foreach_clamp_max_(group, clip_value)
        else:
            for g in group:
                g.clamp_(min=-clip_value, max=clip_value)


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]


def _groups(tensors: list[Tensor], foreach: bool | None) -> Iterator[tuple[list[Tensor], bool]]:
    """The tensors of each device and dtype, in PyTorch's order, and whether they go at once."""
    if not tensors:
        return
    grouped: dict[Any, Any] = _group_tensors_by_device_and_dtype([tensors])  # type: ignore[list-item]
    for (device, _), ((group,), _) in grouped.items():
        if foreach and not _device_has_foreach_support(device):
            raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
        yield group, foreach or (foreach is None and _has_foreach_support(group, device))


# Clipping is this module's own under PyTorch's name for its place too.
clip_grad = sys.modules[f"{__name__}.clip_grad"] = sys.modules[__name__]
__getattr__, __dir__ = handed_on(
    __name__, _torch_utils, ("parametrizations", "parametrize", "prune", "rnn", "stateless")
)
