"""Checks every optimizer of a library, and prints what docs/findings.md shows of it: tables in Markdown."""

from __future__ import annotations

import importlib
import inspect
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from reimpl.testing import OptimizerComparison, compare_optimizers, load_optimizer
from reimpl.testing.recorder import write_json


@dataclass(frozen=True)
class Entry:
    """One comparison: the subject, what it is held against (``None``: itself), and what makes the two alike."""

    subject: str
    against: str | None = None
    subject_kwargs: Mapping[str, Any] = field(default_factory=dict)
    against_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """A library: every optimizer class of ``module`` but ``left_out``, and ``pairs`` with a reference."""

    package: str
    module: str
    pairs: tuple[Entry, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prepare: str = ""

    def entries(self) -> Iterator[Entry]:
        """All comparisons, each class against itself first."""
        module = importlib.import_module(self.module)
        for name, value in sorted(vars(module).items()):
            own = inspect.isclass(value) and value.__module__.split(".")[0] == self.module.split(".")[0]
            if own and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", *self.left_out):
                yield Entry(f"{self.module}.{name}", subject_kwargs=self.kwargs.get(name, {}))
        yield from self.pairs


CATALOGUES: Mapping[str, Catalogue] = {
    "torch": Catalogue(
        "torch", "torch.optim", left_out={"LBFGS": "its step needs a closure that is called repeatedly"}
    ),
    "timm": Catalogue("timm", "timm.optim"),
    "pytorch_optimizer": Catalogue("pytorch_optimizer", "pytorch_optimizer"),
    "heavyball": Catalogue("heavyball", "heavyball"),
}


def run_catalogue(catalogue: Catalogue, console: Console, json: Path | None = None) -> int:
    """Run every entry, print the tables, and write the results to ``json``; the exit status."""
    done: list[OptimizerComparison] = []
    not_run: dict[str, str] = dict(catalogue.left_out)
    with console.status(catalogue.package) as status:
        for entry in catalogue.entries():
            status.update(entry.subject)
            try:
                done.append(_run(entry))
            except (ValueError, TypeError) as error:
                not_run[entry.subject] = str(error)
    if json is not None:
        write_json(json, [result.as_dict() for result in done])
    print(markdown(catalogue, done, not_run))
    return 0 if all(result.ok for result in done) else 1


def _run(entry: Entry) -> OptimizerComparison:
    return compare_optimizers(
        load_optimizer(entry.subject),
        None if entry.against is None else load_optimizer(entry.against),
        subject_kwargs=entry.subject_kwargs,
        reference_kwargs=entry.against_kwargs,
    )


def markdown(catalogue: Catalogue, done: list[OptimizerComparison], not_run: Mapping[str, str]) -> str:
    """The page's tables for one library."""
    lines = [
        f"{catalogue.package} {version(catalogue.package)}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, CPU, {date.today().isoformat()}",
        "",
        "| class | against | cases | same bits | both refuse | parts | raises | where |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_row(result) for result in done]
    lines += ["", *(f"Not run: `{name}`: {why}." for name, why in not_run.items())]
    return "\n".join(lines)


def _row(result: OptimizerComparison) -> str:
    def count(status: str) -> int:
        return sum(outcome.status == status for outcome in result.outcomes)

    own = result.subject == result.reference
    same = sum(outcome.status == "agrees" and outcome.bitwise for outcome in result.outcomes)
    name = result.subject.rpartition(".")[2]
    against = "itself" if own else f"`{result.reference}`"
    where = "<br>".join(kind.described() for kind in result.kinds()) or "—"
    counts = (len(result.outcomes), same, count("both refuse"), count("parts"), count("raises"))
    return f"| `{name}` | {against} | {' | '.join(map(str, counts))} | {where} |"
