"""Initialisations against PyTorch, bit by bit for the same generator, and against the oracle's distributions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch

import reimpl.init
from parity_tests.declarations.init import INITS
from parity_tests.oracle import init as oracle
from reimpl.testing import InitTechnique, Verdict, assert_bitwise, bits_equal, seeded_generator

each_init = pytest.mark.parametrize("technique", INITS, ids=lambda technique: technique.name)
SHAPES = ((64, 32), (16, 8, 3, 3), (5, 7, 3), (1, 1), (3, 2, 2, 2, 2))


def takes_generator(technique: InitTechnique) -> bool:
    return technique.name not in ("zeros_", "ones_", "constant_")


def draw(function: Callable[..., Any], tensor: torch.Tensor, technique: InitTechnique, kwargs: Any) -> torch.Tensor:
    """``tensor`` after ``function``, with a generator of its own where the function takes one."""
    generator = seeded_generator(7, technique.name, device=tensor.device)
    result = function(tensor, **kwargs, **({"generator": generator} if takes_generator(technique) else {}))
    assert result is tensor
    return tensor


@pytest.mark.quick
@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_init
def test_same_bits_as_pytorch(
    technique: InitTechnique, dtype: torch.dtype, device: torch.device, record: Callable[..., Verdict]
) -> None:
    assert technique.torch is not None
    for kwargs in technique.kwargs:
        equal = True
        for shape in SHAPES:
            ours, theirs = (
                draw(function, torch.full(shape, torch.nan, dtype=dtype, device=device), technique, kwargs)
                for function in (technique.ours, technique.torch)
            )
            equal = equal and bits_equal(ours, theirs)
            case = f"{shape}, {kwargs}, {dtype}"
            if not equal:
                assert_bitwise(ours, theirs, technique=technique.name, case=case, quantity="weight")
        # The distribution itself is the oracle's business below: the distance here is from PyTorch's numbers.
        record(
            Verdict(0.0, 0.0, 0.0, 0.0, 0.0, ok=equal, bitwise=equal),
            kind="init",
            technique=technique.name,
            ids=technique.ids,
            case=", ".join(f"{key}={value}" for key, value in kwargs.items()) or "default",
            quantity="weight",
            implementation="eager",
            device=device,
            dtype=dtype,
        )


@each_init
def test_global_generator_and_strides(technique: InitTechnique) -> None:
    assert technique.torch is not None
    for kwargs in technique.kwargs:
        results = []
        for function in (technique.ours, technique.torch):
            torch.manual_seed(3)
            results.append(function(torch.zeros(6, 4).t(), **kwargs))
        assert bits_equal(*results)


def kolmogorov_smirnov(sample: np.ndarray, row: dict[str, Any]) -> float:
    """Largest distance between the sample's distribution function and the expected one."""
    x = np.sort(sample)
    if row["kind"] == "uniform":
        expected = np.clip((x - row["low"]) / (row["high"] - row["low"]), 0, 1)
    else:
        # The normal distribution function through erf, which only the math module has.
        from math import erf

        expected = np.array([0.5 * (1 + erf((v - row["mean"]) / (row["std"] * sqrt(2)))) for v in x])
    steps = np.arange(len(x) + 1) / len(x)
    return float(max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max()))


@each_init
def test_draws_from_the_oracle_distribution(technique: InitTechnique) -> None:
    shape = (120, 20, 3, 3)
    for kwargs in technique.kwargs:
        weight = draw(technique.ours, torch.empty(shape, dtype=torch.float64), technique, kwargs)
        row, sample = technique.oracle(shape, **kwargs), weight.numpy().ravel()
        assert sample.min() >= row["low"] and sample.max() <= row["high"]
        if row["kind"] == "constant":
            assert np.all(sample == row["mean"])
            continue
        # Five standard errors of the mean, and of the standard deviation (sqrt((κ - 1)/(4n)) with kurtosis κ = 3 for
        # the normal and 1.8 for the uniform distribution): a right one misses either once in 1.7 million seeds, and
        # a wrong scale of 2% is caught.
        count, kurtosis = len(sample), 3.0 if row["kind"] == "normal" else 1.8
        assert abs(sample.mean() - row["mean"]) < 5 * row["std"] / sqrt(count)
        assert abs(sample.std() / row["std"] - 1) < 5 * sqrt((kurtosis - 1) / (4 * count))
        # Kolmogorov-Smirnov: the distance times sqrt(n) exceeds 1.95 once in a thousand seeds.
        assert kolmogorov_smirnov(sample, row) * sqrt(count) < 1.95


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


