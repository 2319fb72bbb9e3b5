"""The three products of a convolution of ordinary tensors on the CPU, over blocks of the batch.

For each block windows are gathered into a matrix that stays in the cache, multiplied, and the values written straight
to where they belong. The matrix has a window a row, which wants images with their channels last; or a tap a row, which
leaves the planes as they are, and is for few channels and kernels of one tap.

A window is multiplied in boxes of some taps and channels, whose products are added: sums in one run are up to 15 %
faster and, at 1,152 terms and more, err 2.5 times as much as PyTorch's.

Measured on two Zen 5 cores at the 3x3 layers of ResNet-18 and AlexNet on CIFAR, batch 64: gathering runs at 100 GB/s,
50 where runs are of 16 numbers, bringing the channels to the end and back at 10-18 GB/s. Slower were: boxes that cut
the channels rather than the taps; the batch as the innermost dimension, which spares the kernel its permutation and
rearranges images at 2 GB/s; and blocks of less than 4 MB.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from reimpl.functional._conv.arguments import Geometry, phase_pairs
from reimpl.functional._conv.products import ordinary, product
from reimpl.functional._conv.windows import Box, Gatherer, boxes, parts, pixels_of

# Measured: taps a row are faster for at most so many channels, and runs of at least so many numbers.
_FEW_CHANNELS, _LEAST_RUN = 16, 8
# Terms of a sum that a product takes in one run: the error of a longer one grows with their number, and PyTorch's
# convolutions sum 192.
_TERMS = 256
# Pixels that the gradient of a kernel of one tap takes in one run.
_PIXELS = 256
# The gradient of the kernel takes taps as rows for runs of so many numbers: the product is then shared out among the
# threads as the matrix was written, whose lines need not go from core to core.
_LONG_RUN = 16


def fits(geometry: Geometry, *tensors: Tensor | None) -> bool:
    """Whether the blocks do for such tensors."""
    return (
        geometry.groups == 1
        and geometry.algorithm in (None, "im2col")
        and all(t is None or (t.device.type == "cpu" and t.numel() > 0) for t in tensors)
        and ordinary(*tensors)
    )


def convolve_into(target: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    """``C(x, w) + b``, written to ``target``."""
    _multiply(target, input, weight.permute(2, 3, 1, 0), bias, geometry)


def convolve_input_into(target: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """``T(g, w)``, the gradient of the input, written to ``target``."""
    kernel = _plane(weight)
    pairs = list(phase_pairs(_plane(grad), _plane(target), kernel, geometry))
    if sum(down.number * across.number for down, across, _ in pairs) < prod(_plane(target)):
        target.zero_()
    for down, across, part in pairs:
        rows, columns = _places(down.taps, kernel[0]), _places(across.taps, kernel[1])
        filters = torch.stack([weight[:, :, k, j] for k in rows for j in columns])
        filters = filters.view(len(rows), len(columns), *filters.shape[1:])
        _multiply(pixels_of(target, down, across, geometry), grad, filters, None, part)


def _places(taps: tuple[int, int, int], size: int) -> range:
    """Where the taps of a mirrored kernel (first, number, step) stand in the kernel."""
    first, count, step = taps
    return range(size - 1 - first, size - 1 - first - count * step, -step)


def _multiply(target: Tensor, input: Tensor, filters: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    """All windows of ``input`` times ``filters``, of shape ``(f_h, f_w, C, O)``, written to ``target``."""
    output, outputs, kernel = _plane(target), target.shape[1], (filters.shape[0], filters.shape[1])
    windows, blocks = _gatherer(input, kernel, target, geometry, boxes(kernel, input.shape[1], _TERMS))
    matrices = _matrices(filters, windows.boxes, windows.taps_as_rows)
    for part in blocks:
        total = None
        for matrix, own in zip(windows(part), matrices, strict=True):
            if windows.taps_as_rows:
                values = product(own, matrix)
            else:
                values = product(matrix, own, bias if total is None else None)
            total = values if total is None else total.add_(values)
        assert total is not None
        if windows.taps_as_rows:
            values = total.view(outputs, -1, *output).transpose(0, 1)
            target[part].copy_(values if bias is None else values.add_(bias.view(-1, 1, 1)))
        else:
            target[part].copy_(total.view(-1, *output, outputs).permute(0, 3, 1, 2))


def _matrices(filters: Tensor, boxes: list[Box], taps_as_rows: bool) -> list[Tensor]:
    """Of each box the filters as a matrix, ``(f_h·f_w·C, O)``, or where taps are rows ``(O, C·f_h·f_w)``."""
    outputs = filters.shape[3]
    if len(boxes) > 1 and filters.stride(3) != 1:
        # one tap's numbers together, which most boxes then read in place
        filters = filters.transpose(2, 3).contiguous().transpose(2, 3)
    parts = [filters[box] for box in boxes]
    if taps_as_rows:
        return [part.permute(3, 2, 0, 1).reshape(outputs, -1) for part in parts]
    if filters.stride(3) == 1:
        return [part.reshape(-1, outputs) for part in parts]
    return [part.permute(3, 0, 1, 2).reshape(outputs, -1).t() for part in parts]


def convolve_weight(grad: Tensor, input: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """``W(g, x)``, the gradient of a kernel of height and width ``kernel``."""
    outputs, channels, total = grad.shape[1], input.shape[1], None
    pixels = _PIXELS if kernel == (1, 1) else grad[:, 0].numel()
    whole = boxes(kernel, channels, prod(kernel) * channels)
    windows, blocks = _gatherer(input, kernel, grad, geometry, whole, _LONG_RUN)
    for part in blocks:
        errors = grad[part].transpose(0, 1).reshape(outputs, -1)
        (matrix,) = windows(part)
        left, right = (matrix, errors.t()) if windows.taps_as_rows else (errors, matrix)
        for some, others in zip(left.split(pixels, 1), right.split(pixels), strict=True):
            values = product(some, others)
            total = values if total is None else total.add_(values)
    assert total is not None
    result = grad.new_empty(outputs, channels, *kernel)
    if windows.taps_as_rows:
        return result.copy_(total.t().view(result.shape))
    return result.copy_(total.view(outputs, *kernel, channels).permute(0, 3, 1, 2))


def _plane(tensor: Tensor) -> tuple[int, int]:
    return tensor.shape[2], tensor.shape[3]


def _gatherer(
    input: Tensor,
    kernel: tuple[int, int],
    output: Tensor,
    geometry: Geometry,
    boxes: list[Box],
    long: int | None = None,
) -> tuple[Gatherer, list[slice]]:
    """What makes the matrices of the windows, and the parts of the batch; ``output`` has the output's shape.

    The taps are rows for few channels, and where runs are ``long``.
    """
    size, (count, channels) = _plane(output), input.shape[:2]
    few = channels <= _FEW_CHANNELS or kernel == (1, 1)
    row = max(prod(box.sizes) for box in boxes) * input.element_size()
    values = output.shape[1] * input.element_size()
    blocks = list(parts(count, prod(size) * (row + values), input.device, output.shape[1] * row))
    run = size[1] >= _LEAST_RUN if few else long is not None and size[1] >= long
    most = max(part.stop - part.start for part in blocks)
    return Gatherer(input, kernel, size, geometry, boxes, run and input.stride(3) == 1, most), blocks
