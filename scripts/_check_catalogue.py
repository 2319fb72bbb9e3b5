"""Checks every optimizer of a library, and prints what docs/findings.md shows of it: tables in Markdown."""

from __future__ import annotations

import importlib
import inspect
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from reimpl.testing import OptimizerComparison, compare_optimizers, load_optimizer
from reimpl.testing.comparison import NOTHING_IN_COMMON
from reimpl.testing.recorder import write_json


@dataclass(frozen=True)
class Entry:
    """One comparison: the subject, what it is held against (``None``: itself), and what makes the two alike."""

    subject: str
    against: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    against_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """A library: every optimizer class of ``module`` but those left out, and ``pairs`` with a reference.

    ``prepare`` is called before the first of them.
    """

    module: str
    pairs: tuple[Entry, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    implementations: tuple[str, ...] | None = None
    prepare: Callable[[], None] = lambda: None

    def entries(self) -> Iterator[Entry]:
        """All comparisons, each class against itself first."""
        module = importlib.import_module(self.module)
        for name, value in sorted(vars(module).items()):
            own = inspect.isclass(value) and value.__module__.split(".")[0] == self.module.split(".")[0]
            if own and issubclass(value, torch.optim.Optimizer) and name not in ("Optimizer", *self.left_out):
                yield Entry(f"{self.module}.{name}")
        yield from self.pairs

    def matching(self, match: str) -> Iterator[Entry]:
        """Those entries whose class's name matches the shell pattern."""
        return (entry for entry in self.entries() if fnmatch(entry.subject.rpartition(".")[2], match))


def _heavyball_without_compiling() -> None:
    """Its steps as they are written: compiling each of them takes minutes on a CPU."""
    settings: Any = importlib.import_module("heavyball.utils")
    settings.compile_mode = None


_CLOSURE = "its step needs a closure, and evaluates it more than once"
_WRAPS = "it wraps another optimizer or a model"
_SLOW = "its matrix factorisations would make the run long"

CATALOGUES: Mapping[str, Catalogue] = {
    "torch": Catalogue("torch.optim", left_out={"LBFGS": _CLOSURE}),
    "timm": Catalogue(
        "timm.optim",
        (
            Entry("timm.optim.AdamWLegacy", "torch.optim.AdamW"),
            Entry("timm.optim.SGDW", "torch.optim.SGD", {"momentum": 0.9, "nesterov": True}),
            Entry("timm.optim.NAdamLegacy", "torch.optim.NAdam"),
            Entry(
                "timm.optim.RMSpropTF", "reimpl.optim.RMSprop", {"lr": 0.01},
                {"alpha": 0.9, "eps": 1e-10, "eps_inside_sqrt": True},
            ),
        ),
        {"Lookahead": _WRAPS, "Adahessian": "it differentiates the gradients, which a graph must belong to"},
    ),
    "pytorch_optimizer": Catalogue(
        "pytorch_optimizer",
        (
            Entry("pytorch_optimizer.AdaDelta", "torch.optim.Adadelta"),
            Entry("pytorch_optimizer.AdaMax", "torch.optim.Adamax", {"lr": 0.002}),
            Entry("pytorch_optimizer.SGDW", "torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}),
        ),
        {"TRAC": _WRAPS, **dict.fromkeys(("Alice", "DASH", "SOAP", "SPlus", "Shampoo"), _SLOW)},
        implementations=("default", "forloop"),
    ),
    "heavyball": Catalogue(
        "heavyball",
        (
            Entry("heavyball.AdamW", "torch.optim.AdamW", {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0}),
            Entry("heavyball.SGD", "torch.optim.SGD", {"lr": 0.01}),
        ),
        {
            **dict.fromkeys(("SAMWrapper", "SplitOpt"), _WRAPS),
            **dict.fromkeys(
                (
                    "HeavyKLSOAP", "HeavyKLShampoo", "HeavySOAP", "HeavySOAPAdEMAMix", "HeavySOAPNAdam", "HeavySOLP",
                    "KLSOAP", "KLShampoo", "LATHER", "PSGDBase", "PSGDKron", "PSGDLRA", "PSGDPRO", "QSGD", "SOAP",
                    "SOAPAdEMAMix", "SOAPBase", "SOAPNAdam", "SOLP", "SUDSAdamW",
                ),
                _SLOW,
            ),
        },
        prepare=_heavyball_without_compiling,
    ),
}  # fmt: skip


def run_catalogue(catalogue: Catalogue, match: str, console: Console, json: Path | None = None) -> int:
    """Run every entry that matches, print the table, and write the results to ``json``; the exit status."""
    done: list[OptimizerComparison] = []
    not_run = {name: why for name, why in catalogue.left_out.items() if fnmatch(name, match)}
    catalogue.prepare()
    with console.status(catalogue.module) as status:
        for entry in catalogue.matching(match):
            status.update(entry.subject)
            try:
                done.append(_run(entry, catalogue.implementations))
            except (ValueError, TypeError) as error:
                not_run[entry.subject.rpartition(".")[2]] = str(error)
    if json is not None:
        write_json(json, [result.as_dict() for result in done])
    print(markdown(catalogue, done, not_run))
    return 0 if all(result.ok for result in done) else 1


def _run(entry: Entry, implementations: tuple[str, ...] | None) -> OptimizerComparison:
    """``kwargs`` of the entry go to both; the reference's own are added to them."""
    return compare_optimizers(
        load_optimizer(entry.subject),
        None if entry.against is None else load_optimizer(entry.against),
        kwargs=entry.kwargs,
        reference_kwargs=entry.against_kwargs,
        implementations=implementations,
    )


def markdown(catalogue: Catalogue, done: list[OptimizerComparison], not_run: Mapping[str, str]) -> str:
    """The table for one library: a row for each comparison, and what was not run."""
    package = catalogue.module.split(".")[0]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, CPU, {date.today().isoformat()}"
    title = versions if package == "torch" else f"{package} {version(package)}, {versions}"
    lines = [
        f"{title}:",
        "",
        "| class | against | cases | same bits | both refuse | parts | raises | where |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, done),
        "",
        *(f"- Not run: {names}: {why}" for why, names in _by_reason(not_run)),
    ]
    return "\n".join(lines)


def _by_reason(not_run: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in not_run.items():
        text = why.removeprefix(NOTHING_IN_COMMON).replace(f"{name}.", "").replace(f".{name}", "")
        reasons.setdefault(text, []).append(name)
    for why, names in reasons.items():
        yield why, ", ".join(f"`{name}`" for name in names)


def _row(result: OptimizerComparison) -> str:
    def count(status: str) -> int:
        return sum(outcome.status == status for outcome in result.outcomes)

    same = sum(outcome.status == "agrees" and outcome.bitwise for outcome in result.outcomes)
    name = result.subject.rpartition(".")[2]
    against = "itself" if result.subject == result.reference else f"`{_call(result)}`"
    where = "<br>".join(f"{kind.outcomes[0].status}: {kind.described()}" for kind in result.kinds()) or "—"
    counts = (len(result.outcomes), same, count("both refuse"), count("parts"), count("raises"))
    return f"| `{name}` | {against} | {' | '.join(map(str, counts))} | {where} |"


def _call(result: OptimizerComparison) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in result.reference_arguments.items())
    return f"{result.reference}({arguments})" if arguments else result.reference
