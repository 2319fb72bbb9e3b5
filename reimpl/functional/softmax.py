"""Softmax and its logarithm."""

from __future__ import annotations

import warnings
from operator import index
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import autocast_enabled, call, opmath_dtype, scalar_type_name
from reimpl.functional._losses import plain as _losses_plain
from reimpl.functional._losses.plain import final_worker, worker
from reimpl.functional._options import integer
from reimpl.functional.kernels import attempt, teach

_PYTHON_TYPES: tuple[Any, ...] = (bool, int, float, complex)  # which PyTorch takes for dtypes
_WORKERS = ("_losses.numba", _losses_plain)


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    r"""Softmax :math:`y_i = e^{x_i - m} / \sum_j e^{x_j - m}`, :math:`m = \max_j x_j` (so that nothing overflows).

    Args:
        input: any shape, a floating-point dtype.
        dim: the dimension along which the result sums to 1. Leaving it out is deprecated, as in PyTorch.
        dtype: cast ``input`` to this dtype first.

    Returns:
        the shape of ``input``, contiguous. Half-width types are computed in float32 and rounded once.

    Raises:
        IndexError: ``dim`` is out of range.
        NotImplementedError: the dtype is not floating-point, and there are numbers.

    Source: F3; N3, N4. PyTorch: :func:`torch.nn.functional.softmax`.
    """
    if dim is not None and type(dim) is not int:
        dim = integer(dim)
    key = ("softmax", dim)
    done: Tensor | None = None if dtype is not None else attempt(key, input)
    if done is not None:
        return done
    input, dim = _prepare("softmax", input, dim, _stacklevel, dtype)
    works = worker(*_WORKERS, input) if input.numel() else None
    if works:
        return _worked(key, input, dim, works)
    return _composed(_Softmax, _softmax, input, dim)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Logarithm of the softmax :math:`y_i = (x_i - m) - \log \sum_j e^{x_j - m}`, :math:`m = \max_j x_j`.

    Arguments, result and errors are those of :func:`softmax`.

    Source: F3; N3, N4. PyTorch: :func:`torch.nn.functional.log_softmax`.
    """
    if dim is not None and type(dim) is not int:
        dim = integer(dim)
    key = ("log_softmax", dim)
    done: Tensor | None = None if dtype is not None else attempt(key, input)
    if done is not None:
        return done
    input, dim = _prepare("log_softmax", input, dim, _stacklevel, dtype)
    works = worker(*_WORKERS, input) if input.numel() else None
    if works:
        return _worked(key, input, dim, works)
    return _composed(_LogSoftmax, log_softmax_composition, input, dim)


def _worked(key: tuple[str, int | None], input: Tensor, dim: int, works: Any) -> Tensor:
    log = key[0] == "log_softmax"
    output: Tensor = _WorkedSoftmax.apply(input, dim, log, works)
    if key[1] is not None:
        teach(key, works, _through_log_softmax if log else _through_softmax, input)
    return output


def _composed(function: Any, composition: Any, input: Tensor, dim: int) -> Tensor:
    if not (input.numel() or input.is_floating_point()):
        return input.clone(memory_format=torch.contiguous_format)  # nothing needs another dtype
    return call(function, composition, input, dim)  # type: ignore[no-any-return]


def _prepare(
    name: str, input: Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None
) -> tuple[Tensor, int]:
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated. "
            "Change the call to include dim=X as an argument.",
            stacklevel=index(stacklevel) + 1,  # over the door in reimpl.functional
        )
    dim = integer(dim)
    bound = max(input.dim(), 1)
    if not -bound <= dim < bound:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-bound}, {bound - 1}], but got {dim})")
    dim %= bound
    if any(dtype is kind for kind in _PYTHON_TYPES):
        dtype = torch.empty(0, dtype=dtype).dtype
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if dtype is None and input.device.type == "cuda" and autocast_enabled(input.device):
        dtype = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else None
    if dtype is not None:
        input = input.to(dtype)
    if (not input.is_floating_point() or input.dtype.itemsize < 2) and (input.numel() or not input.dim()):
        kernel = f"{name}_lastdim_kernel_impl" if dim == bound - 1 else f"{name}_kernel_impl"
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{scalar_type_name(input.dtype)}'")
    return input, dim


def _shifted(input: Tensor, dim: int) -> Tensor:
    x = input.contiguous().to(opmath_dtype(input.dtype))
    # The shift cancels in the result, so its derivative need not be followed.
    return x - x.detach().amax(dim, keepdim=True) if x.numel() else x.clone()


def _softmax(input: Tensor, dim: int) -> Tensor:
    weights = torch.exp(_shifted(input, dim))
    return (weights / weights.sum(dim, keepdim=True)).to(input.dtype)


def log_softmax_composition(input: Tensor, dim: int) -> Tensor:
    """:func:`log_softmax` in differentiable tensor arithmetic alone."""
    shifted = _shifted(input, dim)
    return (shifted - torch.exp(shifted).sum(dim, keepdim=True).log()).to(input.dtype)


class _FromOutput(torch.autograd.Function):
    """A Function whose backward needs its output alone."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dim = inputs[1]
        ctx.save_for_backward(output)


class _Softmax(_FromOutput):
    r""":math:`\bar x = y \odot (\bar y - \sum_j \bar y_j y_j)`."""

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return _softmax(input, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _through_softmax((ctx.dim,), (grad,), ctx.saved_tensors), None


def _through_softmax(options: Any, grads: Any, saved: Any, *_: object) -> Tensor:
    (dim,), (output,) = options, saved
    y, g = (t.to(opmath_dtype(t.dtype)) for t in (output, *grads))
    gradient: Tensor = (y * (g - (g * y).sum(dim, keepdim=True))).to(output.dtype)
    return gradient


class _LogSoftmax(_FromOutput):
    r""":math:`\bar x = \bar y - e^{y} \sum_j \bar y_j`."""

    @staticmethod
    def forward(input: Tensor, dim: int) -> Tensor:
        return log_softmax_composition(input, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _through_log_softmax((ctx.dim,), (grad,), ctx.saved_tensors), None


def _through_log_softmax(options: Any, grads: Any, saved: Any, *_: object) -> Tensor:
    (dim,), (output,) = options, saved
    y, g = (t.to(opmath_dtype(t.dtype)) for t in (output, *grads))
    gradient: Tensor = (g - torch.exp(y) * g.sum(dim, keepdim=True)).to(output.dtype)
    return gradient


class _WorkedSoftmax(torch.autograd.Function):
    """:class:`_Softmax`, or with ``log`` :class:`_LogSoftmax`, in place or by a kernel. Without ``setup_context``, for
    which PyTorch looks up the names of the arguments at every call, it begins ten microseconds sooner."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, log: bool, worker: Any) -> Tensor:
        output: Tensor = worker.softmax(input, dim, log)
        ctx.dim, ctx.log = dim, log
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (output,) = ctx.saved_tensors
        works = final_worker(*_WORKERS, grad, output)
        if works:
            return works.softmax_gradient(grad, output, ctx.dim, ctx.log), None, None, None
        return (_LogSoftmax if ctx.log else _Softmax).backward(ctx, grad)[0], None, None, None
