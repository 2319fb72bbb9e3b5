"""What ordinary tensors allow that mapped, traced and differentiated ones do not: writing over, and work on bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

_PLAIN = {Tensor, Parameter}
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether all are tensors of PyTorch's own, their memory holds their numbers, and nothing maps over them."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and all(
        t is None or (type(t) in _PLAIN and not wrapped(t) and not legacy(t) and not t.is_neg()) for t in tensors
    )


def plain(*tensors: Tensor | None) -> bool:
    """Whether all are :func:`ordinary` tensors of one of the wide types."""
    return ordinary(*tensors) and all(t is None or t.dtype in _BITS for t in tensors)


def masked(grad: Tensor, rectified: Tensor) -> Tensor:
    """The gradient where the rectified value is not 0, and 0 elsewhere, bit by bit (NaN and infinities included).

    For :func:`plain` tensors. ``torch.where`` takes several times as long where its condition is random.
    """
    kind = _BITS[grad.dtype]
    # without its sign bit, only a zero is zero
    mask = rectified.view(kind).bitwise_left_shift(1).sign_()
    mask = mask.mul_(mask).neg_()
    return mask.bitwise_and_(grad.view(kind)).view(grad.dtype)
