"""What initialisations do to signals through depth, in numbers: variances kept, decayed and drifting."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import log, sqrt

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reimpl.init
from reimpl.init._activations import measured
from reimpl.testing import seeded_generator

DEPTH, WIDTH, BATCH, SEEDS = 50, 512, 32, 10


def identity(x: Tensor) -> Tensor:
    return x


CHAINS: dict[str, tuple[Callable[..., Tensor], dict[str, object], Callable[[Tensor], Tensor]]] = {
    "lecun_normal_, linear": (reimpl.init.lecun_normal_, {}, identity),
    "lecun_uniform_, linear": (reimpl.init.lecun_uniform_, {}, identity),
    "orthogonal_, linear": (reimpl.init.orthogonal_, {}, identity),
    "kaiming_normal_, relu": (reimpl.init.kaiming_normal_, {"nonlinearity": "relu"}, torch.relu),
    "kaiming_uniform_, relu": (reimpl.init.kaiming_uniform_, {"nonlinearity": "relu"}, torch.relu),
    "lecun_normal_, relu": (reimpl.init.lecun_normal_, {}, torch.relu),
    "lecun_normal_, tanh": (reimpl.init.lecun_normal_, {}, torch.tanh),
    "xavier_normal_, tanh, gain 5/3": (reimpl.init.xavier_normal_, {"gain": 5 / 3}, torch.tanh),
    "kaiming_normal_, gelu": (reimpl.init.xavier_normal_, {"gain": measured(F.gelu).gain}, F.gelu),  # as apply does it
    "the note's uniform, linear": (reimpl.init.kaiming_uniform_, {"a": sqrt(5)}, identity),
    "normal_ 0.01, tanh": (reimpl.init.normal_, {"std": 0.01}, torch.tanh),
    "normal_ 1, tanh": (reimpl.init.normal_, {"std": 1.0}, torch.tanh),
}


@cache
def variances(chain: str, seeds: int = SEEDS) -> Tensor:
    """Mean over the seeds of the variance after each layer, over that of the input, (depth,).

    The variance is the layer's mean square over samples and units: before ReLU (He's equations keep that one), after
    any other activation (after which the mean is 0).
    """
    init, kwargs, activation = CHAINS[chain]
    found = torch.zeros(seeds, DEPTH, dtype=torch.float64)
    weight = torch.empty(WIDTH, WIDTH)
    for seed in range(seeds):
        generator = seeded_generator(seed, chain)
        signal = torch.randn(BATCH, WIDTH, generator=generator)
        for depth in range(DEPTH):
            before = signal @ init(weight, generator=generator, **kwargs).t()
            signal = activation(before)
            found[seed, depth] = (before if activation is torch.relu else signal).double().square().mean()
    return found.mean(0)


@pytest.mark.parametrize("chain", ["lecun_normal_, linear", "kaiming_normal_, relu"])
def test_variance_stays_within_a_factor_of_two(chain: str) -> None:
    """N0 (4.43-4.48) and He et al. 2015: Var[output] = n Var[w] E[input²], kept by 1/n, or by 2/n and ReLU."""
    kept = variances(chain)
    if chain.endswith("relu"):
        kept = kept / kept[0]  # the input has not been halved by a ReLU: the first layer doubles it
    assert float(kept.min()) > 0.5 and float(kept.max()) < 2


def test_orthogonal_keeps_every_length() -> None:
    kept = variances("orthogonal_, linear", seeds=1)
    # float32: 50 layers, each with a relative error of some eps in the mean of 16,384 squares.
    assert float((kept / kept[0] - 1).abs().max()) < 1e-4


def test_lecun_decays_under_relu() -> None:
    """Errata 13: the notes' "Xavier" loses half at each ReLU, 2^-49 from the first layer to the fiftieth."""
    kept = variances("lecun_normal_, relu")
    # The logarithm wanders by sqrt(5/512) = 0.1 a layer, 0.7 in all, and less in the mean of ten seeds.
    assert abs(log(float(kept[-1] / kept[0])) / log(2) + 49) < 1


def test_the_notes_uniform_decays_threefold_each_layer() -> None:
    """Errata 4: ±sqrt(1/n) keeps a third, 3^-50 in all."""
    kept = variances("the note's uniform, linear")
    assert abs(log(float(kept[-1])) / log(3) + 50) < 1  # as above: by sqrt(2/512) a layer


def mean_field_tanh(gain: float) -> np.ndarray:
    """q ← E[tanh²(gain √q z)] for normal z from q = 1, what the variance does in infinitely wide layers, (depth,)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    found = [1.0]
    for _ in range(DEPTH):
        found.append(float(weights @ np.tanh(gain * np.sqrt(found[-1]) * nodes) ** 2 / weights.sum()))
    return np.array(found[1:])


def test_tanh_decays_slowly_without_gain_and_settles_with_it() -> None:
    r"""I7: with variance 1/n, q ← q - 2q² + … falls like 1/(2 depth), not by a factor a layer; gain 5/3 holds it."""
    slow, held = variances("lecun_normal_, tanh").numpy(), variances("xavier_normal_, tanh, gain 5/3").numpy()
    # The fluctuations of ten seeds of 512 units: sqrt(2/512) a layer at most, damped where tanh bends.
    np.testing.assert_allclose(slow, mean_field_tanh(1.0), rtol=0.1)
    np.testing.assert_allclose(held, mean_field_tanh(5 / 3), rtol=0.05)
    assert abs(2 * DEPTH * slow[-1] - 1) < 0.2 and slow[-1] / slow[24] > 0.4
    assert abs(held[-1] / held[24] - 1) < 0.02


def test_layers_scaled_by_a_batch_hold_where_a_gain_does_not() -> None:
    """GELU's gain keeps a mean square of 1, but not one beside it; :func:`layer_sequential_` measures each layer."""
    grown = variances("kaiming_normal_, gelu")
    assert float(grown[-1]) > 100
    layers = [part for _ in range(DEPTH) for part in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU())]
    batch = torch.randn(BATCH, WIDTH, generator=seeded_generator(0))
    scaled = reimpl.init.layer_sequential_(
        torch.nn.Sequential(*layers), batch, rule="normal_", generator=seeded_generator(1)
    )
    assert len(scaled) == DEPTH and all(abs(layer.after - 1) <= 0.01 for layer in scaled.values())  # its tolerance


