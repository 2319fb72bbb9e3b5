"""The matrix product that convolutions on the CPU are made of: oneDNN's for float32, where it is there, else ``mm``.

PyTorch gives float32 products to MKL, which takes its AVX2 kernels on processors that are not Intel's: measured on two
Zen 5 cores, 130-220 GFLOP/s where oneDNN's AVX-512 kernels make 330-510. PyTorch's one way to oneDNN's product of dense
float32 tensors is the operator behind its compiled linear layers. It is a matrix product and nothing else: which
numbers are multiplied, the convolution itself, is the callers' work.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reimpl.functional._plain import ordinary as own_tensors
from reimpl.functional._plain import plain

# Measured: with fewer multiplications than this, the shorter way to mm wins.
_LEAST_WORK = 1 << 18


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right + bias`` of :func:`ordinary` tensors of shapes ``(M, K)``, ``(K, N)`` and ``(N)``.

    ``right`` is best dense, or else its transpose.
    """
    if _fits(left, right) and (operator := _onednn()) is not None:
        return _apply(operator, left, right, bias)
    return left @ right if bias is None else torch.addmm(bias, left, right)


def _fits(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN does these."""
    return (
        left.dtype is torch.float32 is right.dtype
        and left.device.type == "cpu"
        and left.shape[0] * left.shape[1] * right.shape[1] >= _LEAST_WORK
        and torch._C._get_mkldnn_enabled()
    )


def ordinary(*tensors: Tensor | None) -> bool:
    """Plain tensors whose operators nobody records, traces or intercepts, for whom oneDNN's would be news."""
    return plain(*tensors) and unobserved(*tensors)


def unobserved(*tensors: Tensor | None) -> bool:
    """The same of any dtype."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return (
        own_tensors(*tensors)
        and not recorded
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


@cache
def _multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and supported()


def bfloat16_is_quick(*tensors: Tensor | None) -> bool:
    """Whether ``mm`` of tensors such as these is the processor's own product of bfloat16, at twice the speed of that of
    float32 and with sums in float32."""
    narrow = all(t is None or (t.is_cpu and t.dtype is torch.bfloat16) for t in tensors)
    return narrow and _multiplies_bfloat16() and torch._C._get_mkldnn_enabled() and unobserved(*tensors)


def _apply(operator: Any, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    filters = right.t()
    # other strides fall to oneDNN's reference code, a thousand times slower
    if not (filters.is_contiguous() or right.is_contiguous()):
        filters = filters.contiguous()
    # which it reads as if it were dense
    bias = None if bias is None else bias.contiguous()
    return operator(left, filters, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def _onednn() -> Any:
    """The operator, or ``None`` where it is missing or answers otherwise than it is known to."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    # small integers: every sum is exact, in any order
    numbers = torch.arange(16 * 24, device="cpu", dtype=torch.float32) % 7 - 3
    left, right, bias = numbers.view(16, 24), numbers[: 24 * 8].view(24, 8), numbers[:16:2]
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        for b in (right, right.t().contiguous().t()):
            for offset in (None, bias):
                expected = left @ b if offset is None else left @ b + offset
                if not torch.equal(_apply(operator, left, b, offset), expected):
                    return None
    except (AttributeError, RuntimeError, TypeError):
        return None
    return operator
