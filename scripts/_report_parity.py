"""Runs the parity suite's declared cases in a process of their own and reads what they recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reimpl.testing.recorder import read_record
from scripts._report_data import Card, Comparison, make_cards, unmeasured

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Parity:
    """Outcome of the suite: pytest's exit status and last words, the record's header and a card a technique."""

    status: int
    output: str
    header: dict[str, Any]
    cards: list[Card]
    unmeasured: list[str]


def run_suite(record: Path, techniques: Path, workers: int) -> tuple[int, str]:
    """Run every case marked ``parity`` on every device present; writes ``record`` and ``techniques``.

    Returns pytest's exit status and what it printed. A record left by an earlier run is removed first, so that a
    suite which dies cannot pass for one that ran.
    """
    record.unlink(missing_ok=True)
    techniques.unlink(missing_ok=True)
    described = _python("-m", "parity_tests.describe", str(techniques))
    if described.returncode:
        return described.returncode, described.stdout
    finished = _python(
        "-m", "pytest", "parity_tests", "-m", "parity", "--device", "all", "--record", str(record), "-q", "--tb=short",
        "-n", str(workers), "--maxprocesses", "8", "--dist", "worksteal", "--color=no",
    )  # fmt: skip
    return finished.returncode, finished.stdout


def read_suite(record: Path, techniques: Path, status: int = 0, output: str = "") -> Parity:
    """What the suite left behind.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not of the expected layout.
    """
    header, rows = read_record(record)
    declared = json.loads(techniques.read_text(encoding="utf-8"))
    cards = make_cards(declared, map(Comparison.from_row, rows))
    return Parity(status, output, header, cards, unmeasured(declared, cards))


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread a worker: the workers share the cores among themselves.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
