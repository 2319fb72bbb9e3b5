"""Signal reports and gradient checks: what is named, on anyone's model, and that nothing is left behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import reimpl.nn
from reimpl import init
from reimpl.diagnose import SignalReport, gradient_check, signal_report
from reimpl.testing.samples import random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal

pytestmark = pytest.mark.quick


def data(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_tensor(shape, dtype, seeded_generator(0, "signals", shape))


def mlp(activation: Callable[[], nn.Module], rule: Callable[..., Any], depth: int = 12, width: int = 32) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width)
        rule(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def test_sigmoids_vanish_and_he_does_not() -> None:
    x = data(32, 32)
    report = signal_report(mlp(nn.Sigmoid, init.xavier_normal_), x)
    assert report.vanishing[:2] == ("0", "1") and not report.exploding and not report.healthy
    gradients = [layer.gradient for layer in report.layers if layer.kind == "Linear"]
    ratios = [a / b for a, b in pairwise(gradients)]
    assert max(ratios[:-1]) < 0.35  # |w| of about 1 times a slope of at most 1/4, layer after layer
    assert signal_report(mlp(nn.ReLU, init.kaiming_normal_), x).healthy
    assert signal_report(mlp(nn.Tanh, init.xavier_normal_), x).healthy


def test_explosions_are_named() -> None:
    big = mlp(nn.ReLU, lambda w: init.normal_(w, std=1.0))
    report = signal_report(big, data(32, 32))
    assert report.exploding and "0" in report.exploding and "23" in report.exploding and not report.vanishing
    not_finite = mlp(nn.ReLU, lambda w: init.normal_(w, std=1e15))
    assert "24" in signal_report(not_finite, data(32, 32)).exploding


def test_small_and_zero_weights_die() -> None:
    report = signal_report(mlp(nn.ReLU, lambda w: init.normal_(w, std=0.01)), data(32, 32))
    assert "23" in report.vanishing and "0" in report.vanishing
    zero = signal_report(mlp(nn.ReLU, init.zeros_), data(32, 32))
    assert set(zero.dead) == {layer.name for layer in zero.layers} and zero.layers[0].dead == 1


def test_dead_units_are_counted() -> None:
    model = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3))
    with torch.no_grad():
        model[0].bias[:7] = -100
    report = signal_report(model, data(64, 16))
    assert report.dead == ("1",) and report.layers[1].dead == pytest.approx(0.7)
    assert "70%" in str(report) and "dead: 1" in str(report)
    assert signal_report(model, data(64, 16), dead=0.8).healthy
    assert math.isnan(signal_report(model, data(7, 16)).layers[1].dead)  # too few to tell
    saturated = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid())
    with torch.no_grad():
        saturated[0].bias.fill_(1000)
    assert signal_report(saturated, data(32, 4)).dead == ("1",)


def test_a_channel_is_dead_where_it_is_dead_everywhere() -> None:
    for conv, shape in ((nn.Conv1d(3, 4, 3), (16, 3, 9)), (nn.Conv2d(3, 4, 3), (16, 3, 9, 9))):
        with torch.no_grad():
            conv.bias[:1] = -100
        report = signal_report(nn.Sequential(conv, nn.ReLU()), data(*shape))
        assert report.layers[1].dead == 0.25
    tokens = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with torch.no_grad():
        tokens[0].bias[:3] = -100
    assert signal_report(tokens, data(16, 9, 3)).layers[1].dead == 0.75


def test_statistics_by_hand(device: torch.device) -> None:
    model = nn.Linear(2, 1, bias=False).to(device)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    layer = signal_report(model, x, loss=lambda y: y.square().sum() / 2).layers[0]
    assert (layer.name, layer.kind, layer.shape) == ("Linear", "Linear", (2, 1))
    assert (layer.mean, layer.std, layer.spread) == (3.5, 0.5, 0.5)
    assert (layer.gradient, layer.weight, layer.weight_gradient) == (5.0, 5.0, 5.0)


class Branches(nn.Module):
    """Keyword arguments, nested outputs, a shared layer, an unused one, a parameter of its own, a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.shared = nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)
        self.unused = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(8).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, extra: Any = None) -> dict[str, Any]:
        x = self.shared(self.act(self.shared(self.embed(ids))))
        return {"hidden": [x], "logits": (self.norm(x) * self.scale, ids)}


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet20 of ours": (lambda: models.build("resnet20", backend="reimpl"), data(8, 3, 32, 32)),
    "fast": (lambda: models.build("fast", widths=(8, 8, 8)), data(8, 3, 32, 32)),
    "branches": (Branches, {"ids": torch.arange(40).reshape(8, 5) % 10, "extra": None}),
    "transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (data(8, 5, 8), data(8, 4, 8))),
    "lstm": (lambda: nn.LSTM(4, 6, 2, dropout=0.5), data(7, 8, 4)),
    "in place first": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), data(8, 4)),
    "frozen": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False), data(8, 4)),
    "half": (lambda: nn.Linear(4, 4).bfloat16(), data(8, 4).bfloat16()),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), data(8, 4)),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), data(8, 4)),  # type: ignore[return-value]
}


