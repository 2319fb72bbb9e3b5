"""Batch normalisation by compiled kernels, forward and backward, over batches that lie in memory without gaps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reimpl.functional._dispatch import CHANNELS_LAST, is_channels_last, opmath_dtype
from reimpl.functional._numba_source import load, run

# Below so many numbers PyTorch's own operators are as good.
_LEAST_NUMBERS = 1 << 13
# From this size on planes are summed one by one; strips of what is smaller have about so many numbers: the sums and
# factors of their places stay in the nearest caches.
_LARGE_PLANE, _STRIP = 128, 512
# Numbers to a chunk: what is read of them is still in the second cache when it is read again. Of small planes and of
# pixels twice as many: there each chunk writes out the numbers of its channels.
_CHUNK = 1 << 15
_TYPES = {
    torch.float32: ("np.float32", "np.float32"),
    torch.float64: ("np.float64", "np.float64"),
    torch.bfloat16: ("np.uint16", "np.float32"),
}


@cache
def _kernels(dtype: torch.dtype) -> Any:
    own, wanted = ("STORED, REAL = " + ", ".join(_TYPES[d]) + "\n" for d in (torch.float32, dtype))
    return load(Path(__file__).with_name("numba_kernels.py"), own, wanted)


def worth_it(input: Tensor) -> bool:
    """Whether there is enough of the input, in a layout that the kernels walk through."""
    if input.dim() < 2 or input.numel() < max(1, _LEAST_NUMBERS):
        return False
    return input.is_contiguous() or is_channels_last(input)


@dataclass(frozen=True)
class _Plan:
    """How batches of a shape are cut up (see the kernels' file), as the words that do not change from call to call."""

    kernels: Any
    chunks: int
    tasks: int
    places: int
    """Of a strip; rounded up, so that the threads' own lie in lines of the cache apart."""
    words: tuple[int, ...]


@lru_cache(maxsize=1024)
def _plan(shape: torch.Size, by_pixel: bool, dtype: torch.dtype, eps: float) -> _Plan:
    channels, size = shape[1], 1 if by_pixel else prod(shape[2:])
    rows, uniform = prod(shape) // (channels * size), size >= _LARGE_PLANE
    block = min(channels, max(1, (_CHUNK if uniform else _STRIP) // size))
    fold = max(1, min(rows, _STRIP // (channels * size))) if block == channels and not uniform else 1
    strip = fold * block * size
    strips = max(1, (_CHUNK if uniform else 2 * _CHUNK) // strip)
    chunks = ceil(rows / (fold * strips))
    tasks = ceil(channels / block) * chunks
    places = ceil((block if uniform else strip) / 16) * 16
    k = _kernels(dtype)
    words = np.zeros(k.WORDS, np.int64)
    words[[k.CHANNELS, k.SIZE, k.ROWS, k.BLOCK, k.FOLD]] = channels, size, rows, block, fold
    words[[k.TASKS, k.CHUNKS, k.STRIPS, k.UNIFORM, k.PLACES]] = tasks, chunks, strips, uniform, places
    words.view(np.float64)[k.EPS] = eps
    return _Plan(k, chunks, tasks, places, tuple(words.tolist()))


def _planned(input: Tensor, eps: float) -> _Plan:
    return _plan(input.shape, not input.is_contiguous(), input.dtype, eps)


def _vector(vector: Tensor | None, like: Tensor, default: float) -> Tensor:
    """A vector in the statistics' dtype; of ``default`` where there is none."""
    return torch.full_like(like, default) if vector is None else vector.to(like.dtype).contiguous()


def _partials(plan: _Plan, mean: Tensor) -> Tensor:
    """Two sums of each channel in each chunk."""
    return mean.new_empty((plan.chunks, 2, len(mean)), dtype=torch.float64)


def _run(
    plan: _Plan,
    kernel: Any,
    places: int,
    tensors: dict[int, Tensor],
    relu: bool,
    collect: bool,
    apply: bool,
    fixed: bool,
) -> None:
    """Run both phases, or one: at once, unless chunks wait for each other's sums.

    Args:
        places: how many numbers each place of a strip needs.
        tensors: what the words point at.
        collect, apply: the phases.
        fixed: mean and variance are given.
    """
    k, words = plan.kernels, list(plan.words)
    threads = min(torch.get_num_threads(), plan.tasks)
    scratch = torch.empty(threads * places * plan.places, dtype=tensors[k.MEANS].dtype)
    for word, tensor in (tensors | {k.SCRATCH: scratch}).items():
        words[word] = tensor.data_ptr()
    words[k.RELU], words[k.FIXED] = relu, fixed
    waiting = collect and apply and not fixed and plan.chunks > 1
    for phases in (k.COLLECT, k.APPLY) if waiting else (k.COLLECT * collect + k.APPLY * apply,):
        words[k.PHASES] = phases
        run(kernel, words[1:], plan.tasks)


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch."""
    mean, var = (input.new_empty(input.shape[1], dtype=opmath_dtype(input.dtype)) for _ in range(2))
    return _normalized(input, mean, var, weight, bias, eps, relu, False), mean, var


def infer(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """Output for a given mean and variance."""
    mean, var = (v.to(opmath_dtype(input.dtype)).contiguous() for v in (mean, var))
    return _normalized(input, mean, var, weight, bias, eps, relu, True)


def _normalized(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    fixed: bool,
) -> Tensor:
    plan, output = _planned(input, eps), torch.empty_like(input)
    k = plan.kernels
    tensors = {k.SOURCE: input, k.OUTPUT: output, k.MEANS: mean, k.VARIANCES: var, k.PARTIALS: _partials(plan, mean)}
    tensors |= {k.WEIGHT: _vector(weight, mean, 1), k.BIAS: _vector(bias, mean, 0)}
    _run(plan, k.forward, k.FORWARD_ROWS, tensors, relu, not fixed, True, fixed)
    return output


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
    statistics = (weight, mean, var, grad_mean.contiguous(), grad_var.contiguous())
    return _gradient(grad, input, rectified, statistics, eps, True, wanted, False)


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
    """The same where mean and variance do not depend on the input; the sums are of use only if ``sums_wanted``."""
    mean, var = (v.to(opmath_dtype(input.dtype)).contiguous() for v in (mean, var))
    return _gradient(grad, input, rectified, (weight, mean, var, mean, var), eps, sums_wanted, wanted, True)


def _gradient(
    grad: Tensor,
    input: Tensor,
    rectified: Tensor | None,
    statistics: tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor],
    eps: float,
    sums_wanted: bool,
    wanted: bool,
    fixed: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    weight, mean, var, grad_mean, grad_var = statistics
    plan, result = _planned(input, eps), torch.empty_like(input) if wanted else None
    k, partials = plan.kernels, _partials(plan, mean)
    layout = torch.contiguous_format if input.is_contiguous() else CHANNELS_LAST[input.dim()]
    tensors = {
        k.SOURCE: input,
        k.ERRORS: grad.contiguous(memory_format=layout),
        k.PARTIALS: partials,
        # of what there is none, something that can be pointed at
        k.OUTPUT: input if rectified is None else rectified,
        k.TARGET: input if result is None else result,
        k.MEANS: mean,
        k.VARIANCES: var,
        k.WEIGHT: _vector(weight, mean, 1),
        k.GRAD_MEANS: grad_mean,
        k.GRAD_VARIANCES: grad_var,
    }
    _run(plan, k.backward, k.BACKWARD_ROWS, tensors, rectified is not None, sums_wanted, wanted, fixed)
    if not sums_wanted:
        return result, mean, mean
    sum_g, sum_g_centred = (partials[0] if plan.chunks == 1 else partials.sum(0)).to(mean.dtype).unbind()
    return result, sum_g, sum_g_centred
