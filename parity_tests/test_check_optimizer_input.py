"""What the optimizer checker can be asked, and what it says of it: dtypes, nothing to run, long messages, own files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import reimpl.optim
from reimpl.testing import OptimizerComparison, compare_optimizers
from reimpl.testing.outcomes import LONGEST_TEXT, shortened

ROOT = Path(__file__).resolve().parent.parent


def sgd(**options: Any) -> OptimizerComparison:
    usual = {"scenarios": ["sizes"], "implementations": ["default"]}
    return compare_optimizers(torch.optim.SGD, torch.optim.SGD, **{**usual, **options})


@pytest.mark.quick
@pytest.mark.parametrize("given", ["float64", "torch.float64", torch.float64], ids=["name", "full name", "dtype"])
def test_dtypes_come_by_name_too(given: str | torch.dtype) -> None:
    result = sgd(dtypes=(dtype for dtype in [given, "bfloat16"]), scenarios=["sizes", "gaps"])
    cases = [(outcome.scenario, outcome.dtype) for outcome in result.outcomes]
    assert result.ok and cases == [(s, d) for s in ("sizes", "gaps") for d in ("float64", "bfloat16")]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dtypes": ["nope"]}, ValueError, "unknown dtype 'nope'; known: float64, float32, bfloat16, float16, complex"),
        ({"dtypes": [torch.int64]}, ValueError, "unknown dtype 'int64'; known: float64"),
        ({"dtypes": [64]}, ValueError, "unknown dtype 64; known: float64"),
        ({"dtypes": "float64"}, TypeError, "dtypes must be a sequence, as in ['float64'], got 'float64'"),
        ({"dtypes": torch.float64}, TypeError, "dtypes must be a sequence, as in ['float64'], got torch.float64"),
        ({"dtypes": []}, ValueError, "dtypes is empty; known: float64"),
        ({"implementations": "fused"}, TypeError, "implementations must be a sequence, as in ['default'], got 'fused'"),
        ({"kwargs": {"foo": 1}}, TypeError, "takes no argument 'foo'. It takes: lr, momentum"),
        ({"kwargs": {"lrr": 1}}, TypeError, "takes no argument 'lrr'; did you mean lr? It takes: lr"),
    ],
    ids=["name", "integers", "number", "one name", "one dtype", "none", "one implementation", "argument", "near"],
)
def test_what_came_and_what_is_possible(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        sgd(**options)


class Plain(torch.optim.Optimizer):
    """θ ← θ − γg, with a refusal as long as the dispatcher's where ``refused`` says so."""

    refused: torch.dtype | None = None

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype == self.refused:
                    raise RuntimeError("Could not step. It is only available for:\n" + "CPU: registered at file\n" * 99)
                p.sub_(group["lr"] * p.grad)


@pytest.mark.quick
def test_nothing_compared_says_why() -> None:
    fused = compare_optimizers(Plain, implementations=["fused"])
    assert not fused.ok and fused.headline().startswith("nothing could be compared: skipped fused: ")
    assert fused.headline().endswith("Plain takes no argument fused")
    narrow = sgd(scenarios=["closure", "groups"], dtypes=["bfloat16"])
    assert narrow.headline() == "nothing could be compared: skipped closure, groups: it is not run in bfloat16"
    fussy = type("Fussy", (Plain,), {"refused": torch.float32})
    one = compare_optimizers(fussy, Plain, scenarios=["sizes"], dtypes=["float32"])
    assert one.headline() == "nothing could be compared: 1 of 1 cases part before there are numbers"
    both = compare_optimizers(fussy, type("Fussy", (fussy,), {}), scenarios=["sizes"], dtypes=["float32"])
    assert both.headline() == "nothing could be compared: both refuse every case"


@pytest.mark.quick
def test_names_with_commas_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"known: sizes, 0-d, .*, 'transposed, contiguous gradient', "):
        sgd(scenarios=["size"])


@pytest.mark.parametrize("columns", [None, "80"], ids=["as long as needed", "wrapped"])
def test_a_pipe_gets_whole_lines(columns: str | None) -> None:
    only = ("--implementation", "default", "--dtype", "float64", "--scenario", "transposed, contiguous gradient")
    seen = piped("torch.optim.SGD", *only, "--set", "lr=0.1", "--set", "momentum=0.9", "--set", "nesterov=True",
                 columns=columns)  # fmt: skip
    assert seen.returncode == 0, seen.stderr
    title = seen.stdout.splitlines()[0]
    assert ("against its own plain for-loop" in title and "torch " in title) == (columns is None)
    assert all(line == line.rstrip() or len(line) < 120 for line in seen.stdout.splitlines())


