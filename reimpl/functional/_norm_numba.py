"""Batch normalisation by compiled kernels, forward and backward, over batches that lie in memory without gaps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reimpl.functional._dispatch import opmath_dtype
from reimpl.functional._numba_source import load, run

# Below so many numbers PyTorch's own operators are as good.
_LEAST_NUMBERS = 1 << 13
# From this size on a plane is a strip of its own; of what is smaller, strips have about so many numbers: the sums and
# factors of their places stay in the nearest cache.
_LARGE_PLANE, _STRIP = 128, 512
# Numbers to a chunk: what is read of them is still in the second cache when it is read again.
_CHUNK = 1 << 16
_TYPES = {
    torch.float32: ("np.float32", "np.float32"),
    torch.float64: ("np.float64", "np.float64"),
    torch.bfloat16: ("np.uint16", "np.float32"),
}


@cache
def _kernels(dtype: torch.dtype) -> Any:
    own, wanted = ("STORED, REAL = " + ", ".join(_TYPES[d]) + "\n" for d in (torch.float32, dtype))
    return load("_norm_numba_kernels.py", own, wanted)


def worth_it(input: Tensor) -> bool:
    """Whether there is enough of the input, in a layout that the kernels walk through."""
    if input.dim() < 2 or input.numel() < max(1, _LEAST_NUMBERS):
        return False
    return input.is_contiguous() or _by_pixel(input)


def _by_pixel(input: Tensor) -> bool:
    return input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class _Cut:
    """How a batch is cut up: see the kernels' file."""

    channels: int
    size: int
    rows: int
    block: int
    fold: int
    strips: int

    @property
    def chunks(self) -> int:
        return ceil(self.rows / (self.fold * self.strips))

    @property
    def tasks(self) -> int:
        return ceil(self.channels / self.block) * self.chunks

    @property
    def uniform(self) -> bool:
        return self.size >= _LARGE_PLANE

    @property
    def places(self) -> int:
        """Of a strip; rounded up, so that the threads' own lie in lines of the cache apart."""
        return 16 if self.uniform else ceil(self.fold * self.block * self.size / 16) * 16


def _cut(input: Tensor) -> _Cut:
    channels, size = input.shape[1], prod(input.shape[2:]) if input.is_contiguous() else 1
    rows = input.numel() // (channels * size)
    block = 1 if size >= _LARGE_PLANE else min(channels, max(1, _STRIP // size))
    fold = max(1, min(rows, _STRIP // (channels * size))) if block == channels else 1
    return _Cut(channels, size, rows, block, fold, max(1, _CHUNK // (fold * block * size)))


def _vector(vector: Tensor | None, like: Tensor, default: float) -> Tensor:
    """A vector in the statistics' dtype; of ``default`` where there is none."""
    return torch.full_like(like, default) if vector is None else vector.to(like.dtype).contiguous()


class _Job:
    """The words of one direction, by their index, and the tensors behind them."""

    def __init__(self, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float, relu: bool) -> None:
        self.kernels, self.cut = _kernels(input.dtype), _cut(input)
        cut, k = self.cut, self.kernels
        self._real = mean.dtype
        self._kept: list[Tensor] = []
        self.partials = mean.new_empty((cut.chunks, 2, cut.channels), dtype=torch.float64)
        self.words: dict[int, int] = dict(
            [
                *((k.RELU, int(relu)), (k.EPS, int(np.float64(eps).view(np.int64))), (k.UNIFORM, int(cut.uniform))),
                *((k.CHANNELS, cut.channels), (k.SIZE, cut.size), (k.ROWS, cut.rows), (k.BLOCK, cut.block)),
                *((k.FOLD, cut.fold), (k.TASKS, cut.tasks), (k.CHUNKS, cut.chunks), (k.STRIPS, cut.strips)),
                (k.PLACES, cut.places),
            ]
        )
        self.point(k.SOURCE, input)
        self.point(k.MEANS, mean)
        self.point(k.VARIANCES, var)
        self.point(k.WEIGHT, _vector(weight, mean, 1))
        self.point(k.PARTIALS, self.partials)

    def point(self, word: int, tensor: Tensor | None) -> None:
        """Write a tensor's address; of none, that of something readable."""
        tensor = self.partials if tensor is None else tensor
        self._kept.append(tensor)
        self.words[word] = tensor.data_ptr()

    def run(self, kernel: Any, rows: int, collect: bool, apply: bool, fixed: bool) -> None:
        """Run both phases: at once, where no chunk waits for another's sums."""
        k, threads = self.kernels, min(torch.get_num_threads(), self.cut.tasks)
        self.point(k.SCRATCH, torch.empty(threads * rows * self.cut.places, dtype=self._real))
        self.words[k.FIXED] = int(fixed)
        phases = [k.COLLECT * collect + k.APPLY * apply]
        if collect and apply and not fixed and self.cut.chunks > 1:
            phases = [k.COLLECT, k.APPLY]
        for phase in phases:
            self.words[k.PHASES] = phase
            run(kernel, [self.words.get(word, 0) for word in range(1, k.WORDS)], self.cut.tasks)


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
    job, output = _Job(input, mean, var, weight, eps, relu), torch.empty_like(input)
    job.point(job.kernels.OUTPUT, output)
    job.point(job.kernels.BIAS, _vector(bias, mean, 0))
    job.run(job.kernels.forward, job.kernels.FORWARD_ROWS, not fixed, True, fixed)
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
    job = _Job(input, mean, var, weight, eps, rectified is not None)
    job.point(job.kernels.GRAD_MEANS, grad_mean.contiguous())
    job.point(job.kernels.GRAD_VARIANCES, grad_var.contiguous())
    result = _gradient(job, grad, input, rectified, True, wanted, False)
    sums = _sums(job, mean)
    return result, sums[0], sums[1]


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
    job = _Job(input, mean, var, weight, eps, rectified is not None)
    result = _gradient(job, grad, input, rectified, sums_wanted, wanted, True)
    sums = _sums(job, mean) if sums_wanted else (mean, mean)
    return result, sums[0], sums[1]


def _gradient(
    job: _Job, grad: Tensor, input: Tensor, rectified: Tensor | None, sums: bool, wanted: bool, fixed: bool
) -> Tensor | None:
    k, result = job.kernels, torch.empty_like(input) if wanted else None
    layout = torch.contiguous_format if input.is_contiguous() else torch.channels_last
    job.point(k.ERRORS, grad.contiguous(memory_format=layout))
    job.point(k.OUTPUT, input if rectified is None else rectified)
    job.point(k.TARGET, input if result is None else result)
    job.run(k.backward, k.BACKWARD_ROWS, sums, wanted, fixed)
    return result


def _sums(job: _Job, like: Tensor) -> Any:
    total = job.partials[0] if len(job.partials) == 1 else job.partials.sum(0)
    return total.to(like.dtype)
