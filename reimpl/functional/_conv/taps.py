"""The products of a convolution whose matrices have a tap a row, for few channels and for kernels of one tap.

The planes are read as they lie, and what comes of a product lies in planes too. Windows of few numbers make a matrix of
each image, which one call of ``bmm`` multiplies to where the output lies; where planes are small they are turned to a
window a row for the faster product of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.columns import columns
from reimpl.functional._conv.layouts import empty_planes, pixels_of_planes, planes_clash, planes_of_pixels, transposed
from reimpl.functional._conv.products import product

# Measured: taps a row are faster for at most so many channels, and runs of at least so many numbers.
FEW_CHANNELS, _LEAST_RUN = 16, 8
# The gradient of the kernel takes taps as rows for runs of so many numbers.
_LONG_RUN = 32
# Terms of a sum that a product takes in one run, and pixels of the gradient of a kernel of one tap.
_TERMS, _PIXELS = 256, 256


def fits(
    input: Tensor, kernel: tuple[int, int], output: tuple[int, int], geometry: Geometry, for_weight: bool = False
) -> bool:
    """Whether taps make better rows than windows."""
    few = input.shape[1] <= FEW_CHANNELS or kernel == (1, 1) or (for_weight and output[1] >= _LONG_RUN)
    layout = geometry.groups == 1 and input.stride(3) == 1
    return few and output[1] >= _LEAST_RUN and layout and crops_no_more_than_all(input, geometry)


def crops_no_more_than_all(input: Tensor, geometry: Geometry) -> bool:
    """Whether a padding that is negative can be cut off the images."""
    top, bottom, left, right = (min(side, 0) for side in geometry.padding)
    return input.shape[2] + top + bottom >= 0 and input.shape[3] + left + right >= 0


def multiply(
    input: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    output: tuple[int, int],
    geometry: Geometry,
    layout: torch.memory_format,
    target: Tensor | None = None,
) -> Tensor:
    """All windows of ``input`` times ``filters``, of shape ``(f_h, f_w, C, O)``: planes of size ``output``, written to
    ``target`` where there is one."""
    outputs, kernel = filters.shape[3], (filters.shape[0], filters.shape[1])
    plan = columns(input.shape, input.stride(), input.dtype, kernel, outputs, output, geometry, _TERMS)
    matrices = [filters[box].permute(3, 2, 0, 1).reshape(outputs, -1) for box in plan.boxes]
    in_place = plan.by_image and layout is torch.contiguous_format and planes_clash(output, input.dtype)
    if target is None and (in_place or len(plan.blocks) > 1):
        target = empty_planes(input, outputs, output, layout)
    for part, windows in plan.matrices(input):
        if in_place and target is not None and target.is_contiguous():
            own = target[part]
            shared = matrices[0].expand(len(own), -1, -1)
            torch.bmm(shared, next(windows), out=own.view(len(own), outputs, -1))
            if bias is not None:
                own.add_(bias.view(-1, 1, 1))
            continue
        if plan.by_image:
            rows = transposed(next(windows)).flatten(0, 1)
            pixels = product(rows, matrices[0].t().contiguous(), bias)
            planes = planes_of_pixels(pixels.view(-1, *output, outputs), layout)
        else:
            planes = _sum_of_products(matrices, windows, bias).view(outputs, -1, *output).transpose(0, 1)
        if target is None:
            return planes.contiguous(memory_format=layout)
        target[part].copy_(planes)
    assert target is not None
    return target


def _sum_of_products(matrices: list[Tensor], windows: Iterator[Tensor], bias: Tensor | None) -> Tensor:
    total = None
    for filters, matrix in zip(matrices, windows, strict=True):
        values = product(filters, matrix)
        total = values if total is None else total.add_(values)
    assert total is not None
    return total if bias is None else total.add_(bias.view(-1, 1))


def multiply_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """The gradient of a kernel of height and width ``kernel``."""
    outputs, channels, output, total = grad.shape[1], input.shape[1], (grad.shape[2], grad.shape[3]), None
    plan = columns(input.shape, input.stride(), input.dtype, kernel, outputs, output, geometry, None)
    for part, (matrix,) in plan.matrices(input):
        own = grad[part]
        if len(own) == 1 and own.stride(3) == 1:
            # as the product takes its second factor best
            errors = own[0].flatten(1).t()
        else:
            errors = pixels_of_planes(own).reshape(-1, outputs)
        pixels = _PIXELS if kernel == (1, 1) else len(errors)
        for some, others in zip(matrix.split(pixels, 1), errors.split(pixels), strict=True):
            values = product(some, others)
            total = values if total is None else total.add_(values)
    assert total is not None
    return total.t().reshape(outputs, channels, *kernel).contiguous()
