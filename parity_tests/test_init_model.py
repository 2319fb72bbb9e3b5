"""Whole models initialised: which rule, gain and fans each parameter gets, and what is said about it."""

from __future__ import annotations

import copy
import logging
from functools import partial
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reimpl.init as init
from models.layers import layers
from models.resnet import ResNet
from reimpl.testing import independence_guard, seeded_generator

pytestmark = pytest.mark.quick


class Functional(nn.Module):
    """Activations that the modules do not tell: functions, one used twice, a sum in between."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.2)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.summed = nn.Conv2d(8, 8, 1)
        self.wide = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.summed(self.act(self.inner(x)))
        y += x
        x = F.relu(y).mean((2, 3))
        return self.head(F.gelu(F.dropout(self.wide(x), 0.1)))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(16, 16), nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4),
    )  # fmt: skip


def weights(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model if isinstance(module, nn.Linear)]  # type: ignore[attr-defined]


def test_each_layer_gets_the_gain_of_what_follows(device: torch.device) -> None:
    model = mlp().to(device)
    done = init.apply(model, "kaiming_normal_", generator=seeded_generator(0, device=device))
    generator = seeded_generator(0, device=device)
    for layer, nonlinearity, slope in zip(
        weights(model), ("relu", "leaky_relu", "tanh", "linear"), (0, 0.3, 0, 0), strict=True
    ):
        expected = torch.empty_like(layer.weight)
        torch.nn.init.kaiming_normal_(expected, slope, nonlinearity=nonlinearity, generator=generator)
        assert torch.equal(layer.weight, expected) and not layer.bias.any()
    activations = [done[f"{index}.weight"].activation for index in (0, 4, 7, 9)]
    assert activations == ["relu", "leaky_relu(0.3)", "tanh", "linear"]
    assert len(done) == len(list(model.parameters())) and done.left == ()


@pytest.mark.parametrize("rule", ["xavier_uniform_", "orthogonal_"])
def test_rules_with_a_gain_get_it(rule: str) -> None:
    model = mlp()
    init.apply(model, rule, generator=seeded_generator(0))
    generator = seeded_generator(0)
    for layer, gain in zip(weights(model), (sqrt(2), sqrt(2 / (1 + 0.3**2)), 5 / 3, 1.0), strict=True):
        expected = getattr(torch.nn.init, rule)(torch.empty_like(layer.weight), gain, generator)
        assert torch.equal(layer.weight, expected)


def test_one_module_in_several_places() -> None:
    relu = nn.ReLU()
    linear = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), relu, linear, relu, linear)
    done = init.apply(model, "kaiming_normal_")
    assert [done[f"{i}.weight"].activation for i in (0, 2)] == ["relu", "relu"]
    assert done["4.weight"].rule == "shared with 2.weight"


def test_pytorchs_defaults_are_a_rule_too() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 5))
    ours = copy.deepcopy(theirs)
    default = partial(init.kaiming_uniform_, a=sqrt(5))
    torch.manual_seed(0)
    init.apply(ours, default, bias=default)
    for mine, original in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, original)


def test_a_batch_shows_functions_and_what_is_used_twice(device: torch.device) -> None:
    model = Functional().to(device)
    before = copy.deepcopy(dict(model.named_buffers()))
    done = init.apply(model, "kaiming_normal_", batch=torch.randn(2, 3, 8, 8, device=device))
    followed = {row.parameter: row.activation for row in done if row.activation}
    assert followed == {
        "stem.weight": "leaky_relu(0.2)",
        "inner.weight": "leaky_relu(0.2)",
        "summed.weight": "linear",  # what is activated is a sum
        "wide.weight": "gelu",
        "head.weight": "linear",
    }
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_batch_and_the_order_agree_on_a_sequence() -> None:
    model = mlp()
    by_order = [row.activation for row in init.apply(model, "kaiming_normal_")]
    assert [row.activation for row in init.apply(model, "kaiming_normal_", batch=torch.randn(4, 8))] == by_order
    # Arguments and keyword arguments.
    assert [row.activation for row in init.apply(model, batch=(torch.randn(4, 8),))] == by_order
    assert [row.activation for row in init.apply(model, batch={"input": torch.randn(4, 8)})] == by_order


def test_a_batch_that_fails_leaves_no_hooks() -> None:
    model = Functional()
    with pytest.raises(RuntimeError):
        init.apply(model, "kaiming_normal_", batch=torch.randn(2, 5, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("backend", ["torch", "reimpl"])
def test_both_backends_are_known(backend: Any) -> None:
    torch.manual_seed(0)
    model = ResNet(layers(backend), depth=8)
    done = init.apply(model, "kaiming_normal_", batch=torch.randn(2, 3, 32, 32), generator=seeded_generator(0))
    assert done.left == () and "relu" in {row.activation for row in done}
    reference = ResNet(layers("torch"), depth=8)
    init.apply(reference, "kaiming_normal_", batch=torch.randn(2, 3, 32, 32), generator=seeded_generator(0))
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_functions_that_cannot_be_seen_are_asked_for() -> None:
    chain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = copy.deepcopy(chain.state_dict())
    with pytest.raises(
        ValueError, match=r"no activation module follows any of the layers \['0', '1'\].*activation='relu'"
    ):
        init.apply(chain, "kaiming_normal_")
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())
    assert init.apply(chain, "kaiming_normal_", activation="linear")["0.weight"].activation == "linear"
    assert init.apply(chain, "lecun_normal_")["0.weight"].activation == ""  # does not ask
    assert init.apply(chain[0], "kaiming_normal_")["weight"].activation == "linear"  # one layer: an output


def test_activation_by_argument() -> None:
    model = mlp()
    done = init.apply(model, "kaiming_normal_", activation="relu")
    assert {row.activation for row in done if row.fans} == {"relu"}
    done = init.apply(model, "kaiming_normal_", activation={"4": F.gelu, "[79]": "selu"})
    assert [done[f"{i}.weight"].activation for i in (0, 4, 7, 9)] == ["relu", "gelu", "selu", "selu"]


@pytest.mark.parametrize("rule", ["kaiming_normal_", "xavier_normal_"])
@pytest.mark.parametrize("function", [F.gelu, F.silu, nn.ELU(inplace=True), torch.nn.functional.softplus])
def test_other_activations_keep_the_mean_square(rule: str, function: Any) -> None:
    """Gain E[f(z)²]^(-1/2): a layer of normal inputs and that gain ends at mean square 1 in f's units, so f(z)·gain."""
    layer = nn.Linear(400, 400).requires_grad_(False)
    init.apply(layer, rule, activation=function, generator=seeded_generator(0))
    plain = nn.Linear(400, 400).requires_grad_(False)
    init.apply(plain, rule, activation="linear", generator=seeded_generator(0))
    gain = float((layer.weight / plain.weight).median())
    z = torch.randn(1_000_000, dtype=torch.float64, generator=seeded_generator(1))
    # The mean of a million squares: five standard errors are below 2% for functions with tails no heavier than z's.
    assert gain**2 * float(function(z).square().mean()) == pytest.approx(1, rel=0.02)


