"""Batch normalisation by compiled kernels, forward and backward, over batches that lie in memory without gaps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reimpl.functional._dispatch import CHANNELS_LAST, is_channels_last, opmath_dtype
from reimpl.functional._node.plan import (
    COUNTERS,
    Address,
    Constants,
    Launch,
    Layout,
    Number,
    Plan,
    Room,
    Step,
    Word,
    bits,
    dense,
    layout_of,
    run,
    step,
)
from reimpl.functional._numba_source import load

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
    """Whether there are numbers, in a layout that the kernels walk through."""
    if input.dim() < 2 or not input.numel():
        return False
    return input.is_contiguous() or is_channels_last(input)


class _Cut(NamedTuple):
    """How batches of a shape are cut up (see the kernels' file), as the words that do not change from call to call.

    Of the places of a strip there are a few more, so that the threads' own lie in lines of the cache apart.
    """

    kernels: Any
    dtype: torch.dtype
    chunks: int
    tasks: int
    places: int
    words: tuple[int, ...]

    def constants(self, value: float) -> Constants:
        """A vector of equal numbers."""
        channels = self.words[self.kernels.CHANNELS]
        numbers = torch.full((channels + channels % 2,), value, dtype=self.dtype, device="cpu")
        return Constants(numbers.view(torch.int64).tolist())

    def partials(self) -> Room:
        """Room for two sums of each channel in each chunk."""
        return Room(self.chunks * 2 * self.words[self.kernels.CHANNELS])

    def step(self, name: str, words: Mapping[int, Word], collect: bool, apply: bool, fixed: bool, last: str) -> Step:
        """A kernel for both phases, or one: at once, unless chunks wait for each other's sums.

        Args:
            name: ``forward`` or ``backward``.
            words: what this layer's pass puts into the table.
            collect, apply: the phases.
            fixed: mean and variance are given.
            last: the kernel that is called once at the end, or nothing.
        """
        k, table = self.kernels, list[Word](self.words)
        threads = min(torch.get_num_threads(), self.tasks)
        rows = {"forward": k.FORWARD_ROWS, "backward": k.BACKWARD_ROWS}[name]
        scratch = Room(-(-threads * rows * self.places * k.REAL_BYTES // 8))
        for at, word in {k.COUNTER: COUNTERS, k.SCRATCH: scratch, k.FIXED: int(fixed), **words}.items():
            table[at] = word
        launches = []
        waiting = collect and apply and not fixed and self.chunks > 1
        for phases in (k.COLLECT, k.APPLY) if waiting else (k.COLLECT * collect + k.APPLY * apply,):
            table[k.PHASES] = phases
            launches.append(Launch(getattr(k, name).address, tuple(table), threads))
        if last:
            launches.append(Launch(getattr(k, last).address, None, 1))
        return step(*launches)


@lru_cache(maxsize=1024)
def _cut(shape: torch.Size, by_pixel: bool, dtype: torch.dtype, eps: float) -> _Cut:
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
    words = [0] * k.WORDS
    words[k.CHANNELS], words[k.SIZE], words[k.ROWS], words[k.BLOCK], words[k.FOLD] = channels, size, rows, block, fold
    words[k.TASKS], words[k.CHUNKS], words[k.STRIPS], words[k.UNIFORM] = tasks, chunks, strips, int(uniform)
    words[k.PLACES], words[k.EPS] = places, bits(eps)
    return _Cut(k, opmath_dtype(dtype), chunks, tasks, places, tuple(words))


class _Layer(NamedTuple):
    """A layer over batches of a layout: whether there are weights, biases and running averages, and what it does."""

    batch: Layout
    by_pixel: bool
    eps: float
    relu: bool
    fixed: bool
    weighted: bool
    biased: bool
    averaged: bool
    threads: int

    def cut(self) -> _Cut:
        """How its batches are cut up."""
        return _cut(torch.Size(self.batch.sizes), self.by_pixel, self.batch.dtype, self.eps)


def _layer(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    fixed: bool,
    averaged: bool = False,
) -> _Layer:
    options = (not input.is_contiguous(), eps, relu, fixed, weight is not None, bias is not None, averaged)
    return _Layer(layout_of(input), *options, torch.get_num_threads())


# Tensors of the forward pass.
_INPUT, _RUNNING_MEAN, _RUNNING_VAR, _WEIGHT, _BIAS, _OUTPUT, _MEAN, _VAR = range(8)


@lru_cache(maxsize=1024)
def _forward_step(layer: _Layer) -> Step:
    """Output, and of what is not fixed mean and variance; the running averages follow where there are some."""
    cut = layer.cut()
    k = cut.kernels
    averaged = layer.averaged and not layer.fixed
    words: dict[int, Word] = {
        k.SOURCE: Address(_INPUT),
        k.OUTPUT: Address(_OUTPUT),
        k.RELU: int(layer.relu),
        k.PARTIALS: cut.partials(),
        k.MEANS: Address(_RUNNING_MEAN if layer.fixed else _MEAN),
        k.VARIANCES: Address(_RUNNING_VAR if layer.fixed else _VAR),
        k.WEIGHT: Address(_WEIGHT) if layer.weighted else cut.constants(1),
        k.BIAS: Address(_BIAS) if layer.biased else cut.constants(0),
    }
    if averaged:
        words |= {k.FIRST: Address(_RUNNING_MEAN), k.SECOND: Address(_RUNNING_VAR), k.MOMENTUM: Number(0)}
    return cut.step("forward", words, not layer.fixed, True, layer.fixed, "move_averages" if averaged else "")


class _Given(NamedTuple):
    """Where the tensors of a backward pass stand, ``None`` for what there is none of or is not wanted."""

    input: int
    weight: int | None
    mean: int
    var: int
    output: int | None
    grad: int
    result: int | None
    sum_g: int | None
    sum_g_centred: int | None
    grad_mean: int | None = None
    grad_var: int | None = None
    scaled: bool = False
    """Whether the second sum is to be the gradient of the weight."""


@lru_cache(maxsize=1024)
def _backward_step(layer: _Layer, given: _Given) -> Step:
    cut = layer.cut()
    k = cut.kernels

    def at(number: int | None, otherwise: Word) -> Word:
        return otherwise if number is None else Address(number)

    zeros, here = cut.constants(0), Address(given.input)
    words: dict[int, Word] = {
        k.SOURCE: here,
        k.ERRORS: Address(given.grad),
        k.RELU: int(layer.relu),
        k.PARTIALS: cut.partials(),
        # of what there is none, something that can be pointed at
        k.OUTPUT: at(given.output, here),
        k.TARGET: at(given.result, here),
        k.MEANS: Address(given.mean),
        k.VARIANCES: Address(given.var),
        k.WEIGHT: at(given.weight, cut.constants(1)),
        k.GRAD_MEANS: at(given.grad_mean, zeros),
        k.GRAD_VARIANCES: at(given.grad_var, zeros),
        k.FIRST: at(given.sum_g, 0),
        k.SECOND: at(given.sum_g_centred, 0),
        k.SCALED: int(given.scaled),
    }
    summed = given.sum_g is not None or given.sum_g_centred is not None
    wanted = given.result is not None
    return cut.step("backward", words, summed or not layer.fixed, wanted, layer.fixed, "add_up" if summed else "")


@lru_cache(maxsize=256)
def _plan(layer: _Layer, wanting: tuple[int, ...]) -> Plan:
    """A layer with its running averages, and the gradients of those arguments that want them."""
    channels, cut = layer.batch.sizes[1], layer.cut()
    vector = dense(channels, dtype=cut.dtype)
    average = vector if layer.averaged else None
    vectors = (average, average, vector if layer.weighted else None, vector if layer.biased else None)
    mean, var = (_RUNNING_MEAN, _RUNNING_VAR) if layer.fixed else (_MEAN, _VAR)
    saved = (_INPUT, *((_WEIGHT,) if layer.weighted else ()), mean, var, *((_OUTPUT,) if layer.relu else ()))
    places = {number: place for place, number in enumerate(saved)}
    results = {number: place for place, number in enumerate(wanting, len(saved) + 1)}
    given = _Given(
        places[_INPUT], places.get(_WEIGHT), places[mean], places[var], places.get(_OUTPUT), len(saved),
        results.get(_INPUT), results.get(_BIAS), results.get(_WEIGHT), scaled=True,
    )  # fmt: skip
    return Plan(
        (layer.batch, *vectors),
        (layer.batch,) if layer.fixed else (layer.batch, vector, vector),
        _forward_step(layer),
        _backward_step(layer, given),
        saved=saved,
        differentiable=wanting,
        changed=(_RUNNING_MEAN, _RUNNING_VAR) if layer.averaged and not layer.fixed else (),
    )


def plan_of(
    key: tuple[Any, ...],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Plan | None:
    """The plan of a layer, of its options, for such tensors; ``None`` where vectors are not as wide as the sums."""
    _, training, eps, relu, _ = key
    given = (input, running_mean, running_var, weight, bias)
    wide = opmath_dtype(input.dtype)
    if not all(v is None or (v.dtype is wide and v.is_contiguous() and v.dim() == 1) for v in given[1:]):
        return None
    wanting = tuple(number for number, t in enumerate(given) if t is not None and t.requires_grad)
    return _plan(_layer(input, weight, bias, eps, relu, not training, running_mean is not None), wanting)


def _vector(vector: Tensor | None, like: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(like.dtype).contiguous()


def forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and variance of the batch."""
    mean, var = (input.new_empty(input.shape[1], dtype=opmath_dtype(input.dtype)) for _ in range(2))
    output, weight, bias = torch.empty_like(input), _vector(weight, mean), _vector(bias, mean)
    layer = _layer(input, weight, bias, eps, relu, False)
    run(_forward_step(layer), (input, None, None, weight, bias, output, mean, var))
    return output, mean, var


def infer(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """Output for a given mean and variance."""
    mean, var = (v.to(opmath_dtype(input.dtype)).contiguous() for v in (mean, var))
    output, weight, bias = torch.empty_like(input), _vector(weight, mean), _vector(bias, mean)
    layer = _layer(input, weight, bias, eps, relu, True)
    run(_forward_step(layer), (input, mean, var, weight, bias, output))
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
    result = torch.empty_like(input) if wanted else None
    sums = (torch.empty_like(mean), torch.empty_like(mean)) if sums_wanted else (mean, mean)
    layout = torch.contiguous_format if input.is_contiguous() else CHANNELS_LAST[input.dim()]
    grad, weight = grad.contiguous(memory_format=layout), _vector(weight, mean)
    tensors = (input, weight, mean, var, rectified, grad, result, *sums, grad_mean, grad_var)
    given = _Given(
        input=0,
        weight=None if weight is None else 1,
        mean=2,
        var=3,
        output=None if rectified is None else 4,
        grad=5,
        result=6 if wanted else None,
        sum_g=7 if sums_wanted else None,
        sum_g_centred=8 if sums_wanted else None,
        grad_mean=None if fixed else 9,
        grad_var=None if fixed else 10,
    )
    run(_backward_step(_layer(input, weight, None, eps, rectified is not None, fixed), given), tensors)
    return result, *sums
