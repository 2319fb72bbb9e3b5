"""Initialisations that give a weight a structure: identity, Dirac, orthogonal and sparse."""

from __future__ import annotations

from math import ceil

import torch
from torch import Generator, Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def eye_(tensor: Tensor) -> Tensor:
    r"""Fill a matrix with the identity, :math:`w_{ij} = [i = j]`: as many inputs as possible pass unchanged.

    Raises:
        ValueError: ``tensor`` is no matrix.

    Source: I11. PyTorch: :func:`torch.nn.init.eye_`.
    """
    if tensor.dim() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    with torch.no_grad():
        tensor.zero_().diagonal().fill_(1)
    return tensor


def dirac_(tensor: Tensor, groups: int = 1) -> Tensor:
    r"""Fill a convolution's weight ``(out, in / groups, *kernel)`` so that channels pass unchanged within each group.

    :math:`w_{o i k} = 1` where :math:`o` is the :math:`i`-th output of its group and :math:`k` the kernel's middle
    (:math:`\lfloor f/2 \rfloor` in each direction), else 0.

    Raises:
        ValueError: ``tensor`` has not 3 to 5 dimensions, or its first is not divisible by ``groups``.

    Source: I11. PyTorch: :func:`torch.nn.init.dirac_`.
    """
    if tensor.dim() not in (3, 4, 5):
        raise ValueError("Only tensors with 3, 4, or 5 dimensions are supported")
    outputs = _outputs_of_a_group(tensor, groups)
    if tensor.is_meta:
        return tensor
    with torch.no_grad():
        middle = tensor.zero_()
        for size in tensor.shape[2:]:
            middle = middle.select(2, size // 2)
        middle.unflatten(0, (groups, outputs)).diagonal(dim1=1, dim2=2).fill_(1)
    return tensor


def orthogonal_(tensor: Tensor, gain: float = 1, generator: Generator | None = None, *, groups: int = 1) -> Tensor:
    r"""Fill with ``gain`` times an orthogonal matrix, uniform over all such.

    With the dimensions after the first flattened, :math:`W` has orthonormal rows where it is wider than tall, else
    orthonormal columns. It is the :math:`Q` of a normal matrix's QR factorisation, with signs that make :math:`R`'s
    diagonal positive, without which it would not be uniform (Mezzadri 2007).

    Beyond PyTorch, which refuses these: float16 and bfloat16 are drawn in float32 and rounded, complex weights are
    unitary, and a ``channels_last`` weight is filled. A meta tensor, or one with no elements, is returned as it is.

    Args:
        tensor: the weight.
        gain: see :func:`calculate_gain`.
        generator: where the numbers come from.
        groups: number of blocks, stacked in the first dimension, that are orthogonal each for itself: the groups of a
            convolution, or the gates of a recurrent layer. PyTorch's way is 1.

    Raises:
        ValueError: ``tensor`` has fewer than two dimensions, or its first is not divisible by ``groups``.

    Source: I11; Saxe et al. 2013. PyTorch: :func:`torch.nn.init.orthogonal_`.
    """
    if tensor.dim() < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported")
    rows = _outputs_of_a_group(tensor, groups)
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    dtype = torch.float32 if tensor.dtype in _LOW_PRECISION else tensor.dtype
    with torch.no_grad():
        for block in tensor.unflatten(0, (groups, rows)):
            normal = tensor.new_empty((rows, block.numel() // rows), dtype=dtype).normal_(0, 1, generator=generator)
            block.copy_(_orthonormal(normal).reshape(block.shape))
        return tensor.mul_(gain)


def _orthonormal(normal: Tensor) -> Tensor:
    """The orthogonal factor of a normal matrix, of its transpose where it is wider than tall."""
    wide = normal.shape[0] < normal.shape[1]
    q: Tensor
    q, r = torch.linalg.qr(normal.t() if wide else normal)
    q *= r.diagonal().sgn()
    return q.t() if wide else q


def sparse_(tensor: Tensor, sparsity: float, std: float = 0.01, generator: Generator | None = None) -> Tensor:
    r"""Draw from :math:`N(0, \text{std}^2)` and set :math:`\lceil \text{sparsity} \cdot \text{rows} \rceil` numbers of
    each column to 0.

    As in PyTorch, ``generator`` draws the normal numbers only: which rows become 0 is up to the global CPU generator.
    A meta tensor is returned as it is.

    Raises:
        ValueError: ``tensor`` is no matrix, or ``sparsity`` is not within [0, 1].

    Source: I11; Martens 2010. PyTorch: :func:`torch.nn.init.sparse_`.
    """
    if tensor.dim() != 2:
        raise ValueError("Only tensors with 2 dimensions are supported")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
    if tensor.is_meta:
        return tensor
    rows = tensor.shape[0]
    count = ceil(sparsity * rows)
    with torch.no_grad():
        tensor.normal_(0, std, generator=generator)
        for column in tensor.unbind(1):
            column[torch.randperm(rows)[:count].to(tensor.device)] = 0
    return tensor


def _outputs_of_a_group(tensor: Tensor, groups: int) -> int:
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if tensor.shape[0] % groups != 0:
        raise ValueError("dim 0 must be divisible by groups")
    return tensor.shape[0] // groups
