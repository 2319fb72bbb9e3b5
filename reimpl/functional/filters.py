"""Filters that are known without training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Positive on the left or at the top: a filter answers positively where brightness falls to the right or downwards.
_VERTICAL = {
    "vertical": ((1, 0, -1), (1, 0, -1), (1, 0, -1)),
    "sobel_vertical": ((1, 0, -1), (2, 0, -2), (1, 0, -1)),
    "scharr_vertical": ((3, 0, -3), (10, 0, -10), (3, 0, -3)),
}
_FILTERS: dict[str, tuple[tuple[int, ...], ...]] = {
    **_VERTICAL,
    **{name.replace("vertical", "horizontal"): tuple(zip(*rows)) for name, rows in _VERTICAL.items()},
    "diagonal": ((0, 1, 1), (-1, 0, 1), (-1, -1, 0)),
    "laplacian": ((0, -1, 0), (-1, 4, -1), (0, -1, 0)),
}


def edge_filters(*names: str, channels: int = 1, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Weights of a convolution that finds edges, one output channel a name.

    ``"vertical"`` and ``"horizontal"`` are differences of neighbouring columns and rows over a 3×3 window;
    ``"sobel_..."`` and ``"scharr_..."`` weigh the middle more; ``"diagonal"`` finds edges along the diagonal, and
    ``"laplacian"`` edges of every direction. Each sums to 0: a flat area gives 0.

    Args:
        names: which filters (default: ``"vertical", "horizontal"``).
        channels: input channels; the filter is the same in each, and the convolution adds them up.
        device, dtype: of the result.

    Returns:
        shape (names, channels, 3, 3), for :func:`conv2d`.

    Raises:
        ValueError: there is no such filter, or ``channels`` is not positive.

    Source: F8; N4. PyTorch has none.
    """
    names = names or ("vertical", "horizontal")
    for name in names:
        if name not in _FILTERS:
            raise ValueError(f"names must be among {', '.join(_FILTERS)}, got {name!r}")
    if channels < 1:
        raise ValueError(f"channels must be positive, got {channels}")
    dtype = dtype or torch.get_default_dtype()
    weight = torch.tensor([_FILTERS[name] for name in names], dtype=dtype, device=device)
    return weight.unsqueeze(1).repeat(1, channels, 1, 1)
