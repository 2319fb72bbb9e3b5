"""What the demonstrations share: a command line, a figure, a result in words, a loop over minibatches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Result(Protocol):
    """What a demonstration returns: numbers that print as text and draw as a figure."""

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the result and writes it to ``path`` if given."""
        ...


class Settings(Protocol):
    """The flags of a demonstration."""

    out: Path


S = TypeVar("S", bound=Settings)
R = TypeVar("R", bound=Result)


def command_line(settings: type[S], run: Callable[[S], R], text: str | None, arguments: Sequence[str] | None) -> R:
    """Reads the flags, runs, prints the numbers and writes the figure.

    Args:
        settings: the flags, a dataclass.
        run: the demonstration.
        text: what ``--help`` says.
        arguments: the command line's, by default the process's.
    """
    try:
        import tyro
    except ImportError:
        sys.exit("a demonstration needs tyro and matplotlib: pip install 'reimpl[report]'")
    chosen = tyro.cli(settings, description=text, args=arguments)
    result = run(chosen)
    print(result)
    result.plot(chosen.out)
    print(f"figure: {chosen.out}")
    return result


def minibatches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of an epoch's batches, in a new random order; the remainder that fills no batch is left out."""
    order = torch.randperm(n, generator=generator)
    return iter(order[: n - n % size].split(size))


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Cross-entropy and error rate in evaluation mode; the mode is afterwards as it was."""
    training = model.training
    model.eval()
    logits = torch.cat([model(part) for part in x.split(500)])
    model.train(training)
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) != y).double().mean())


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns of text, numbers to three digits."""
    cells = [[c if isinstance(c, str) else f"{c:.3g}" for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)
