"""The demonstrations, at small size: each draws its figure, and its numbers say what it claims."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the command line needs the extra report")
pytest.importorskip("matplotlib", reason="figures need the extra plot")

from scripts import demo_overfitting, demo_shuffling, demo_synthesis, demo_vanishing

ROOT = Path(__file__).resolve().parents[1]


def test_vanishing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sigmoid network's gradient falls geometrically and it learns nothing; the repairs carry it and learn."""
    out = tmp_path / "deep" / "vanishing.png"
    flags = ("--depth", "10", "--width", "32", "--examples", "400", "--epochs", "40", "--lr", "0.05")
    result = demo_vanishing.main([*flags, "--out", str(out)])
    sigmoid = result["sigmoid, 1/√n"]
    hidden = sigmoid.gradients[:-1]
    assert max(a / b for a, b in pairwise(hidden)) < 0.35  # a slope of at most 1/4, weights of norm about 1
    assert sigmoid.ratio < 1e-4 and len(sigmoid.before.vanishing) > 5
    assert sigmoid.error > 0.4 and sigmoid.losses[-1] > 0.65  # ln 2 is chance
    for name in ("ReLU, He", "sigmoid, batch norm", "ReLU, He, batch norm"):
        run = result[name]
        assert 0.05 < run.ratio < 100 and not run.before.vanishing, name
        assert run.losses[-1] < 0.5, name
    assert result["ReLU, He"].error < 0.2 and result["ReLU, He, batch norm"].error < 0.1
    printed = capsys.readouterr().out
    assert "sigmoid, batch norm" in printed and printed.endswith(f"figure: {out}\n") and out.stat().st_size > 10_000


def test_overfitting(tmp_path: Path) -> None:
    """The plain network overfits; L1 makes zeros, L2 shrinks, dropout and early stopping end at a lower loss."""
    out = tmp_path / "overfitting.png"
    flags = ("--train", "200", "--held-out", "300", "--epochs", "30", "--width", "8", "--out", str(out))
    result = demo_overfitting.main(flags)
    plain, early = result["none"], result["early stopping"]
    assert plain.curve.overfits and plain.curve.train[-1] < 0.3 < 2 < plain.curve.dev[-1]
    assert result["L1"].zeros > 5 * plain.zeros and result["L2"].norm < 0.8 * plain.norm
    assert all(result[name].curve.dev[-1] < plain.curve.dev[-1] - 0.1 for name in ("L1", "L2", "dropout"))
    assert early.test_loss < plain.test_loss - 0.3
    best = plain.curve.dev[: len(early.curve.x)]
    assert early.curve.dev == best and early.curve.dev[-1] == min(best)
    assert not early.curve.overfits and out.stat().st_size > 10_000


def test_shuffling(tmp_path: Path) -> None:
    """In order of class a network learns far less; once is as good as every epoch."""
    out = tmp_path / "shuffling.svg"
    result = demo_shuffling.main(["--examples", "1500", "--epochs", "8", "--seeds", "2", "--out", str(out)])
    none, once, every = (sum(result.final(order)) / 2 for order in ("none", "once", "every epoch"))
    assert none > once + 0.05 and none > every + 0.05
    assert abs(once - every) < 0.02  # two standard errors between two seeds on 1,500 test examples each
    assert out.read_text(encoding="utf-8").lstrip().startswith("<?xml")


def test_synthesis(tmp_path: Path) -> None:
    """With one noise the network fits that and fails on others; with many it does not."""
    out = tmp_path / "synthesis.png"
    result = demo_synthesis.main(
        ["--stocks", "1", "30", "300", "--examples", "1000", "--epochs", "20", "--out", str(out)]
    )
    assert all(error < 0.02 for error in result.known.values())
    assert result.new[1] > 0.35 and result.new[1] > result.new[30] + 0.1 and result.new[300] < 0.03
    assert str(result).splitlines()[1].split() == ["none", f"{result.clean:.3g}"]
    assert result.clean > result.new[30] and out.stat().st_size > 10_000


def test_help() -> None:
    """As a process, which describes itself."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.demo_vanishing", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "--depth" in done.stdout and "batch norm" in done.stdout
