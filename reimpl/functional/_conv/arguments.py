"""A convolution's arguments: their forms, what is refused and in which words, and the geometry that they describe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reimpl.functional._dispatch import scalar_type_name, type_text
from reimpl.functional._options import integer

_warned = False
ALGORITHMS = ("im2col", "views", "winograd")
"""What ``algorithm=`` can name."""

_WITHOUT_PRODUCTS = (torch.bool, torch.uint16, torch.uint32, torch.uint64)
_IN_C = {
    torch.bool: "bool",
    torch.uint8: "unsigned char",
    torch.int8: "signed char",
    torch.int16: "short int",
    torch.int32: "int",
    torch.int64: "long int",
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
    torch.float32: "float",
    torch.float64: "double",
    torch.complex64: "c10::complex<float>",
    torch.complex128: "c10::complex<double>",
}
_BY_NAME = {1: "2D (unbatched) or 3D (batched) input to conv1d", 2: "3D (unbatched) or 4D (batched) input to conv2d"}


@dataclass(frozen=True)
class Geometry:
    """Stride, padding (top, bottom, left, right; negative where it crops), dilation, groups, and the algorithm."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    algorithm: str | None = None

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Size of the input with its padding."""
        top, bottom, left, right = self.padding
        return height + top + bottom, width + left + right

    def reach(self, k_h: int, k_w: int) -> tuple[int, int]:
        """Size of the dilated kernel."""
        return self.dilation[0] * (k_h - 1) + 1, self.dilation[1] * (k_w - 1) + 1

    def output(self, height: int, width: int, k_h: int, k_w: int) -> tuple[int, int]:
        """Size of the output, floor((h + 2p - d(f - 1) - 1)/s) + 1."""
        (rows, columns), (r_h, r_w) = self.padded(height, width), self.reach(k_h, k_w)
        return (rows - r_h) // self.stride[0] + 1, (columns - r_w) // self.stride[1] + 1

    def repeated(self, times: int) -> Geometry:
        """The same with ``times`` as many groups."""
        return replace(self, groups=self.groups * times)


def geometry_of(
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    algorithm: str | None,
) -> Geometry:
    """The geometry of a call; ``weight`` has one or two dimensions of space, of which one becomes the columns.

    Raises:
        RuntimeError: an option is out of its range; the text is PyTorch's.
        ValueError: no such algorithm.
        NotImplementedError: the algorithm does not do this kernel, stride or dilation.
    """
    dims, groups = weight.dim() - 2, integer(groups)
    strides, dilations = _each("stride", stride, dims), _each("dilation", dilation, dims)
    if groups <= 0:
        raise RuntimeError("non-positive groups is not supported")
    sides = _sides(padding, weight.shape[2:], strides, dilations)
    if min(strides) <= 0:
        raise RuntimeError("non-positive stride is not supported")
    if min(dilations) < 0:
        raise RuntimeError("dilation should be greater than zero")
    if min(dilations) == 0:
        raise RuntimeError("non-positive dilation is not supported")
    while len(strides) < 2:
        strides, dilations, sides = (1, *strides), (1, *dilations), (0, 0, *sides)
    geometry = Geometry(
        (strides[0], strides[1]),
        (sides[0], sides[1], sides[2], sides[3]),
        (dilations[0], dilations[1]),
        groups,
        algorithm,
    )
    _check_algorithm(geometry, weight)
    return geometry


def _sides(
    padding: int | Sequence[int] | str, kernel: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Padding before and after, dimension by dimension."""
    if not isinstance(padding, str):
        values = _each("padding", padding, len(kernel))
        if min(values) < 0:
            raise RuntimeError("negative padding is not supported")
        return tuple(value for value in values for _ in (0, 1))
    if padding == "valid":
        return (0, 0) * len(kernel)
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    if max(stride) > 1:
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if min(totals) < 0:
        raise RuntimeError("negative padding is not supported")
    if any(total % 2 for total in totals) and not torch.compiler.is_compiling():
        _warn_of_copy()
    return tuple(side for total in totals for side in (total // 2, total - total // 2))


def _warn_of_copy() -> None:
    """PyTorch's warning, once in a process unless :func:`torch.set_warn_always` says otherwise."""
    global _warned
    if torch.is_warn_always_enabled() or not _warned:
        _warned = True
        warnings.warn(
            "Using padding='same' with even kernel lengths and odd dilation may require a zero-padded copy of the "
            "input be created",
            stacklevel=7,  # over the door in reimpl.functional
        )


def _each(name: str, value: Any, dims: int) -> tuple[int, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = tuple(map(integer, value)) if several else (integer(value),)
    if len(values) == 1:
        return values * dims
    if len(values) != dims:
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of {dims} values "
            f"to match the convolution dimensions, but got {name}={list(values)}"
        )
    return values


def check_algorithm(name: str) -> None:
    """Refuse a name that is no algorithm's.

    Raises:
        ValueError: it is none.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm must be None or one of {ALGORITHMS}, but got {name!r}")


def _check_algorithm(geometry: Geometry, weight: Tensor) -> None:
    if geometry.algorithm is None:
        return
    check_algorithm(geometry.algorithm)
    if geometry.algorithm == "winograd":
        kernel = tuple(weight.shape[2:])
        if kernel != (3, 3) or geometry.stride != (1, 1) or geometry.dilation != (1, 1):
            raise NotImplementedError(
                "algorithm='winograd' is the minimal filtering F(2x2, 3x3), for 3 x 3 kernels at stride 1 and dilation "
                f"1, but got a kernel of {' x '.join(map(str, kernel))}, stride={geometry.stride}, "
                f"dilation={geometry.dilation}"
            )


def check_dims(input: Tensor, weight: Tensor, dims: int) -> None:
    """Refuse an input or a weight of another rank than a convolution over ``dims`` dimensions of space takes.

    Raises:
        RuntimeError: as PyTorch words it.
    """
    if input.dim() not in (dims + 1, dims + 2):
        raise RuntimeError(f"Expected {_BY_NAME[dims]}, but got input of size: {list(input.shape)}")
    if weight.dim() < 3:
        raise RuntimeError("weight should have at least three dimensions")
    if weight.dim() != dims + 2:
        size = list(input.shape if input.dim() == dims + 2 else (1, *input.shape))
        raise RuntimeError(
            f"Expected {weight.dim()}-dimensional input for {weight.dim()}-dimensional weight {list(weight.shape)}, "
            f"but got {dims + 2}-dimensional input of size {size} instead"
        )


def check(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    """Refuse a batch, weight and bias that do not fit each other or the geometry.

    Raises:
        RuntimeError: as PyTorch words it.
        NotImplementedError: ``input`` is of a dtype that has no products.
    """
    size, groups = list(weight.shape), geometry.groups
    _check_dtypes(input, weight, bias)
    if size[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {size} instead"
        )
    if size[0] % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size [{size}] instead"
        )
    if input.shape[1] != size[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {size}, expected input{list(input.shape)} "
            f"to have {size[1] * groups} channels, but got {input.shape[1]} channels instead"
        )
    if bias is not None and tuple(bias.shape) != (size[0],):
        raise RuntimeError(
            f"Given weight of size {size}, expected bias to be 1-dimensional with {size[0]} elements, "
            f"but got bias of size {list(bias.shape)} instead"
        )
    _check_reach(input, weight, geometry)


def _check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.dtype != input.dtype:
        names = [_IN_C.get(t.dtype, scalar_type_name(t.dtype)) for t in (input, bias)]
        raise RuntimeError(f"Input type ({names[0]}) and bias type ({names[1]}) should be the same")
    if input.dtype in _WITHOUT_PRODUCTS or (input.is_floating_point() and input.itemsize < 2):
        kernel = f"slow_conv2d_{input.device.type}"
        raise NotImplementedError(f"\"{kernel}\" not implemented for '{scalar_type_name(input.dtype)}'")
    if weight.dtype != input.dtype:
        raise RuntimeError(f"Input type ({type_text(input)}) and weight type ({type_text(weight)}) should be the same")


def _check_reach(input: Tensor, weight: Tensor, geometry: Geometry) -> None:
    kernel, plane = tuple(weight.shape[2:]), tuple(input.shape[2:])
    if 0 in kernel:
        raise RuntimeError(f"Expected a kernel of at least 1 x 1, but got weight of size {list(weight.shape)}")
    skip = 2 - len(kernel)
    padded = geometry.padded(*(1,) * skip, *plane)[skip:]
    reach = geometry.reach(*(1,) * skip, *kernel)[skip:]
    if any(p < r for p, r in zip(padded, reach, strict=True)):
        raise RuntimeError(
            f"Calculated padded input size per channel: ({' x '.join(map(str, padded))}). "
            f"Kernel size: ({' x '.join(map(str, reach))}). Kernel size can't be greater than actual input size"
        )
    if 0 in plane:
        shape = [*input.shape[:2], *(1,) * skip, *plane]
        raise RuntimeError(f"Only zero batch or zero channel inputs are supported, but got input shape: {shape}")


class Phase(NamedTuple):
    """Along one dimension, the pixels of one residue by the stride, and the convolution that gives their gradients."""

    first: int
    """First of the pixels, which are a stride apart."""
    number: int
    """Number of pixels."""
    taps: tuple[int, int, int]
    """First, number and step of the mirrored kernel's taps."""
    padding: tuple[int, int]
    """Of the output's gradient, before and after."""
    dilation: int
    """Of the taps."""


def phases(dim: int, errors: int, size: int, taps: int, geometry: Geometry) -> Iterator[Phase]:
    """Along one dimension, the pixels of each residue by the stride, and the convolution that gives their gradients.

    A pixel ``h`` lies under tap ``k`` of output ``i`` where ``h + p = i s + k d``. For the pixels ``h = a + m s`` those
    are the taps ``k ≡ k0 (mod s/gcd(s, d))``, and ``i`` falls by ``d/gcd(s, d)`` from one to the next.
    """
    stride, dilation, before = geometry.stride[dim], geometry.dilation[dim], geometry.padding[2 * dim]
    common = gcd(stride, dilation)
    step, jump = stride // common, dilation // common
    for a in range(min(stride, size)):
        first = next((k for k in range(min(step, taps)) if (a + before - k * dilation) % stride == 0), None)
        if first is None:
            continue
        count, met = -(-(size - a) // stride), -(-(taps - first) // step)
        leading = jump * (met - 1) - (a + before - first * dilation) // stride
        padding = leading, count - errors - leading + jump * (met - 1)
        # the kernel is mirrored, so that its tap k stands at taps - 1 - k
        yield Phase(a, count, ((taps - 1 - first) % step, met, step), padding, jump)


def phase_pairs(
    errors: tuple[int, int], size: tuple[int, int], kernel: tuple[int, int], geometry: Geometry
) -> Iterator[tuple[Phase, Phase, Geometry]]:
    """The phases down with each of those across, and the geometry of the two's convolution, at stride 1."""
    across = list(phases(1, errors[1], size[1], kernel[1], geometry))
    for row in phases(0, errors[0], size[0], kernel[0], geometry):
        for column in across:
            padding, dilation = (*row.padding, *column.padding), (row.dilation, column.dilation)
            yield row, column, Geometry((1, 1), padding, dilation, geometry.groups, geometry.algorithm)