def test_small_weights_die() -> None:
    """C3: at std 0.01 a layer keeps 512·1e-4 = 5% of the variance, and 50 leave nothing; at std 1 tanh saturates."""
    small, large = variances("normal_ 0.01, tanh"), variances("normal_ 1, tanh")
    # From the second layer on tanh is the identity to 1%. A wandering logarithm, as above.
    assert abs(log(float(small[20] / small[1])) / log(WIDTH * 1e-4) - 19) < 0.5
    assert float(small[-1]) < 1e-60
    assert float(large.min()) > 0.9


def gradients_of_first_and_last(std: float) -> tuple[float, float]:
    """Mean absolute gradients of the first and last weights of ten tanh layers."""
    generator = seeded_generator(0)
    layers = [torch.empty(WIDTH, WIDTH).requires_grad_() for _ in range(10)]
    signal = torch.randn(BATCH, WIDTH, generator=generator)
    for weight in layers:
        signal = torch.tanh(signal @ reimpl.init.normal_(weight, 0, std, generator).t())
    first, last = torch.autograd.grad(signal.sum(), (layers[0], layers[-1]))
    return float(first.abs().mean()), float(last.abs().mean())


def test_small_weights_leave_no_gradient() -> None:
    small, right = gradients_of_first_and_last(0.01), gradients_of_first_and_last(1 / sqrt(WIDTH))
    # The last weight's gradient is the signal that reaches it, (512·1e-4)^(9/2) = 1.5e-6 of the input.
    assert small[1] < 1e-5 < 1e-2 < right[1]
    assert small[0] < 1e-4 * right[0]


def train(model: torch.nn.Module, steps: int, device: torch.device) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = seeded_generator(3)
    x = torch.randn(64, 8, generator=generator).to(device)
    target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def two_layers(device: torch.device) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(device)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_units_stay_equal(value: float, device: torch.device) -> None:
    """I1, N0: hidden units that start equal get equal gradients; after 100 steps there is still but one of them."""
    model = two_layers(device)
    reimpl.init.apply(model, value)
    train(model, 100, device)
    hidden, output = model[0].weight, model[2].weight
    # A sum over equal units may be added up in another order for each: some roundings a step.
    torch.testing.assert_close(hidden, hidden[:1].expand_as(hidden), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output, output[:, :1].expand_as(output), rtol=1e-4, atol=1e-6)
    if value == 0:
        assert not hidden.any() and not output.any()  # tanh(0) = 0: only the last bias learns
        assert model[2].bias.any()
    else:
        assert (hidden[0] - value).abs().max() > 0.01  # they did learn
    reimpl.init.apply(model, "xavier_normal_", generator=seeded_generator(4, device=device))
    train(model, 100, device)
    assert torch.linalg.matrix_rank(hidden) == 8


# Between |δ| at both ends of a deep narrow chain, over many seeds.
NARROW, STEPS, RUNS = 32, 60, 200


def drift(draw: Callable[[Tensor, torch.Generator], Tensor], relu: bool) -> tuple[float, float]:
    """Mean and standard error over the runs of ln |δ_first|² - ln |δ_last|² for one chain each."""
    generator = seeded_generator(1, relu)
    signal = torch.randn(RUNS, 1, NARROW, generator=generator, dtype=torch.float64)
    gradient = torch.randn(RUNS, 1, NARROW, generator=generator, dtype=torch.float64)
    start = gradient.square().sum((1, 2))
    layers = []
    for _ in range(STEPS):
        weight = torch.stack([draw(torch.empty(NARROW, NARROW, dtype=torch.float64), generator) for _ in range(RUNS)])
        signal = signal @ weight.mT
        active = signal > 0 if relu else torch.ones_like(signal, dtype=torch.bool)
        signal = signal * active
        layers.append((weight, active))
    for weight, active in reversed(layers):
        gradient = (gradient * active) @ weight
    walk = (gradient.square().sum((1, 2)) / start).log()
    return float(walk.mean()), float(walk.std()) / sqrt(RUNS)


@pytest.mark.parametrize("nonlinearity", ["linear", "relu"])
def test_a_random_walk_has_no_drift(nonlinearity: str) -> None:
    """I10: ln |δ|² ends where it began, on average; with E[|δ|²] kept instead it goes down by 1/n or 2.5/n a layer."""
    relu = nonlinearity == "relu"
    mean, error = drift(lambda w, g: reimpl.init.random_walk_(w, nonlinearity=nonlinearity, generator=g), relu)
    assert abs(mean) < 3 * error  # three standard errors
    usual, error = drift(lambda w, g: reimpl.init.kaiming_normal_(w, nonlinearity=nonlinearity, generator=g), relu)
    expected = -(2.5 if relu else 1.0) * STEPS / NARROW
    assert usual < -3 * error and abs(usual - expected) < 3 * error + 0.1 * abs(expected)  # first order in 1/n
