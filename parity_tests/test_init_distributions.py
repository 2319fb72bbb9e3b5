"""What the initialisations draw from, against the oracle's distributions; and what the notes say, against both."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

import reimpl.init
from parity_tests.declarations.init import INITS
from parity_tests.oracle import init as oracle
from parity_tests.test_init import draw
from reimpl.testing import InitTechnique

SHAPE = (120, 20, 3, 3)


def distribution(row: dict[str, Any]) -> Any:
    """SciPy's distribution for the oracle's row."""
    stats = pytest.importorskip("scipy.stats", reason="the distribution functions are SciPy's")
    if row["kind"] == "normal":
        return stats.norm(row["mean"], row["std"])
    if row["kind"] == "sparse":
        return stats.norm(0, row["scale"])
    if row["kind"] == "uniform":
        return stats.uniform(row["low"], row["high"] - row["low"])
    if row["kind"] == "truncated":
        loc, scale = row["loc"], row["scale"]
        return stats.truncnorm((row["low"] - loc) / scale, (row["high"] - loc) / scale, loc, scale)
    # A coordinate of a random direction in n dimensions, on [-1, 1]: a symmetric beta distribution.
    shape = (row["size"] - 1) / 2
    return stats.beta(shape, shape, row["low"], row["high"] - row["low"])


@pytest.mark.parametrize("technique", INITS, ids=lambda technique: technique.name)
def test_draws_from_the_oracle_distribution(technique: InitTechnique, device: torch.device) -> None:
    name = technique.name
    shape = {"sparse_": (200, 100), "eye_": (20, 30), "dirac_": (6, 4, 3, 3)}.get(name, SHAPE)
    for kwargs in technique.kwargs:
        weight = draw(technique.ours, torch.empty(shape, dtype=torch.float64, device=device), technique, kwargs)
        row, sample = technique.oracle(shape, **kwargs), weight.cpu().numpy()
        assert sample.min() >= row["low"] and sample.max() <= row["high"]
        if row["kind"] in ("constant", "exact"):
            assert np.array_equal(sample, np.broadcast_to(row.get("value", row["mean"]), shape))
            continue
        if row["kind"] == "sparse":
            assert ((sample == 0).sum(0) == row["zeros"]).all()
        drawn = sample[sample != 0]
        expected = distribution(row)
        count, kurtosis = drawn.size, float(expected.stats("k")) + 3
        # Five standard errors of the mean, and of the standard deviation (sqrt((κ - 1)/(4n)) for kurtosis κ): a right
        # one misses either once in 1.7 million seeds, and a wrong scale of 2% is caught.
        assert abs(drawn.mean() - expected.mean()) < 5 * expected.std() / sqrt(count)
        assert abs(drawn.std() / expected.std() - 1) < 5 * sqrt((kurtosis - 1) / (4 * count))
        # The oracle's own moments, worked out apart from SciPy's: equal but for the roundings of a dozen operations,
        # and of the differences of the truncated distribution's, which lose up to four digits.
        if row["kind"] != "sparse":
            assert row["mean"] == pytest.approx(float(expected.mean()), rel=1e-11, abs=1e-15)
            assert row["std"] == pytest.approx(float(expected.std()), rel=1e-11)
        # A right distribution ends below once in a thousand seeds.
        assert pytest.importorskip("scipy.stats").kstest(drawn, expected.cdf).pvalue > 1e-3


@pytest.mark.parametrize("wrong", [{"std": 1.02}, {"mean": 0.03}, {"a": -1.9}])
def test_a_wrong_distribution_is_noticed(wrong: dict[str, float]) -> None:
    """The test above can fail: 2% in scale, 0.03 in place or a bound by 0.1 are seen in as many numbers."""
    stats = pytest.importorskip("scipy.stats", reason="the distribution functions are SciPy's")
    weight = reimpl.init.trunc_normal_(
        torch.empty(200_000, dtype=torch.float64), generator=torch.Generator().manual_seed(0)
    )
    row = oracle.truncated(**wrong)
    expected = distribution(row)
    assert stats.kstest(weight.numpy(), expected.cdf).pvalue < 1e-3


@pytest.mark.parametrize("shape", [(300, 200), (64, 32, 3, 3)])
def test_lecun_uniform_has_three_times_the_variance_of_the_note(shape: tuple[int, ...]) -> None:
    """Errata 4: ±sqrt(1/n) has variance 1/(3n); ±sqrt(3/n) has 1/n."""
    fan_in, _ = oracle.fans(shape)
    generator = torch.Generator().manual_seed(0)
    note = torch.empty(shape, dtype=torch.float64).uniform_(-sqrt(1 / fan_in), sqrt(1 / fan_in), generator=generator)
    ours = reimpl.init.lecun_uniform_(torch.empty(shape, dtype=torch.float64), torch.Generator().manual_seed(0))
    # Same uniform numbers, so that the ratio is 3 but for roundings.
    assert float(ours.var() / note.var()) == pytest.approx(3, rel=1e-12)
    # The variance of a sample of n from a uniform distribution has the relative error sqrt(0.8/n); five of them.
    bound = 5 * sqrt(0.8 / note.numel())
    assert abs(float(ours.var()) * fan_in - 1) < bound
    assert abs(float(note.var()) * 3 * fan_in - 1) < bound
    # The note's version is PyTorch's default for layers.
    default = torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.float64), a=sqrt(5))
    assert float(default.abs().max()) <= sqrt(1 / fan_in)


def test_xavier_as_the_notes_use_it_is_lecun() -> None:
    """I5, errata 13: 1/sqrt(n_in) times normal numbers."""
    shape = (40, 25)
    numbers = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = reimpl.init.lecun_normal_(torch.empty(shape, dtype=torch.float64), torch.Generator().manual_seed(1))
    # One more rounding on one of the two ways: 1/sqrt(n) before the product.
    torch.testing.assert_close(ours, numbers / sqrt(25), rtol=4 * torch.finfo(torch.float64).eps, atol=0)


def drawn(name: str, shape: tuple[int, ...] = (64, 256), **kwargs: Any) -> torch.Tensor:
    """Every call has the same normal numbers under it."""
    weight = torch.empty(shape, dtype=torch.float64)
    return getattr(reimpl.init, name)(weight, generator=torch.Generator().manual_seed(2), **kwargs)


def test_xavier_as_the_notes_use_it_is_not_glorots() -> None:
    """Errata 13: Glorot looks at both fans; the two agree for square weights alone, and He's is neither."""
    eps = torch.finfo(torch.float64).eps
    for shape in ((64, 256), (256, 64), (128, 128)):
        fan_out, fan_in = shape
        note, glorot, he = (
            drawn("lecun_normal_", shape),
            drawn("xavier_normal_", shape),
            drawn("kaiming_normal_", shape),
        )
        # Ratios of the same numbers: a handful of roundings.
        torch.testing.assert_close(glorot, note * sqrt(2 * fan_in / (fan_in + fan_out)), rtol=8 * eps, atol=0)
        torch.testing.assert_close(he, note * sqrt(2), rtol=8 * eps, atol=0)
        assert torch.allclose(note, glorot, rtol=8 * eps, atol=0) == (fan_in == fan_out)


def test_variance_by_activation_and_the_gain_of_tanh() -> None:
    """I7: 1/n for tanh as the notes say, 2/n for ReLU, 2/(n_in + n_out); PyTorch's tanh has (5/3)²/n instead."""
    eps = torch.finfo(torch.float64).eps
    linear = drawn("lecun_normal_")
    assert reimpl.init.calculate_gain("tanh") == 5 / 3 == torch.nn.init.calculate_gain("tanh")
    for name, kwargs, variance in (
        ("kaiming_normal_", {"nonlinearity": "linear"}, 1),
        ("kaiming_normal_", {"nonlinearity": "relu"}, 2),
        ("kaiming_normal_", {"nonlinearity": "tanh"}, 25 / 9),
        ("xavier_normal_", {}, 2 * 256 / (64 + 256)),
    ):
        torch.testing.assert_close(drawn(name, **kwargs), linear * sqrt(variance), rtol=8 * eps, atol=0)
