"""Shows a comparison of two optimizers in the terminal: what was run, where they part, what was left out."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reimpl.testing import OptimizerComparison, Outcome

_MARKS = {
    "both refuse": "[dim]both refuse[/]",
    "both leave": "[yellow]both leave[/]",
    "parts": "[bold red]parts[/]",
    "raises": "[bold red]raises[/]",
}
_GRAVITY = ("agrees", "both refuse", "both leave", "raises", "parts")


def print_comparison(result: OptimizerComparison, console: Console, *, everything: bool = False) -> None:
    """The grid of scenarios and implementations, the partings, what was skipped, and the headline."""
    console.print(f"[bold]{escape(_title(result))}[/]  [dim]torch {result.torch}, {result.device}[/]", highlight=False)
    console.print(_grid(result))
    if result.partings:
        _print_partings(result, console, everything)
    for skipped in result.skipped:
        console.print(f"[dim]{escape(str(skipped))}[/]", highlight=False)
    if result.random:
        console.print("[yellow]the subject draws random numbers; each step was seeded[/]")
    colour = "green" if result.ok else "red"
    console.print(f"[bold {colour}]{escape(result.headline())}[/]", highlight=False)


def _title(result: OptimizerComparison) -> str:
    def call(name: str, arguments: dict[str, str]) -> str:
        return f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})"

    subject = call(result.subject, result.subject_arguments)
    reference = call(result.reference, result.reference_arguments)
    return f"{subject} against {'its own plain for-loop' if subject == reference else reference}"


def _grid(result: OptimizerComparison) -> Table:
    """Rows are scenarios, columns implementations; a cell holds the worst over the dtypes."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    implementations = list(dict.fromkeys(outcome.implementation for outcome in result.outcomes))
    table.add_column("scenario")
    for name in implementations:
        table.add_column(name)
    for scenario in dict.fromkeys(outcome.scenario for outcome in result.outcomes):
        rows = [outcome for outcome in result.outcomes if outcome.scenario == scenario]
        table.add_row(scenario, *(_cell([r for r in rows if r.implementation == name]) for name in implementations))
    return table


def _cell(outcomes: list[Outcome]) -> str:
    worst = max(outcomes, key=lambda outcome: _GRAVITY.index(outcome.status), default=None)
    if worst is None:
        return ""
    if worst.status in ("parts", "raises") and len(outcomes) > 1:
        bad = sum(not outcome.ok for outcome in outcomes)
        return f"{_MARKS[worst.status]} [dim]{bad} of {len(outcomes)}[/]"
    if worst.status != "agrees" and all(outcome.status == worst.status for outcome in outcomes):
        return _MARKS[worst.status]
    agreeing = [outcome for outcome in outcomes if outcome.status == "agrees"]
    same = all(outcome.bitwise for outcome in agreeing)
    return "[green]same bits[/]" if same else f"[green]{max(o.ulp for o in agreeing):.2g} ulp[/]"


def _print_partings(result: OptimizerComparison, console: Console, everything: bool) -> None:
    console.print("\n[bold]Where they part[/]")
    for kind in result.kinds():
        shown = kind.outcomes if everything else kind.outcomes[:1]
        console.print(f"{_MARKS[shown[0].status]} {escape(kind.described())}", highlight=False)
        for outcome in shown:
            console.print(f"  {escape(str(outcome))}", highlight=False)
