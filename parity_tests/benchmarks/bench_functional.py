"""Layer times, ours against PyTorch's built-in: forward and backward at the layers of ResNet-18 and AlexNet on CIFAR.

``test_ratio`` holds each layer's ratio, from interleaved rounds, to its limit; ``test_geometric_mean`` all of them
together. Each runs two ways: as the library comes, and with its own compiled kernels. Two threads, float32, batch 64.

Both are timed with the memory they have freed kept by the process: by glibc's own rule, a buffer of 256 KiB costs 64
page faults or none, by where in the heap it happens to lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from reimpl.functional._node import native
from reimpl.testing.timing import Timings, interleave

pytestmark = pytest.mark.usefixtures("freed_memory_is_kept")
BATCH, THREADS, ROUNDS, SECONDS = 64, 2, 25, 0.7
# As a share of PyTorch's time: each layer, and the geometric mean of all.
LIMITS = {"as it comes": (3.0, 1.5), "kernels": (1.25, 1.0)}

Call = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer of a network: its name, and what makes the call (of a namespace) and the tensors that want gradients."""

    name: str
    make: Callable[[], tuple[Call, tuple[Tensor, ...]]]


def drawn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


def conv(channels: int, outputs: int, side: int, kernel: int, stride: int = 1, padding: int = 1) -> Layer:
    def make() -> tuple[Call, tuple[Tensor, ...]]:
        # the first layer's input, an image, takes no gradient
        x, w = drawn(BATCH, channels, side, side, grad=channels > 3), drawn(outputs, channels, kernel, kernel)
        return lambda m: m.conv2d(x, w, None, stride, padding), (x, w) if channels > 3 else (w,)

    strided = f"/{stride}" if stride > 1 else ""
    return Layer(f"conv {kernel}x{kernel}{strided}, {channels}-{outputs}, {side}x{side}", make)


def norm(channels: int, side: int) -> Layer:
    def make() -> tuple[Call, tuple[Tensor, ...]]:
        x, w, b = drawn(BATCH, channels, side, side), drawn(channels), drawn(channels)
        mean, var = torch.zeros(channels), torch.ones(channels)
        return lambda m: m.batch_norm(x, mean, var, w, b, True), (x, w, b)

    return Layer(f"batch_norm, {channels}, {side}x{side}", make)


def norm_relu(channels: int, side: int) -> Layer:
    def make() -> tuple[Call, tuple[Tensor, ...]]:
        x, w, b = drawn(BATCH, channels, side, side), drawn(channels), drawn(channels)
        mean, var = torch.zeros(channels), torch.ones(channels)

        def call(m: Any) -> Tensor:
            if m is F:
                return F.batch_norm_relu(x, mean, var, w, b, True)
            return m.relu(m.batch_norm(x, mean, var, w, b, True))  # type: ignore[no-any-return]

        return call, (x, w, b)

    return Layer(f"batch_norm + relu, {channels}, {side}x{side}", make)


def of_one(name: str, function: Callable[[Any, Tensor], Tensor], *shape: int) -> Layer:
    def make() -> tuple[Call, tuple[Tensor, ...]]:
        x = drawn(BATCH, *shape)
        return lambda m: function(m, x), (x,)

    return Layer(f"{name}, {'x'.join(map(str, shape))}", make)


def linear(inputs: int, outputs: int) -> Layer:
    def make() -> tuple[Call, tuple[Tensor, ...]]:
        x, w, b = drawn(BATCH, inputs), drawn(outputs, inputs), drawn(outputs)
        return lambda m: m.linear(x, w, b), (x, w, b)

    return Layer(f"linear, {inputs}-{outputs}", make)


def cross_entropy(m: Any, x: Tensor) -> Tensor:
    return m.cross_entropy(x, torch.arange(len(x)) % 10)  # type: ignore[no-any-return]


def loss(name: str, make_target: Callable[[Tensor], Tensor], label: str, *shape: int, logits: bool = True) -> Layer:
    """A loss at other sizes than a network's, of numbers or, without ``logits``, of probabilities."""

    def make() -> tuple[Call, tuple[Tensor, ...]]:
        x = drawn(BATCH, *shape) if logits else torch.rand(BATCH, *shape, requires_grad=True)
        target = make_target(x)
        return lambda m: getattr(m, name)(x, target), (x,)

    return Layer(f"{name}{label}, {'x'.join(map(str, shape))}", make)


def index_loss(name: str, label: str, *shape: int, ignore: bool = False, weighted: bool = False) -> Layer:
    """A loss of class indices with a class that does not count, or with weights of the classes."""

    def make() -> tuple[Call, tuple[Tensor, ...]]:
        x = drawn(BATCH, *shape)
        target, weight = classes_of(x), torch.rand(shape[0]) if weighted else None
        options = {"ignore_index": 1} if ignore else {}
        return lambda m: getattr(m, name)(x, target, weight, **options), (x,)

    return Layer(f"{name} with {label}, {'x'.join(map(str, shape))}", make)


def classes_of(x: Tensor) -> Tensor:
    return torch.randint(0, x.shape[1], (x.shape[0], *x.shape[2:]))


