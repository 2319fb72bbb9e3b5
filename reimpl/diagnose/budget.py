"""``error_budget``: where a model's errors come from, and what to do about it first (catalogue D6, D16)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reimpl.diagnose._plots import finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Problem = Literal["bias", "variance", "data mismatch", "overfitting of dev"]

# In the order in which they are to be solved, one knob at a time: fit train, then dev, then test.
_ADVICE: Mapping[Problem, tuple[str, ...]] = {
    "bias": (
        "train a larger or deeper network",
        "train longer, or with a better optimizer or learning rate",
        "try another architecture",
        "regularise less",
        "do not collect more data: they do not cure bias",
    ),
    "variance": (
        "collect more training data, or augment those there are (flips, shifts, crops)",
        "regularise: L2, dropout, early stopping",
        "try another architecture",
    ),
    "data mismatch": (
        "look at errors to see how dev differs from the training data (error_analysis)",
        "collect training data that look like dev",
        "make some: mix what dev has into the training data (data.Mix), in many variations, as few are soon overfitted",
    ),
    "overfitting of dev": (
        "enlarge the dev set: choices were fitted to the one there is",
        "renew it, and choose again",
    ),
}
_FITTED = (
    "every gap is closed: use the model in the world",
    "where it disappoints there, change the metric (cost_weighted_error) or the dev and test sets",
)


@dataclass(frozen=True)
class ErrorBudget:
    """A model's error divided by its causes, all numbers in the unit of the errors given.

    Attributes:
        gaps: what each cause adds; negative where a set is easier than the one before.
        problems: the causes that add much, in the order in which to solve them.
        errors: the errors that the gaps are between, by name.
    """

    gaps: Mapping[Problem, float]
    problems: tuple[Problem, ...]
    errors: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """The problems in words."""
        return " and ".join(f"high {p}" if p in ("bias", "variance") else p for p in self.problems) or "no problem"

    @property
    def advice(self) -> tuple[str, ...]:
        """What to try next: the first problem's remedies alone, since one knob is turned at a time."""
        return _ADVICE[self.problems[0]] if self.problems else _FITTED

    def __str__(self) -> str:
        names = list(self.errors)
        lines = [f"{names[0]:24}{self.errors[names[0]]:8.4g}"]
        for name, (cause, gap) in zip(names[1:], self.gaps.items()):
            lines.append(f"{name:24}{self.errors[name]:8.4g}   {cause} {gap:+.4g}")
        if self.gaps["bias"] < 0:
            lines.append("better than humans: how much bias can be avoided is not known")
        lines += [f"verdict: {self.verdict}", "next:", *(f"  - {step}" for step in self.advice)]
        return "\n".join([*lines, *([f"then: {', '.join(self.problems[1:])}"] if len(self.problems) > 1 else [])])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the errors as steps and the gaps between them, and writes the figure to ``path`` if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, (ax,) = new_figure()
        names, values = list(self.errors), list(self.errors.values())
        ax.bar(names, values, color="0.8")
        for position, (cause, gap) in enumerate(self.gaps.items(), start=1):
            color = "C3" if cause in self.problems else "C0"
            ax.bar(names[position], gap, bottom=values[position - 1], color=color)
            ax.annotate(f"{cause}\n{gap:+.3g}", (position, max(values[position - 1 : position + 1])), ha="center")
        ax.set(title=self.verdict, ylabel="error")
        ax.margins(y=0.2)
        return finish(figure, path)


def error_budget(
    train: float,
    dev: float,
    *,
    train_dev: float | None = None,
    test: float | None = None,
    human: float | Iterable[float] = 0.0,
    relative: float = 0.5,
) -> ErrorBudget:
    """Divides a model's error into avoidable bias, variance, data mismatch and overfitting of the dev set.

    - avoidable bias = train - human
    - variance = train-dev - train; where the sources are one, dev - train
    - data mismatch = dev - train-dev
    - overfitting of dev = test - dev

    A gap is a problem where it is above 0 and at least ``relative`` times the largest. The human error stands for the
    best that can be reached (Bayes'), which it bounds from above; of several the smallest is taken, an expert team's
    rather than a layman's.

    Args:
        train, dev: error rates on the training and dev sets, as shares or per cent, all in the same unit.
        train_dev: on data of the training set's source that were not trained on; needed where dev is of another source
            (:func:`reimpl.data.split` makes one).
        test: on the test set.
        human: of humans, one or several.
        relative: how large a gap must be beside the largest to count.

    Raises:
        ValueError: an error is negative, above 100 or not finite; no human error; ``relative`` is outside (0, 1].
        TypeError: an error is no number.

    Source: D6, D16 (N4). The note calls 10/11/20 bias and variance; its gap of 9 is the mismatch.
    """
    if not 0 < relative <= 1:
        raise ValueError(f"relative must lie in (0, 1], got {relative}")
    humans = list(human) if isinstance(human, Iterable) else [human]
    if not humans:
        raise ValueError("human must be an error or several, got none")
    for name, error in [("human", h) for h in humans] + [("train", train), ("dev", dev)]:
        _check(name, error)
    errors = {"human": min(humans), "train": train}
    causes: list[Problem] = ["bias", "variance"]
    if train_dev is not None:
        _check("train_dev", train_dev)
        errors["train-dev"] = train_dev
        causes.append("data mismatch")
    errors["dev"] = dev
    if test is not None:
        _check("test", test)
        errors["test"] = test
        causes.append("overfitting of dev")
    values = list(errors.values())
    gaps = {cause: high - low for cause, low, high in zip(causes, values, values[1:])}
    least = relative * max(gaps.values())
    problems = tuple(cause for cause, gap in gaps.items() if gap > 0 and gap >= least)
    return ErrorBudget(gaps, problems, errors)


def _check(name: str, error: float) -> None:
    expected = "must be an error rate, a share or per cent from 0 to 100"
    try:
        finite = math.isfinite(error)
    except TypeError:
        raise TypeError(f"{name} {expected}, got {error!r}") from None
    if not (finite and 0 <= error <= 100):
        raise ValueError(f"{name} {expected}, got {error}")
