r"""Runs any optimizer class beside a reference over the cases that break real ones, and says where the two part.

    python scripts/check_optimizer.py torch.optim.Adam                       against its own plain for-loop
    python scripts/check_optimizer.py timm.optim.RMSpropTF --against reimpl.optim.RMSprop \
        --set lr=0.01 --set against.eps_inside_sqrt=true --set against.alpha=0.9 --set against.eps=1e-10 \
        --set against.initial_accumulator_value=1
    python scripts/check_optimizer.py --catalogue timm                       the tables of docs/findings.md

--set takes key=value for both, subject.key=value or against.key=value for one; values are Python literals, true, false
or none. Exits with 0 where nothing parts, 1 where something does, 2 where the question cannot be put or nothing could
be compared. Into a file or a pipe, lines are as long as they need to be; COLUMNS=80 wraps them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from reimpl.testing import compare_optimizers, load_optimizer
from reimpl.testing.comparison import ALL_DTYPES
from reimpl.testing.recorder import write_json
from scripts._check_catalogue import CATALOGUES, run_catalogue
from scripts._check_tables import print_comparison
from scripts._environment import pick_device
from scripts._optimizers import parse_settings

_ROLES = ("subject", "against")


@dataclass(frozen=True)
class Options:
    """What is compared, how, and where the result goes."""

    subject: tyro.conf.Positional[str | None] = None
    """Dotted name of an optimizer class."""
    against: str | None = None
    """Dotted name of the reference; without it the subject's own plain for-loop."""
    set: tuple[str, ...] = ()
    """key=value for both, subject.key=value or against.key=value; may be given several times."""
    scenario: tuple[str, ...] = ()
    """Only these scenarios; may be given several times."""
    implementation: tuple[str, ...] = ()
    """Only these of default, forloop, foreach, fused, differentiable and capturable."""
    dtype: tuple[str, ...] = ()
    """Only these, as in float32."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    state: Literal["shared", "exact", "ignored"] = "shared"
    """Compare the state entries that both have, require the same entries, or look at parameters alone."""
    bitwise: bool = False
    """Allow no difference at all."""
    seed: int = 0
    """Of parameters and gradients."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write everything that was seen to this file."""
    all: bool = False
    """Show every parting, not the first of each kind."""
    catalogue: Literal["torch", "timm", "pytorch_optimizer", "heavyball"] | None = None
    """Run a whole library instead of one class, and print its table in Markdown."""
    match: str = "*"
    """Only the classes of the catalogue whose names match this shell pattern."""


def split_settings(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``("lr=0.1", "against.eps=1e-8")`` as keyword arguments of both, of the subject and of the reference.

    Raises:
        ValueError: an entry has no ``=``, no key before it, or a prefix that is neither ``subject`` nor ``against``.
    """
    found: dict[str, dict[str, Any]] = {"both": {}, **{role: {} for role in _ROLES}}
    for entry in entries:
        key, separator, value = entry.partition("=")
        role, dot, name = key.partition(".")
        if dot and role not in _ROLES:
            raise ValueError(f"--set takes key=value, subject.key=value or against.key=value, got {entry!r}")
        found[role if dot else "both"] |= parse_settings([f"{name if dot else key}{separator}{value}"])
    return found


def check(options: Options, console: Console) -> int:
    """Compare, print, write; the exit status.

    Raises:
        ValueError: a name, an argument or an option that is not known, or arguments that the class refuses.
        TypeError: a name that is no optimizer's, or an argument that the class does not take.
    """
    if options.subject is None:
        raise ValueError("name an optimizer class, as in torch.optim.Adam, or a --catalogue")
    settings = split_settings(options.set)
    with console.status(f"{options.subject} …"):
        result = compare_optimizers(
            load_optimizer(options.subject),
            None if options.against is None else load_optimizer(options.against),
            kwargs=settings["both"],
            subject_kwargs=settings["subject"],
            reference_kwargs=settings["against"],
            scenarios=options.scenario or None,
            implementations=options.implementation or None,
            dtypes=options.dtype or ALL_DTYPES,
            device=pick_device(options.device),
            state=options.state,
            bitwise=options.bitwise,
            seed=options.seed,
        )
    if options.json is not None:
        write_json(options.json, result.as_dict())
    print_comparison(result, console, everything=options.all)
    if not result.compared and not result.partings:
        return 2
    return 0 if result.ok else 1


def wide_console() -> Console:
    """A console as wide as the terminal; elsewhere wide enough for every line, unless ``COLUMNS`` says how wide."""
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=10_000)


def main(options: Options, console: Console) -> int:
    """Run what ``options`` ask for; the exit status, 2 with one line on the standard error for a bad question."""
    try:
        if options.catalogue is not None:
            return run_catalogue(CATALOGUES[options.catalogue], options.match, console, options.json)
        return check(options, console)
    except (ValueError, TypeError, OSError) as error:
        print(f"check_optimizer: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if not sys.flags.safe_path:  # a class of the current directory is found, as with python -m
        sys.path.insert(0, str(Path.cwd()))
    try:
        try:
            status = main(tyro.cli(Options, description=__doc__, config=(tyro.conf.UseAppendAction,)), wide_console())
        finally:
            sys.stdout.flush()  # --help leaves by SystemExit
    except BrokenPipeError:  # who read has seen enough, as in | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
