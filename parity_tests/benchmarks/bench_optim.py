"""Step times of the optimizers, ours fused against PyTorch's, over large networks and over 1,000 small tensors.

``test_ratio`` and ``test_large_ratio`` hold the ratios to their limits, from interleaved rounds;
``test_default_ratio`` does so for the path that is taken unasked; ``test_third_party_ratio`` sets us beside other
libraries; ``test_step`` gives pytest-benchmark's own statistics, a group for each optimizer and workload;
``test_first_use`` times compilation with an empty cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import reimpl.optim
from parity_tests.benchmarks.conftest import Outcome
from reimpl.testing.timing import interleave, peak_memory
from scripts.step_times import (
    EVERY_WORKLOAD,
    EXECUTIONS,
    LARGE_WORKLOADS,
    OPTIMIZERS,
    WORKLOADS,
    StepTimes,
    contenders,
    gradients_kept,
    make_optimizer,
    make_parameters,
    third_parties,
    time_steps,
)

# What a fused step may take, on the CPU, as a share of PyTorch's best. Over large tensors memory is the limit, and
# PyTorch's fused kernels reach it: 5% is room for the clock, not for the kernel. The others have no fused kernel in
# PyTorch, which makes several passes over memory. Over small tensors the bytes cost next to nothing, and what is
# measured is the cost of one Python call a tensor and operation; SGD has the fewest operations to save.
FUSED_IN_TORCH = ("SGD", "Adam", "AdamW", "Adagrad")
_FUSED_LIMIT, _UNFUSED_LIMIT = 1.05, 0.5
_SMALL_LIMITS = {"SGD": 0.3, **dict.fromkeys(FUSED_IN_TORCH[1:], 0.15)}
_SMALL_LIMIT = 0.1
#: Where PyTorch's own loop already moves little, so many in-place passes over the same streams are enough.
_MOST_PASSES = 1.15
#: Of an in-place add's speed, how much a step over large tensors has to reach.
_MEMORY_SHARE = 0.87
_DEFAULT_LIMIT = 1.05
#: Rounds of a row, and the seconds after which none is begun: slow steps get fewer, and all rows take under 8 minutes.
_ROUNDS, _SECONDS = 60, 2.5
_LARGE_ROUNDS, _LARGE_SECONDS = 12, 4.5
#: Seconds that the first step may take, compilation included; it does not grow with the tensors.
_FIRST_USE = 10.0


def limit_of(workload: str, optimizer: str) -> float:
    """The largest ratio to PyTorch's best execution."""
    if workload == "1,000 x 64":
        return _SMALL_LIMITS.get(optimizer, _SMALL_LIMIT)
    return _FUSED_LIMIT if optimizer in FUSED_IN_TORCH else _UNFUSED_LIMIT


def _assert_fast(outcome: Outcome) -> None:
    times, passes = outcome.times, outcome.times.passes
    found = f"{times.optimizer}: {outcome.ratio:.2f} of {outcome.baseline}'s time"
    if passes is not None:
        found += f", {passes:.2f} in-place passes over the same streams"
        print(found)
    assert outcome.met or (passes is not None and passes <= _MOST_PASSES), found


def _memory(workload: str, optimizer: str, names: tuple[str, str], device: torch.device) -> dict[str, int | None]:
    executions = [name.split()[1] for name in names]
    made = contenders(optimizer, EVERY_WORKLOAD[workload], device, ours=executions[:1], torchs=executions[1:])
    for each in made.values():
        each.step()  # the state is made in the first step and is no temporary
    return {name: peak_memory(each.step, device) for name, each in made.items()}


def _outcome(times: StepTimes, device: torch.device, limit: float) -> Outcome:
    names = ("ours fused", times.torch_best)
    memory = _memory(times.workload, times.optimizer, names, device)
    ratio = times.timings.ratio(*names)
    return Outcome(times, names[1], ratio, limit if device.type == "cpu" else None, memory)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_ratio(device: torch.device, workload: str, optimizer: str, report_outcome: Callable[[Outcome], None]) -> None:
    times = time_steps(optimizer, workload, device, rounds=_ROUNDS, ours=("fused",), max_seconds=_SECONDS)
    outcome = _outcome(times, device, limit_of(workload, optimizer))
    report_outcome(outcome)
    _assert_fast(outcome)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", LARGE_WORKLOADS)
