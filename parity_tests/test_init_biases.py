"""Biases that start at more than zero, and layers scaled by what a batch makes of them."""

from __future__ import annotations

import copy
from functools import partial
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reimpl.init as init
import reimpl.nn
from reimpl.testing import bits_equal, seeded_generator

pytestmark = pytest.mark.quick


def classifier(outputs: int, device: torch.device) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs)).to(device)
    init.apply(model)
    init.zeros_(model[2].weight)
    return model


def test_softmax_outputs_start_at_the_class_shares(device: torch.device) -> None:
    """I8: the first loss is the entropy of the classes, which no constant prediction beats."""
    counts = torch.tensor([70, 20, 10], device=device)
    model = classifier(3, device)
    assert init.output_bias_(model, counts) is model
    assert float(model[2].bias.detach().logsumexp(0)) == pytest.approx(0, abs=1e-6)  # logits of shares, not of counts
    model.requires_grad_(False)
    x, target = torch.randn(100, 6, device=device), torch.arange(3, device=device).repeat_interleave(counts)
    entropy = -sum(p * log(p) for p in (0.7, 0.2, 0.1))
    assert float(F.cross_entropy(model(x), target)) == pytest.approx(entropy, rel=1e-6)  # float32
    shares = init.output_bias_(model[2].bias, counts / 100)
    assert shares is model[2].bias and float(shares.logsumexp(0)) == pytest.approx(0, abs=1e-6)
    zero = classifier(3, device).requires_grad_(False)
    assert float(F.cross_entropy(zero(x), target)) == pytest.approx(log(3), rel=1e-6)


def test_sigmoid_outputs_start_at_the_share_of_positives(device: torch.device) -> None:
    shares = torch.tensor([0.01, 0.5, 0.9], device=device)
    model = classifier(3, device)
    init.output_bias_(model, shares, link="sigmoid")
    torch.testing.assert_close(model(torch.randn(4, 6, device=device)).sigmoid(), shares.expand(4, 3))
    init.output_bias_(model[2], 0.25, "sigmoid")
    torch.testing.assert_close(model[2].bias.detach().cpu(), torch.full((3,), -log(3.0)))


def test_linear_outputs_start_at_the_mean(device: torch.device) -> None:
    targets = torch.randn(50, 2, device=device) * 3 + 10
    model = classifier(2, device)
    init.output_bias_(model, targets.mean(0), link="linear")
    loss = F.mse_loss(model(torch.randn(50, 6, device=device)), targets)
    torch.testing.assert_close(loss, targets.var(0, correction=0).mean())


@pytest.mark.parametrize(
    ("target", "marginal", "link", "words"),
    [
        (nn.Linear(2, 3), [1.0, 1.0, 1.0], "logits", r"link must be one of .*softmax.*, got 'logits'"),
        (nn.Linear(2, 3), [1.0, 1.0], "softmax", r"bias's shape \(3,\), got \(2,\)"),
        (nn.Linear(2, 3), [5.0, 0.0, 1.0], "softmax", r"add one to each count\), got 0.0 at \[1\]"),
        (nn.Linear(2, 3), [5.0, float("inf"), 1.0], "softmax", r"got inf at \[1\]"),
        (nn.Linear(2, 3), [0.5, 0.5, 1.0], "sigmoid", r"between 0 and 1, both excluded, got 1.0 at \[2\]"),
        (nn.Linear(2, 3), [0.5, -0.5, 1.0], "sigmoid", r"got -0.5 at \[1\]"),
        (nn.Linear(2, 3), [0.5, float("nan"), 1.0], "linear", r"finite, got nan at \[1\]"),
        (nn.Linear(2, 3, bias=False), [1.0, 1.0, 1.0], "softmax", "the layer Linear has no bias"),
        (nn.ReLU(), [1.0], "softmax", "linear or convolution layer, ReLU has none"),
        (nn.Linear(2, 3), [0.5, 0.3, 0.3], "softmax", "shares that sum to 1, or counts in whole numbers, .* sum 1.1"),
        (nn.Linear(2, 3), [0.5, 1.5, 1.0], "softmax", "shares that sum to 1, or counts in whole numbers, .* sum 3"),
        (nn.Linear(2, 3), 0.5, "softmax", "shares that sum to 1, .* sum 1.5"),
    ],
    ids=range(12),
)
def test_output_bias_refuses(target: Any, marginal: list[float], link: str, words: str) -> None:
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=words):
        init.output_bias_(target, torch.tensor(marginal), link)
    assert all(bits_equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_shares_and_counts_are_the_same_start(dtype: torch.dtype, device: torch.device) -> None:
    """Whole numbers are counts; shares sum to 1 within the rounding of their dtype."""
    counted = init.output_bias_(torch.empty(3, device=device), [1, 2, 1])
    assert torch.equal(counted, init.output_bias_(torch.empty(3, device=device), [0.25, 0.5, 0.25]))
    third = torch.full((3,), 1 / 3, dtype=dtype)
    torch.testing.assert_close(init.output_bias_(torch.empty(3, device=device), third).exp().cpu(), torch.ones(3) / 3)


@pytest.mark.parametrize(
    "function", [partial(init.output_bias_, marginal=0.5), init.relu_bias_, init.lstm_forget_bias_]
)
def test_a_layer_without_bias_has_none_to_set(function: Any) -> None:
    with pytest.raises(ValueError, match="got None: a layer with bias=False has no bias"):
        function(nn.Linear(2, 2, bias=False).bias)
    with pytest.raises(TypeError, match="target must be a bias, a layer or a model, got list"):
        function([0.0])


def test_scalings_print_as_a_table() -> None:
    done = init.layer_sequential_(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(64, 4))
    head, first, second = str(done).splitlines()
    assert head.split("  ") == ["layer", "variance before", "after", "weight times"] and second.startswith("2 ")
    assert first.split() == ["0", *(f"{number:.4g}" for number in done["0"])]


def test_relu_bias_is_the_one_the_relu_sees(device: torch.device) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Dropout(), reimpl.nn.ReLU(),
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4),
    ).to(device)  # fmt: skip
    init.apply(model)
    assert init.relu_bias_(model) is model
    set_ = {name for name, value in model.named_parameters() if name.endswith("bias") and value.any()}
    assert set_ == {"1.bias", "3.bias"}  # not the linear layer's before the norm, which has no effect there
    assert (model[1].bias == 0.1).all() and (model[3].bias == 0.1).all()
    assert (init.relu_bias_(model[8], 0.3).bias == 0.3).all()
    assert (init.relu_bias_(torch.empty(3, device=device)) == 0.1).all()


