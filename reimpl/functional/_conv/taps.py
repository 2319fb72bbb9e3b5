"""The products of a convolution whose matrices have a tap a row, for few channels and for kernels of one tap.

The planes are read as they lie, and what comes of a product lies in planes too. Windows of few numbers are multiplied
image by image, in one call of ``bmm``, which writes where the output lies; others go to the faster product of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import gcd, prod

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry
from reimpl.functional._conv.layouts import pixels_of_planes, transposed
from reimpl.functional._conv.products import product
from reimpl.functional._conv.regions import Box, partitions
from reimpl.functional._conv.windows import Run, dense, inside_padding, parts

# Measured: taps a row are faster for at most so many channels, and runs of at least so many numbers.
_FEW_CHANNELS, _LEAST_RUN = 16, 8
# The gradient of the kernel takes taps as rows for runs of so many numbers.
_LONG_RUN = 32
# Terms of a sum that a product takes in one run, and pixels of the gradient of a kernel of one tap.
_TERMS, _PIXELS = 256, 256
# Windows of at most so many numbers go image by image: measured at 27.
_FEW_TERMS = 64


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
    by_image = len(boxes) == 1 and matrices[0].shape[1] <= _FEW_TERMS
    windows, blocks = _gatherer(input, kernel, target, geometry, boxes, by_image)
    for part in blocks:
        if by_image:
            _multiply_images(target[part], matrices[0], *windows(part))
        else:
            total = None
            for own, matrix in zip(matrices, windows(part), strict=True):
                values = product(own, matrix)
                total = values if total is None else total.add_(values)
            assert total is not None
            target[part].copy_(total.view(outputs, -1, *output).transpose(0, 1))
        if bias is not None:
            target[part].add_(bias.view(-1, 1, 1))


def _multiply_images(target: Tensor, filters: Tensor, windows: Tensor) -> None:
    """``filters``, ``(O, terms)``, times the windows of each image, ``(N, terms, pixels)``, written to ``target``."""
    count, outputs, *output = target.shape
    shared = filters.expand(count, *filters.shape)
    if target.is_contiguous():
        torch.bmm(shared, windows, out=target.view(count, outputs, -1))
    elif target.is_contiguous(memory_format=torch.channels_last):
        pixels = target.permute(0, 2, 3, 1).view(count, -1, outputs)
        torch.bmm(windows.transpose(1, 2), shared.transpose(1, 2), out=pixels)
    else:
        target.copy_(torch.bmm(shared, windows).view(count, outputs, *output))


def multiply_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """The gradient of a kernel of height and width ``kernel``."""
    outputs, channels, total = grad.shape[1], input.shape[1], None
    pixels = _PIXELS if kernel == (1, 1) else grad[:, 0].numel()
    whole = [Box(slice(0, kernel[0]), slice(0, kernel[1]), slice(0, channels))]
    windows, blocks = _gatherer(input, kernel, grad, geometry, whole)
    for part in blocks:
        errors = pixels_of_planes(grad[part]).reshape(-1, outputs)
        (matrix,) = windows(part)
        for some, others in zip(matrix.split(pixels, 1), errors.split(pixels), strict=True):
            values = product(some, others)
            total = values if total is None else total.add_(values)
    assert total is not None
    return total.t().reshape(outputs, channels, *kernel).contiguous()


def _gatherer(
    input: Tensor,
    kernel: tuple[int, int],
    output: Tensor,
    geometry: Geometry,
    boxes: list[Box],
    by_image: bool = False,
) -> tuple[Gatherer, list[slice]]:
    """What makes the matrices of the windows, and the parts of the batch; ``output`` has the output's shape."""
    size = output.shape[2], output.shape[3]
    row = max(prod(box.sizes) for box in boxes) * input.element_size()
    values = output.shape[1] * input.element_size()
    blocks = list(parts(input.shape[0], prod(size) * (row + values), input.device, output.shape[1] * row))
    most = max(part.stop - part.start for part in blocks)
    return Gatherer(input, size, geometry, boxes, most, by_image), blocks


