"""Softmax and the losses in few operators and few passes over memory, for plain tensors that nothing differentiates.

The formulas are those of the Functions that call these; what differs is that results overwrite what is no longer
needed, which neither ``vmap`` nor a graph allows, and that large tensors go part by part, so that what lies between
the operators stays in the cache. The modules of kernels have functions of the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reimpl.functional._dispatch import autocast_enabled
from reimpl.functional._plain import HALF, exponential, ordinary, plain
from reimpl.functional.kernels import kernels_for

# So many numbers keep two threads busy, and three buffers of them fit into a megabyte or two.
_PART = 1 << 17
# Reductions along a dimension of a few numbers want more: measured over 5 million, parts of 2^17 take twice as long.
_PART_ALONG = 1 << 20


def runs_plainly(*tensors: Tensor | None) -> bool:
    """Whether the tensors are plain, and the call is neither one of forward mode nor of ``torch.func``."""
    return plain(*tensors) and undisturbed()


def half_runs_plainly(*tensors: Tensor | None) -> bool:
    """The same of tensors of half the width on the CPU, where autocast does not widen them first."""
    given = [t for t in tensors if t is not None]
    narrow = all(t.dtype in HALF and t.is_cpu for t in given)
    return narrow and not autocast_enabled(given[0].device) and ordinary(*given) and undisturbed()


def undisturbed() -> bool:
    """Whether the call is neither one of forward mode nor of ``torch.func``."""
    # inside a transform, even a Function of tensors that it leaves alone must have a `setup_context`
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()


def final(grad: Tensor, *others: Tensor | None) -> bool:
    """Whether a gradient may be made in place: nothing maps over it, and no graph is made of its making."""
    return not torch.is_grad_enabled() and plain(grad, *others)


def worker(kernels: str, otherwise: ModuleType, *tensors: Tensor | None) -> Any:
    """Whose functions do a call with such tensors: the kernels' or the other module's, or (``None``) neither's."""
    if not undisturbed():
        return None
    return kernels_for(kernels, *tensors) or (otherwise if plain(*tensors) else None)


def final_worker(kernels: str, otherwise: ModuleType, *tensors: Tensor | None) -> Any:
    """:func:`worker` of a backward pass: ``None`` where a graph is made of it, or something maps over it."""
    if torch.is_grad_enabled():
        return None
    return kernels_for(kernels, *tensors) or (otherwise if plain(*tensors) else None)


def in_parts(first: Tensor, *others: Any, part: int = _PART) -> Iterable[tuple[Any, ...]]:
    """The tensors, of as many rows as the first, in pieces along dimension 0, which of the first are of about ``part``
    numbers; what is a scalar or no tensor comes with every piece."""
    numbers = first.numel()
    if numbers < 2 * part:
        return ((first, *others),)
    rows = max(1, first.shape[0] * part // numbers)
    pieces = (t.split(rows) if isinstance(t, Tensor) and t.dim() else repeat(t) for t in others)
    return zip(first.split(rows), *pieces, strict=False)


def along(dim: int, first: Tensor, *others: Any) -> Iterable[tuple[Any, ...]]:
    """:func:`in_parts` that keep dimension ``dim`` whole."""
    return in_parts(first, *others, part=_PART_ALONG) if dim else ((first, *others),)


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """Softmax of a tensor with elements, or its logarithm; contiguous."""
    input = input.contiguous()
    output = torch.empty_like(input)
    scratch = None
    for x, y in along(dim, input, output):
        torch.sub(x, x.amax(dim, True), out=y)
        if log:
            scratch = torch.empty_like(y) if scratch is None else scratch[: y.shape[0]]
            y.sub_(exponential(y, scratch).sum(dim, True).log_())
        else:
            y.div_(y.exp_().sum(dim, True))
    return output


def softmax_gradient(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """:math:`y \\odot (\\bar y - \\sum_j \\bar y_j y_j)`; of the logarithm :math:`\\bar y - e^y \\sum_j \\bar y_j`."""
    result = torch.empty_like(output)
    for g, y, d in along(dim, grad, output, result):
        if log:
            torch.addcmul(g, exponential(y, d), g.sum(dim, True), value=-1, out=d)
        else:
            torch.mul(g, y, out=d)
            torch.addcmul(d, y, d.sum(dim, True), value=-1, out=d)
    return result
