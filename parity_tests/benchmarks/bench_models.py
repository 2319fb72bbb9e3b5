"""Training steps of whole networks, ours against PyTorch's, eager and under ``torch.compile``.

A step is forward, cross-entropy, backward and SGD with momentum (PyTorch's for both) over a batch of 64 images of
CIFAR's size, in float32 on two threads. ``test_ratio`` holds the ratio of interleaved rounds to its limit, where there
is one: ``kernels`` are the library's own compiled kernels.

Both are timed with the memory they have freed kept by the process: by glibc's own rule, one and the same step costs
none or 22,000 page faults (20 of 84 ms), by where in the heap its tensors happen to lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reimpl.functional as F
import reimpl.nn as ours_nn
from models import build
from reimpl.testing.timing import interleave

pytestmark = pytest.mark.usefixtures("freed_memory_is_kept")
BATCH, THREADS, ROUNDS, SECONDS = 64, 2, 30, 10.0
# As a share of PyTorch's time.
LIMITS: dict[str, dict[str, float]] = {
    "eager, as it comes": {},
    "eager, kernels": {"resnet20": 1.1},
    "compiled, as it comes": {},
    "compiled, kernels": dict.fromkeys(("cnn", "resnet20", "alexnet", "resnet18"), 1.05),
}


def alexnet() -> nn.Module:
    """AlexNet in its CIFAR shapes."""
    sizes, pooled = (64, 192, 384, 256, 256), (0, 1, 4)
    stages: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip((3, *sizes), sizes)):
        stages += [nn.Conv2d(fan_in, fan_out, 3, stride=1 if i else 2, padding=1), nn.ReLU()]
        stages += [nn.MaxPool2d(2)] if i in pooled else []
    hidden = [nn.Dropout(), nn.Linear(1024, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*stages, nn.Flatten(), *hidden, nn.Linear(4096, 10))


def resnet18() -> nn.Module:
    """ResNet-18 with the first layers that CIFAR's images want."""
    torchvision = pytest.importorskip("torchvision", reason="its ResNet-18 is the one that is timed")
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: build("cnn"),
    "resnet20": lambda: build("resnet20"),
    "alexnet": alexnet,
    "resnet18": resnet18,
}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(THREADS)
    torch._dynamo.reset()
    with F.use_kernels(False):
        yield


def step_of(network: str, namespace: Any, compiled: bool) -> Callable[[], object]:
    """One training step, on weights and images that do not depend on ``namespace``."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    if namespace is ours_nn:
        ours_nn.convert(model)
    criterion, optimizer = namespace.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return criterion(model(images), labels)  # type: ignore[no-any-return]

    forward = torch.compile(loss_of, fullgraph=True) if compiled else loss_of

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = forward(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("way", LIMITS)
def test_ratio(way: str, network: str) -> None:
    if "kernels" in way:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    with F.use_kernels("kernels" in way):
        steps, first = {}, {}
        for name, namespace in (("ours", ours_nn), ("torch", nn)):
            steps[name] = step_of(network, namespace, way.startswith("compiled"))
            begun = perf_counter()
            steps[name]()
            first[name] = perf_counter() - begun
        times = interleave(steps, rounds=ROUNDS, max_seconds=SECONDS)
    ratio, limit = times.ratio("ours", "torch"), LIMITS[way].get(network)
    ours, theirs = (times.median(name) * 1e3 for name in steps)
    held = "" if limit is None else f"  limit {limit:.2f}"
    print(
        f"{way:<22} {network:<9} {ours:9.2f} ms {theirs:9.2f} ms  ratio {ratio:5.2f}{held}  "
        f"first step {first['ours']:.1f} s, {first['torch']:.1f} s"
    )
    assert limit is None or ratio <= limit
