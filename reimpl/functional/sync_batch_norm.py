"""Batch normalisation by the batches of several processes together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from reimpl.functional._dispatch import autocast_disabled, memory_format_of, opmath_dtype
from reimpl.functional._norm.chain import Chain, like, other_dims, per_channel
from reimpl.functional._norm.functions import scaled
from reimpl.functional.normalization import move_averages


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    process_group: Any = None,
) -> Tensor:
    r"""Batch normalisation in training whose mean and variance are those of all processes' batches joined.

    Each process sends its count :math:`m_k`, mean :math:`\mu_k` and sum of squared deviations :math:`S_k`; then

    .. math::
        m = \sum_k m_k, \quad \mu = \frac1m \sum_k m_k \mu_k, \quad
        \sigma^2 = \frac1m \sum_k \left(S_k + m_k (\mu_k - \mu)^2\right).

    The backward pass adds up (4.92) and (4.94) over the processes; the gradients of weight and bias stay each process's
    own, which distributed training averages. What is differentiated, to any order, is the sum of what the processes
    differentiate, and all of them must do so alike. Batches may differ in size and be empty.

    Args:
        input: shape :math:`(N, C, *)`, this process's batch.
        running_mean, running_var, weight, bias: shape :math:`(C)`, or ``None``.
        momentum, eps: as in :func:`reimpl.functional.batch_norm`.
        process_group: the processes; ``None`` for all.

    Returns:
        the shape and dtype of ``input``, ``channels_last`` where it is.

    Raises:
        ValueError: there is a single value a channel in all processes together.

    Source: F10; the joined variance: Chan, Golub and LeVeque, 1979. PyTorch: :class:`torch.nn.SyncBatchNorm`.
    """
    x = input.contiguous(memory_format=memory_format_of(input))
    with autocast_disabled(input.device):
        output, mean, var, count = _SyncBatchNorm.apply(x, weight, bias, eps, process_group)
        if running_mean is not None and running_var is not None:
            move_averages(running_mean, running_var, mean, var, count, momentum)
    return output  # type: ignore[no-any-return]


def _joined(count: float, mean: Tensor, squares: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of the batches of all processes."""
    mine = torch.cat([mean, squares, mean.new_full((1,), count)])
    rows = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(rows, mine, group)
    means, sums, counts = torch.stack(rows).split([mean.numel(), mean.numel(), 1], 1)
    total = counts.sum()
    joined = (counts * means).sum(0) / total
    deviations = means - joined
    return total, joined, (sums + counts * deviations * deviations).sum(0) / total


class _SumOfProcesses(torch.autograd.Function):
    """The sum of all processes' tensors. Each of them enters every process's sum: their gradients add up likewise."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOfProcesses.apply(grad, ctx.group), None


class _SyncBatchNorm(torch.autograd.Function):
    """The derivatives are :class:`~reimpl.functional._norm.chain.Chain`'s; (4.92) and (4.94) add up over all
    processes, with whatever else depends on the statistics, which are differentiable outputs."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, dims = input.to(opmath_dtype(input.dtype)), other_dims(input)
        own = input.numel() // max(1, input.shape[1])
        mean = x.sum(dims) / max(1, own)
        centred = x - per_channel(mean, x)
        total, joined, var = _joined(own, mean, (centred * centred).sum(dims), group)
        if total <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        ctx.group, ctx.eps = group, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, joined, var, total)
        ctx.mark_non_differentiable(total)
        output = scaled(x - per_channel(joined, x), var, weight, bias, eps, False).to(input.dtype)
        return output, joined, var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, var, total = ctx.saved_tensors
        dims, g = other_dims(input), grad.to(mean.dtype)
        centred = input.to(mean.dtype) - per_channel(mean, input)
        chain = Chain(g.sum(dims), (g * centred).sum(dims), var, weight, ctx.eps)
        grad_input = None
        if ctx.needs_input_grad[0]:
            own = torch.stack([grad_mean + chain.to_mean, grad_var + chain.to_var])
            to_mean, to_var = _SumOfProcesses.apply(own, ctx.group)
            grad_input = chain.to_input(g, centred, to_mean, to_var, total).to(input.dtype)
        return grad_input, like(chain.to_weight, weight), like(chain.sum_g, ctx.bias_dtype), None, None