def test_large_ratio(
    device: torch.device, workload: str, optimizer: str, report_outcome: Callable[[Outcome], None]
) -> None:
    times = time_steps(optimizer, workload, device, rounds=_LARGE_ROUNDS, ours=("fused",), max_seconds=_LARGE_SECONDS)
    share = times.share_of_memory_speed
    assert share is not None
    outcome = _outcome(times, device, limit_of(workload, optimizer))
    report_outcome(outcome)
    if device.type == "cpu":
        _assert_fast(outcome)
        assert share >= _MEMORY_SHARE, f"{share:.0%} of the memory's speed"


_REDUCING = {"Adafactor": {"lr": 1e-3}, "Muon": {"lr": 1e-3}}


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *_REDUCING])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_default_ratio(
    device: torch.device, workload: str, optimizer: str, report_outcome: Callable[[Outcome], None]
) -> None:
    shapes = WORKLOADS[workload].shapes
    if optimizer == "Muon":
        shapes = tuple(shape for shape in shapes if len(shape) == 2)
        if not shapes:
            pytest.skip("Muon steps matrices")
    options = {**OPTIMIZERS, **_REDUCING}[optimizer]
    steps = {
        name: getattr(namespace, optimizer)(make_parameters(shapes, device), **options).step
        for name, namespace in (("ours default", reimpl.optim), ("torch default", torch.optim))
    }
    timings = interleave(steps, rounds=_ROUNDS, max_seconds=_SECONDS, device=device)
    ratio = timings.ratio(*steps)
    limit = _DEFAULT_LIMIT if device.type == "cpu" else None
    times = StepTimes(optimizer, workload, device.type, timings)
    report_outcome(Outcome(times, "torch default", ratio, limit, {}))
    assert limit is None or ratio <= limit


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_third_party_ratio(
    device: torch.device,
    workload: str,
    optimizer: str,
    report_outcome: Callable[[Outcome], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = WORKLOADS[workload]
    if find_spec("heavyball") is not None:
        # it compiles for minutes over many tensors
        monkeypatch.setattr("heavyball.utils.compile_mode", None)
    others = third_parties(optimizer, load, device)
    if not others:
        pytest.skip(f"no other library here has its own {optimizer}")
    ours = contenders(optimizer, load, device, ours=("fused",), torchs=())
    steps = {name: each.step for name, each in (ours | others).items()}
    timings = interleave(
        steps, rounds=_ROUNDS // 2, setup=gradients_kept(ours | others), max_seconds=_SECONDS, device=device
    )
    fastest = timings.fastest(list(others))
    ratio = timings.ratio("ours fused", fastest)
    times = StepTimes(optimizer, workload, device.type, timings)
    report_outcome(Outcome(times, fastest, ratio, 1.0, {}))
    assert ratio < 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("owner", ["ours", "torch"])
def test_step(benchmark: Any, owner: str, execution: str, workload: str, optimizer: str) -> None:
    namespace = reimpl.optim if owner == "ours" else torch.optim
    stepper = make_optimizer(namespace, optimizer, execution, WORKLOADS[workload])
    if stepper is None:
        pytest.skip(f"torch.optim.{optimizer} has no {execution} execution")
    benchmark.group = f"{optimizer}, {workload}"
    benchmark.name = f"{owner} {execution}"
    benchmark.pedantic(stepper.step, rounds=5, warmup_rounds=1)


_FIRST_STEP = """
import sys, time
import reimpl.optim, torch
from scripts.step_times import make_optimizer, WORKLOADS, Workload
workload = {"one tensor": Workload(((64,),)), **WORKLOADS}[sys.argv[2]]
optimizer = make_optimizer(reimpl.optim, sys.argv[1], "fused", workload)
start = time.perf_counter()
optimizer.step()
print(time.perf_counter() - start)
"""


# every rule is compiled once; that the tensors' number makes no difference, one rule shows
@pytest.mark.parametrize(
    ("optimizer", "workload"), [*((name, "one tensor") for name in OPTIMIZERS), *(("Adam", load) for load in WORKLOADS)]
)
def test_first_use(optimizer: str, workload: str, tmp_path: Path, record_property: Callable[..., None]) -> None:
    environment = {**os.environ, "REIMPL_CACHE_DIR": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", _FIRST_STEP, optimizer, workload],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds = float(finished.stdout)
    record_property("first_use_seconds", seconds)
    print(f"first use of fused {optimizer}, {workload}: {seconds:.2f} s")
    assert seconds <= _FIRST_USE
