"""The three products of a depthwise convolution, one filter a channel, on the CPU: a sum over taps of shifted planes.

There is nothing to add up over channels, and so no matrix product worth the name. At stride 1 a tap's product is taken
over whole padded planes, shifted as one run of numbers: what falls into the padding is computed in vain and left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry, phase_pairs
from reimpl.functional._conv.layouts import empty_planes
from reimpl.functional._conv.products import unobserved
from reimpl.functional._conv.windows import every, fill_padded, pixels_of
from reimpl.functional._dispatch import opmath_dtype

# Bytes of padded planes that stay in the cache from tap to tap.
_BLOCK_BYTES = 1 << 20


def fits(geometry: Geometry, *tensors: Tensor | None) -> bool:
    """Whether the sums do for such tensors; for one filter a channel."""
    return (
        geometry.groups > 1
        and geometry.algorithm is None
        and all(t is None or (t.device.type == "cpu" and t.is_floating_point() and t.numel() > 0) for t in tensors)
        and unobserved(*tensors)
    )


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: tuple[int, int],
    geometry: Geometry,
    layout: torch.memory_format,
) -> Tensor:
    """``C(x, w) + b``, of height and width ``output``; ``weight`` is ``(C, 1, f_h, f_w)``."""
    target = empty_planes(input, input.shape[1], output, layout)
    _convolve_into(target, input, weight, bias, geometry)
    return target


def _convolve_into(target: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    filters = weight.to(opmath_dtype(weight.dtype)).permute(2, 3, 0, 1).flatten(0, 1)
    offset = None if bias is None else bias.to(filters.dtype).view(-1, 1, 1)
    for part, taps, shape in _blocks(input, (target.shape[2], target.shape[3]), _plane(weight), geometry):
        total = None
        for tap, factor in zip(taps, filters, strict=True):
            factor = factor.view(-1, *(1,) * (tap.dim() - 2))
            total = tap * factor if total is None else total.addcmul_(tap, factor)
        assert total is not None
        values = _inside(total, shape, (target.shape[2], target.shape[3]))
        target[part].copy_(values if offset is None else values.add_(offset))


def convolve_input(
    grad: Tensor, weight: Tensor, size: tuple[int, int], geometry: Geometry, layout: torch.memory_format
) -> Tensor:
    """``T(g, w)``, the gradient of an input of height and width ``size``."""
    target = empty_planes(grad, grad.shape[1], size, layout)
    mirrored = weight.flip(2, 3)
    pairs = list(phase_pairs(_plane(grad), size, _plane(weight), geometry))
    if sum(down.number * across.number for down, across, _ in pairs) < prod(size):
        target.zero_()
    for down, across, part in pairs:
        taps = every(every(mirrored, 2, *down.taps), 3, *across.taps)
        _convolve_into(pixels_of(target, down, across, geometry), grad, taps, None, part)
    return target


def convolve_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``, the gradient of a kernel of height and width ``kernel``."""
    sums = grad.new_zeros(prod(kernel), grad.shape[1], dtype=opmath_dtype(grad.dtype))
    room = products = None
    for part, taps, shape in _blocks(input, _plane(grad), kernel, geometry):
        errors = grad[part]
        for k, tap in enumerate(taps):
            if room is None or products is None:
                # used from block to block
                room, products = tap.new_zeros(tap.shape), tap.new_empty(tap.shape)
            own = room[: len(errors)]
            if k == 0:
                _inside(own, shape, _plane(grad)).copy_(errors)
            product = torch.mul(own, tap, out=products[: len(errors)])
            # without what lies between the rows, where a zero may have met an infinity
            sums[k] += _inside(product, shape, _plane(grad)).sum((0, 2, 3))
    return sums.t().reshape(grad.shape[1], 1, *kernel).to(grad.dtype)


def _plane(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[2], tensor.shape[3]


def _blocks(
    input: Tensor, output: tuple[int, int], kernel: tuple[int, int], geometry: Geometry
) -> Iterator[tuple[slice, Iterator[Tensor], tuple[int, int] | None]]:
    """Parts of the batch, what each tap of the kernel sees of them, and the planes' size where those are flat.

    Flat planes, at stride 1, are runs of all numbers of a padded plane, and begin with the tap's first.
    """
    count, channels = input.shape[:2]
    height, width = geometry.padded(input.shape[2], input.shape[3])
    (s_h, s_w), (d_h, d_w) = geometry.stride, geometry.dilation
    flat, dtype = geometry.stride == (1, 1), opmath_dtype(input.dtype)
    size = max(1, _BLOCK_BYTES // (channels * height * width * dtype.itemsize))
    # all taps of the last row of outputs see so many numbers
    length = (output[0] - 1) * width + output[1]
    room = input.new_zeros(min(size, count), channels, height, width, dtype=dtype)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        planes = fill_padded(room[: part.stop - start], input[part], geometry)
        places = [(k * d_h, j * d_w) for k in range(kernel[0]) for j in range(kernel[1])]
        if flat:
            taps = (planes.flatten(2).narrow(2, k * width + j, length) for k, j in places)
            yield part, taps, (output[0], width)
        else:
            taps = (every(every(planes, 2, k, output[0], s_h), 3, j, output[1], s_w) for k, j in places)
            yield part, taps, None


def _inside(values: Tensor, shape: tuple[int, int] | None, output: tuple[int, int]) -> Tensor:
    """The output's numbers among those of flat planes, of which the last row ends with the output's."""
    if shape is None:
        return values
    n, c, _ = values.stride()
    return values.as_strided((*values.shape[:2], *output), (n, c, shape[1], 1), values.storage_offset())
