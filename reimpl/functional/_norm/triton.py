"""Batch normalisation, with relu or not, by Triton kernels: two passes over memory forward, two backward."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from reimpl.functional._dispatch import is_channels_last
from reimpl.functional._norm import triton_kernels as kernels
from reimpl.functional._triton_common import blocks, laid_out_as, launch, power_of_two, programs_wanted

# Numbers of a tile: 16 for each of a program's 128 threads, beside as many partial sums twice.
_TILE = 2_048
# Channels of a tile where they are last in memory: 128 bytes of float32 are read at once.
_COLUMNS = 32
# Parts whose sums are read at once.
_PARTS = 32
# Offsets within an image, and the numbers of a channel, are counted in 32 bits.
_MOST = 2**31 - _TILE


def worth_it(input: Tensor) -> bool:
    """Whether there is anything to do, in a layout that the kernels walk through."""
    if input.dim() < 2 or not input.numel():
        return False
    sizes = prod(input.shape[1:]), input.numel() // input.shape[1]
    return max(sizes) < _MOST and (input.is_contiguous() or is_channels_last(input))


@dataclass(frozen=True)
class _Split:
    """How the numbers of a tensor are shared out: the grid, the kernels' arguments, and their constants."""

    grid: tuple[int, int]
    arguments: tuple[int, ...]
    """Channels, numbers of a channel, of a part and of a plane, and the strides of images, channels and pixels."""
    tile: dict[str, int]

    @property
    def parts(self) -> int:
        return self.grid[1]


def _split(input: Tensor) -> _Split:
    channels, size = input.shape[1], prod(input.shape[2:])
    count = input.shape[0] * size
    by_planes = input.is_contiguous() and size > 1
    columns = 1 if by_planes else power_of_two(channels, 1, _COLUMNS)
    rows = power_of_two(count, 1, _TILE // columns)
    groups, tiles = blocks(channels, columns), blocks(count, rows)
    parts = max(1, min(tiles, programs_wanted(input.device) // groups))
    per_part = blocks(tiles, parts) * rows
    strides = (channels * size, size, 1) if by_planes else (channels * size, 1, channels)
    return _Split(
        (groups, blocks(count, per_part)),
        (channels, count, per_part, size, *strides),
        {"ROWS": rows, "COLUMNS": columns},
    )


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A vector, or something else to point at where there is none."""
    return other if tensor is None else tensor.contiguous()


def _statistic(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=torch.float32)


def _partial(input: Tensor, split: _Split) -> Tensor:
    return input.new_empty((2, split.parts, input.shape[1]), dtype=torch.float32)


def _normalized(
    input: Tensor,
    split: _Split,
    partial: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    output = torch.empty_like(input)
    launch(
        kernels.normalize, split.grid, input, output, _or(partial, mean), mean, var, _or(weight, mean), _or(bias, mean),
        float(eps), split.parts, *split.arguments, TRAINING=partial is not None, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, RELU=relu, PARTS=power_of_two(split.parts, 1, _PARTS), **split.tile,
    )  # fmt: skip
    return output


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch."""
    split = _split(input)
    partial, mean, var = _partial(input, split), _statistic(input), _statistic(input)
    launch(kernels.moments, split.grid, input, partial, *split.arguments, **split.tile)
    return _normalized(input, split, partial, mean, var, weight, bias, eps, relu), mean, var


def infer(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """Output for a given mean and variance."""
    return _normalized(input, _split(input), None, mean.contiguous(), var.contiguous(), weight, bias, eps, relu)


def _gradients(
    grad: Tensor,
    input: Tensor,
    rectified: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    to_statistics: tuple[Tensor, Tensor] | None,
    eps: float,
    wanted: bool,
    summed: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    split, grad = _split(input), laid_out_as(grad, input)
    output = input if rectified is None else laid_out_as(rectified, input)
    result = torch.empty_like(input) if wanted else None
    partial, sum_g, sum_g_centred = _partial(input, split), _statistic(input), _statistic(input)
    flags: dict[str, Any] = {"RELU": rectified is not None, **split.tile}
    mean, var = mean.contiguous(), var.contiguous()
    grad_mean, grad_var = (_or(t, mean) for t in to_statistics or (None, None))
    if summed:
        launch(kernels.error_sums, split.grid, grad, input, output, mean, partial, *split.arguments, **flags)
    grid = split.grid if wanted else (split.grid[0], 1)
    if wanted or summed:
        launch(
            kernels.gradient, grid, grad, input, output, input if result is None else result, partial, mean, var,
            _or(weight, mean), grad_mean, grad_var, sum_g, sum_g_centred, float(eps), split.parts, *split.arguments,
            TRAINING=to_statistics is not None, SUMMED=summed, WANTED=wanted, HAS_WEIGHT=weight is not None,
            PARTS=power_of_two(split.parts, 1, _PARTS), **flags,
        )  # fmt: skip
    return result, sum_g, sum_g_centred


def backward(
    grad: Tensor,
    input: Tensor,
    rectified: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    eps: float,
    wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradient of the input (``None`` unless ``wanted``), and the sums of g and g (x - μ)."""
    return _gradients(grad, input, rectified, weight, mean, var, (grad_mean, grad_var), eps, wanted, True)


def infer_backward(
    grad: Tensor,
    input: Tensor,
    rectified: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    wanted: bool,
    sums_wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """:func:`backward` for statistics that do not depend on the input; the sums are empty unless ``sums_wanted``."""
    return _gradients(grad, input, rectified, weight, mean, var, None, eps, wanted, sums_wanted)
