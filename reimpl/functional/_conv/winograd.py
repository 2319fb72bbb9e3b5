r"""Winograd's minimal filtering :math:`F(2 \times 2, 3 \times 3)` and its gradient with respect to the kernel.

.. math::
    y = A^\top \left[(G w G^\top) \odot (B^\top x B)\right] A

for each tile :math:`x` of 4 x 4 inputs, which overlap by 2 and give 2 x 2 outputs; the products over channels become
16 matrix products, with 16 multiplications where the plain sum takes 36. The sums before and after cost accuracy: in
one dimension the rows of :math:`|A^\top|`, :math:`|G|` and :math:`|B^\top|` add up to at most 3, 3/2 and 2.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_constant

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._dispatch import opmath_dtype


def winograd(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution by a 3 x 3 kernel at stride 1, channels last in memory."""
    groups, dtype = geometry.groups, opmath_dtype(input.dtype)
    rows, columns = geometry.output(input.shape[2], input.shape[3], 3, 3)
    tiles = _input_tiles(input.to(dtype), geometry)
    products = _channels_apart(tiles, groups) @ _kernel(weight.to(dtype), groups)
    values = _channels_together(products, tiles.shape[2:5])
    # (2, 2, N, tiles down, tiles across, O) to (N, rows, columns, O)
    plane = _inverse(_inverse(values, 0), 1).permute(2, 3, 0, 4, 1, 5)
    count, down, _, across, _, outputs = plane.shape
    plane = plane.reshape(count, 2 * down, 2 * across, outputs)
    plane = plane.narrow(1, 0, rows).narrow(2, 0, columns)
    if bias is not None:
        plane = plane + bias.to(dtype)
    return plane.to(input.dtype).contiguous().permute(0, 3, 1, 2)


def winograd_weight(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    r"""The adjoint in :math:`w`: :math:`\bar w = G^\top [(A \bar y A^\top) \odot (B^\top x B)]\, G`, over all tiles."""
    groups, dtype = geometry.groups, opmath_dtype(input.dtype)
    tiles = _input_tiles(input.to(dtype), geometry)
    errors = _error_tiles(grad.to(dtype), tiles.shape[3], tiles.shape[4])
    products = _channels_apart(errors, groups).transpose(-1, -2) @ _channels_apart(tiles, groups)
    outputs, channels = products.shape[-2:]
    kernel = _kernel_adjoint(_kernel_adjoint(products.reshape(4, 4, groups, outputs, channels), 0), 1)
    weight = kernel.permute(2, 3, 4, 0, 1).reshape(groups * outputs, channels, 3, 3)
    return weight.to(grad.dtype).contiguous()


def _input_tiles(input: Tensor, geometry: Geometry) -> Tensor:
    r""":math:`B^\top x B` of every tile: (4, 4, N, tiles down, tiles across, C)."""
    top, bottom, left, right = geometry.padding
    rows, columns = geometry.output(input.shape[2], input.shape[3], 3, 3)
    # an odd number of outputs is made even
    planes = pad_constant(input.permute(0, 2, 3, 1), (0, 0, left, right + columns % 2, top, bottom + rows % 2))
    return _forward(_forward(planes, 1, -(-rows // 2)), 3, -(-columns // 2)).transpose(0, 1)


def _forward(planes: Tensor, dim: int, count: int) -> Tensor:
    """The four rows of B^T over overlapping tiles along ``dim``, stacked before everything."""
    d = [planes.narrow(dim, k, 2 * count - 1)[(slice(None),) * dim + (slice(None, None, 2),)] for k in range(4)]
    return torch.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]])


def _inverse(values: Tensor, dim: int) -> Tensor:
    """The two rows of A^T along ``dim``, of four."""
    m = values.unbind(dim)
    return torch.stack([m[0] + m[1] + m[2], m[1] - m[2] - m[3]], dim)


def _error_tiles(grad: Tensor, down: int, across: int) -> Tensor:
    r""":math:`A \bar y A^\top` of every tile: (4, 4, N, tiles down, tiles across, O)."""
    rows, columns = grad.shape[2:]
    errors = pad_constant(grad.permute(0, 2, 3, 1), (0, 0, 0, 2 * across - columns, 0, 2 * down - rows))
    errors = errors.reshape(grad.shape[0], down, 2, across, 2, grad.shape[1]).permute(2, 4, 0, 1, 3, 5)
    return _inverse_adjoint(_inverse_adjoint(errors, 0), 1)


def _inverse_adjoint(errors: Tensor, dim: int) -> Tensor:
    e = errors.unbind(dim)
    return torch.stack([e[0], e[0] + e[1], e[0] - e[1], -e[1]], dim)


def _kernel(weight: Tensor, groups: int) -> Tensor:
    r""":math:`G w G^\top` as matrices (16, groups, C/groups, O/groups)."""
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], 3, 3).permute(3, 4, 0, 2, 1)
    return _kernel_rows(_kernel_rows(split, 0), 1).reshape(16, *split.shape[2:])


def _kernel_rows(weight: Tensor, dim: int) -> Tensor:
    w = weight.unbind(dim)
    outer = w[0] + w[2]
    return torch.stack([w[0], (outer + w[1]) * 0.5, (outer - w[1]) * 0.5, w[2]], dim)


def _kernel_adjoint(products: Tensor, dim: int) -> Tensor:
    m = products.unbind(dim)
    inner = (m[1] + m[2]) * 0.5
    return torch.stack([m[0] + inner, (m[1] - m[2]) * 0.5, inner + m[3]], dim)


def _channels_apart(tiles: Tensor, groups: int) -> Tensor:
    """(4, 4, N, down, across, C) as matrices (16, groups, tiles, C/groups)."""
    matrices = tiles.reshape(16, prod(tiles.shape[2:5]), groups, tiles.shape[-1] // groups)
    return matrices.transpose(1, 2)


def _channels_together(products: Tensor, tiles: torch.Size) -> Tensor:
    """(16, groups, tiles, O/groups) as (4, 4, N, down, across, O)."""
    return products.transpose(1, 2).reshape(4, 4, *tiles, products.shape[1] * products.shape[3])
