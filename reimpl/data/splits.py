"""How data are divided: train, dev and test sets of the right size and source, and minibatches (catalogue D4, D5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from math import floor, log
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

_FEW, _MANY = 10_000, 1_000_000  # up to which 20% each, from which on 1% each
_SHARE_OF_FEW, _SHARE_OF_MANY = 0.2, 0.01
_BATCHES = (512, 256, 128, 64)
_FULL_BATCH_BELOW = 2_000
_STEPS_AN_EPOCH = 100


@dataclass(frozen=True, eq=False)
class Split:
    """Indices of the parts, int64, each in random order, no two with an example in common.

    With two sources the target's examples are 0 to n - 1 and the foreign ones follow, as in
    ``ConcatDataset([target, foreign])``.

    Attributes:
        train: what is trained on.
        dev: what choices are made by.
        test: what the result is reported on.
        train_dev: from the source of ``train``, not trained on; ``None`` where there is one source.
    """

    train: Tensor
    dev: Tensor
    test: Tensor
    train_dev: Tensor | None = None

    def subsets(self, target: Dataset[Any], foreign: Dataset[Any] | None = None) -> Mapping[str, Subset[Any]]:
        """The parts as data sets, by name."""
        whole = target if foreign is None else ConcatDataset([target, foreign])
        parts = {"train": self.train, "train_dev": self.train_dev, "dev": self.dev, "test": self.test}
        return {name: Subset(whole, index.tolist()) for name, index in parts.items() if index is not None}

    def __str__(self) -> str:
        parts = {"train": self.train, "train-dev": self.train_dev, "dev": self.dev, "test": self.test}
        return ", ".join(f"{name} {len(index):,}" for name, index in parts.items() if index is not None)


def split(
    target: int | Sized,
    foreign: int | Sized = 0,
    *,
    sizes: Sequence[float] | None = None,
    stratify: Tensor | Sequence[int] | np.ndarray[Any, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Split:
    r"""Divides examples at random into train, dev and test; dev and test are of the target alone.

    Up to 10,000 examples the default is 60/20/20, from a million on 98/1/1; in between dev and test each take

    .. math:: s(n) = 0.2 \, (n / 10^4)^{\log 0.05 / \log 100}

    of n, so that their size never falls as n grows. Examples from another source (``foreign``) all go to train,
    together with what dev and test leave of the target. A part of that train set, as large as dev, is then kept apart
    as ``train_dev``: it tells variance from mismatch (:func:`reimpl.diagnose.error_budget`). By default dev and test
    together take no more than half of the target.

    Args:
        target: the number of examples from where the model will be used, or something that has a length.
        foreign: the same for another source.
        sizes: (train, dev, test) as shares of all examples, which sum to 1, or as counts, which sum to their number;
            train includes ``train_dev``. Dev and test may be 0.
        stratify: labels of all examples, the target's first: each class is divided in proportion. A part's count of a
            class is within one of its share of what the parts before (dev, test, train-dev) have left.
        generator: draws the order; the default generator if left out.

    Raises:
        ValueError: a part would be empty that must not be, or is larger than its source; shares do not sum to 1 or
            counts to the number of examples; a class has fewer examples than there are parts, or a part is smaller
            than the number of classes.
        TypeError: ``target`` or ``foreign`` is neither an integer nor has a length; ``sizes`` are no numbers.

    Source: D4 (N4). scikit-learn: ``train_test_split``.
    """
    n, extra = _count("target", target), _count("foreign", foreign)
    train, dev, test = _sizes(n, extra, sizes)
    if dev + test > n:
        raise ValueError(f"dev and test need {dev} + {test} examples of the target, which has {n}")
    train_dev = min(dev, train - 1) if extra else 0
    if train - train_dev < 1:
        raise ValueError(f"train must hold at least one example, got sizes {train}, {dev}, {test} for {n + extra}")
    parts = [size for size in (dev, test, train_dev) if size]
    labels = None if stratify is None else _labels(stratify, n + extra, 1 + len(parts), parts)
    own, rest = torch.arange(n), torch.arange(n, n + extra)
    dev_index, own = _draw(own, dev, labels, generator)
    test_index, own = _draw(own, test, labels, generator)
    train_dev_index, train_index = _draw(torch.cat([own, rest]), train_dev, labels, generator)
    return Split(train_index, dev_index, test_index, train_dev_index if extra else None)


def _count(name: str, value: object) -> int:
    if not isinstance(value, (Integral, Sized)):
        raise TypeError(f"{name} must be a number of examples, or something that has a length, got {value!r}")
    count = len(value) if isinstance(value, Sized) else int(value)
    if count < (name == "target"):
        raise ValueError(f"{name} must hold at least one example, got {count}")
    return count


def _sizes(n: int, extra: int, sizes: Sequence[float] | None) -> tuple[int, int, int]:
    total = n + extra
    if sizes is None:
        slope = log(_SHARE_OF_MANY / _SHARE_OF_FEW) / log(_MANY / _FEW)
        share = _SHARE_OF_FEW * (min(max(total, _FEW), _MANY) / _FEW) ** slope
        part = round(share * total)
        part = min(part, n // 4) if extra else part
        if part < 1 or total - 2 * part < 1:
            raise ValueError(f"{n} examples of the target are too few for train, dev and test: give sizes=")
        return total - 2 * part, part, part
    _check_numbers(sizes)
    if len(sizes) != 3 or not all(size >= 0 for size in sizes):
        raise ValueError(f"sizes must be three numbers of at least 0, for train, dev and test, got {sizes}")
    if all(isinstance(size, Integral) for size in sizes):
        if sum(sizes) != total:
            raise ValueError(
                f"sizes as counts must sum to the {total} examples, got {sizes}, whose sum is {sum(sizes)}"
            )
        return int(sizes[0]), int(sizes[1]), int(sizes[2])
    if abs(sum(sizes) - 1) > 1e-6:  # thirds written with six digits still pass
        raise ValueError(f"sizes as shares must sum to 1, got {sizes}, whose sum is {sum(sizes):.6g}")
    dev, test = (round(size * total) for size in sizes[1:])
    for name, share, count in (("dev", sizes[1], dev), ("test", sizes[2], test)):
        if share and not count:
            raise ValueError(f"{name} would be empty: {share:g} of {total} examples is less than one")
    return total - dev - test, dev, test


def _check_numbers(sizes: object) -> None:
    if not isinstance(sizes, (Sequence, np.ndarray)) or not all(isinstance(size, Real) for size in sizes):
        raise TypeError(f"sizes must be three numbers, for train, dev and test, got {sizes!r}")


def _labels(labels: Any, n: int, needed: int, parts: list[int]) -> Tensor:
    values = torch.as_tensor(np.asarray(labels) if not isinstance(labels, Tensor) else labels).cpu()
    if values.shape != (n,):
        raise ValueError(f"stratify must hold one label an example, shape ({n},), got {tuple(values.shape)}")
    index: Tensor
    classes, index, counts = values.unique(return_inverse=True, return_counts=True)
    rarest = int(counts.argmin())
    if counts[rarest] < needed:
        raise ValueError(
            f"class {classes[rarest].item()} has {int(counts[rarest])} examples, too few for {needed} parts to have one"
        )
    if parts and min(parts) < len(classes):
        raise ValueError(f"a part of {min(parts)} examples is too small to be stratified by {len(classes)} classes")
    return index


def _draw(index: Tensor, size: int, labels: Tensor | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``size`` of the examples ``index``, and the others, both in random order."""
    index = index[torch.randperm(len(index), generator=generator)]
    if labels is None or not size:
        return index[:size], index[size:]
    own = labels[index]
    counts = torch.bincount(own)
    quotas = _apportion(counts.tolist(), size)
    # The rank of each example within its class, in the random order that they are in.
    order = own.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(own)) - (counts.cumsum(0) - counts)[own[order]]
    chosen = rank < torch.tensor(quotas)[own]
    return index[chosen], index[~chosen]


