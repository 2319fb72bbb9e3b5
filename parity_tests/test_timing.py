"""``reimpl.testing.timing``: fair rounds, ratios pair by pair, and memory."""

from __future__ import annotations

import gc
import time
from itertools import pairwise

import pytest
import torch

from reimpl.testing import timing
from reimpl.testing.timing import Timings, interleave, peak_memory

pytestmark = pytest.mark.quick


def test_statistics() -> None:
    timings = Timings({"ours": (1.0, 2.0, 30.0), "torch": (2.0, 8.0, 40.0)})
    assert timings.names == ("ours", "torch")
    assert timings.median("torch") == 8.0
    # Pair by pair: 1/2, 2/8, 30/40. The ratio of the medians would be 2/8.
    assert timings.ratio("ours", "torch") == 0.5
    assert timings.quartiles("ours") == (1.5, 2.0, 16.0)
    assert timings.fastest() == "ours" and timings.fastest(["torch"]) == "torch"
    assert Timings({"ours": (3.0,)}).quartiles("ours") == (3.0, 3.0, 3.0)


def test_every_contender_runs_once_a_round_and_behind_every_other() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleave(contenders, rounds=30, warmup=2)
    assert calls[:6] == list("aabbcc")
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert len(rounds) == 30 and all(sorted(each) == list("abc") for each in rounds)
    assert set(pairwise("".join(rounds))) >= {(a, b) for a in "abc" for b in "abc" if a != b}
    assert all(len(timings.samples[name]) == 30 for name in "abc")


def test_setup_runs_before_each_sample_and_is_not_timed() -> None:
    events: list[str] = []

    def setup() -> None:
        events.append("setup")
        time.sleep(0.02)

    timings = interleave({"a": lambda: events.append("a")}, rounds=3, warmup=0, setup=setup)
    assert events == ["setup", "a"] * 3
    assert timings.median("a") < 0.02  # the least that the setup's sleep takes


@pytest.mark.slow
def test_sample_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # one tick between two looks at it
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(clock)))
    timings = interleave({"a": lambda: None}, rounds=2, warmup=0, calls=4)
    assert timings.samples["a"] == (0.25, 0.25)  # four calls in a tick


def test_time_limit_ends_the_rounds() -> None:
    calls: list[str] = []

    def sleep() -> None:
        calls.append("a")
        time.sleep(0.02)

    timings = interleave({"a": sleep}, rounds=1000, warmup=1000, max_seconds=0.01)
    assert len(timings.samples["a"]) == 1 and len(calls) == 2


@pytest.mark.slow
def test_garbage_collection_is_restored_even_after_an_error() -> None:
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interleave({"a": fail}, rounds=1, warmup=0)
    assert seen == [False] and gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"contenders": {}}, "contenders is empty"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"calls": 0}, "calls must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        interleave(**{"contenders": {"a": lambda: None}, **arguments})  # type: ignore[arg-type]


@pytest.mark.slow
def test_peak_memory_sees_temporaries(device: torch.device) -> None:
    x = torch.zeros(64 * 2**20 // 4, device=device)
    needed = {"none": lambda: x.add_(1), "one": lambda: x * 2, "two": lambda: (x * 2) + 1}
    for call in needed.values():
        call()  # the first call brings in code, which is memory too
    peaks = {name: peak_memory(call, device) for name, call in needed.items()}
    if peaks["none"] is None:
        pytest.skip("this system keeps no high-water mark")
    # A sixteenth of a copy is room for the pages that the interpreter and the C library take meanwhile.
    assert peaks == {name: pytest.approx(count * x.nbytes, abs=x.nbytes / 16) for count, name in enumerate(needed)}