def test_the_computed_gain_of_relu_is_he(device: torch.device) -> None:
    weight = nn.Linear(3, 5, device=device)
    init.apply(weight, "xavier_normal_", activation=torch.relu, generator=seeded_generator(0, device=device))
    expected = init.xavier_normal_(torch.empty(5, 3, device=device), sqrt(2), seeded_generator(0, device=device))
    # A sum over 4,001 points with a kink in the middle: 1e-6 is its error there.
    torch.testing.assert_close(weight.weight.detach(), expected, rtol=2e-6, atol=0)


def test_biases_by_argument() -> None:
    model = mlp()
    init.apply(model, bias=0.5)
    assert all((layer.bias == 0.5).all() for layer in weights(model)) and not model[1].bias.any()
    before = [layer.bias.clone() for layer in weights(model)]
    done = init.apply(model, bias=None)
    assert all(torch.equal(layer.bias, old) for layer, old in zip(weights(model), before, strict=True))
    assert set(done.left) == {"0.bias", "4.bias", "7.bias", "9.bias"}
    init.apply(model, bias="normal_")
    assert all(layer.bias.std() > 0 for layer in weights(model))


def test_meta_and_other_dtypes() -> None:
    model = nn.ModuleList((Functional(), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2), nn.Embedding(3, 4, padding_idx=0)))
    done = init.apply(copy.deepcopy(model).to("meta"), activation="relu")
    assert len(done) == len(list(model.parameters())) and "nan" in str(done)
    for dtype in (torch.bfloat16, torch.float64):
        done = init.apply(model.to(dtype), "orthogonal_", activation="relu")
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_seed_gives_the_same_model_and_no_graph(device: torch.device) -> None:
    first, second = Functional().to(device), Functional().to(device)
    first.stem.weight.requires_grad_(False)
    for model in (first, second):
        init.apply(model, activation="relu", generator=seeded_generator(3, device=device))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other) and one.is_leaf
    assert not first.stem.weight.requires_grad and first.head.weight.requires_grad