RESNET18 = (
    conv(3, 64, 32, 3),
    conv(64, 64, 32, 3),
    conv(64, 128, 32, 3, 2),
    conv(128, 128, 16, 3),
    conv(128, 256, 16, 3, 2),
    conv(256, 256, 8, 3),
    conv(256, 512, 8, 3, 2),
    conv(512, 512, 4, 3),
    conv(64, 128, 32, 1, 2, 0),
    conv(128, 256, 16, 1, 2, 0),
    conv(256, 512, 8, 1, 2, 0),
    *(norm(channels, side) for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4))),
    *(norm_relu(channels, side) for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4))),
    of_one("relu", lambda m, x: m.relu(x), 64, 32, 32),
    of_one("leaky_relu", lambda m, x: m.leaky_relu(x), 64, 32, 32),
    of_one("sigmoid", lambda m, x: (torch if m is torch_functional else m).sigmoid(x), 64, 32, 32),
    of_one("tanh", lambda m, x: (torch if m is torch_functional else m).tanh(x), 64, 32, 32),
    of_one("adaptive_avg_pool2d", lambda m, x: m.adaptive_avg_pool2d(x, 1), 512, 4, 4),
    linear(512, 10),
    of_one("cross_entropy", cross_entropy, 10),
)
ALEXNET = (
    conv(3, 64, 32, 3, 2),
    conv(64, 192, 8, 3),
    conv(192, 384, 4, 3),
    conv(384, 256, 4, 3),
    conv(256, 256, 4, 3),
    of_one("max_pool2d", lambda m, x: m.max_pool2d(x, 2), 64, 16, 16),
    of_one("max_pool2d", lambda m, x: m.max_pool2d(x, 2), 192, 8, 8),
    of_one("avg_pool2d", lambda m, x: m.avg_pool2d(x, 2), 64, 16, 16),
    of_one("dropout", lambda m, x: m.dropout(x), 4096),
    linear(1024, 4096),
    linear(4096, 4096),
)
LOSSES = (
    *(of_one("softmax", lambda m, x: m.softmax(x, 1), *shape) for shape in ((1000,), (21, 64, 64))),
    *(of_one("log_softmax", lambda m, x: m.log_softmax(x, 1), *shape) for shape in ((1000,), (21, 64, 64))),
    *(loss("nll_loss", classes_of, "", *shape) for shape in ((1000,), (21, 64, 64))),
    *(loss("cross_entropy", classes_of, "", *shape) for shape in ((1000,), (21, 64, 64))),
    *(index_loss(name, "ignore_index", 10, ignore=True) for name in ("nll_loss", "cross_entropy")),
    *(index_loss(name, "weights", 10, weighted=True) for name in ("nll_loss", "cross_entropy")),
    loss("cross_entropy", torch.rand_like, " of probabilities", 1000),
    *(loss("mse_loss", torch.rand_like, "", *shape) for shape in ((1000,), (64, 32, 32))),
    *(loss("binary_cross_entropy", torch.rand_like, "", *shape, logits=False) for shape in ((1000,), (64, 32, 32))),
    *(loss("binary_cross_entropy_with_logits", torch.rand_like, "", *shape) for shape in ((1000,), (64, 32, 32))),
)
LAYERS = {
    f"{network}: {layer.name}": layer
    for network, layers in (("ResNet-18", RESNET18), ("AlexNet", ALEXNET), ("losses", LOSSES))
    for layer in layers
}

_RATIOS: dict[str, dict[str, float]] = {way: {} for way in LIMITS}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(THREADS)
    with F.use_kernels(False):
        yield


def time_layer(layer: Layer) -> Timings:
    """Forward and backward, ours and PyTorch's by turns."""
    call, leaves = layer.make()
    grad = torch.randn_like(call(torch_functional))

    def step(namespace: Any) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(namespace), leaves, grad)

    contenders = {"ours": step(F), "torch": step(torch_functional)}
    return interleave(contenders, rounds=ROUNDS, max_seconds=SECONDS)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", LIMITS)
def test_ratio(name: str, way: str) -> None:
    if way == "kernels":
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
        with F.use_kernels():
            native.wait()
    with F.use_kernels(way == "kernels"):
        times = time_layer(LAYERS[name])
    ratio = _RATIOS[way][name] = times.ratio("ours", "torch")
    limit = LIMITS[way][0]
    ours, theirs = (times.median(who) * 1e3 for who in ("ours", "torch"))
    print(f"{way:<12} {name:<48} {ours:9.3f} ms {theirs:9.3f} ms  ratio {ratio:5.2f}  limit {limit:.2f}")
    assert ratio <= limit


@pytest.mark.parametrize("way", LIMITS)
def test_geometric_mean(way: str) -> None:
    ratios = _RATIOS[way]
    if len(ratios) < len(LAYERS):
        pytest.skip("needs the ratios of all layers from the same run")
    mean, limit = math.exp(sum(map(math.log, ratios.values())) / len(ratios)), LIMITS[way][1]
    print(f"{way:<12} geometric mean of {len(ratios)} layers: {mean:.3f}, limit {limit:.2f}")
    assert mean <= limit
