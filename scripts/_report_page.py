"""Turns what was measured into one self-contained HTML page, written atomically."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scripts._report_data import KIND_TITLES, Card, Comparisons, Line, dtype_rank
from scripts._report_plots import error_scatter, formula_svg, loss_curves
from scripts._report_training import CurvePair
from scripts.step_times import EVERY_WORKLOAD, StepTimes

TEMPLATES = Path(__file__).parent / "templates"
_LANES = (
    ("ours fused", "c-ours"), ("torch fused", "c-torch"), ("torch foreach", "c-each"), ("torch for-loop", "c-loop"),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something that kept the report from being whole: a title and what was said."""

    title: str
    detail: str = ""


@dataclass
class Report:
    """Everything the page shows; what was not measured is empty."""

    header: Mapping[str, Any]
    cards: Sequence[Card] = ()
    steps: Sequence[StepTimes] = ()
    training: Sequence[CurvePair] = ()
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0
    load: float = 0.0  # runnable processes a core, when the steps had been timed
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def total(self) -> Comparisons:
        """All comparisons."""
        return Comparisons(row for card in self.cards for row in card.all.rows)

    @property
    def ok(self) -> bool:
        """Whether everything ran and every comparison keeps its limit."""
        return not self.problems and self.total.ok and len(self.total) > 0

    @property
    def fastest(self) -> StepTimes | None:
        """The step with the greatest lead over PyTorch's best, if there is a lead at all."""
        best = min(self.steps, key=lambda step: step.ratio, default=None)
        return best if best is not None and best.ratio < 1 and not self.busy else None

    @property
    def busy(self) -> bool:
        """Whether something else must have been running while the steps were timed.

        On an idle machine the quartiles lie within some tens of per cent of each other, and the load is that of the
        timed threads alone.
        """
        spreads = [step.timings.quartiles(name) for step in self.steps for name in step.timings.names]
        return self.load > 1.5 or sum(third > 1.5 * first for first, _, third in spreads) > len(spreads) / 4

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        if not len(self.total):
            return "Nothing was compared"
        if self.total.failed:
            return f"{len(self.total.failed):,} of {len(self.total):,} comparisons are beyond their limit"
        return f"{len(self.cards)} techniques, {len(self.total):,} comparisons, all within their limit"


def render(report: Report) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["ulp"] = format_ulp
    environment.filters["small"] = _format_small
    total = report.total
    kinds = {card.declaration["kind"] for card in report.cards}
    return environment.get_template("report.html.j2").render(
        css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        js=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        header=report.header,
        ok=report.ok,
        verdict=_verdict(report),
        headline=report.headline,
        problems=report.problems,
        total=total if len(total) else None,
        devices=sorted({row.device for row in total.rows}),
        scatter=Markup(error_scatter(total.rows)) if total.paired else "",
        cards=[_card(card) for card in report.cards],
        kinds=[{"key": key, "title": title} for key, title in KIND_TITLES.items() if key in kinds],
        speed=_speed(report.steps),
        threads=report.threads if report.steps else None,
        fastest=report.fastest,
        busy=report.busy,
        training=_training(report.training),
        environment=_environment(report),
    )


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)  # mkstemp's own mode lets nobody else read the page
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def format_ulp(value: float | None) -> str:
    """An error in ulp with two or three significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "∞"
    if value >= 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2f}"


def format_seconds(seconds: float) -> str:
    """Seconds as s, ms or µs with three significant digits."""
    if seconds >= 0.9995:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _format_small(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else "∞"


def _verdict(report: Report) -> str:
    if report.ok:
        return "everything agrees"
    return "does not agree" if report.total.failed else "incomplete"


def _card(card: Card) -> dict[str, Any]:
    declaration = card.declaration
    dialects = " ".join(f"{d['id'] or ''} {d['description']} {d['arguments']}" for d in declaration["dialects"])
    words = f"kind:{declaration['kind']} {card.name} {' '.join(declaration['ids'])} {declaration['source']} {dialects}"
    formula = formula_svg(declaration["formula"])
    return {
        "name": card.name,
        "declaration": declaration,
        "all": card.all,
        "lines": card.lines,
        **_grid(card),
        "dialects": [_dialect(card, dialect) for dialect in declaration["dialects"]],
        "words": words.lower(),
        "formula": None if formula is None else Markup(formula),
    }


def _dialect(card: Card, dialect: Mapping[str, Any]) -> dict[str, Any]:
    measured = Comparisons(row for row in card.all.rows if row.case == dialect["description"])
    return {**dialect, "ours_ulp": measured.ours_ulp, "ok": measured.ok}


def _grid(card: Card) -> dict[str, Any]:
    """The card's lines as a table: a row an execution and device, a column a dtype."""
    dtypes = sorted({line.dtype for line in card.lines}, key=dtype_rank)
    return {
        "dtypes": dtypes,
        "grid": [*_grid_rows(card.lines, dtypes), *_grid_rows(card.beside, dtypes, beside=True)],
    }


