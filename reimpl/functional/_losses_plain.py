"""Softmax and the losses in few operators and few passes over memory, for plain tensors that nothing differentiates.

The formulas are those of the Functions that call these; what differs is that results overwrite what is no longer
needed, which neither ``vmap`` nor a graph allows, and that large tensors go part by part, so that what lies between
the operators stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reimpl.functional._plain import plain

# So many numbers keep two threads busy, and three buffers of them fit into a megabyte or two.
_PART = 1 << 17
# Reductions along a dimension of a few numbers want more: measured over 5 million, parts of 2^17 take twice as long.
_PART_ALONG = 1 << 20


def runs_plainly(*tensors: Tensor | None) -> bool:
    """Whether the tensors are plain, and the call is not one of forward mode."""
    return plain(*tensors) and forward_ad._current_level < 0


def final(grad: Tensor, *others: Tensor | None) -> bool:
    """Whether a gradient may be made in place: nothing maps over it, and no graph is made of its making."""
    return not torch.is_grad_enabled() and plain(grad, *others)


def in_parts(first: Tensor, *others: Tensor, part: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, which have equal shapes, in pieces along dimension 0 of about ``part`` numbers."""
    numbers, part = first.numel(), part or _PART
    if numbers < 2 * part:
        yield (first, *others)
        return
    rows = max(1, first.shape[0] * part // numbers)
    yield from zip(*(tensor.split(rows) for tensor in (first, *others)), strict=True)


def _along(dim: int, first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """:func:`in_parts` that keep dimension ``dim`` whole."""
    return in_parts(first, *others, part=_PART_ALONG) if dim else iter([(first, *others)])


def softmax(input: Tensor, dim: int) -> Tensor:
    """Softmax of a tensor with elements; contiguous."""
    input = input.contiguous()
    output = torch.empty_like(input)
    for x, y in _along(dim, input, output):
        torch.sub(x, x.amax(dim, True), out=y).exp_()
        y.div_(y.sum(dim, True))
    return output


def log_softmax(input: Tensor, dim: int) -> Tensor:
    """Its logarithm; contiguous."""
    input = input.contiguous()
    output = torch.empty_like(input)
    scratch = None
    for x, y in _along(dim, input, output):
        torch.sub(x, x.amax(dim, True), out=y)
        scratch = torch.exp(y) if scratch is None else torch.exp(y, out=scratch[: y.shape[0]])
        y.sub_(scratch.sum(dim, True).log_())
    return output


def softmax_gradient(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """:math:`y \\odot (\\bar y - \\sum_j \\bar y_j y_j)`"""
    result = torch.empty_like(output)
    for g, y, d in _along(dim, grad, output, result):
        torch.mul(g, y, out=d)
        torch.sub(g, d.sum(dim, True), out=d).mul_(y)
    return result


def log_softmax_gradient(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """:math:`\\bar y - e^y \\sum_j \\bar y_j`"""
    result = torch.empty_like(output)
    for g, y, d in _along(dim, grad, output, result):
        torch.exp(y, out=d).mul_(g.sum(dim, True))
        torch.sub(g, d, out=d)
    return result


def picked_negative(input: Tensor, indices: Tensor, reduction: str) -> Tensor:
    """Minus what the indices pick along dimension 1, or the sum or mean of that."""
    picked = input.gather(1, indices.unsqueeze(1))
    if reduction == "none":
        return picked.squeeze(1).neg_()
    return picked.sum().neg_() if reduction == "sum" else picked.mean().neg_()


def index_gradient(grad: Tensor, log_probs: Tensor, indices: Tensor, divisor: int) -> Tensor:
    """:math:`(\\hat y - t) \\bar\\ell / d` for a gradient of each sample or one of all."""
    result = torch.empty_like(log_probs)
    factor = grad / divisor if divisor != 1 else grad
    columns = (factor if factor.dim() else factor.expand(indices.shape)).unsqueeze(1)
    for y, i, g, d in _along(1, log_probs, indices.unsqueeze(1), columns, result):
        torch.exp(y, out=d).mul_(g if factor.dim() else factor)
        d.scatter_add_(1, i, -g)
    return result