class Gatherer:
    """Makes matrices of the windows of a batch, block by block, in memory of its own; for one group.

    A matrix holds a box of each window, a tap a row, ``(C·f_h·f_w, N·H'·W')``, or one of each image, ``(N, C·f_h·f_w,
    H'·W')``. It is valid until the next. Where windows are some columns apart, columns are first dealt out to as many
    planes, which is a transposition, so that runs of numbers are copied.
    """

    def __init__(
        self,
        input: Tensor,
        output: tuple[int, int],
        geometry: Geometry,
        boxes: list[Box],
        size: int,
        by_image: bool,
    ) -> None:
        self.input, self.output, self.geometry, self.boxes, self.by_image = input, output, geometry, boxes, by_image
        self._room = input.new_empty(size * prod(output) * max(prod(box.sizes) for box in boxes))
        self._hands = geometry.stride[1] if boxes[0].sizes[1] > 1 else 1
        height, width = geometry.padded(input.shape[2], input.shape[3])
        spare = -width % self._hands
        self._padded = None
        if spare or any(geometry.padding):
            self._padded = input.new_zeros(size, input.shape[1], height, width + spare)
            self._inside, self.input = inside_padding(self._padded.narrow(3, 0, width), input, geometry)

    def __call__(self, part: slice) -> Iterator[Tensor]:
        """The matrices of the images of ``part``, one for each box."""
        planes = self.input[part]
        if self._padded is not None:
            self._inside[: len(planes)].copy_(planes)
            planes = self._padded[: len(planes)]
        planes = planes.unsqueeze(1)
        if self._hands > 1:
            count, _, channels, height, width = planes.shape
            planes = transposed(planes.reshape(count, -1, self._hands))
            planes = planes.view(count, self._hands, channels, height, width // self._hands)
        return (self._gather(planes, box) for box in self.boxes)

    def _gather(self, planes: Tensor, box: Box) -> Tensor:
        """The matrix of planes dealt out, ``(N, hands, C, H, W / hands)``."""
        starts, offset = (box.rows.start, box.columns.start, box.channels.start), int(planes.storage_offset())
        runs = _runs(starts, box.sizes, planes.shape, planes.stride(), self.output, self.geometry, self.by_image)
        terms, area = prod(box.sizes), prod(self.output)
        shape = (len(planes), terms, area) if self.by_image else (terms, len(planes) * area)
        if len(runs) == 1 and runs[0].lies:
            return planes.as_strided(shape, dense(shape), offset + runs[0].first)
        for run in runs:
            run.copy(planes, offset, self._room)
        return self._room.as_strided(shape, dense(shape))


@lru_cache(maxsize=1024)
def _runs(
    starts: tuple[int, int, int],
    sizes: tuple[int, int, int],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    output: tuple[int, int],
    geometry: Geometry,
    by_image: bool,
) -> tuple[Run, ...]:
    """Where the numbers of a box stand in planes of ``shape`` and ``strides``: first row, column and channel, sizes."""
    (count, hands, *_), (n, hand, c, h, w) = shape, strides
    (s_h, s_w), (d_h, d_w) = geometry.stride, geometry.dilation
    (row, column, channel), (rows, columns, channels) = starts, sizes
    area = prod(output)
    # how far apart the matrix has taps, and images
    tap, image = (area, prod(sizes) * area) if by_image else (count * area, area)
    # taps so many columns apart find their numbers in one plane
    period = hands // gcd(hands, d_w)
    runs = []
    for k in range(min(period, columns)):
        place, owner = divmod((column + k) * d_w, hands)
        dims = (
            (channels, c, rows * columns * tap),
            (rows, h * d_h, columns * tap),
            (len(range(k, columns, period)), w * (period * d_w // hands), period * tap),
            (count, n, image),
            (output[0], h * s_h, output[1]),
            (output[1], w * (s_w // hands), 1),
        )
        first = channel * c + row * d_h * h + owner * hand + place * w
        taken, lying, wanted = zip(*dims, strict=True)
        runs.append(Run(taken, lying, first, wanted, k * tap))
    return tuple(runs)
