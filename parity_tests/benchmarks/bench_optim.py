"""Step times of the optimizers, ours fused against PyTorch's, over ResNet-18's parameters and over 1,000 small tensors.

``test_ratio`` holds the ratios to their limits, from interleaved rounds; ``test_step`` gives pytest-benchmark's own
statistics, a group for each optimizer and workload; ``test_first_use`` times compilation with an empty cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reimpl.optim
from parity_tests.benchmarks.conftest import Outcome
from reimpl.testing.timing import peak_memory
from scripts.step_times import EXECUTIONS, OPTIMIZERS, WORKLOADS, contenders, make_optimizer, time_steps

# What a fused step may take, on the CPU, as a share of PyTorch's. Over ResNet-18 memory is the limit, and PyTorch's
# fused kernels reach it: 5% is room for the clock, not for the kernel. RMSprop and Adadelta have no fused kernel in
# PyTorch, whose best makes several passes over memory. Over small tensors the bytes cost next to nothing, and what is
# measured is the cost of one Python call a tensor and operation; SGD has the fewest operations to save.
_FUSED_LIMIT, _UNFUSED_LIMIT = 1.05, 0.5
_SMALL_LIMITS = {"SGD": 0.5}
_SMALL_LIMIT = 0.2
#: Seconds that the first step may take, compilation included; it does not grow with the tensors.
_FIRST_USE = 10.0


def baseline_and_limit(workload: str, optimizer: str, torch_best: str) -> tuple[str, float]:
    """Which of PyTorch's executions ours is held against, and the largest ratio."""
    if workload == "ResNet-18":
        unfused = optimizer in ("RMSprop", "Adadelta")
        return (torch_best, _UNFUSED_LIMIT) if unfused else ("torch fused", _FUSED_LIMIT)
    return torch_best, _SMALL_LIMITS.get(optimizer, _SMALL_LIMIT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_ratio(device: torch.device, workload: str, optimizer: str, report_outcome: Callable[[Outcome], None]) -> None:
    times = time_steps(optimizer, workload, device, rounds=60, ours=("fused",), max_seconds=12)
    baseline, limit = baseline_and_limit(workload, optimizer, times.torch_best)
    steps = contenders(optimizer, WORKLOADS[workload], device, ours=("fused",))
    for name in ("ours fused", baseline):
        steps[name]()  # the state is made in the first step and is no temporary
    memory = {name: peak_memory(steps[name], device) for name in ("ours fused", baseline)}
    ratio = times.timings.ratio("ours fused", baseline)
    outcome = Outcome(times, baseline, ratio, limit if device.type == "cpu" else None, memory)
    report_outcome(outcome)
    assert outcome.met, f"{optimizer} over {workload}: {ratio:.2f} of {baseline}'s time, limit {limit}"


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
    benchmark.pedantic(stepper.step, rounds=10, warmup_rounds=2)


_FIRST_STEP = """
import sys, time
import reimpl.optim, torch
from scripts.step_times import make_optimizer, WORKLOADS
optimizer = make_optimizer(reimpl.optim, sys.argv[1], "fused", {"one tensor": ((64,),), **WORKLOADS}[sys.argv[2]])
start = time.perf_counter()
optimizer.step()
print(time.perf_counter() - start)
"""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", ["one tensor", *WORKLOADS])
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