def _apportion(counts: list[int], size: int) -> list[int]:
    """``size`` seats in proportion to ``counts``: the floors, then one more for the largest remainders."""
    shares = [size * count / sum(counts) for count in counts]
    quotas = [floor(share) for share in shares]
    by_remainder = sorted(range(len(counts)), key=lambda i: quotas[i] - shares[i])
    for i in by_remainder[: size - sum(quotas)]:
        quotas[i] += 1
    return quotas


def suggest_batch_size(examples: int | Sized, *, limit: int | None = None) -> int:
    """A batch size to begin with: all examples under 2,000, else a power of two from 64 to 512.

    Of the four sizes it is the largest that still makes at least 100 steps an epoch, and 64 where none does.

    Args:
        examples: the number of training examples, or something that has a length.
        limit: the most examples that the memory holds at a time; a smaller suggestion is made where it is exceeded,
            the largest power of two that fits.

    Raises:
        ValueError: there is no example, or ``limit`` is below 1.

    Source: D5 (N4; N2 §8.1.3). The 100 steps are this library's choice, the notes leave it to trial.
    """
    n = _count("target", examples)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    size = n if n < _FULL_BATCH_BELOW else next((b for b in _BATCHES if n // b >= _STEPS_AN_EPOCH), _BATCHES[-1])
    return size if limit is None or size <= limit else 2 ** (limit.bit_length() - 1)
