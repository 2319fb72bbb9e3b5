"""The report's figures: matplotlib drawings as inline SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath

from scripts._report_data import Comparison

# Stand-ins that the SVG is searched for afterwards: matplotlib wants a colour, the page wants a CSS variable.
INK, MUTED, GRID, OURS, TORCH, WARN, PAPER = (f"#01020{i}" for i in range(7))
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--line", OURS: "--ours", TORCH: "--torch", WARN: "--warn", PAPER: "--card",
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "reimpl",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "savefig.transparent": True,
}
#: Errors of exactly 0 have no place on a logarithmic axis; they are drawn here, in ulp.
_ZERO_ULP = 0.02
#: Errors beyond this, infinite ones included, are drawn here, in ulp.
_MOST_ULP = 1e7


def formula_svg(tex: str) -> str | None:
    r"""A formula as SVG paths in the text's colour, or ``None`` where matplotlib's mathtext cannot set it.

    It is broken at ``,\quad`` into several pictures, so that a narrow page can set them one below the other.
    """
    parts = [_equation_svg(part) for part in re.split(r",\s*\\q?quad\s*", tex) if part.strip()]
    return "".join(part for part in parts if part) if parts and all(parts) else None


@cache
def _equation_svg(tex: str, size: float = 19) -> str | None:
    try:
        outline = TextPath((0, 0), f"${tex}$", size=size, prop=FontProperties(math_fontfamily="stix"))
    except ValueError:
        return None
    box = outline.get_extents()
    left, bottom, width, height = box.x0 - 1, box.y0 - 1, box.width + 2, box.height + 2
    return (
        f'<svg class="formula" role="img" aria-label="{_escape(tex)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{left:.1f} {-(bottom + height):.1f} {width:.1f} {height:.1f}">'
        f'<path fill="currentColor" d="{_path_data(outline)}"/></svg>'
    )


def _path_data(outline: Outline) -> str:
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    parts = []
    for points, code in outline.iter_segments(simplify=False, curves=True):
        if code == Outline.CLOSEPOLY:
            parts.append("Z")
        else:  # SVG's y axis points down
            flipped = (f"{-v if i % 2 else v:.1f}" for i, v in enumerate(points))
            parts.append(letters[code] + " ".join(flipped))
    return "".join(parts)


def error_scatter(rows: Sequence[Comparison]) -> str:
    """Ours against PyTorch's distance from the oracle, a dot a comparison, one panel a device."""
    paired = [row for row in rows if row.torch_ulp is not None]
    devices = sorted({row.device for row in paired})
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, max(len(devices), 1), figsize=(4.6 * max(len(devices), 1), 4.3), squeeze=False, sharex=True, sharey=True
        )
        for axes, device in zip(panels[0], devices, strict=False):
            _scatter_panel(axes, [row for row in paired if row.device == device])
            axes.set_title(device.upper(), loc="left", fontsize=12)
        panels[0][0].set_ylabel("ours, ulp from the oracle")
        figure.tight_layout()
        return _svg(figure, "Error of ours against error of PyTorch's")


def _scatter_panel(axes: Axes, rows: Sequence[Comparison]) -> None:
    low = _ZERO_ULP / 2
    high = max(10.0, 3 * max(max(_place(row.ours_ulp), _place(row.torch_ulp)) for row in rows))
    line = np.geomspace(low, high, 200)
    axes.fill_between(line, np.maximum(2 * line, 4), high, color=WARN, alpha=0.10, linewidth=0)
    axes.plot(line, line, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    # Thousands of dots weigh megabytes and hide each other: one dot a cell, its area growing with what it stands for.
    cells = Counter((_cell(row.torch_ulp), _cell(row.ours_ulp), row.ok) for row in rows)
    for ok, colour, marker, size in ((True, OURS, "o", 9.0), (False, WARN, "X", 30.0)):
        chosen = [(theirs, ours, count) for (theirs, ours, passed), count in cells.items() if passed is ok]
        if chosen:
            theirs, ours, counts = np.array(chosen).T
            axes.scatter(theirs, ours, s=size * (1 + np.log2(counts)), c=colour, alpha=0.5, marker=marker, linewidths=0)
    ticks = [_ZERO_ULP, *(10.0**k for k in range(-1, 8, 1 if high < 1e4 else 2) if 10.0**k < high)]
    labels = ["0", *(f"{t:g}" if t < 1e4 else f"1e{round(math.log10(t))}" for t in ticks[1:])]
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel("PyTorch's, ulp from the oracle")
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    axes.minorticks_off()
    axes.text(0.97, 0.05, "ours nearer", transform=axes.transAxes, ha="right", color=MUTED, fontsize=10)
    axes.text(0.04, 0.93, "beyond the limit", transform=axes.transAxes, color=WARN, fontsize=10)


def loss_curves(runs: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """For each optimizer the two losses over the steps, ours on top of PyTorch's, and their difference below."""
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            2, len(runs), figsize=(4.6 * len(runs), 4.4), squeeze=False, sharex=True,
            gridspec_kw={"height_ratios": [3, 1]},
        )  # fmt: skip
        for (above, below), (name, ours, theirs) in zip(panels.T, runs, strict=True):
            steps = np.arange(1, len(ours) + 1)
            above.plot(steps, theirs, color=TORCH, linewidth=6, alpha=0.35, solid_capstyle="round", label="PyTorch")
            above.plot(steps, ours, color=OURS, linewidth=1.8, label="ours")
            above.set_title(name, loc="left", fontsize=12)
            above.legend(loc="upper right")
            below.plot(steps, np.subtract(ours, theirs), color=OURS, linewidth=1.2)
            below.set_xlabel("step")
            if list(ours) == list(theirs):
                below.set_ylim(-1, 1)
                below.set_yticks([0])
        panels[0][0].set_ylabel("training loss")
        panels[1][0].set_ylabel("difference")
        figure.align_ylabels()
        figure.tight_layout()
        return _svg(figure, "Training loss of ours and PyTorch's")


def _place(ulp: float | None) -> float:
    """Where an error stands on the logarithmic axis."""
    return min(max(ulp or 0.0, _ZERO_ULP), _MOST_ULP)


def _cell(ulp: float | None) -> float:
    """The middle of the error's cell, twenty to a decade."""
    return 10 ** (round(20 * math.log10(_place(ulp))) / 20)


def _svg(figure: Figure, label: str) -> str:
    """The figure as an ``<svg>`` element for a page: its ids made unique, its colours the page's variables."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"(href=\"#|url\(#)", rf"\1{prefix}-", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{_escape(label)}"', 1)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
