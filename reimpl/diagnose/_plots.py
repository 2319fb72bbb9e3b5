"""Figures: matplotlib, where it is installed, and files that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(columns: int = 1, *, width: float = 6.4, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes side by side, outside pyplot's global list.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib: pip install 'reimpl[plot]'; the numbers are there without it"
        ) from (error)
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    return figure, axes


def finish(figure: Figure, path: str | Path | None) -> Figure:
    """Writes ``figure`` to ``path``, if given, in the format of its suffix; written beside and renamed."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{os.getpid()}-{path.name}")
        try:
            figure.savefig(beside, dpi=150)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return figure
