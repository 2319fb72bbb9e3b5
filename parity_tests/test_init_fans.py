"""A layer's fans, counted by the layer itself, and what they do to signals that pass through such layers."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reimpl.init
import reimpl.nn
from parity_tests.declarations.init import INITS
from reimpl.testing import seeded_generator

pytestmark = pytest.mark.quick

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "ours": lambda: reimpl.nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "conv2d": lambda: nn.Conv2d(6, 4, (3, 2)),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "our conv2d": lambda: reimpl.nn.Conv2d(6, 4, 3, groups=2),
    "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "dilated": lambda: nn.Conv2d(6, 4, 3, dilation=2),
    "strided": lambda: nn.Conv2d(6, 4, 4, stride=2),
    "strided, grouped": lambda: nn.Conv2d(6, 4, 3, stride=(3, 1), groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
    "transposed, strided": lambda: nn.ConvTranspose2d(6, 4, 4, stride=2),
    "transposed, strided, uneven": lambda: nn.ConvTranspose1d(6, 4, 3, stride=2),
    "transposed, grouped": lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2),
}


def middle(x: Tensor) -> Tensor:
    """Six places (a multiple of every stride) in the middle of each spatial dimension: no border is near."""
    for dim in range(2, x.dim()):
        start = (x.shape[dim] - 6) // 6 * 3
        x = x.narrow(dim, start, 6)
    return x


@pytest.mark.parametrize("name", LAYERS)
def test_fans_are_the_connections_that_are_there(name: str, device: torch.device) -> None:
    """Weights and inputs of 1: the output counts what comes in, the gradient of its sum what goes out."""
    layer = LAYERS[name]().to(device=device, dtype=torch.float64)
    reimpl.init.apply(layer, 1.0)
    channels = layer.in_features if hasattr(layer, "in_features") else layer.in_channels
    x = torch.ones(1, channels, *(24,) * (layer.weight.dim() - 2), dtype=torch.float64, device=device)
    x.requires_grad_()
    output = layer(x)
    output.sum().backward()
    assert x.grad is not None
    fan_in, fan_out = reimpl.init.layer_fans(layer)
    # Sums of small integers, and means of a few of them: exact but for a division by 6, 36 or 216.
    assert float(middle(output.detach()).mean()) == pytest.approx(fan_in, rel=1e-14)
    assert float(middle(x.grad).mean()) == pytest.approx(fan_out, rel=1e-14)


def test_fans_of_bilinear_layers() -> None:
    layer = nn.Bilinear(3, 5, 2)
    reimpl.init.apply(layer, 1.0)
    assert layer(torch.ones(1, 3), torch.ones(1, 5)).tolist() == [[15.0, 15.0]]
    assert reimpl.init.layer_fans(layer) == (15, 2)


def test_fans_without_a_layer_are_pytorchs() -> None:
    for shape in ((3, 4), (3, 4, 5), (3, 4, 5, 6)):
        weight = torch.empty(shape)
        ours, theirs = reimpl.init.gain.fans(weight), torch.nn.init._calculate_fan_in_and_fan_out(weight)
        assert ours == theirs == (4 * prod(shape[2:]), 3 * prod(shape[2:]))


SCALED = [row.name for row in INITS if row.name.startswith(("kaiming", "lecun", "random", "xavier"))]


@pytest.mark.parametrize("name", SCALED)
def test_given_fans_replace_those_of_the_shape(name: str, device: torch.device) -> None:
    """The same numbers under it: a weight (5, 7) with the fans of (9, 11) is scaled as such a one."""
    rule = getattr(reimpl.init, name)

    def drawn(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        weight = torch.empty(shape, dtype=torch.float64, device=device)
        return rule(weight, generator=seeded_generator(0, device=device), **kwargs)

    plain, given = drawn((5, 7)), drawn((5, 7), fans=(11, 9))
    assert torch.equal(drawn((5, 7), fans=(7, 5)), plain)
    ratio = given / plain
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-14, atol=0)  # some roundings
    (expected,) = (row.oracle for row in INITS if row.name == name)
    assert float(ratio.flatten()[0]) == pytest.approx(expected((9, 11))["std"] / expected((5, 7))["std"], rel=1e-14)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.BatchNorm2d(3), nn.Embedding(3, 4), nn.Sequential(nn.Linear(2, 2))])
def test_fans_of_anything_else_are_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"linear, bilinear or convolution layer, got {type(layer).__name__}"):
        reimpl.init.layer_fans(layer)


def decoder() -> nn.Sequential:
    up = [nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1) for _ in range(4)]
    return nn.Sequential(*(part for layer in up for part in (layer, nn.ReLU()))).requires_grad_(False)


def depthwise() -> nn.Sequential:
    return nn.Sequential(*(nn.Conv1d(512, 512, 3, padding=1, groups=512) for _ in range(4))).requires_grad_(False)


def growth(model: nn.Module, shape: tuple[int, ...], generator: torch.Generator) -> float:
    """Mean square of the output over that of the input."""
    x = torch.randn(shape, generator=generator)
    return float(model(x).square().mean() / x.square().mean())


def test_transposed_layers_keep_the_signal() -> None:
    """Four strided layers up: each output reads one in four of the kernel's places, which the weight does not tell."""
    generator = seeded_generator(0)
    model = decoder()
    reimpl.init.apply(model, "kaiming_normal_", generator=generator)
    # Four layers of 256 inputs wander by sqrt(5/256) each; the border, which reads less, takes up to 10% off a layer.
    assert 0.4 < growth(model, (4, 64, 8, 8), generator) < 1.5
    reimpl.init.apply(model, torch.nn.init.kaiming_normal_, generator=generator)
    assert growth(model, (4, 64, 8, 8), generator) < 0.01  # about 4^-4


def test_grouped_layers_keep_the_signal() -> None:
    """Glorot's mean of the fans: a depthwise layer's fan out is that of its group, 3, not 1536."""
    generator = seeded_generator(1)
    model = depthwise()
    reimpl.init.apply(model, "xavier_normal_", activation="linear", generator=generator)
    # Weights of 512 channels of three numbers: four layers of the mean over channels; the border takes a third twice.
    assert 0.5 < growth(model, (4, 512, 64), generator) < 2
    reimpl.init.apply(model, torch.nn.init.xavier_normal_, activation="linear", generator=generator)
    assert growth(model, (4, 512, 64), generator) < 1e-6  # (6/1539)^4
    # Orthogonal blocks are one to a group: each channel's kernel has length 1.
    reimpl.init.apply(model, "orthogonal_", activation="linear", generator=generator)
    torch.testing.assert_close(model[0].weight.flatten(1).norm(dim=1), torch.ones(512))
