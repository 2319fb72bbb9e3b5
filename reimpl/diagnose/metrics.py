"""One number to choose by: F1, one metric under constraints, errors weighted by cost (catalogue D8, D17)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor

Labels = Tensor | np.ndarray[Any, Any] | Sequence[int]
Average = Literal["binary", "micro", "macro", "weighted"]


@overload
def f1_score(
    target: Labels, prediction: Labels, *, average: Average = ..., positive: int = ..., zero_division: float = ...
) -> float: ...
@overload
def f1_score(
    target: Labels, prediction: Labels, *, average: None, positive: int = ..., zero_division: float = ...
) -> Tensor: ...
def f1_score(
    target: Labels,
    prediction: Labels,
    *,
    average: Average | None = "binary",
    positive: int = 1,
    zero_division: float = 0.0,
) -> float | Tensor:
    r"""The harmonic mean of precision and recall.

    .. math:: F_1 = \frac{2 \, \text{tp}}{2 \, \text{tp} + \text{fp} + \text{fn}}

    Args:
        target: true labels, integers or booleans of any shape.
        prediction: predicted labels of the same shape.
        average: ``"binary"`` is F1 of the class ``positive``; ``"macro"`` the mean over the classes, ``"weighted"``
            that by their number of targets, ``"micro"`` F1 of the counts of all classes together (with one label an
            example, the accuracy); ``None`` every class's own.
        positive: the label that counts as positive.
        zero_division: the value where there is no positive label and none was predicted, so that 0 is divided by 0.

    Returns:
        A number; for ``average=None`` a float64 tensor, one for each label in ascending order that is in either.

    Raises:
        ValueError: there is no example; shapes differ; ``average`` is unknown; ``"binary"`` and more than two labels,
            or two of which neither is ``positive``.
        TypeError: labels that are neither integers nor booleans.

    Source: D8 (N4). scikit-learn: ``f1_score``, which has ``pos_label`` for ``positive``.
    """
    if average is not None and average not in get_args(Average):
        raise ValueError(f"average must be one of {get_args(Average)} or None, got {average!r}")
    true, guessed = _labels("target", target), _labels("prediction", prediction)
    _same_shape(true, guessed)
    classes, index = torch.cat([true.flatten(), guessed.flatten()]).unique(return_inverse=True)
    true, guessed = index[: true.numel()], index[true.numel() :]
    count = len(classes)
    right = torch.bincount(true[true == guessed], minlength=count)
    wanted, given = (torch.bincount(x, minlength=count) for x in (true, guessed))
    scores = 2 * right.double() / (wanted + given)  # 2 tp + fp + fn, which no class that occurs has at 0
    if average == "binary":
        names = classes.tolist()
        if count > 2 or (count == 2 and positive not in names):
            raise ValueError(f'average="binary" needs two labels, of which positive={positive} is one, got {names}')
        return float(scores[names.index(positive)]) if positive in names else float(zero_division)
    if average == "micro":
        return float(2 * right.sum().double() / (wanted + given).sum())
    if average == "macro":
        return float(scores.mean())
    if average == "weighted":
        return float((scores * wanted).sum() / wanted.sum())
    return scores


def _labels(name: str, labels: Labels) -> Tensor:
    x = labels.detach() if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    if not x.numel():
        raise ValueError(f"{name} must hold at least one label, got shape {tuple(x.shape)}")
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"{name} must hold labels, integers or booleans, got {x.dtype}")
    return x.long()


def _same_shape(target: Tensor, prediction: Tensor) -> None:
    if target.shape != prediction.shape:
        raise ValueError(f"prediction must have target's shape {tuple(target.shape)}, got {tuple(prediction.shape)}")


@dataclass(frozen=True)
class Selection:
    """The candidate chosen: its ``name`` and metrics, who else was ``feasible``, and why the others were not."""

    name: str
    metrics: Mapping[str, float]
    feasible: tuple[str, ...]
    rejected: Mapping[str, str]

    def __str__(self) -> str:
        metrics = ", ".join(f"{name} {value:g}" for name, value in self.metrics.items())
        return "\n".join([f"{self.name}: {metrics}", *(f"not {name}: {why}" for name, why in self.rejected.items())])


def select(
    candidates: Mapping[str, Mapping[str, float]],
    *,
    maximize: str | None = None,
    minimize: str | None = None,
    at_most: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
) -> Selection:
    """Chooses the candidate that is best by one metric among those that satisfy bounds on others.

    .. code-block:: python

        models = {"A": {"F1": 90, "ms": 80}, "B": {"F1": 92, "ms": 95}, "C": {"F1": 95, "ms": 1500}}
        select(models, maximize="F1", at_most={"ms": 100}).name  # B

    Args:
        candidates: each one's metrics by name.
        maximize, minimize: the metric to choose by; exactly one is given. Of equals the first is chosen.
        at_most, at_least: bounds by metric, themselves allowed.

    Raises:
        ValueError: there is no candidate, or none within the bounds (the text says what each violates); not exactly
            one metric to choose by; a metric is NaN.
        KeyError: a candidate lacks a metric.

    Source: D8 (N4).
    """
    if not candidates:
        raise ValueError("candidates must hold at least one, got none")
    metric = maximize if maximize is not None else minimize
    if metric is None or (maximize is not None and minimize is not None):
        raise ValueError(f"give one of maximize and minimize, got maximize={maximize!r}, minimize={minimize!r}")
    upper, lower = dict(at_most or {}), dict(at_least or {})
    rejected: dict[str, str] = {}
    for name, metrics in candidates.items():
        missing = [m for m in (metric, *upper, *lower) if m not in metrics]
        if missing:
            raise KeyError(f"candidate {name!r} has no metric {missing[0]!r}; it has {', '.join(metrics)}")
        unknown = [m for m in (metric, *upper, *lower) if math.isnan(metrics[m])]
        if unknown:
            raise ValueError(f"metric {unknown[0]!r} of candidate {name!r} is NaN")
        broken = [f"{m} {metrics[m]:g} is above {bound:g}" for m, bound in upper.items() if metrics[m] > bound]
        broken += [f"{m} {metrics[m]:g} is below {bound:g}" for m, bound in lower.items() if metrics[m] < bound]
        if broken:
            rejected[name] = ", ".join(broken)
    feasible = tuple(name for name in candidates if name not in rejected)
    if not feasible:
        reasons = "; ".join(f"{name}: {why}" for name, why in rejected.items())
        raise ValueError(f"no candidate is within the bounds: {reasons}")
    sign = 1 if maximize is not None else -1
    best = max(feasible, key=lambda name: sign * candidates[name][metric])
    return Selection(best, candidates[best], feasible, rejected)


def cost_weighted_error(
    target: Labels, prediction: Labels, cost: Tensor | np.ndarray[Any, Any] | Sequence[Any]
) -> float:
    r"""The mean cost of an example, where every mistake costs what it costs.

    .. math:: \frac1n \sum_i C_{t_i p_i} \qquad\text{or}\qquad \frac1n \sum_i c_i \, [p_i \ne t_i]

    With every cost 1 it is the error rate. A model that errs in 1% of cases, each time with an accident, is then worse
    than one that errs in 5% without, if an accident costs more than five times another mistake.

    Args:
        target: true labels, integers of any shape; for a matrix they are its rows.
        prediction: predicted labels of the same shape; for a matrix they are its columns.
        cost: C, (classes, classes), the cost of predicting the column where the row is true; or c, of the labels'
            shape, the cost of being wrong about each example. (Labels of a square shape with equal sizes take c.)

    Raises:
        ValueError: there is no example; shapes differ; a cost is negative or not finite; a label is outside the matrix.
        TypeError: labels that are neither integers nor booleans.

    Source: D17 (N4).
    """
    true, guessed = _labels("target", target), _labels("prediction", prediction)
    _same_shape(true, guessed)
    costs = torch.as_tensor(np.asarray(cost) if not isinstance(cost, Tensor) else cost).double().to(true.device)
    if not (costs.isfinite().all() and (costs >= 0).all()):
        raise ValueError("cost must be finite and at least 0 everywhere")
    if costs.shape == true.shape:
        return float((costs * (true != guessed)).mean())
    if costs.dim() != 2 or costs.shape[0] != costs.shape[1]:
        shape = tuple(true.shape)
        raise ValueError(f"cost must be a square matrix or of the labels' shape {shape}, got {tuple(costs.shape)}")
    low, high = (int(getattr(torch.stack([true, guessed]), end)()) for end in ("min", "max"))
    if low < 0 or high >= len(costs):
        raise ValueError(f"labels must lie in 0..{len(costs) - 1}, the sizes of cost, got {low}..{high}")
    return float(costs[true, guessed].mean())