def test_relu_bias_keeps_units_alive(device: torch.device) -> None:
    """What it is for: with weights of std 0.02 on 25 inputs, nearly every unit is on for nearly every input."""
    generator = seeded_generator(0, device=device)
    layer = nn.Linear(25, 400, device=device)
    init.normal_(layer.weight, std=0.02, generator=generator)
    x = torch.randn(200, 25, generator=generator, device=device)
    share = {}
    for value in (0.0, 0.1):
        init.relu_bias_(layer, value)
        share[value] = float((layer(x) > 0).double().mean())
    # std of the sum is 0.1: Φ(0) = 0.5 and Φ(1) = 0.84; 400 rows of 25 weights let the std differ by some percent.
    assert share[0.0] == pytest.approx(0.5, abs=0.03) and share[0.1] == pytest.approx(0.84, abs=0.03)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "no ReLU module with a bias in front"),
        (nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()), "no ReLU module with a bias in front"),
        (nn.Linear(2, 2, bias=False), "the layer Linear has no bias"),
    ],
    ids=range(3),
)
def test_relu_bias_refuses(target: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        init.relu_bias_(target)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
        lambda: nn.LSTMCell(3, 4),
        lambda: nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4, proj_size=2)),
    ],
    ids=["layers", "cell", "model"],
)
def test_forget_gates_start_open(make: Any, device: torch.device) -> None:
    model = make().to(device)
    before = copy.deepcopy(model.state_dict())
    assert init.lstm_forget_bias_(model, 2.0) is model
    gates = 0
    for name, value in model.state_dict().items():
        old = before[name]
        if "bias_ih" in name or "bias_hh" in name:
            gates += 1
            assert (value[4:8] == (2.0 if "bias_ih" in name else 0.0)).all()
            value, old = (torch.cat((x[:4], x[8:])) for x in (value, old))
        assert torch.equal(value, old)
    assert gates in (2, 8)


def test_an_open_forget_gate_remembers(device: torch.device) -> None:
    """With zero weights the cell decays by σ(bias) a step: 0.73 for 1, where a zero bias halves it."""
    cell = nn.LSTMCell(3, 4, device=device)
    for value, kept in ((1.0, 0.7310585786), (0.0, 0.5)):
        init.apply(cell, "zeros_", recurrent="zeros_", forget_bias=value)
        _, memory = cell(
            torch.zeros(1, 3, device=device), (torch.zeros(1, 4, device=device), torch.ones(1, 4, device=device))
        )
        assert float(memory[0, 0].detach()) == pytest.approx(kept, rel=1e-6)  # float32


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (nn.GRU(3, 4), "no LSTM with biases was found in GRU"),
        (nn.LSTM(3, 4, bias=False), "no LSTM with biases"),
        (torch.empty(4, 4), r"four gates, got shape \(4, 4\)"),
        (torch.empty(6), r"four gates, got shape \(6,\)"),
    ],
    ids=range(4),
)
def test_lstm_forget_bias_refuses(target: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        init.lstm_forget_bias_(target)


class Deep(nn.Module):
    """A convolutional net with batch norm, dropout, a branch, a layer used twice and one not used at all."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = reimpl.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = torch.tanh(self.norm(self.stem(x * scale)))
        x = x + F.elu(self.twice(F.elu(self.twice(x))))
        return self.head(self.drop(F.relu(self.up(x))).mean((2, 3)))


def output_variances(model: nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Variance of each layer's first output."""
    found: dict[str, float] = {}

    def note(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            found.setdefault(name, float(output.var(correction=0)))

        return after

    hooks = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if hasattr(m, "weight") and n != "norm"]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rule", ["orthogonal_", "normal_", None])
def test_layers_have_unit_variance_on_the_batch(rule: Any, norm: bool, device: torch.device) -> None:
    model = Deep(norm).to(device)
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(8, 3, 8, 8, generator=seeded_generator(0)).to(device) * 40 + 7
    model.eval()  # dropout would draw other units the second time
    done = init.layer_sequential_(model, batch, rule=rule, generator=seeded_generator(1, device=device))
    assert list(done) == ["stem", "twice", "up", "head"]
    for name, variance in output_variances(model, batch).items():
        # The default tolerance; with zero biases one scaling is exact but for float32.
        assert variance == pytest.approx(1, abs=0.0101 if rule is None else 1e-4), name
        assert done[name].after == pytest.approx(variance, rel=1e-5)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if "running" in name or "num_" in name)
    if rule is None:
        for name, scaling in done.items():
            torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] * scaling.factor)
            assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
        assert torch.equal(after["unused.weight"], before["unused.weight"])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in model.parameters())