def test_the_table(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="reimpl.init"):
        done = init.apply(
            nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2), nn.ReLU()), generator=seeded_generator(0)
        )
    assert caplog.messages == [str(done)]
    header, weight, bias = str(done).splitlines()
    assert header.split() == ["parameter", "shape", "rule", "activation", "fan", "in", "fan", "out", "std"]
    std = float(done["0.weight"].std)
    assert weight.split() == f"0.weight 4 × 6 × 3 kaiming_normal_ relu 6 18 {std:.4g}".split()
    assert bias.split() == ["0.bias", "6", "0", "0"]
    with pytest.raises(KeyError, match="nowhere"):
        done["nowhere"]


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"rule": "he_normal_"}, ValueError, r"rule must be .* or one of .*kaiming_normal_.*'he_normal_'"),
        ({"rule": None}, TypeError, "rule must be a name, a number or a function, got NoneType"),
        ({"rule": "constant_"}, ValueError, r"rule constant_ needs val: pass functools.partial\(constant_, val=...\)"),
        ({"rule": "sparse_"}, ValueError, "needs sparsity"),
        ({"bias": "sparse_"}, ValueError, "bias sparse_ needs sparsity"),
        ({"recurrent": "x"}, ValueError, "recurrent must be"),
        ({"embedding": "x"}, ValueError, "embedding must be"),
        ({"activation": "swish"}, ValueError, "Unsupported nonlinearity swish: activation must be .* one of .*relu"),
        ({"activation": 3}, TypeError, "activation must be a function, .* got 3"),
        ({"activation": {"7": "relu", "nowhere": "relu"}}, ValueError, "activation has the pattern 'nowhere'"),
        ({"activation": torch.zeros_like}, ValueError, "zeros_like has mean square 0.0"),
        ({"activation": torch.sum}, ValueError, "sum must be elementwise"),
        ({"overrides": {"nowhere": 0.0}}, ValueError, "overrides has the pattern 'nowhere'"),
        ({"rule": "random_walk_", "activation": F.gelu}, ValueError, "nonlinearity gelu: 0.weight's layer"),
    ],
)  # fmt: skip
def test_refuses_before_or_names_the_parameter(kwargs: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        init.apply(mlp(), **kwargs)


@pytest.mark.parametrize("rule", ["random_walk_", partial(init.random_walk_, generator=None)], ids=["name", "partial"])
def test_random_walk_says_which_layer_and_what_it_knows(rule: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Tanh())
    words = "nonlinearity tanh: 2.weight's layer is followed by it, and random_walk_ knows linear, relu, leaky_relu"
    with pytest.raises(ValueError, match=words):
        init.apply(model, rule)


@pytest.mark.parametrize("function", [init.apply, partial(init.layer_sequential_, batch=torch.ones(2))], ids=range(2))
def test_a_tensor_is_no_model(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        function(torch.zeros(3))


def test_an_error_says_which_parameter() -> None:
    with pytest.raises(ValueError, match="Only tensors with 2 dimensions") as caught:
        init.apply(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Conv2d(1, 1, 1)), "eye_")
    assert caught.value.__notes__ == ["while initialising 2.weight, shape (1, 1, 1, 1), by eye_"]


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight belongs to a lazy layer"):
        init.apply(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))


def test_layers_without_units() -> None:
    with pytest.warns(UserWarning, match="zero-element tensors"):
        model = nn.Sequential(nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 0))
    with pytest.warns(UserWarning, match="zero-element tensors"):
        init.apply(model)
    init.apply(model, "xavier_normal_")


def test_no_model_is_initialised_by_pytorch() -> None:
    first, second = Functional(), mlp()
    with independence_guard(("torch.nn.init.*",)) as seen:
        init.apply(first, batch=torch.randn(2, 3, 8, 8))
        init.layer_sequential_(second, torch.randn(8, 8))
    assert any(name.endswith("_job.Job.run") for name in seen), "the guard slept"
