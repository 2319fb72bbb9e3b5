"""How long calls take against each other, and the memory they need: interleaved medians, on CPU and CUDA."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

__all__ = ["Timings", "interleave", "peak_memory"]


@dataclass(frozen=True)
class Timings:
    """Seconds per call of several contenders, sampled in the same rounds.

    ``samples[name][k]`` was measured in round ``k``, beside every other contender's sample of that round, so that a
    ratio taken round by round is free of whatever slowed the whole machine down for a while.
    """

    samples: Mapping[str, tuple[float, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The contenders in the order in which they were given."""
        return tuple(self.samples)

    def median(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples[name])

    def quartiles(self, name: str) -> tuple[float, float, float]:
        """First quartile, median and third quartile, in seconds per call."""
        samples = self.samples[name]
        if len(samples) == 1:
            return (samples[0],) * 3
        first, second, third = statistics.quantiles(samples, n=4, method="inclusive")
        return first, second, third

    def ratio(self, name: str, baseline: str) -> float:
        """Median over the rounds of time(``name``) / time(``baseline``); under 1 means that ``name`` is faster."""
        pairs = zip(self.samples[name], self.samples[baseline], strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)

    def fastest(self, names: Sequence[str] | None = None) -> str:
        """The name with the least median, among ``names`` or among all."""
        return min(self.names if names is None else names, key=self.median)


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 50,
    warmup: int = 3,
    setup: Callable[[], object] | None = None,
    *,
    calls: int = 1,
    max_seconds: float | None = None,
    device: torch.device | str = "cpu",
) -> Timings:
    """Time every contender once a round, so that drift of the machine falls on all of them alike.

    The order is drawn anew each round, the same in every run: nobody always runs behind the same neighbour and finds
    the caches as that one left them. Garbage collection waits until the end. On CUDA the clock runs until the device
    is idle.

    Args:
        contenders: name to a call without arguments.
        rounds: samples taken of each contender.
        warmup: untimed calls of each contender before the first round (compilation, lazily made state).
        setup: untimed call before each sample.
        calls: calls in one sample; raise it where one call is near the clock's resolution (about 0.1 µs).
        max_seconds: begin no further warm-up call or round after so long; the first of each always runs.
        device: where the work happens.

    Raises:
        ValueError: no contender, or a count below its least value.
    """
    if not contenders:
        raise ValueError("contenders is empty, expected at least one named call")
    for argument, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0), ("calls", calls, 1)):
        if value < least:
            raise ValueError(f"{argument} must be at least {least}, got {value}")
    synchronize = _synchronizer(torch.device(device))
    begun = perf_counter()

    def late() -> bool:
        return max_seconds is not None and perf_counter() - begun > max_seconds

    for call in contenders.values():
        for done in range(warmup):
            if done and late():
                break
            call()
    order, draw = list(contenders), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done and late():
                break
            draw.shuffle(order)
            for name in order:
                if setup is not None:
                    setup()
                samples[name].append(_sample(contenders[name], calls, synchronize))
    finally:
        if collecting:
            gc.enable()
    return Timings({name: tuple(taken) for name, taken in samples.items()})


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Bytes that ``call`` needs at its worst moment beyond what was held before it.

    On CUDA the allocator's own count. On the CPU the resident set's high-water mark, which Linux lets a process
    reset, after the C library has given its free memory back; it counts pages, so a few hundred KiB are noise.
    ``None`` where the system has no such mark.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - held, 0)
    except (OSError, AttributeError, KeyError):
        return None


def _sample(call: Callable[[], object], calls: int, synchronize: Callable[[], object]) -> float:
    synchronize()
    start = perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (perf_counter() - start) / calls


def _synchronizer(device: torch.device) -> Callable[[], object]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _resident(field: str) -> int:
    """One of this process's memory counters in bytes; the kernel writes them in KiB."""
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int({line[0]: line[1] for line in lines}[field].split()[0]) * 1024