def test_a_bias_takes_more_than_one_pass() -> None:
    layer = nn.Linear(50, 40)
    init.apply(layer)
    init.normal_(layer.bias, std=0.5, generator=seeded_generator(0))
    batch = torch.randn(300, 50, generator=seeded_generator(1))
    once = init.layer_sequential_(copy.deepcopy(layer), batch, rule=None, tolerance=1e-4, max_passes=1)[""]
    often = init.layer_sequential_(layer, batch, rule=None, tolerance=1e-4, max_passes=50)[""]
    assert abs(once.after - 1) > 1e-2 > 1e-4 >= abs(often.after - 1)
    assert init.layer_sequential_(layer, batch, rule=None, variance=4.0)[""].after == pytest.approx(4, rel=0.01)


def test_arguments_of_a_batch() -> None:
    model, images = Deep(False), torch.randn(4, 3, 8, 8)
    for batch in ((images, 2.0), {"x": images, "scale": 2.0}):
        assert len(init.layer_sequential_(model, batch)) == 4


def test_a_weight_that_two_layers_share_is_scaled_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    batch = torch.randn(50, 6)
    assert list(init.layer_sequential_(model, batch)) == ["0"]
    assert output_variances(model, batch)["0"] == pytest.approx(1, rel=1e-4)  # float32


def test_weight_norm_is_scaled_through() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    batch = torch.randn(50, 6)
    assert init.layer_sequential_(model, batch)[""].after == pytest.approx(1, rel=1e-4)
    assert float(model(batch).var(correction=0).detach()) == pytest.approx(1, rel=1e-4)


def test_layers_in_training_mode_see_batch_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(8, 2))
    done = init.layer_sequential_(model, torch.randn(16, 3, 8, 8) * 100)
    assert done["2"].before < 2  # what the norm hands on has variance 1, not 1e4
    assert model.training and int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("make", "batch", "kwargs", "words"),
    [
        (lambda: nn.Linear(3, 4), torch.zeros(5, 3), {}, "output of layer '' has variance 0.0 on this batch"),
        (lambda: nn.Linear(3, 4), torch.full((5, 3), torch.inf), {}, "has variance nan"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.ones(1, 3), {}, "layer '2' has"),
        (nn.ReLU, torch.ones(1, 3), {}, "batch reached no linear or convolution layer of ReLU"),
        (lambda: nn.Linear(3, 4), torch.ones(5, 3), {"variance": 0.0}, "variance must be positive, got 0.0"),
        (lambda: nn.Linear(3, 4), torch.ones(5, 3), {"tolerance": -1.0}, "tolerance must be positive"),
        (lambda: nn.Linear(3, 4), torch.ones(5, 3), {"max_passes": 0}, "max_passes must be positive"),
        (lambda: nn.Linear(3, 4), torch.ones(5, 3), {"rule": "x"}, "rule must be"),
        (lambda: nn.LazyLinear(4), torch.ones(5, 3), {}, "lazy"),
        (lambda: nn.LazyLinear(4), torch.ones(5, 3), {"rule": None}, "lazy"),
    ],
    ids=range(10),
)  # fmt: skip
def test_layer_sequential_refuses(make: Any, batch: torch.Tensor, kwargs: Any, words: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=words):
        init.layer_sequential_(model, batch, **kwargs)
    assert not any(module._forward_hooks for module in model.modules() if not isinstance(module, nn.LazyLinear))


def test_hooks_and_buffers_are_put_back_after_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        init.layer_sequential_(model, torch.randn(5, 3, 2, 2))
    assert not any(module._forward_hooks for module in model.modules())
    assert int(model[1].num_batches_tracked) == 0 and not model[1].running_mean.any()