def _everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: x.clone() for name, x in model.state_dict().items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "buffers": [id(buffer) for buffer in model.buffers()],
        "random": torch.get_rng_state(),
    }


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bits_equal(left, right) if isinstance(left, Tensor) else bool(left == right)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_is_left_as_it_was(name: str, training: bool) -> None:
    make, batch = MODELS[name]
    model = make().train(training)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 3.0) if i % 2 else None
    next(model.modules()).train(training)
    before, batch_before = _everything(model), copy.deepcopy(batch)
    with torch.inference_mode() if training else torch.no_grad():
        report = signal_report(model, batch)
    assert isinstance(report, SignalReport) and report.layers and str(report)
    assert _same(_everything(model), before)
    given, kept = (x if isinstance(x, (tuple, dict)) else (x,) for x in (batch, batch_before))
    assert all(_same(a, b) for a, b in zip(*(x.values() if isinstance(x, dict) else x for x in (given, kept))))
    assert not any(isinstance(x, Tensor) and x.requires_grad for x in given)
    assert all(layer.gradient >= 0 for layer in report.layers), name
    again = signal_report(model, batch)
    assert repr(report) == repr(again)  # as text, in which NaN is NaN


def test_inputs_of_inference_mode() -> None:
    model = nn.Linear(4, 4)
    with torch.inference_mode():
        assert signal_report(model, torch.ones(8, 4)).layers[0].gradient > 0


def test_layers_are_listed_in_order_and_by_call() -> None:
    report = signal_report(Branches(), torch.arange(80).reshape(16, 5) % 10)
    # the module itself has a parameter of its own, and ends last
    assert [layer.name for layer in report.layers] == ["embed", "shared", "act", "shared#2", "norm", "Branches"]
    assert math.isnan(report.layers[2].weight) and report.layers[0].weight > 0
    frozen = report.layers[4]
    assert math.isnan(frozen.weight_gradient) and frozen.weight > 0 and frozen.gradient > 0


def test_everything_is_restored_when_the_model_raises() -> None:
    class Fails(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            torch.rand(1)
            raise ZeroDivisionError

    model = Fails(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout())
    before = _everything(model)
    with pytest.raises(ZeroDivisionError):
        signal_report(model, data(8, 3))
    assert _same(_everything(model), before)


def test_checkpointed_layers_run_twice_and_count_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)  # type: ignore[no-any-return]

    report = signal_report(Checkpointed(), data(8, 4))
    assert [layer.name for layer in report.layers] == ["block.0", "block.1"]
    assert all(layer.gradient > 0 for layer in report.layers)


def test_a_loss_of_ones_own() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), data(16, 4), torch.arange(16) % 2
    report = signal_report(model, x, loss=lambda out: nn.functional.cross_entropy(out, y))
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for index in (0, 2):
        grads = torch.cat([p.grad.flatten() for p in model[index].parameters()])
        assert report.layers[index].weight_gradient == pytest.approx(float(grads.norm()), rel=1e-6)
    constant = signal_report(model, x, loss=lambda out: torch.tensor(1.0))
    assert all(math.isnan(layer.gradient) for layer in constant.layers)


def test_signal_report_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot")
    report = signal_report(mlp(nn.ReLU, init.zeros_), data(32, 32))
    assert report.plot(tmp_path / "signals.png").axes and (tmp_path / "signals.png").stat().st_size > 1000