def test_nothing_compared_is_status_2() -> None:
    seen = piped("torch.optim.SparseAdam", "--implementation", "fused", "--dtype", "float64", "--scenario", "sizes")
    assert seen.returncode == 2 and "nothing could be compared: skipped fused" in seen.stdout


def test_help_keeps_its_lines_and_may_be_cut_short() -> None:
    pytest.importorskip("tyro", reason="the command line is read by tyro")
    pytest.importorskip("rich", reason="the tables are rich's")
    command = [sys.executable, str(ROOT / "scripts" / "check_optimizer.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as cut:
        assert cut.stdout is not None and cut.stderr is not None
        cut.stdout.close()  # before anything was written: the imports take longer
        assert cut.stderr.read() == ""
    text = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True, env=environment).stdout
    assert "\n        --set lr=0.01 --set against.eps_inside_sqrt=true" in text and "  --set lr=0.01 --set" in text


def piped(*arguments: str, columns: str | None = None) -> subprocess.CompletedProcess[str]:
    """The script's output where it is no terminal's."""
    pytest.importorskip("tyro", reason="the command line is read by tyro")
    pytest.importorskip("rich", reason="the tables are rich's")
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    environment |= {"PYTHONPATH": str(ROOT), **({"COLUMNS": columns} if columns else {})}
    command = [sys.executable, str(ROOT / "scripts" / "check_optimizer.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


@pytest.mark.quick
def test_long_messages_are_shortened_but_kept_in_the_data() -> None:
    fussy = type("Fussy", (Plain,), {"refused": torch.float32})
    result = compare_optimizers(fussy, Plain, scenarios=["sizes"], dtypes=["float64", "float32"])
    assert result.summary().count("registered") == 0
    assert "raises RuntimeError at step 1: Could not step. …; reference: steps" in result.summary()
    assert result.as_dict()["outcomes"][1]["subject"].count("registered") == 99
    with pytest.raises(ValueError, match=r"step 1: Could not step\. …$"):
        compare_optimizers(type("Fussy", (Plain,), {"refused": torch.float64}))


@pytest.mark.quick
def test_shortened_keeps_sentences_or_words() -> None:
    assert shortened("one\n  line.") == "one line."
    assert shortened("One. Two! " + "x" * 300) == "One. Two! …"
    assert shortened("y" * 300) == "y" * (LONGEST_TEXT - 2) + " …"
    words = shortened("some words " * 50)
    assert words.endswith(("some …", "words …")) and len(words) <= LONGEST_TEXT


def test_the_documented_example_leaves_complex_numbers_alone() -> None:
    """Its settings are read from the page, and the README has the same."""
    timm_optim = pytest.importorskip("timm.optim", reason="the example is about timm's RMSpropTF")
    check_optimizer = pytest.importorskip("scripts.check_optimizer", reason="needs tyro and rich")
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("docs/check_optimizer.md", "README.md")]
    commands = [re.search(r"timm\.optim\.RMSpropTF --against[^`]*?accumulator_value=1", page) for page in pages]
    entries, readme = (re.findall(r"--set\s+(\S+)", command.group()) for command in commands if command)
    assert entries == readme
    settings = check_optimizer.split_settings(entries)
    result = compare_optimizers(
        timm_optim.RMSpropTF, reimpl.optim.RMSprop, kwargs=settings["both"], reference_kwargs=settings["against"],
        implementations=["default"], scenarios=["sizes", "tiny gradients", "state dict"],
    )  # fmt: skip
    assert {outcome.dtype for outcome in result.partings} == {"complex128", "complex64"}


def test_a_class_of_the_current_directory_is_found(tmp_path: Path) -> None:
    pytest.importorskip("tyro", reason="the command line is read by tyro")
    pytest.importorskip("rich", reason="the tables are rich's")
    (tmp_path / "mine.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "check_optimizer.py"), "mine.Mine", "--scenario", "sizes"]
    seen = subprocess.run(
        [*command, "--implementation", "default", "--dtype", "float64"],
        capture_output=True, text=True, timeout=110, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert seen.returncode == 0, seen.stderr
    assert "mine.Mine" in seen.stdout and "1 cases, 1 equal to the last bit, none part" in seen.stdout
