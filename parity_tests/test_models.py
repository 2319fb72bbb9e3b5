"""Networks on PyTorch's layers and on ours: parameter counts, state dicts, outputs, gradients, starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from models import MODELS, Backend, build, layers

SMALL: dict[str, dict[str, Any]] = {
    "cnn": {"channels": (4, 8), "hidden": 16},
    "resnet": {"depth": 8, "width": 4},
    "fast": {"widths": (8, 8, 16)},
}
BACKENDS: tuple[Backend, ...] = ("torch", "reimpl")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def step(model: nn.Module, backend: Backend, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, loss, gradients and running statistics of one training step, by name."""
    model.zero_grad()
    logits = model(x)
    loss = layers(backend).CrossEntropyLoss(label_smoothing=0.1)(logits, y)
    loss.backward()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients, **dict(model.named_buffers())}


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Moves a network off its start, where identity convolutions between two normalisations make some gradients 0."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_every_model_has_a_small_shape() -> None:
    assert SMALL.keys() == MODELS.keys()


@pytest.mark.quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("channels", "filters", "side", "parameters"),
    # N4's worked numbers; it gives 156 for six filters of 5x5 over three channels, which is the count over one.
    [(3, 1, 3, 28), (3, 2, 3, 56), (1, 6, 5, 156), (3, 6, 5, 456)],
)
def test_a_convolution_has_the_notes_parameters(
    backend: Backend, channels: int, filters: int, side: int, parameters: int
) -> None:
    assert count(layers(backend).Conv2d(channels, filters, side)) == parameters


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),  # He et al. 2015, table 6: 0.27 M
        ("resnet56", 853_018),  # 0.85 M
        ("cnn", (27 * 32 + 32) + (9 * 32 * 64 + 64) + (64 * 8 * 8 * 128 + 128) + (128 * 10 + 10)),
        ("fast", 24 * 13 + 9 * (24 * 64 + 64 * 64 + 64 * 128 + 3 * 128 * 128) + 4 * (64 + 128 + 128) + 1_280),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    assert count(build(name)) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_one_seed_gives_both_backends_the_same_weights(name: str) -> None:
    states = []
    for backend in BACKENDS:
        torch.manual_seed(7)
        states.append(build(name, backend=backend, **SMALL[name]).state_dict())
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_backends_load_each_other_and_agree(name: str, channels_last: bool, device: torch.device) -> None:
    """Outputs, loss, every gradient and the running statistics, in float64.

    The bound is 1e-9 of a tensor's largest number: the dozen layers multiply a rounding of 1e-16 by the condition of
    what they add up (batch normalisation over 8 images most of all), which leaves six digits of room to any real fault.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64).to(device, memory_format=layout)
    y = torch.randint(10, (8,)).to(device)
    nets = {b: build(name, backend=b, **SMALL[name]).double().to(device, memory_format=layout) for b in BACKENDS}
    for there, here in (BACKENDS, BACKENDS[::-1]):
        disturb(nets[there])
        nets[here].load_state_dict(copy.deepcopy(nets[there].state_dict()))
        results = {backend: step(net, backend, x, y) for backend, net in nets.items()}
        assert results["torch"].keys() == results["reimpl"].keys()
        for key, expected in results["torch"].items():
            difference = (results["reimpl"][key] - expected).abs().max()
            assert difference <= 1e-9 * expected.abs().max(), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_evaluation_mode_treats_each_image_alone(name: str, backend: Backend) -> None:
    model = build(name, backend=backend, **SMALL[name]).double()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    model(x)  # moves the running statistics off their start
    model.eval()
    with torch.no_grad():
        # One image takes another order of summation than six: some tens of ulp of 2e-16.
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-11, atol=1e-12)


@pytest.mark.quick
def test_the_whitening_layer_whitens() -> None:
    """Over random patches with strong correlation, the first layer's outputs are uncorrelated and of variance 1."""
    model = build("fast")
    smooth = nn.functional.avg_pool2d(torch.randn(64, 3, 40, 40), 9, stride=1)
    smooth = smooth[:, [0, 0, 0]] + 0.1 * smooth  # colours nearly alike
    images = smooth / smooth.std()
    model.whiten_(images, eps=0.0)
    patches = model.double().whiten(images.double()).transpose(0, 1).flatten(1)
    covariance = patches[:12].cov()
    # The filters are float32 (6e-8) and reach 1/sqrt of the smallest eigenvalue, some hundreds of times the largest.
    torch.testing.assert_close(covariance, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-2)
    torch.testing.assert_close(patches[12:], -patches[:12], rtol=0, atol=0)


@pytest.mark.quick
def test_the_fast_network_starts_as_the_identity() -> None:
    group = build("fast", widths=(32, 32, 32)).groups[0]
    x = torch.randn(2, 24, 8, 8)
    torch.testing.assert_close(group.conv1(x)[:, :24], x, rtol=0, atol=0)
    assert not build("fast").whiten.weight.requires_grad


def test_the_residual_shortcut_has_no_parameters() -> None:
    block = build("resnet20").stages[3]
    assert block.stride == 2 and block.widen == 16
    x = torch.randn(2, 16, 32, 32)
    shortcut = block._shortcut(x)
    assert shortcut.shape == (2, 32, 16, 16)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert shortcut[:, :8].eq(0).all() and shortcut[:, 24:].eq(0).all()


def test_bad_names_and_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"model must be one of cnn, resnet, fast.*got 'fasst' \(did you mean 'fast'"):
        build("fasst")
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 .*got 21"):
        build("resnet21")
    with pytest.raises(ValueError, match=r"backend must be one of \('torch', 'reimpl'\), got 'jax'"):
        build("cnn", backend="jax")
    with pytest.raises(ValueError, match=r"widths must be three positive channel counts, got \(1, 2\)"):
        build("fast", widths=(1, 2))
    with pytest.raises(ValueError, match=r"channels must name 1 to 5 convolutions"):
        build("cnn", channels=())
    with pytest.raises(TypeError, match="'width'"):
        build("fast", width=3)