@pytest.mark.parametrize("keeps", ["lecun_normal_", "lecun_uniform_"])
def test_variance_of_a_signal_through_linear_layers(keeps: str) -> None:
    """N0 (4.43-4.48): Var[output] = n_in Var[w] Var[input]; 1/n_in keeps it, 1/(3 n_in) leaves a third a layer."""
    generator = torch.Generator().manual_seed(0)
    signal = noted = torch.randn(256, 400, generator=generator, dtype=torch.float64)
    for _ in range(5):
        weight = torch.empty(400, 400, dtype=torch.float64)
        signal = signal @ getattr(reimpl.init, keeps)(weight, generator=generator).t()
        noted = noted @ weight.uniform_(-sqrt(1 / 400), sqrt(1 / 400), generator=generator).t()
    # Each layer's variance scatters by about sqrt(2/400) = 7% at most; five layers stay well within 40%.
    assert 0.6 < float(signal.var()) < 1.4
    assert 0.6 < float(noted.var()) * 3**5 < 1.4


def test_gains() -> None:
    names = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu", "conv2d", "conv_transpose3d")
    for name in names:
        assert reimpl.init.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    for slope in (0, 0.2, 1, 5.0):
        ours, theirs = (m.calculate_gain("leaky_relu", slope) for m in (reimpl.init, torch.nn.init))
        assert ours == theirs


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("calculate_gain", ("swish",), {}),
        ("calculate_gain", ("leaky_relu", "steep"), {}),
        ("calculate_gain", ("leaky_relu", True), {}),
        ("kaiming_normal_", (torch.empty(3),), {}),
        ("kaiming_uniform_", (torch.empty(3, 3),), {"mode": "fan_up"}),
        ("kaiming_uniform_", (torch.empty(3, 3),), {"nonlinearity": "swish"}),
        ("xavier_normal_", (torch.empty(()),), {}),
        ("xavier_uniform_", (torch.empty(4),), {}),
        ("normal_", (torch.empty(3), 0.0, -1.0), {}),
        ("uniform_", (torch.empty(3), 1.0, 0.0), {}),
    ],
)
def test_refuses_what_pytorch_refuses_in_its_words(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn.init, name)(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        getattr(reimpl.init, name)(*args, **kwargs)
    assert str(ours.value) == str(theirs.value)


def test_lecun_refuses_vectors() -> None:
    for function in (reimpl.init.lecun_normal_, reimpl.init.lecun_uniform_):
        with pytest.raises(ValueError, match="fewer than 2 dimensions"):
            function(torch.empty(3))


@pytest.mark.parametrize("name", ["kaiming_normal_", "kaiming_uniform_"])
def test_no_elements_warns_as_pytorch_does(name: str) -> None:
    messages = []
    for module in (reimpl.init, torch.nn.init):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(module, name)(torch.empty(0, 3))
        messages.append([(w.category, str(w.message), w.filename) for w in caught])
    assert messages[0] == messages[1] and messages[0]


def test_parameters_are_drawn_without_a_graph() -> None:
    weight = torch.nn.Parameter(torch.empty(4, 4))
    assert reimpl.init.kaiming_normal_(weight) is weight
    assert weight.grad_fn is None and weight.requires_grad


def test_zero_weights_never_break_the_symmetry() -> None:
    """I1, N0: hidden units that start equal get equal gradients, and stay equal."""
    first, second = reimpl.init.constant_(torch.empty(3, 4), 0.3), reimpl.init.zeros_(torch.empty(2, 3))
    first.requires_grad_()
    second.requires_grad_()
    x, target = torch.randn(8, 4), torch.tensor([0, 1] * 4)
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(torch.tanh(x @ first.t()) @ second.t(), target)
        for parameter, grad in zip((first, second), torch.autograd.grad(loss, (first, second)), strict=True):
            parameter.data -= 0.5 * grad
    assert torch.equal(first[0], first[1]) and torch.equal(second[:, 0], second[:, 2])
    assert not torch.equal(first[0], torch.full((4,), 0.3))