def _grid_rows(lines: Sequence[Line], dtypes: Sequence[str], beside: bool = False) -> list[dict[str, Any]]:
    cells = {(line.device, line.execution, line.dtype): line.all for line in lines}
    return [
        {
            "device": device,
            "execution": f"torch {execution}" if beside else execution,
            "beside": beside,
            "cells": [cells.get((device, execution, dtype)) for dtype in dtypes],
        }
        for device, execution in dict.fromkeys((line.device, line.execution) for line in lines)
    ]


def _speed(steps: Sequence[StepTimes]) -> list[dict[str, Any]]:
    """One group a workload and device, its bars drawn to one scale."""
    groups = []
    for device in dict.fromkeys(step.device for step in steps):
        for workload in dict.fromkeys(step.workload for step in steps):
            members = [step for step in steps if (step.device, step.workload) == (device, workload)]
            if members:
                longest = max(step.timings.median(name) for step in members for name in step.timings.names)
                load = EVERY_WORKLOAD[workload]
                groups.append(
                    {
                        "workload": workload,
                        "device": device.upper(),
                        "description": f"{len(load.shapes):,} parameters, {load.numel:,} numbers",
                        "steps": [_step(step, longest) for step in members],
                    }
                )
    return groups


def _step(step: StepTimes, longest: float) -> dict[str, Any]:
    lanes = []
    for name, css in _LANES:
        if name in step.timings.names:
            first, median, third = step.timings.quartiles(name)
            lanes.append(
                {
                    "ours": name.startswith("ours"),
                    "css": css,
                    "share": median / longest,
                    "text": format_seconds(median),
                    "title": f"{name}: {format_seconds(first)} to {format_seconds(third)}",
                }
            )
    return {"optimizer": step.optimizer, "verdict": speed_verdict(step), "lanes": lanes}


def speed_verdict(step: StepTimes) -> str:
    """Ours against PyTorch's best in words."""
    if 0.95 <= step.ratio <= 1.05:
        return "level"
    times = max(step.ratio, 1 / step.ratio)
    return f"{times:.{0 if times >= 10 else 1}f}× as {'fast' if step.ratio < 1 else 'long'}"


def _training(runs: Sequence[CurvePair]) -> dict[str, Any] | None:
    if not runs:
        return None
    same = all(run.difference == 0 for run in runs)
    return {
        "title": "Two curves, one line" if same else "Two curves",
        "text": runs[0].description,
        "plot": Markup(loss_curves([(run.optimizer, run.ours, run.theirs) for run in runs])),
        "runs": runs,
    }


def _environment(report: Report) -> list[tuple[str, str]]:
    header = report.header
    names = ("date", "torch", "numpy", "python", "cuda", "cpu", "platform")
    rows = [(name, str(header[name])) for name in names if header.get(name) is not None]
    rows.append(("threads", f"{header['threads']} a process of the parity suite, {report.threads} for the step times"))
    rows.append(("devices", ", ".join(header["devices"])))
    if report.seconds:
        rows.append(("report made in", f"{report.seconds:.0f} s"))
    return rows
