"""``learning_curve``: train and dev error over epochs or over data, and whether they part (catalogue D19)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from torch import Tensor

from reimpl.diagnose._plots import finish, new_figure
from reimpl.diagnose.budget import ErrorBudget, error_budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = Sequence[float] | Sequence[Sequence[float]] | np.ndarray[Any, Any] | Tensor
Over = Literal["epochs", "examples"]


@dataclass(frozen=True)
class LearningCurve:
    """Errors at several points of training.

    Attributes:
        x: the points, epochs or numbers of examples, ascending.
        train, dev: the mean error at each.
        train_std, dev_std: their standard deviation over repetitions, 0 where there is one.
        over: what ``x`` counts.
        best: the position of the lowest dev error, the first of equals.
        overfits: whether, over epochs, the dev error has risen since by more than ``tolerance`` times itself while the
            training error has not.
    """

    x: tuple[float, ...]
    train: tuple[float, ...]
    dev: tuple[float, ...]
    train_std: tuple[float, ...]
    dev_std: tuple[float, ...]
    over: Over
    best: int
    overfits: bool

    @property
    def gap(self) -> float:
        """Dev error less training error at the end."""
        return self.dev[-1] - self.train[-1]

    def budget(self, human: float | Iterable[float] = 0.0) -> ErrorBudget:
        """Bias and variance at the end; over data, bias says that more of them will not help."""
        return error_budget(self.train[-1], self.dev[-1], human=human)

    def __str__(self) -> str:
        lowest, train, dev = (f"{error:.4g}" for error in (self.dev[self.best], self.train[-1], self.dev[-1]))
        if self.best == len(self.x) - 1:
            return f"dev error lowest at the end, {self._at(-1)}: train {train}, dev {dev}"
        text = f"dev error lowest {self._at(self.best)}: {lowest}; at the end, {self._at(-1)}: train {train}, dev {dev}"
        return f"{text}\noverfits from {self._at(self.best).removeprefix('at ')} on" if self.overfits else text

    def _at(self, position: int) -> str:
        """A point in words."""
        x = self.x[position]
        number = f"{x:,.0f}" if x.is_integer() else f"{x:g}"
        return f"at epoch {number}" if self.over == "epochs" else f"with {number} examples"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws both curves with their deviations, and writes the figure to ``path`` if given.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure, (ax,) = new_figure()
        for name, mean, std in (("train", self.train, self.train_std), ("dev", self.dev, self.dev_std)):
            ax.plot(self.x, mean, label=name)
            below, above = ([m + sign * s for m, s in zip(mean, std)] for sign in (-1, 1))
            ax.fill_between(self.x, below, above, alpha=0.2)
        ax.axvline(self.x[self.best], color="0.6", linestyle=":", label="lowest dev error")
        ax.set(xlabel=self.over, ylabel="error", title="overfitted" if self.overfits else "")
        ax.legend()
        return finish(figure, path)


def learning_curve(
    train: Values, dev: Values, x: Sequence[float] | None = None, *, over: Over = "epochs", tolerance: float = 0.05
) -> LearningCurve:
    """Puts train and dev errors over epochs, or over numbers of examples, side by side and names overfitting.

    Over data, train once for each size: ``learning_curve(*zip(*map(errors_of, sizes)), sizes, over="examples")`` where
    ``errors_of(size)`` returns train and dev error. scikit-learn's ``learning_curve`` returns scores in the shape that
    is taken here: ``learning_curve(1 - train_scores, 1 - test_scores, sizes, over="examples")``.

    Args:
        train, dev: errors or losses, one a point, or (points, repetitions), which are averaged.
        x: epochs or numbers of examples, ascending; by default 1, 2, 3, …
        over: ``"epochs"`` or ``"examples"``.
        tolerance: by what share of the lowest dev error it must rise to be called overfitting.

    Raises:
        ValueError: there is no point; lengths differ; an error is not finite (the text says where); ``x`` does not
            ascend; ``over`` is unknown.

    Source: D19 (N1, N2). scikit-learn: ``learning_curve``.
    """
    if over not in get_args(Over):
        raise ValueError(f"over must be one of {get_args(Over)}, got {over!r}")
    (train_mean, train_std), (dev_mean, dev_std) = _values("train", train), _values("dev", dev)
    points = [float(value) for value in (range(1, len(dev_mean) + 1) if x is None else x)]
    for name, length in (("train", len(train_mean)), ("x", len(points))):
        if length != len(dev_mean):
            raise ValueError(f"{name} must have as many points as dev, {len(dev_mean)}, got {length}")
    if not all(a < b for a, b in pairwise(points)):
        raise ValueError(f"x must ascend, got {points}")
    best = int(np.argmin(dev_mean))
    risen = dev_mean[-1] > dev_mean[best] * (1 + tolerance)
    overfits = over == "epochs" and risen and train_mean[-1] <= train_mean[best]
    means = tuple(map(float, train_mean)), tuple(map(float, dev_mean))
    deviations = tuple(map(float, train_std)), tuple(map(float, dev_std))
    return LearningCurve(tuple(points), *means, *deviations, over, best, bool(overfits))


def _values(name: str, values: Values) -> tuple[Any, Any]:
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"{name} must hold errors, (points,) or (points, repetitions), got shape {array.shape}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name} must be finite, got {array[tuple(bad[0])]} at point {bad[0][0]}")
    rows = array.reshape(len(array), -1)
    return rows.mean(axis=1), rows.std(axis=1)
