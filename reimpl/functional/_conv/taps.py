"""The products of a convolution whose matrices have a tap a row, for few channels and for kernels of one tap.

The planes are read as they lie, and what comes of a product lies in planes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.products import product
from reimpl.functional._conv.regions import Box, partitions
from reimpl.functional._conv.windows import fill_padded, parts

# Measured: taps a row are faster for at most so many channels, and runs of at least so many numbers.
_FEW_CHANNELS, _LEAST_RUN = 16, 8
# The gradient of the kernel takes taps as rows for runs of so many numbers.
_LONG_RUN = 32
# Terms of a sum that a product takes in one run, and pixels of the gradient of a kernel of one tap.
_TERMS, _PIXELS = 256, 256


def fits(
    input: Tensor, kernel: tuple[int, int], output: tuple[int, int], geometry: Geometry, for_weight: bool = False
) -> bool:
    """Whether taps make better rows than windows."""
    few = input.shape[1] <= _FEW_CHANNELS or kernel == (1, 1) or (for_weight and output[1] >= _LONG_RUN)
    return few and output[1] >= _LEAST_RUN and geometry.groups == 1 and input.stride(3) == 1


def multiply_into(target: Tensor, input: Tensor, filters: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    """All windows of ``input`` times ``filters``, of shape ``(f_h, f_w, C, O)``, written to ``target``."""
    kernel, output, outputs = (filters.shape[0], filters.shape[1]), (target.shape[2], target.shape[3]), target.shape[1]
    boxes = partitions(kernel, input.shape[1], _TERMS)[-1]
    matrices = [filters[box].permute(3, 2, 0, 1).reshape(outputs, -1) for box in boxes]
    windows, blocks = _gatherer(input, kernel, target, geometry, boxes)
    for part in blocks:
        total = None
        for own, matrix in zip(matrices, windows(part), strict=True):
            values = product(own, matrix)
            total = values if total is None else total.add_(values)
        assert total is not None
        values = total.view(outputs, -1, *output).transpose(0, 1)
        target[part].copy_(values if bias is None else values.add_(bias.view(-1, 1, 1)))


def multiply_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """The gradient of a kernel of height and width ``kernel``."""
    outputs, channels, total = grad.shape[1], input.shape[1], None
    pixels = _PIXELS if kernel == (1, 1) else grad[:, 0].numel()
    whole = [Box(slice(0, kernel[0]), slice(0, kernel[1]), slice(0, channels))]
    windows, blocks = _gatherer(input, kernel, grad, geometry, whole)
    for part in blocks:
        errors = grad[part].transpose(0, 1).reshape(outputs, -1).t()
        (matrix,) = windows(part)
        for some, others in zip(matrix.split(pixels, 1), errors.split(pixels), strict=True):
            values = product(some, others)
            total = values if total is None else total.add_(values)
    assert total is not None
    return total.t().reshape(outputs, channels, *kernel).contiguous()


def _gatherer(
    input: Tensor, kernel: tuple[int, int], output: Tensor, geometry: Geometry, boxes: list[Box]
) -> tuple[Gatherer, list[slice]]:
    """What makes the matrices of the windows, and the parts of the batch; ``output`` has the output's shape."""
    size = output.shape[2], output.shape[3]
    row = max(prod(box.sizes) for box in boxes) * input.element_size()
    values = output.shape[1] * input.element_size()
    blocks = list(parts(input.shape[0], prod(size) * (row + values), input.device, output.shape[1] * row))
    most = max(part.stop - part.start for part in blocks)
    return Gatherer(input, kernel, size, geometry, boxes, most), blocks


class Gatherer:
    """Makes matrices of the windows of a batch, block by block, in memory of its own; for one group.

    A matrix holds a box of each window, a tap a row, ``(C·f_h·f_w, N·H'·W')``. It is valid until the next.
    """

    def __init__(
        self,
        input: Tensor,
        kernel: tuple[int, int],
        output: tuple[int, int],
        geometry: Geometry,
        boxes: list[Box],
        size: int,
    ) -> None:
        self.input, self.output, self.geometry, self.boxes = input, output, geometry, boxes
        self._matrix = input.new_empty(size * prod(output) * max(prod(box.sizes) for box in boxes))
        self._planes = None
        if any(geometry.padding):
            height, width = geometry.padded(input.shape[2], input.shape[3])
            self._planes = input.new_zeros(size, input.shape[1], height, width)

    def __call__(self, part: slice) -> Iterator[Tensor]:
        """The matrices of the images of ``part``, one for each box."""
        planes = self.input[part]
        if self._planes is not None:
            planes = fill_padded(self._planes[: len(planes)], planes, self.geometry)
        return (self._gather(planes, box) for box in self.boxes)

    def _gather(self, planes: Tensor, box: Box) -> Tensor:
        n, c, h, w = planes.stride()
        (s_h, s_w), (d_h, d_w) = self.geometry.stride, self.geometry.dilation
        rows, columns, channels = box.sizes
        first = box.rows.start * d_h * h + box.columns.start * d_w * w + box.channels.start * c
        sizes = (channels, rows, columns, len(planes), *self.output)
        strides = (c, h * d_h, w * d_w, n, h * s_h, w * s_w)
        windows = planes.as_strided(sizes, strides, planes.storage_offset() + first)
        pixels = len(planes) * prod(self.output)
        if windows.is_contiguous():
            return windows.view(-1, pixels)
        return self._matrix[: windows.numel()].view(sizes).copy_(windows).view(-1, pixels)
