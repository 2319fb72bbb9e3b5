"""Activations and their gradients in few operators, part by part, for final results on the CPU.

For tensors that :func:`reimpl.functional._plain.final_on_cpu`. The module of kernels has the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reimpl.functional._dispatch import opmath_dtype
from reimpl.functional._plain import HALF, exponential, in_blocks, in_wide_blocks, of_bits


def leaky_relu(input: Tensor, slope: float) -> Tensor:
    """The larger of :math:`x` and :math:`a x`, for a slope that is positive and at most 1."""
    output = torch.empty_like(input)
    for x, y in in_blocks(input, output):
        torch.maximum(x, torch.mul(x, slope, out=y), out=y)
    return output


def leaky_relu_gradient(grad: Tensor, signed: Tensor, slope: float) -> Tensor:
    """The gradient where ``signed`` is positive, ``slope`` times it elsewhere, for a slope from 0 to 1."""
    if grad.dtype in HALF:
        return _leaky_relu_gradient_of_half(grad, signed, slope)
    result, least = torch.empty_like(signed), grad.new_tensor(slope)
    for g, x, d in in_blocks(grad, signed, result):
        # 1 or 0 as numbers of the gradient's dtype, then 1 or the slope
        torch.maximum(torch.gt(x, 0, out=d), least, out=d).mul_(g)
    return result


def _leaky_relu_gradient_of_half(grad: Tensor, signed: Tensor, slope: float) -> Tensor:
    """The same where the slope is none of the dtype's numbers, and a choice between two is made bit by bit."""
    result, room = torch.empty_like(signed), None
    for g, x, d in in_blocks(grad, signed, result):
        room = torch.empty_like(g) if room is None or room.shape != g.shape else room
        leaked, bits, chosen = of_bits(torch.mul(g, slope, out=room)), of_bits(g), of_bits(d)
        leaked.bitwise_xor_(bits)
        # the bits of 1 shift out what the two differ in
        leaked.bitwise_left_shift_(of_bits(torch.gt(x, 0, out=d)))
        torch.bitwise_xor(bits, leaked, out=chosen)
    return result


def sigmoid(input: Tensor) -> Tensor:
    """:math:`1/(1 + e^{-x})`; the overflow of :math:`e^{-x}` ends as 1/inf = 0, as it should."""
    output, half = torch.empty_like(input), input.dtype in HALF
    for x, y in in_wide_blocks(input, result=output):
        (exponential(x, y, -1) if half else torch.neg(x, out=y).exp_()).add_(1).reciprocal_()
    return output


def sigmoid_gradient(grad: Tensor, output: Tensor) -> Tensor:
    """:math:`\\bar y\\, y (1 - y)`."""
    result, zero = _like(grad, output), _scalar(0, grad)
    for y, g, d in in_wide_blocks(output, grad, result=result):
        # y + y (0 - y) below a half, 0 - (0 - y) (1 - y) from there on: as exact as the product, in one pass
        torch.lerp(y, zero, y, out=d).mul_(g)
    return result


def tanh(input: Tensor) -> Tensor:
    """:math:`t/(t + 2)` with :math:`t = e^{2x} - 1`, held where the result is 1, so that nothing overflows."""
    output, bound, denominator = torch.empty_like(input), _scalar(40, input), None
    for x, y in in_wide_blocks(input, result=output):
        torch.minimum(torch.mul(x, 2, out=y), bound, out=y).expm1_()
        if denominator is None or denominator.shape != y.shape:
            denominator = torch.empty_like(y)
        y.div_(torch.add(y, 2, out=denominator))
    return output


def tanh_gradient(grad: Tensor, output: Tensor) -> Tensor:
    """:math:`\\bar y (1 - y^2)`."""
    result, one = _like(grad, output), _scalar(1, grad)
    for y, g, d in in_wide_blocks(output, grad, result=result):
        torch.addcmul(one, y, y, value=-1, out=d).mul_(g)
    return result


def _like(grad: Tensor, output: Tensor) -> Tensor:
    """Room laid out as the gradient, but as the output where a single number is spread over it."""
    return torch.empty_like(output if 0 in grad.stride() else grad)


def _scalar(value: float, like: Tensor) -> Tensor:
    return like.new_full((), value, dtype=opmath_dtype(like.dtype))
