"""Rows of a table by their numbers, and the skip-gram loss of word vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reimpl.functional._dispatch import autocast_to_float32, call, opmath_dtype, scalar_type_name, type_text
from reimpl.functional._losses.reduction import reduced, resolve
from reimpl.functional._losses.targets import values_are_readable
from reimpl.functional._options import check_flags, check_number, integer
from reimpl.functional.activation import logistic, minus_log_sigmoid


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    r"""Rows of a table, :math:`y_n = W_{i_n}`; the gradients of equal numbers are added up in their row.

    Args:
        input: numbers :math:`i`, any shape, int64 or int32.
        weight: the table, shape :math:`(V, D)`.
        padding_idx: a row that counts as a constant; negative numbers count from the end.
        max_norm: first shrink the rows that are asked for to this norm, in place.
        norm_type: the exponent of that norm.
        scale_grad_by_freq: divide each gradient by how often its number is in ``input``.
        sparse: give the gradient as a sparse tensor, for optimizers that take one.

    Returns:
        the shape of ``input`` with :math:`D` behind it.

    Raises:
        AssertionError: ``padding_idx`` is no row.
        RuntimeError: ``weight`` is no matrix or empty, or ``input`` holds no integers; in the backward pass, of both
            ``sparse`` and ``scale_grad_by_freq``.
        IndexError: a number is no row (checked on the CPU; on CUDA a device assertion).
        NotImplementedError: ``sparse`` with a gradient under ``torch.compile``, which traces no sparse tensors; it or
            ``scale_grad_by_freq`` with a gradient inside forward mode.

    Source: F15; N4. PyTorch: :func:`torch.nn.functional.embedding`.
    """
    row = None if padding_idx is None else integer(padding_row(padding_idx, weight.size(0)))
    check_flags(scale_grad_by_freq, sparse)
    if max_norm is not None:
        check_number(max_norm)
        check_number(norm_type)
        _check_shrinkable(weight, input)
        _shrink_rows(weight, input, max_norm, norm_type)
    if weight.dim() != 2:
        raise RuntimeError("'weight' must be 2-D")
    _check_type(input, 1, "embedding")
    if not weight.shape[0] and input.numel():
        raise RuntimeError("index_select(): self indexing axis dim should be positive")
    if values_are_readable(input) and ((input < 0) | (input >= weight.shape[0])).any():
        raise IndexError("index out of range in self")
    indices = input.long()
    if (scale_grad_by_freq or sparse) and torch.is_grad_enabled() and weight.requires_grad:
        # a composition's gradient would be neither divided nor sparse
        if sparse and torch.compiler.is_compiling():
            raise NotImplementedError("embedding: sparse=True has no gradient under torch.compile")
        if forward_ad._current_level >= 0:
            option = "sparse" if sparse else "scale_grad_by_freq"
            raise NotImplementedError(f"embedding: {option}=True has no reverse mode inside forward mode")
        return _Embedding.apply(weight, indices, row, scale_grad_by_freq, sparse)  # type: ignore[no-any-return]
    return call(_Embedding, _rows, weight, indices, row, scale_grad_by_freq, sparse)  # type: ignore[no-any-return]


def skip_gram_loss(center: Tensor, context: Tensor, negative: Tensor, reduction: str = "mean") -> Tensor:
    r"""Skip-gram with negative sampling: a word's vector against one true and :math:`K` drawn context words.

    .. math::
        \ell_n = -\log \sigma(v_n \cdot u_n) - \sum_{k=1}^K \log \sigma(-v_n \cdot \tilde u_{nk})

    The first errors of the scores are :math:`\sigma(v_n \cdot u_n) - 1` and :math:`\sigma(v_n \cdot \tilde u_{nk})`.

    Args:
        center: :math:`v`, shape :math:`(N, D)`.
        context: :math:`u`, shape :math:`(N, D)`.
        negative: :math:`\tilde u`, shape :math:`(N, K, D)`.
        reduction: ``"none"``, ``"mean"`` (over :math:`N`) or ``"sum"``.

    Raises:
        ValueError: a shape does not fit, or ``reduction`` is unknown.

    Source: F15, X1; N4 (word vectors of SCDV), Mikolov et al. (2013). PyTorch has none.
    """
    reduction = resolve(reduction)
    if center.dim() != 2:
        raise ValueError(f"center must have shape (N, D), got {list(center.shape)}")
    if context.shape != center.shape:
        raise ValueError(f"context must have the shape of center, {list(center.shape)}, got {list(context.shape)}")
    if negative.dim() != 3 or (negative.shape[0], negative.shape[2]) != tuple(center.shape):
        n, d = center.shape
        raise ValueError(f"negative must have shape ({n}, K, {d}), got {list(negative.shape)}")
    center, context, negative = autocast_to_float32(center, context, negative)
    dtype = torch.promote_types(torch.promote_types(center.dtype, context.dtype), negative.dtype)
    wide = opmath_dtype(dtype)
    losses = call(_SkipGram, _skip_gram, center, context, negative, wide)
    return reduced(losses, reduction, dtype)


def padding_row(padding_idx: int, rows: int) -> int:
    """``padding_idx`` counted from the start of a table of ``rows`` rows.

    Raises:
        AssertionError: it is none of them; 0 is let through.
    """
    if (padding_idx > 0 and padding_idx >= rows) or (padding_idx < 0 and padding_idx < -rows):
        raise AssertionError("Padding_idx must be within num_embeddings")
    return rows + padding_idx if padding_idx < 0 else padding_idx


def _check_type(input: Tensor, position: int, operator: str) -> None:
    if input.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(
            f"Expected tensor for argument #{position} 'indices' to have one of the following scalar types: Long, Int; "
            f"but got {type_text(input)} instead (while checking arguments for {operator})"
        )


def _check_shrinkable(weight: Tensor, input: Tensor) -> None:
    if weight.dim() != 2:
        raise RuntimeError(
            f"Expected 2-dimensional tensor, but got {weight.dim()}-dimensional tensor for argument #1 'self' "
            "(while checking arguments for embedding_renorm_)"
        )
    _check_type(input, 2, "embedding_renorm_")
    if not input.numel():
        return
    rows = weight.shape[0]
    if values_are_readable(input) and ((input < -rows) | (input >= rows)).any():
        row = int(input[(input < -rows) | (input >= rows)].min())
        raise IndexError(f"select(): index {row} out of range for tensor of size {list(weight.shape)} at dimension 0")
    if not (weight.is_floating_point() or weight.is_complex()):
        found = scalar_type_name(weight.dtype)
        raise NotImplementedError(
            f"norm(): input dtype should be either floating point or complex. Got {found} instead."
        )


@torch.no_grad()
def _shrink_rows(weight: Tensor, input: Tensor, max_norm: float, norm_type: float) -> None:
    """Scale the rows of a norm over ``max_norm`` down to it."""
    wanted = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    wanted[input.reshape(-1).long()] = True
    norms = torch.linalg.vector_norm(weight.to(opmath_dtype(weight.dtype)), norm_type, 1)
    # PyTorch's guard against a norm of 0.
    scale = torch.where(wanted & (norms > max_norm), max_norm / (norms + 1e-7), 1)
    # detached, since torch.jit.trace records no no_grad
    weight.detach().copy_(weight * scale.to(weight.dtype).unsqueeze(1))


def _rows(weight: Tensor, indices: Tensor, padding_row: int | None, by_frequency: bool, sparse: bool) -> Tensor:
    rows = weight.index_select(0, indices.reshape(-1)).reshape(*indices.shape, weight.shape[1])
    if padding_row is None:
        return rows
    return torch.where((indices == padding_row).unsqueeze(-1), rows.detach(), rows)


class _Embedding(torch.autograd.Function):
    r""":math:`\bar W_v = \sum_{n: i_n = v} \bar y_n`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, indices: Tensor, padding_row: int | None, by_frequency: bool, sparse: bool) -> Tensor:
        return weight.index_select(0, indices.reshape(-1)).reshape(*indices.shape, weight.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, indices, ctx.padding_row, ctx.by_frequency, ctx.sparse = inputs
        ctx.rows = weight.shape[0]
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        options = ctx.rows, ctx.padding_row, ctx.sparse
        if ctx.by_frequency and ctx.sparse:
            raise RuntimeError("embedding_backward: scale_grad_by_freq not supported with sparse gradients")
        if ctx.by_frequency:
            table = _MeanGradient.apply(grad, indices, *options)
        else:
            table = _table(grad, indices, *options)
        return table, None, None, None, None


class _MeanGradient(torch.autograd.Function):
    """``scale_grad_by_freq``: the table's gradient with each row divided by the number of times that it was looked up.

    It is the gradient of nothing, and differentiated as if it were not divided, which is PyTorch's way.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, indices: Tensor, rows: int, padding_row: int | None, sparse: bool) -> Tensor:
        flat = indices.reshape(-1)
        counts = torch.zeros(rows, dtype=grad.dtype, device=grad.device)
        counts = counts.index_add(0, flat, torch.ones_like(flat, dtype=grad.dtype))[flat]
        return _table(grad / counts.reshape(*indices.shape, 1), indices, rows, padding_row, sparse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, indices, _, ctx.padding_row, _ = inputs
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx: Any, other: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        rows = _rows(other, indices, None, False, False)
        if ctx.padding_row is not None:
            rows = torch.where((indices == ctx.padding_row).unsqueeze(-1), 0, rows)
        return rows, None, None, None, None


def _table(grad: Tensor, indices: Tensor, rows: int, padding_row: int | None, sparse: bool) -> Tensor:
    indices, grad = indices.reshape(-1), grad.reshape(indices.numel(), grad.shape[-1])
    if sparse:
        kept = slice(None) if padding_row is None else indices != padding_row
        numbers, size = indices[kept].unsqueeze(0), (rows, grad.shape[1])
        return torch.sparse_coo_tensor(numbers, grad[kept], size, check_invariants=False)
    if padding_row is not None:
        grad = torch.where((indices == padding_row).unsqueeze(1), 0, grad)
    wide = grad.to(opmath_dtype(grad.dtype))
    return wide.new_zeros(rows, grad.shape[1]).index_add(0, indices, wide).to(grad.dtype)


def _scores(center: Tensor, context: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    return (center * context).sum(1), (negative @ center.unsqueeze(2)).squeeze(2)


def _skip_gram(center: Tensor, context: Tensor, negative: Tensor, dtype: torch.dtype) -> Tensor:
    true, drawn = _scores(center.to(dtype), context.to(dtype), negative.to(dtype))
    return minus_log_sigmoid(true) + minus_log_sigmoid(-drawn).sum(1)


class _SkipGram(torch.autograd.Function):
    r"""With :math:`\delta = \sigma(v \cdot u) - 1` and :math:`\delta_k = \sigma(v \cdot \tilde u_k)`:
    :math:`\bar v = \delta u + \sum_k \delta_k \tilde u_k`, :math:`\bar u = \delta v`,
    :math:`\bar{\tilde u}_k = \delta_k v`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(center: Tensor, context: Tensor, negative: Tensor, dtype: torch.dtype) -> Tensor:
        return _skip_gram(center, context, negative, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        center, context, negative = (each.to(grad.dtype) for each in kept)
        true, drawn = _scores(center, context, negative)
        true_error = (-logistic(-true) * grad).unsqueeze(1)
        drawn_errors = (logistic(drawn) * grad.unsqueeze(1)).unsqueeze(2)
        grad_center = true_error * context + (drawn_errors * negative).sum(1)
        grads = grad_center, true_error * center, drawn_errors * center.unsqueeze(1)
        return *(g.to(each.dtype) for g, each in zip(grads, kept, strict=True)), None
