"""Makes the parity report: runs the declared cases, trains, times, and writes ``reports/index.html``.

    python -m scripts.report                    everything
    python -m scripts.report --no-speed         without timing the optimizers' steps
    python -m scripts.report --reuse            from the parity record of the last run

Exits with 1 where a case is beyond its limit or a part did not run; the page is written all the same and says so.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from reimpl.testing.recorder import header
from scripts._report_data import KIND_TITLES, Comparisons
from scripts._report_page import Problem, Report, format_seconds, format_ulp, render, speed_verdict, write_text
from scripts._report_parity import Parity, read_suite, run_suite
from scripts._report_training import OPTIMIZERS as TRAINED
from scripts._report_training import train_pairs
from scripts.step_times import OPTIMIZERS, WORKLOADS, time_steps

#: Longest that one optimizer is timed over one workload, in seconds; what lies beyond it on a busy machine is left out.
_STEP_SECONDS = 4.0


@dataclass(frozen=True)
class Options:
    """What the report is made of and where it goes."""

    out: Path = Path("reports")
    """Folder of the page and of the parity record."""
    reuse: bool = False
    """Take the parity record that lies in the folder instead of running the suite."""
    training: bool = True
    """Train side by side with PyTorch's optimizers."""
    speed: bool = True
    """Time the optimizers' steps."""
    workers: int = os.cpu_count() or 1
    """Processes that run the parity suite."""


def make_report(options: Options, console: Console) -> Report:
    """Measure everything that ``options`` asks for; what fails becomes a problem of the report, not an exception."""
    started = time.perf_counter()
    report = Report(header())
    with _part(report, console, "parity suite"):
        parity = _parity(options)
        report.header, report.cards = parity.header, parity.cards
        _judge(report, parity)
    if options.training:
        with _part(report, console, "training, " + ", ".join(TRAINED)):
            report.training = list(train_pairs())
    if options.speed:
        with _part(report, console, "step times"):
            devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
            report.steps = [
                time_steps(name, workload, device, rounds=40, ours=("fused",), max_seconds=_STEP_SECONDS)
                for device in devices
                for workload in WORKLOADS
                for name in OPTIMIZERS
            ]
            report.load = _load()
    report.seconds = time.perf_counter() - started
    return report


def _load() -> float:
    """Runnable processes a core over the last minute; 0 where the system does not tell."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


def _parity(options: Options) -> Parity:
    record, techniques = options.out / "parity.json", options.out / "techniques.json"
    if options.reuse:
        return read_suite(record, techniques)
    status, output = run_suite(record.resolve(), techniques.resolve(), options.workers)
    try:
        return read_suite(record, techniques, status, output)
    except (OSError, ValueError, KeyError) as error:
        raise RuntimeError(f"the suite left no record ({error}); it said:\n{output[-4000:]}") from error


def _judge(report: Report, parity: Parity) -> None:
    """Note what the comparisons themselves do not show."""
    if parity.unmeasured:
        report.problems.append(Problem("Declared, but nothing was recorded", ", ".join(parity.unmeasured)))
    if parity.status:
        report.problems.append(Problem(f"The parity suite ended with status {parity.status}", parity.output[-6000:]))


@contextmanager
def _part(report: Report, console: Console, title: str) -> Iterator[None]:
    """Show that a part is running and how long it took; keep its failure for the page."""
    started = time.perf_counter()
    if not console.is_terminal:
        console.print(f"{title} …", highlight=False)
    try:
        with console.status(f"{title} …", refresh_per_second=1):  # a livelier spinner would show in the timings
            yield
    except Exception as error:
        report.problems.append(Problem(f"{title}: {error.__class__.__name__}", traceback.format_exc()))
        console.print(f"[red]✗[/] {title}: {error}", highlight=False)
    else:
        console.print(f"[green]✓[/] {title} [dim]{time.perf_counter() - started:.0f} s[/]", highlight=False)


def print_summary(report: Report, console: Console) -> None:
    """The page's summary for the terminal."""
    table = Table(title=report.headline, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("cases", "beyond", "bitwise", "nearer", "level", "farther", "ulp"):
        table.add_column(heading, justify="right")
    for kind, title in KIND_TITLES.items():
        cards = [card for card in report.cards if card.declaration["kind"] == kind]
        rows = Comparisons(row for card in cards for row in card.all.rows)
        if cards:
            counts = (len(rows), len(rows.failed), rows.bitwise, rows.closer, rows.level, rows.farther)
            style = "red" if rows.failed else None
            numbers = (f"{count:,}" for count in counts)
            table.add_row(f"{title}, {len(cards)}", *numbers, format_ulp(rows.median_ulp), style=style)
    console.print()
    console.print(table)
    if report.steps:
        _print_steps(report, console)
    for run in report.training:
        same = "the same to the last bit" if run.difference == 0 else f"{run.difference:.1e} apart at most"
        console.print(f"training, {run.optimizer}: curves {same}; test accuracy {run.ours_accuracy:.1%}")
    for problem in report.problems:
        console.print(f"[red]{problem.title}[/]", highlight=False)


def _print_steps(report: Report, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("one step", "ours, fused", "PyTorch's best", "ours is"):
        table.add_column(heading, justify="right" if heading in ("ours, fused", "PyTorch's best") else "left")
    for step in report.steps:
        best = step.torch_best
        theirs = f"{format_seconds(step.timings.median(best))} {best.removeprefix('torch '):>8}"
        name = f"{step.optimizer}, {step.workload}, {step.device}"
        table.add_row(name, format_seconds(step.timings.median("ours fused")), theirs, speed_verdict(step))
    console.print()
    console.print(table)
    if report.busy:
        console.print("[yellow]the machine was busy: these times say little[/]")


def main(options: Options) -> int:
    """Make the report, write it, print where it is; the exit status."""
    console = Console()
    report = make_report(options, console)
    page = options.out / "index.html"
    write_text(page, render(report))
    print_summary(report, console)
    console.print(f"\n[bold]{page.resolve().as_uri()}[/]  ({report.seconds:.0f} s)", soft_wrap=True, highlight=False)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
