"""Collects the interleaved step times, prints them as a table at the end, and writes them to ``reports/bench.json``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reimpl.testing.recorder import header, write_json
from scripts.step_times import StepTimes

RECORD = Path("reports") / "bench.json"


@dataclass(frozen=True)
class Outcome:
    """One optimizer over one workload: its times, what it is held against, and the memory that one step needs."""

    times: StepTimes
    baseline: str
    ratio: float
    limit: float | None
    memory: dict[str, int | None]

    @property
    def met(self) -> bool:
        """Whether the ratio keeps its limit; without a limit it does."""
        return self.limit is None or self.ratio <= self.limit


_OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = []


@pytest.fixture
def report_outcome(request: pytest.FixtureRequest) -> Callable[[Outcome], None]:
    """Adds an outcome to the table."""
    return request.config.stash[_OUTCOMES].append


# glibc's names of its settings, and what they are set to: the largest it takes, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = (-1, 1 << 30), (-3, 1 << 25)


@pytest.fixture(scope="module")
def freed_memory_is_kept() -> None:
    """Has glibc keep what is freed for what comes next: an allocation costs no page faults after the first round."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    for setting in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD) if set_option else ():
        set_option(*setting)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    outcomes = config.stash[_OUTCOMES]
    if not outcomes:
        return
    terminalreporter.section("one step, medians of interleaved rounds")
    layout = "{:<11} {:<10} {:<5} {:>10} {:>10} {:>10} {:>10}   {:<18} {:>6} {:>6}  {:>9} {:>9} {:>7} {:>6}"
    terminalreporter.write_line(
        layout.format(
            "workload", "optimizer", "on", "ours", "fused", "foreach", "for-loop", "held against", "ratio", "limit",
            "memory", "PyTorch's", "speed", "rounds",
        )
    )  # fmt: skip
    for outcome in outcomes:
        times = outcome.times
        ours = "ours fused" if "ours fused" in times.timings.names else "ours default"
        columns = [_milliseconds(times, name) for name in (ours, *(f"torch {e}" for e in _TORCH))]
        share = times.share_of_memory_speed
        limit = "" if outcome.limit is None else f"{outcome.limit:.2f}"
        memory = (_mebibytes(outcome.memory.get(name)) for name in ("ours fused", outcome.baseline))
        line = layout.format(
            times.workload, times.optimizer, times.device, *columns, outcome.baseline, f"{outcome.ratio:.2f}", limit,
            *memory, "–" if share is None else f"{share:.0%}", len(times.timings.samples[ours]),
        )  # fmt: skip
        terminalreporter.write_line(line, red=not outcome.met, green=outcome.met and outcome.limit is not None)
    target = config.rootpath / RECORD
    write_json(target, {"header": header(), "rows": [_row(outcome) for outcome in outcomes]})
    terminalreporter.write_line(
        "times in ms; memory beyond what was held before the step in MiB; speed at which the step moves its bytes, as "
        f"a share of an in-place add's; also in {RECORD}"
    )


_TORCH = ("fused", "foreach", "for-loop")


def _milliseconds(times: StepTimes, name: str) -> str:
    return f"{times.timings.median(name) * 1e3:.3f}" if name in times.timings.names else "–"


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f}"


def _row(outcome: Outcome) -> dict[str, Any]:
    times = outcome.times
    return {
        "workload": times.workload,
        "optimizer": times.optimizer,
        "device": times.device,
        "rounds": len(times.timings.samples[times.timings.names[0]]),
        "seconds": {name: times.timings.quartiles(name) for name in times.timings.names},
        "baseline": outcome.baseline,
        "ratio": outcome.ratio,
        "limit": outcome.limit,
        "memory": outcome.memory,
        "passes": times.passes,
        "share_of_memory_speed": times.share_of_memory_speed,
    }
