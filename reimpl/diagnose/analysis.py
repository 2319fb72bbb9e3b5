"""``error_analysis`` and ``label_noise``: what a look at some errors says about all of them (catalogue D7)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from reimpl.diagnose._plots import finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cause:
    """A cause of errors: how often it was seen, its ``share`` of the errors, and its ``ceiling``.

    ``interval`` and ``ceiling_interval`` are Wilson's; the ceiling is by how much the error falls if the cause is
    removed altogether, in the unit of the error.
    """

    name: str
    count: int
    share: float
    interval: tuple[float, float]
    ceiling: float
    ceiling_interval: tuple[float, float]


@dataclass(frozen=True)
class ErrorAnalysis:
    """The causes, the most frequent first; ``print`` it for a table."""

    causes: tuple[Cause, ...]
    examined: int
    error: float
    confidence: float

    def __getitem__(self, name: str) -> Cause:
        return next(cause for cause in self.causes if cause.name == name)

    def __str__(self) -> str:
        width = max([5, *(len(cause.name) for cause in self.causes)])
        interval = f"{self.confidence:.0%} interval"
        head = f"{'cause':{width}}  of {self.examined:<5} share   {interval:17} error falls by at most"
        lines = [
            f"{c.name:{width}}  {c.count:<8} {c.share:6.1%}  {c.interval[0]:6.1%} to {c.interval[1]:6.1%}   "
            f"{c.ceiling:.3g} of {self.error:.3g} ({c.ceiling_interval[0]:.3g} to {c.ceiling_interval[1]:.3g})"
            for c in self.causes
        ]
        return "\n".join([head, *lines])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the shares with their intervals, and writes the figure to ``path`` if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, (ax,) = new_figure()
        causes = self.causes[::-1]
        below = [100 * (c.share - c.interval[0]) for c in causes]
        above = [100 * (c.interval[1] - c.share) for c in causes]
        ax.barh([c.name for c in causes], [100 * c.share for c in causes], xerr=[below, above], capsize=3)
        ax.set(title=f"Causes of {self.examined} errors", xlabel=f"% of errors, {self.confidence:.0%} interval")
        return finish(figure, path)


def error_analysis(
    causes: Mapping[str, int] | Iterable[Collection[str]],
    *,
    error: float,
    examined: int | None = None,
    confidence: float = 0.95,
) -> ErrorAnalysis:
    r"""What share of a model's errors each cause has, and what removing it can gain at most.

    .. math::
        \hat p = \frac{k}{n}, \qquad
        p_\pm = \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}, \qquad
        \text{ceiling} = \hat p \cdot \text{error}

    The interval is Wilson's, which also holds for few errors and for shares near 0 and 1. An error may have several
    causes, so shares need not sum to 1, and ceilings do not add up.

    Args:
        causes: how many of the errors looked at have each cause (then ``examined`` is needed), or for each of these
            errors the collection of its causes, empty where none is known.
        error: the model's error rate on the set that the errors are from, a share or per cent.
        examined: n, the number of errors looked at, drawn at random; about 100 will do.
        confidence: of the intervals.

    Raises:
        ValueError: no error was looked at, a cause was counted more often than errors were, a number is out of range.
        TypeError: a count is no whole number; an error's causes are a string, not a collection of them.

    Source: D7 (N4). E. Wilson, *Probable inference, the law of succession, and statistical inference*, 1927.
    """
    if isinstance(causes, Mapping):
        if examined is None:
            raise ValueError("examined must say how many errors were looked at where causes are counts")
        for name, count in (*causes.items(), ("examined", examined)):
            if not isinstance(count, Integral):
                raise TypeError(f"{name!r} must be counted in whole numbers, got {count!r}")
        counts = Counter(dict(causes))
    else:
        tags = list(causes)
        if any(isinstance(tag, str) for tag in tags):
            raise TypeError("causes must hold a collection of names for each error, got a string")
        if examined is not None and examined != len(tags):
            raise ValueError(f"examined is {examined}, but causes are of {len(tags)} errors")
        examined, counts = len(tags), Counter(name for tag in tags for name in set(tag))
    if examined < 1:
        raise ValueError(f"at least one error must be looked at, got {examined}")
    if not (math.isfinite(error) and 0 <= error <= 100):
        raise ValueError(f"error must be an error rate, a share or per cent from 0 to 100, got {error}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    for name, count in counts.items():
        if not 0 <= count <= examined:
            raise ValueError(f"{name!r} must be the cause of 0 to {examined} errors, as many as looked at, got {count}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    found = [_cause(name, count, examined, error, z) for name, count in counts.most_common()]
    return ErrorAnalysis(tuple(found), examined, error, confidence)


def _cause(name: str, count: int, n: int, error: float, z: float) -> Cause:
    share = count / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    low, high = (0.0 if count == 0 else low), (1.0 if count == n else high)  # exact there, but for rounding
    return Cause(name, count, share, (low, high), share * error, (low * error, high * error))


@dataclass(frozen=True)
class LabelNoise:
    """What wrong labels hide.

    Attributes:
        share: the part of the best model's error that wrong labels may be.
        undecided: pairs of models, by position, whose errors differ by less than the labels are wrong.
        matters: whether the labels should be corrected.
    """

    share: float
    undecided: tuple[tuple[int, int], ...]
    matters: bool

    def __str__(self) -> str:
        pairs = ", ".join(f"{i} and {j}" for i, j in self.undecided)
        hidden = f"; which is better cannot be told of models {pairs}" if pairs else ""
        act = "correct the labels of dev and test, both" if self.matters else "let them be"
        return f"wrong labels are up to {self.share:.0%} of the error{hidden}: {act}"


def label_noise(noise: float, errors: Sequence[float], *, share: float = 0.1) -> LabelNoise:
    """Whether wrong labels in dev and test sets matter to the choice between models.

    They do where two models differ by less than the labels are wrong, or where the labels make up more than ``share``
    of the best model's error. Of an error of 10%, wrong labels of 0.6% are a sixteenth; of 2% a third, and they hide
    whether 2.1 or 1.9% is better. Random errors in training labels are borne well and are not meant here.

    Args:
        noise: the share of examples whose label is wrong, in the unit of ``errors``.
        errors: of one model or several.
        share: of the error that may be the labels' without mattering.

    Raises:
        ValueError: there is no error, or a number is negative or not finite.

    Source: D7 (N4). The threshold of a tenth is this library's choice.
    """
    if not errors:
        raise ValueError("errors must hold that of one model at least, got none")
    for name, value in [("noise", noise), *(("errors", error) for error in errors)]:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    pairs = [(i, j) for i in range(len(errors)) for j in range(i + 1, len(errors))]
    undecided = tuple((i, j) for i, j in pairs if abs(errors[i] - errors[j]) < noise)
    best = min(errors)
    part = min(1.0, noise / best) if best else float(noise > 0)
    return LabelNoise(part, undecided, bool(undecided) or part > share)