def test_signal_report_refuses() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ratio must be above 1, got 1"):
        signal_report(model, data(8, 2), ratio=1)
    with pytest.raises(ValueError, match=r"dead must lie in \(0, 1\], got 0"):
        signal_report(model, data(8, 2), dead=0)
    with pytest.raises(ValueError, match=r"loss must return a tensor of one number, got shape \(8, 2\)"):
        signal_report(model, data(8, 2), loss=lambda y: y)
    with pytest.raises(ValueError, match=r"batch must hold at least one example, got shape \(0, 2\)"):
        signal_report(model, torch.randn(0, 2))
    with pytest.raises(TypeError, match="batch must be a tensor, or a tuple, list or mapping with one, got ndarray"):
        signal_report(model, data(8, 2).numpy())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        signal_report(lambda x: x, data(8, 2))  # type: ignore[arg-type]
    parts = nn.ModuleList([model])
    parts.forward = model.forward  # type: ignore[method-assign]  # calls no module, so that no hook runs
    with pytest.raises(ValueError, match="no layer of the model ran"):
        signal_report(parts, data(8, 2))


# Gradient checking (D10)


class _Halved(torch.autograd.Function):
    """tanh with half its gradient: the planted error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y) / 2


class Planted(nn.Module):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(4))
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        gain = _Halved.apply(self.gain) if self.wrong else torch.tanh(self.gain)
        return self.third(x * gain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_worst_parameter_is_named(dtype: torch.dtype, device: torch.device) -> None:
    x, y = data(16, 3, dtype=dtype).to(device), (torch.arange(16) % 2).to(device)
    for wrong in (False, True):
        torch.manual_seed(0)
        model = Planted(wrong).to(device, dtype)
        check = gradient_check(model, lambda m=model: nn.functional.cross_entropy(m(x), y))
        assert check.ok is not wrong
        if wrong:
            # |g/2 - g| / (|g/2| + |g|), less the rounding allowed for: in float32 a thirtieth of the gradient
            assert check.worst.name == "gain"
            assert check.worst.relative_error == pytest.approx(1 / 3, abs=1e-6 if dtype == torch.float64 else 0.04)
            assert check.worst.numeric == pytest.approx(2 * check.worst.analytic, rel=0.02)
            assert [p.name for p in check.parameters if not p.ok] == ["gain"]
            assert "WRONG" in str(check) and str(check).endswith("worst: gain")
        else:
            assert str(check).endswith("all gradients are right") and len(check.parameters) == 7


def test_gradient_check_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, x = _everything(model), data(16, 3, dtype=torch.float64)
    with torch.no_grad():
        check = gradient_check(model, lambda: model(x).square().mean(), samples=None)
    assert check.ok and _same(_everything(model), before)
    counts = {p.name: p.compared for p in check.parameters}
    assert counts["0.weight"] == 12 and counts["3.bias"] == 2
    # Batch normalisation makes the gradient of the bias before it 0, which must not look wrong.
    bias = next(p for p in check.parameters if p.name == "0.bias")
    assert bias.ok and abs(bias.analytic) < 1e-15
    failing = iter([1.0])
    with pytest.raises(StopIteration):
        gradient_check(model, lambda: model(x).square().mean() * next(failing))
    assert _same(_everything(model), before)


@pytest.mark.parametrize("layer", ["Conv2d", "BatchNorm2d"])
def test_our_layers_have_right_gradients(layer: str) -> None:
    torch.manual_seed(0)
    model = getattr(reimpl.nn, layer)(*((3, 4, 3) if layer == "Conv2d" else (3,))).double()
    x = data(4, 3, 5, 5, dtype=torch.float64)
    assert gradient_check(model, lambda: model(x).sin().sum(), samples=None).ok


def test_tensors_by_name_and_unused_ones() -> None:
    w = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    check = gradient_check({"w": w, "s": s, "unused": unused}, lambda: (w**2).sum() * s)
    assert check.ok and {p.name: p.analytic for p in check.parameters}["s"] == 13
    wrong = gradient_check({"w": w}, lambda: (w**2).sum() + (w.detach() ** 2).sum())
    assert not wrong.ok and wrong.worst.relative_error == pytest.approx(1 / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "loss", "arguments", "text"),
    [
        ({}, lambda m: 0, {}, "must have a parameter that requires a gradient"),
        ("linear", lambda m: m(torch.ones(1, 2)).sum(), {"samples": 0}, "samples must be at least 1, got 0"),
        (
            "half",
            lambda m: m(torch.ones(1, 2).half()).sum(),
            {},
            "weight must be float32 or float64 .* got torch.float16",
        ),
        (
            "linear",
            lambda m: m(torch.ones(1, 2)),
            {},
            r"a tensor of one number that has a gradient, got shape \(1, 3\)",
        ),
        ("linear", lambda m: 1.0, {}, "has a gradient, got float"),
        ("linear", lambda m: m(torch.ones(1, 2)).sum().detach(), {}, "has a gradient"),
        ("linear", lambda m: m(torch.full((1, 2), math.inf)).sum(), {}, "loss must be finite"),
    ],
)
def test_gradient_check_refuses(model: Any, loss: Any, arguments: Any, text: str) -> None:
    if isinstance(model, str):
        model = nn.Linear(2, 3).half() if model == "half" else nn.Linear(2, 3)
    with pytest.raises(ValueError, match=text):
        gradient_check(model, lambda: loss(model), **arguments)


def test_a_loss_that_changes_is_refused() -> None:
    model, calls = nn.Linear(2, 1), iter(range(100))
    with pytest.raises(ValueError, match="loss must be the same when it is evaluated again"):
        gradient_check(model, lambda: model(torch.ones(1, 2)).sum() * (1 + next(calls)))


def _of_images(kind: str) -> nn.Sequential:
    """A plain network full of kinks: in float32 most weights have one within the step of a difference."""
    layers: dict[str, list[nn.Module]] = {
        "norm": [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)],
        "conv": [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)],
        "dense": [nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)],
    }
    return nn.Sequential(*layers[kind])


def _times(share: float, only_the_largest: bool) -> Callable[[Tensor], Tensor]:
    def wrong(grad: Tensor) -> Tensor:
        largest = grad.abs() == grad.abs().max()
        return grad.where(~largest, grad * share) if only_the_largest else grad * share

    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["norm", "conv", "dense"])
def test_a_kink_is_no_error_and_hides_none(kind: str, dtype: torch.dtype) -> None:
    kinks = 0
    for seed in range(12):
        torch.manual_seed(seed)
        model, x, y = _of_images(kind).to(dtype), data(16, 3, 8, 8, dtype=dtype), torch.randint(0, 4, (16,))

        def loss(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            return nn.functional.cross_entropy(model(x), y)

        check = gradient_check(model, loss, samples=8)
        assert check.ok, f"seed {seed}\n{check}"
        kinks += sum(p.kinks for p in check.parameters)
        first = next(module for module in model if list(module.parameters()))
        # Batch normalisation makes the gradient of a bias before it 0, of which half is right.
        wrongs = [("weight", 0.5, False)] if kind == "norm" else [("weight", 0.9, False), ("bias", 0.5, True)]
        for name, share, only_the_largest in wrongs:
            handle = getattr(first, name).register_hook(_times(share, only_the_largest))
            found = gradient_check(model, loss, samples=8)
            handle.remove()
            bad = [p.name for p in found.parameters if not p.ok]
            assert len(bad) == 1 and bad[0].endswith(name), f"seed {seed}, {name}\n{found}"
    assert kinks or dtype == torch.float64, "no entry had a kink: the test shows nothing"


def test_a_kink_at_the_entry_itself() -> None:
    """At 0 autograd takes ReLU's derivative from the left, the difference half of both."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    check = gradient_check({"w": w}, lambda: 1 + w.relu().sum())
    assert check.ok and check.worst.kinks == 3 and check.worst.compared == 0
    assert "3 beside a kink agree by other differences" in str(check)
    w.register_hook(lambda grad: grad + 0.25)
    assert not gradient_check({"w": w}, lambda: 1 + w.relu().sum()).ok


def test_a_gradient_that_is_no_number_is_wrong() -> None:
    w = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    check = gradient_check({"w": w}, lambda: (w * w).sqrt().sum())  # 0 · ∞ at 0
    assert not check.ok and math.isnan(check.worst.relative_error) and check.worst.index == (0,)


def test_an_error_within_rounding_is_said_to_be() -> None:
    w = torch.tensor([0.5], requires_grad=True)
    check = gradient_check({"w": w}, lambda: 100 + (w.sin() / 3).sum())
    assert check.ok and check.worst.within_rounding and check.worst.numeric != check.worst.analytic
    assert "ok     within rounding over 1; at (0,): autograd 0.2925" in str(check)
    off = abs(check.worst.numeric - check.worst.analytic) / (check.worst.numeric + check.worst.analytic)
    assert check.worst.relative_error == pytest.approx(off, rel=1e-6)
