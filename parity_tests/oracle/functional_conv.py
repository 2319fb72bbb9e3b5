"""Convolutions in NumPy alone: one row is a plane of height 1; and what Winograd's algorithm adds up on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parity_tests.oracle.functional import conv2d

Array = np.ndarray[Any, np.dtype[Any]]
Result = tuple[Array, Callable[[Array], tuple[Array | None, ...]]]

# Winograd's matrices of F(2, 3) (Lavin and Gray, 2015): y = Aᵀ[(G w) ⊙ (Bᵀ x)]
_A = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], float).T
_B = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], float).T
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], float)


def conv1d(
    input: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Result:
    """:func:`conv2d` of planes of one row."""

    def across(value: int | Sequence[int] | str, rows: int) -> Any:
        return value if isinstance(value, str) else (rows, value if isinstance(value, int) else value[0])

    output, vjp = conv2d(
        input[..., None, :],
        weight[:, :, None],
        bias,
        across(stride, 1),
        across(padding, 0),
        across(dilation, 1),
        groups,
    )

    def vjp_of_sequences(grad: Array) -> tuple[Array | None, ...]:
        grad_input, grad_weight, grad_bias = vjp(grad[..., None, :])
        assert grad_input is not None and grad_weight is not None
        return grad_input[..., 0, :], grad_weight[:, :, 0], grad_bias

    return output[..., 0, :], vjp_of_sequences


def winograd_magnitude(input: Array, weight: Array, padding: int = 0) -> Result:
    r"""Every sum of F(2x2, 3x3) over absolute values: ``|Aᵀ| [(|G||w||Gᵀ|) ⊙ (|Bᵀ||x||B|)] |A|``, tile by tile.

    The gradient of the input is the same algorithm on the mirrored kernel and padding 2 - p, and that of the kernel its
    adjoint, ``|Gᵀ| [(|A||ȳ||Aᵀ|) ⊙ (|Bᵀ||x||B|)] |G|``.
    """
    a, b, g = np.abs(_A), np.abs(_B), np.abs(_G)
    tiles, size = _tiles(np.abs(input), padding)
    moved = np.einsum("xi,ncuvxy,yj->ncuvij", b, tiles, b)
    kernel = np.einsum("ix,ocxy,jy->ocij", g, np.abs(weight), g)
    products = np.einsum("ncuvij,ocij->nouvij", moved, kernel)
    output = _plane(np.einsum("ix,nouvij,jy->nouvxy", a, products, a), size)

    def vjp(grad: Array) -> tuple[Array | None, ...]:
        mirrored = np.swapaxes(weight, 0, 1)[:, :, ::-1, ::-1]
        into, _ = winograd_magnitude(grad, mirrored, 2 - padding)
        whole = np.zeros((*grad.shape[:2], 2 * moved.shape[2], 2 * moved.shape[3]), grad.dtype)
        whole[:, :, : size[0], : size[1]] = np.abs(grad)
        errors = whole.reshape(*grad.shape[:2], moved.shape[2], 2, moved.shape[3], 2)
        errors = np.einsum("iu,noxuyv,jv->noxyij", a, errors, a)
        of_weight = np.einsum("noxyij,ncxyij->ocij", errors, moved)
        return into, np.einsum("ix,ocij,jy->ocxy", g, of_weight, g), None

    return output, vjp


def _tiles(input: Array, padding: int) -> tuple[Array, tuple[int, int]]:
    """4 x 4 tiles, 2 apart, of the padded input: (N, C, down, across, 4, 4); and the output's size."""
    rows, columns = (n + 2 * padding - 2 for n in input.shape[2:])
    sides = [(padding, padding + rows % 2), (padding, padding + columns % 2)]
    inner = [slice(max(0, -before), n - max(0, -after)) for (before, after), n in zip(sides, input.shape[2:])]
    kept = input[:, :, inner[0], inner[1]]
    padded = np.pad(kept, [(0, 0), (0, 0), *((max(0, before), max(0, after)) for before, after in sides)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(2, 3))
    return windows[:, :, ::2, ::2], (rows, columns)


def _plane(tiles: Array, size: tuple[int, int]) -> Array:
    n, o, down, across, _, _ = tiles.shape
    plane = tiles.transpose(0, 1, 2, 4, 3, 5).reshape(n, o, 2 * down, 2 * across)
    return plane[:, :, : size[0], : size[1]]
