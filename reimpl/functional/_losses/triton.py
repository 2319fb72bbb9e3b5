"""Softmax, its logarithm and the cross-entropy of class indices as Triton kernels, each row read once or twice.

Rows lie either one after the other, or (where the classes are not the last dimension) side by side in planes; a tile
is some rows by some classes. A row that fits into a tile stays in registers; a longer one is walked through with a
running maximum and a sum that is scaled down when the maximum grows, and then once more.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reimpl.functional._triton_common import blocks, exp, launch, log, power_of_two, processors

# Numbers of a tile, and of those the rows where they lie side by side: 128 bytes of float32 are read at once.
_TILE, _SIDE_BY_SIDE = 4_096, 32
# A target that is no class stops the program, as PyTorch's does; other checks of the compiler's are left out.
_CHECKED = {"debug": True, "sanitize_overflow": False}


@triton.jit
def _rows(count, classes, inner, ROWS: tl.constexpr, PLANES: tl.constexpr):
    """Where the tile's rows begin, their numbers, and which of them exist."""
    block = tl.program_id(0)
    if PLANES:
        in_plane = tl.cdiv(inner, ROWS)
        outer = (block // in_plane).to(tl.int64)
        i = (block % in_plane) * ROWS + tl.arange(0, ROWS)
        return outer * classes * inner + i, outer * inner + i, i < inner
    else:
        r = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        return r * classes, r, r < count


@triton.jit
def _places(base, live, c, classes, inner):
    """Where the classes ``c`` of each row lie, and which of them exist."""
    return base[:, None] + c[None, :].to(tl.int64) * inner, live[:, None] & (c < classes)[None, :]


@triton.jit
def _largest_and_total(x, base, live, classes, inner, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The maximum of each row, and the sum of the exponentials of what lies below it."""
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in range(0, classes, WIDTH):
        c = at + tl.arange(0, WIDTH)
        place, there = _places(base, live, c, classes, inner)
        v = tl.load(x + place, mask=there, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(v, 1))
        # before the first finite number nothing is to be scaled
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * exp(largest - shift) + tl.sum(exp(v - shift[:, None]), 1)
        largest = higher
    return largest, total


@triton.jit
def _forward(
    x,
    y,
    count,
    classes,
    inner,
    LOG: tl.constexpr,
    PLANES: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    base, _, live = _rows(count, classes, inner, ROWS, PLANES)
    if WHOLE:
        c = tl.arange(0, WIDTH)
        place, there = _places(base, live, c, classes, inner)
        v = tl.load(x + place, mask=there, other=float("-inf")).to(tl.float32)
        v -= tl.max(v, 1)[:, None]
        powers = exp(v)
        total = tl.sum(powers, 1)[:, None]
        if LOG:
            v -= log(total)
        else:
            v = tl.div_rn(powers, tl.broadcast_to(total, [ROWS, WIDTH]))
        tl.store(y + place, v.to(y.dtype.element_ty), mask=there)
    else:
        largest, total = _largest_and_total(x, base, live, classes, inner, ROWS, WIDTH)
        for at in range(0, classes, WIDTH):
            c = at + tl.arange(0, WIDTH)
            place, there = _places(base, live, c, classes, inner)
            v = tl.load(x + place, mask=there, other=float("-inf")).to(tl.float32) - largest[:, None]
            if LOG:
                v -= log(total)[:, None]
            else:
                v = tl.div_rn(exp(v), tl.broadcast_to(total[:, None], [ROWS, WIDTH]))
            tl.store(y + place, v.to(y.dtype.element_ty), mask=there)


@triton.jit
def _gradient(g, y, total, LOG: tl.constexpr):
    if LOG:
        return g - exp(y) * total[:, None]
    else:
        return y * (g - total[:, None])


@triton.jit
def _backward(
    grad,
    y,
    result,
    count,
    classes,
    inner,
    LOG: tl.constexpr,
    PLANES: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    base, _, live = _rows(count, classes, inner, ROWS, PLANES)
    if WHOLE:
        c = tl.arange(0, WIDTH)
        place, there = _places(base, live, c, classes, inner)
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        v = tl.load(y + place, mask=there, other=0.0).to(tl.float32)
        total = tl.sum(g if LOG else g * v, 1)
        tl.store(result + place, _gradient(g, v, total, LOG).to(result.dtype.element_ty), mask=there)
    else:
        total = tl.zeros([ROWS], tl.float32)
        for at in range(0, classes, WIDTH):
            c = at + tl.arange(0, WIDTH)
            place, there = _places(base, live, c, classes, inner)
            g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
            if not LOG:
                g *= tl.load(y + place, mask=there, other=0.0).to(tl.float32)
            total += tl.sum(g, 1)
        for at in range(0, classes, WIDTH):
            c = at + tl.arange(0, WIDTH)
            place, there = _places(base, live, c, classes, inner)
            g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
            v = tl.load(y + place, mask=there, other=0.0).to(tl.float32)
            tl.store(result + place, _gradient(g, v, total, LOG).to(result.dtype.element_ty), mask=there)


@triton.jit
def _targets(indices, sample, live, classes, ignore_index):
    """The class of each sample, -1 where it does not count."""
    target = tl.load(indices + sample, mask=live, other=0)
    kept = live & (target != ignore_index)
    inside = (target >= 0) & (target < classes)
    tl.device_assert(inside | (kept == 0), "Target is out of bounds.")
    return tl.where(kept & inside, target, -1)


@triton.jit
def _loss_parts(log_probs, c, there, target, weight, HAS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr):
    """What the classes of a tile add: the target's log-probability, and the sum of all, weighted."""
    picked = tl.sum(tl.where(c[None, :] == target[:, None], log_probs, 0.0), 1)
    spread = tl.zeros_like(picked)
    if SMOOTH:
        if HAS_WEIGHT:
            log_probs *= tl.load(weight + c[None, :], mask=there, other=0.0).to(tl.float32)
        spread = tl.sum(tl.where(there, log_probs, 0.0), 1)
    return picked, spread


@triton.jit
def _loss_forward(
    x,
    probabilities,
    loss,
    partial,
    indices,
    weight,
    ignore_index,
    smoothing,
    count,
    classes,
    inner,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    REDUCED: tl.constexpr,
    PLANES: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    base, sample, live = _rows(count, classes, inner, ROWS, PLANES)
    target = _targets(indices, sample, live, classes, ignore_index)
    if WHOLE:
        c = tl.arange(0, WIDTH)
        place, there = _places(base, live, c, classes, inner)
        v = tl.load(x + place, mask=there, other=float("-inf")).to(tl.float32)
        v -= tl.max(v, 1)[:, None]
        powers = exp(v)
        total = tl.sum(powers, 1)[:, None]
        tl.store(probabilities + place, tl.div_rn(powers, tl.broadcast_to(total, [ROWS, WIDTH])), mask=there)
        v -= log(total)
        picked, spread = _loss_parts(v, c, there, target, weight, HAS_WEIGHT, SMOOTH)
    else:
        largest, total = _largest_and_total(x, base, live, classes, inner, ROWS, WIDTH)
        shift = log(total)
        picked = tl.zeros([ROWS], tl.float32)
        spread = tl.zeros([ROWS], tl.float32)
        for at in range(0, classes, WIDTH):
            c = at + tl.arange(0, WIDTH)
            place, there = _places(base, live, c, classes, inner)
            v = tl.load(x + place, mask=there, other=float("-inf")).to(tl.float32)
            v -= largest[:, None]
            values = tl.div_rn(exp(v), tl.broadcast_to(total[:, None], [ROWS, WIDTH]))
            tl.store(probabilities + place, values, mask=there)
            v -= shift[:, None]
            of_target, of_all = _loss_parts(v, c, there, target, weight, HAS_WEIGHT, SMOOTH)
            picked += of_target
            spread += of_all
    share = tl.where(target >= 0, 1.0, 0.0)
    if HAS_WEIGHT:
        share = tl.load(weight + target, mask=target >= 0, other=0.0).to(tl.float32)
        picked *= share
    value = tl.where(target >= 0, -picked, 0.0)
    rest = tl.zeros_like(value)
    if SMOOTH:
        value *= 1 - smoothing
        rest = tl.where(target >= 0, -tl.div_rn(smoothing, classes * 1.0) * spread, 0.0)
    if REDUCED:
        tl.store(partial + tl.program_id(0), tl.sum(value, 0))
        tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(share, 0))
        if SMOOTH:
            tl.store(partial + 2 * tl.num_programs(0) + tl.program_id(0), tl.sum(rest, 0))
    else:
        tl.store(loss + sample, (value + rest).to(loss.dtype.element_ty), mask=live)


@triton.jit
def _loss_finish(partial, loss, divisor, count, MEAN: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all programs' losses, divided by that of the weights for a mean; one program."""
    total = tl.zeros([BLOCK], tl.float32)
    shares = tl.zeros([BLOCK], tl.float32)
    rests = tl.zeros([BLOCK], tl.float32)
    for at in range(0, count, BLOCK):
        k = at + tl.arange(0, BLOCK)
        total += tl.load(partial + k, mask=k < count, other=0.0)
        shares += tl.load(partial + count + k, mask=k < count, other=0.0)
        if SMOOTH:
            rests += tl.load(partial + 2 * count + k, mask=k < count, other=0.0)
    value = tl.sum(total, 0)
    rest = tl.sum(rests, 0)
    share = tl.sum(shares, 0) if MEAN else 1.0
    if MEAN:
        # each by itself: where the weights' sum is 0, the one mean is NaN and the other infinite
        value = tl.div_rn(value, share)
        if SMOOTH:
            rest = tl.div_rn(rest, share)
    if SMOOTH:
        value += rest
    tl.store(divisor, share)
    tl.store(loss, value.to(loss.dtype.element_ty))


@triton.jit
def _loss_backward(
    grad,
    probabilities,
    result,
    indices,
    weight,
    weights_total,
    divisor,
    grad_stride,
    ignore_index,
    smoothing,
    count,
    classes,
    inner,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """g (softmax (sum of w q) - w q), q the smoothed target."""
    base, sample, live = _rows(count, classes, inner, ROWS, PLANES)
    target = _targets(indices, sample, live, classes, ignore_index)
    counts = target >= 0
    g = tl.load(grad + sample * grad_stride, mask=counts, other=0.0).to(tl.float32)
    # where no sample counts, the divisor is 0
    g = tl.where(counts, tl.div_rn(g, tl.zeros_like(g) + tl.load(divisor)), 0.0)
    at_target = g
    if HAS_WEIGHT:
        at_target *= tl.load(weight + target, mask=counts, other=0.0).to(tl.float32)
    whole = at_target
    everywhere = tl.zeros_like(g)
    if SMOOTH:
        everywhere = g * tl.div_rn(smoothing, classes * 1.0)
        at_target *= 1 - smoothing
        if HAS_WEIGHT:
            whole = at_target + everywhere * tl.load(weights_total).to(tl.float32)
        else:
            whole = at_target + g * smoothing
    for at in range(0, classes, WIDTH):
        c = at + tl.arange(0, WIDTH)
        place, there = _places(base, live, c, classes, inner)
        v = tl.load(probabilities + place, mask=there, other=0.0) * whole[:, None]
        v -= tl.where(c[None, :] == target[:, None], at_target[:, None], 0.0)
        if SMOOTH:
            if HAS_WEIGHT:
                v -= tl.load(weight + c[None, :], mask=there, other=0.0).to(tl.float32) * everywhere[:, None]
            else:
                v -= everywhere[:, None]
        tl.store(result + place, v.to(result.dtype.element_ty), mask=there)


def _split(input: Tensor, dim: int) -> tuple[int, tuple[int, int, int], dict[str, Any]]:
    """How many programs, how many rows, classes and rows side by side, and the form of a tile."""
    shape = input.shape or (1,)
    dim %= len(shape)
    outer, classes, inner = prod(shape[:dim]), shape[dim], prod(shape[dim + 1 :])
    planes = inner > 1
    width = power_of_two(classes, 1, _TILE // _SIDE_BY_SIDE if planes else _TILE)
    # rows that lie one after the other are shared out to all processors
    rows = power_of_two(inner if planes else outer // processors(input.device), 1, min(_TILE // width, _SIDE_BY_SIDE))
    programs = outer * blocks(inner, rows) if planes else blocks(outer, rows)
    return programs, (outer * inner, classes, inner), {"PLANES": planes, "ROWS": rows, "WIDTH": width}


def softmax(input: Tensor, dim: int, log: bool) -> Tensor:
    """``exp(x - m) / sum exp(x - m)`` along ``dim``, ``m`` the maximum, or its logarithm; contiguous."""
    x = input.contiguous()
    y = x.new_empty(x.shape)
    programs, sizes, tile = _split(x, dim)
    launch(_forward, (programs,), x, y, *sizes, LOG=log, WHOLE=sizes[1] <= tile["WIDTH"], **tile)
    return y


def softmax_gradient(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """``y (grad - sum grad y)``, or for the logarithm ``grad - exp(y) sum grad``."""
    grad, output = grad.contiguous(), output.contiguous()
    result = output.new_empty(output.shape)
    programs, sizes, tile = _split(output, dim)
    launch(_backward, (programs,), grad, output, result, *sizes, LOG=log, WHOLE=sizes[1] <= tile["WIDTH"], **tile)
    return result


def index_loss(
    input: Tensor, indices: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss in the dtype of ``input``, float32 probabilities, and what the sum was divided by.

    Dimension 1 of ``input`` holds the classes.
    """
    x, indices = input.contiguous(), indices.contiguous()
    probabilities, reduced = x.new_empty(x.shape, dtype=torch.float32), reduction != "none"
    loss = x.new_empty(() if reduced else indices.shape)
    programs, sizes, tile = _split(x, 1)
    smooth = smoothing != 0
    partial = x.new_empty((2 + smooth, programs) if reduced else (1,), dtype=torch.float32)
    launch(
        _loss_forward, (programs,), x, probabilities, loss, partial, indices,
        loss if weight is None else weight.contiguous(), ignore_index, float(smoothing), *sizes,
        HAS_WEIGHT=weight is not None, SMOOTH=smooth, REDUCED=reduced, WHOLE=sizes[1] <= tile["WIDTH"],
        **_CHECKED, **tile,
    )  # fmt: skip
    divisor = (x.new_empty if reduced else x.new_ones)((), dtype=torch.float32)
    if reduced:
        block = power_of_two(programs, 1, _TILE)
        mean = reduction == "mean"
        launch(_loss_finish, (1,), partial, loss, divisor, programs, MEAN=mean, SMOOTH=smooth, BLOCK=block)
    return loss, probabilities, divisor


def index_loss_gradient(
    grad: Tensor,
    probabilities: Tensor,
    indices: Tensor,
    ignore_index: int,
    weight: Tensor | None,
    smoothing: float,
    divisor: Tensor,
) -> Tensor:
    """The gradient of the logits, in the dtype of that of each loss or of what they were reduced to."""
    same = all(stride == 0 or size == 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
    grad, probabilities = grad if same else grad.contiguous(), probabilities.contiguous()
    result = probabilities.new_empty(probabilities.shape, dtype=grad.dtype)
    weight = None if weight is None else weight.contiguous()
    total = weight.sum(dtype=torch.float32) if weight is not None and smoothing != 0 else probabilities
    programs, sizes, tile = _split(probabilities, 1)
    launch(
        _loss_backward, (programs,), grad, probabilities, result, indices.contiguous(),
        probabilities if weight is None else weight, total, divisor, int(not same),
        ignore_index, float(smoothing), *sizes, HAS_WEIGHT=weight is not None, SMOOTH=smoothing != 0,
        **_CHECKED, **tile,
    )  # fmt: skip
    return result
