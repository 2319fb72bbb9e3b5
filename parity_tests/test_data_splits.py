"""Splits, batch sizes and mixing: the notes' numbers, scikit-learn's proportions, and what cannot be done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from reimpl.data import Mix, split, suggest_batch_size
from reimpl.data._synthetic import synthetic
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal

pytestmark = pytest.mark.quick


def sizes_of(parts: Any) -> tuple[int, int, int]:
    return len(parts.train), len(parts.dev), len(parts.test)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (100, (60, 20, 20)),
        (10_000, (6_000, 2_000, 2_000)),
        (1_000_000, (980_000, 10_000, 10_000)),
        (2_000_000, (1_960_000, 20_000, 20_000)),
        (100_000, (91_056, 4_472, 4_472)),  # 0.2·10^-0.6505 = 4.4721%
    ],
)
def test_default_sizes(n: int, expected: tuple[int, int, int]) -> None:
    assert sizes_of(split(n)) == expected


def test_dev_never_shrinks_as_data_grow() -> None:
    dev = [len(split(n).dev) for n in (5, 10, 1_000, 9_999, 10_000, 10_001, 50_000, 200_000, 999_999, 1_000_001)]
    assert dev == sorted(dev) and dev[0] == 1


def test_parts_are_disjoint_whole_and_random() -> None:
    for seed in SEEDS:
        parts = split(103, sizes=(0.5, 0.3, 0.2), generator=torch.Generator().manual_seed(seed))
        every = torch.cat([parts.train, parts.dev, parts.test])
        assert sorted(every.tolist()) == list(range(103)) and parts.train_dev is None
        assert every.tolist() != sorted(every.tolist()) and every.dtype == torch.int64
        again = split(103, sizes=(0.5, 0.3, 0.2), generator=torch.Generator().manual_seed(seed))
        assert bits_equal(again.dev, parts.dev)
    assert not bits_equal(split(103).dev, split(103).dev)


@pytest.mark.parametrize("sizes", [(0.5, 0.25, 0.25), (50, 25, 25), (0.7, 0.3, 0.0), (70, 0, 30), (0.98, 0.01, 0.01)])
def test_given_sizes(sizes: Any) -> None:
    expected = tuple(round(size * 100) if sum(sizes) < 2 else size for size in sizes)
    assert sizes_of(split(100, sizes=sizes)) == expected


def test_foreign_data_go_to_train() -> None:
    """N4: dev and test are of the target, the surplus and all foreign examples train, a part of which is kept apart."""
    parts = split(10_000, 200_000)
    assert parts.train_dev is not None
    assert sizes_of(parts) == (210_000 - 3 * 2_500, 2_500, 2_500) and len(parts.train_dev) == 2_500
    assert parts.dev.max() < 10_000 and parts.test.max() < 10_000
    # the same source as train: a share of 5,000/205,000 of the target in both
    shares = [float((part < 10_000).double().mean()) for part in (parts.train, parts.train_dev)]
    assert shares == pytest.approx([5 / 205] * 2, abs=0.015)  # five standard errors of 2,500 draws: 0.0154
    every = torch.cat([parts.train, parts.train_dev, parts.dev, parts.test])
    assert bits_equal(every.sort().values, torch.arange(210_000))
    assert str(parts) == "train 202,500, train-dev 2,500, dev 2,500, test 2,500"


def test_subsets() -> None:
    target, foreign = TensorDataset(torch.arange(20)), TensorDataset(100 + torch.arange(30))
    parts = split(target, foreign)
    subsets = parts.subsets(target, foreign)
    assert list(subsets) == ["train", "train_dev", "dev", "test"]
    assert {int(x) for (x,) in subsets["dev"]} <= set(range(20))
    assert sorted(int(x) for s in subsets.values() for (x,) in s) == [*range(20), *range(100, 130)]
    assert list(split(target).subsets(target)) == ["train", "dev", "test"]


@pytest.mark.parametrize("sizes", [None, (0.55, 0.3, 0.15), (67, 20, 13)])
def test_stratified_parts_have_the_shares_of_the_whole(sizes: Any) -> None:
    selection = pytest.importorskip("sklearn.model_selection", reason="the reference is scikit-learn's")
    labels = np.repeat([3, 7, 9], [50, 37, 13])
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(labels)
        parts = split(100, sizes=sizes, stratify=order, generator=torch.Generator().manual_seed(seed))
        _, theirs = selection.train_test_split(order, test_size=len(parts.dev), stratify=order, random_state=seed)
        for label, count in ((3, 50), (7, 37), (9, 13)):
            mine = int((order[parts.dev.numpy()] == label).sum())
            assert abs(mine - count * len(parts.dev) / 100) < 1
            assert abs(mine - int((theirs == label).sum())) <= 1  # both round a share, to the one side or the other
            left = count - mine
            in_test = int((order[parts.test.numpy()] == label).sum())
            assert abs(in_test - left * len(parts.test) / (100 - len(parts.dev))) < 1
        assert sorted(torch.cat([parts.train, parts.dev, parts.test]).tolist()) == list(range(100))


def test_stratified_is_random_within_a_class() -> None:
    labels = torch.arange(60) % 3
    first = [tuple(sorted(split(60, stratify=labels).dev.tolist())) for _ in range(5)]
    assert len(set(first)) == 5
    parts = split(40, 20, stratify=labels)
    assert parts.train_dev is not None
    for part in (parts.dev, parts.test, parts.train_dev):
        counts = torch.bincount(labels[part], minlength=3)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": 0}, "target must hold at least one example, got 0"),
        ({"target": 5, "foreign": -1}, "foreign must hold at least one example, got -1"),
        ({"target": []}, "target must hold at least one example"),
        ({"target": 2}, "2 examples of the target are too few"),
        ({"target": 3, "foreign": 1000}, "3 examples of the target are too few"),
        ({"target": 10, "sizes": (0.6, 0.2, 0.3)}, "must sum to 1, got .*, whose sum is 1.1"),
        ({"target": 10, "sizes": (0.6, 0.2)}, "sizes must be three numbers of at least 0"),
        ({"target": 10, "sizes": (1.2, -0.1, -0.1)}, "sizes must be three numbers of at least 0"),
        ({"target": 10, "sizes": (float("nan"), 0.5, 0.5)}, "sizes must be three numbers"),
        ({"target": 10, "sizes": (5, 2, 2)}, "must sum to the 10 examples, got .*, whose sum is 9"),
        ({"target": 10, "sizes": (0.0, 0.5, 0.5)}, "train must hold at least one example"),
        ({"target": 10, "sizes": (0.98, 0.01, 0.01)}, "dev would be empty: 0.01 of 10 examples"),
        (
            {"target": 10, "foreign": 90, "sizes": (0.8, 0.1, 0.1)},
            "need 10 \\+ 10 examples of the target, which has 10",
        ),
        ({"target": 6, "stratify": [0, 0, 0, 0, 1, 1]}, "class 1 has 2 examples, too few for 3 parts"),
        ({"target": 9, "stratify": [0, 1, 2] * 3}, "a part of 2 examples is too small to be stratified by 3 classes"),
        ({"target": 9, "stratify": [0, 1]}, r"one label an example, shape \(9,\), got \(2,\)"),
    ],
)
def test_splits_that_cannot_be_made(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        split(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target": None}, "target must be a number of examples, or something that has a length, got None"),
        ({"target": 10.5}, "target must be a number of examples, .* got 10.5"),
        ({"target": 9, "foreign": None}, "foreign must be a number of examples"),
        ({"target": 100, "sizes": "abc"}, "sizes must be three numbers, for train, dev and test, got 'abc'"),
        ({"target": 100, "sizes": 0.5}, "sizes must be three numbers, .* got 0.5"),
        ({"target": 100, "sizes": (0.8, None, 0.2)}, "sizes must be three numbers"),
    ],
)
def test_split_names_the_argument_of_another_type(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        split(**arguments)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, 1), (1_999, 1_999), (2_000, 64), (12_799, 64), (12_800, 128), (50_000, 256), (51_200, 512), (10**7, 512)],
)
def test_batch_size(n: int, expected: int) -> None:
    assert suggest_batch_size(n) == expected


def test_batch_size_is_limited_by_memory() -> None:
    assert [suggest_batch_size(50_000, limit=limit) for limit in (1, 3, 100, 255, 256, 1000)] == [
        1,
        2,
        64,
        128,
        256,
        256,
    ]
    assert suggest_batch_size(1_500, limit=1_000) == 512
    assert suggest_batch_size(TensorDataset(torch.ones(300))) == 300
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        suggest_batch_size(50_000, limit=0)
    with pytest.raises(ValueError, match="at least one example, got 0"):
        suggest_batch_size([])


# Mix (D18)


def test_mix_adds_and_blends(device: torch.device) -> None:
    x, v = torch.full((200, 3), 2.0, device=device), torch.tensor([[1.0, 1, 1], [5, 5, 5]])
    added = Mix(v, amount=(0.5, 0.5)).to(device)(x)
    assert sorted(set(added.flatten().tolist())) == [2.5, 4.5] and added.device == x.device
    blended = Mix(v, amount=(0.25, 0.25), blend=True).to(device)(x)
    assert sorted(set(blended.flatten().tolist())) == [1.75, 2.75]
    assert ((added == 2.5).double().mean() - 0.5).abs() < 0.18  # five standard errors of 200 draws: 0.177


def test_mix_draws_amounts_and_shares() -> None:
    x = torch.zeros(4000, 1, dtype=torch.float64)
    mixed = Mix(torch.ones(1, 1), amount=(0.2, 0.6), p=0.25)(x, torch.Generator().manual_seed(1))
    some = mixed[mixed != 0]
    assert 0.2 <= some.min() < 0.21 and 0.59 < some.max() <= 0.6
    assert abs(len(some) / 4000 - 0.25) < 0.035  # five standard errors
    assert some.mean() == pytest.approx(0.4, abs=0.02)  # five standard errors: 0.018
    again = Mix(torch.ones(1, 1), amount=(0.2, 0.6), p=0.25)(x, torch.Generator().manual_seed(1))
    assert bits_equal(mixed, again)


def test_mix_takes_windows_of_larger_variations() -> None:
    recording = torch.arange(50.0)
    mixed = Mix([recording], amount=(1.0, 1.0))(torch.zeros(500, 8))
    assert (mixed.diff(dim=1) == 1).all() and set(mixed[:, 0].tolist()) == set(map(float, range(43)))
    images = torch.from_numpy(synthetic(10, 10).train_images).float()
    assert Mix([images[0], torch.ones(3, 40, 64)])(images).shape == images.shape


def test_mix_is_off_in_evaluation_and_not_saved() -> None:
    model = Mix(random_tensor((4, 2), torch.float32, seeded_generator(0, "mix")))
    x = torch.ones(5, 2)
    assert model.eval()(x) is x and not model.state_dict()
    assert model.train()(x[:0]).shape == (0, 2) and len(model) == 4
    assert model(x.half()).dtype == torch.float16
    assert repr(model) == "Mix(4 variations, amount=(0.0, 1.0), p=1.0, blend=False)"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"variations": torch.empty(0, 2)}, "at least one to mix in, got none"),
        ({"variations": []}, "at least one to mix in"),
        ({"variations": torch.ones(1, 2), "amount": (1.0, 0.5)}, r"amount must be \(low, high\), got \(1.0, 0.5\)"),
        ({"variations": torch.ones(1, 2), "amount": (0.0, 1.5), "blend": True}, r"within 0..1 to blend"),
        ({"variations": torch.ones(1, 2), "p": 1.5}, "p must lie in 0..1, got 1.5"),
    ],
)
def test_mix_refuses(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Mix(**arguments)


def test_mix_refuses_inputs() -> None:
    with pytest.raises(ValueError, match=r"variation 0 has shape \(2,\), too small for examples of \(3,\)"):
        Mix(torch.ones(1, 2))(torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"floating point to mix into, got torch.uint8"):
        Mix(torch.ones(1, 2))(torch.ones(1, 2, dtype=torch.uint8))
