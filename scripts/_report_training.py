"""Trains the small network twice from one seed, with our optimizer and with PyTorch's, and keeps both loss curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from reimpl.data import CIFAR10Arrays
from scripts.train_cifar10 import Config, Result, train

#: Name to highest learning rate; ``None`` is the default of the network for SGD and of the class for the others.
OPTIMIZERS: Mapping[str, float | None] = {"SGD": None, "Adam": 0.01, "RMSprop": None}
_CONFIG = Config(
    model="fast", widths=(8, 16, 32), generated=(4_000, 1_000), epochs=3, batch_size=250, label_smoothing=0.0,
    average="none", device="cpu", threads=1, progress=False,
)  # fmt: skip


@dataclass(frozen=True)
class CurvePair:
    """Two runs that differ in nothing but whose optimizer they use."""

    optimizer: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    ours_accuracy: float
    theirs_accuracy: float
    description: str

    @property
    def difference(self) -> float:
        """Largest difference between the losses of one step."""
        return max(abs(a - b) for a, b in zip(self.ours, self.theirs, strict=True))


def train_pairs(config: Config = _CONFIG, arrays: CIFAR10Arrays | None = None) -> Iterator[CurvePair]:
    """One pair after the other, on ``arrays`` or on the generated set; PyTorch's thread count is left as it was."""
    threads = torch.get_num_threads()
    try:
        for name, lr in OPTIMIZERS.items():
            ours, theirs = (
                train(dataclasses.replace(config, optimizer=f"{owner}.{name}", lr=lr), arrays)
                for owner in ("reimpl", "torch")
            )
            losses = tuple(ours.losses), tuple(theirs.losses)
            yield CurvePair(name, *losses, ours.accuracy, theirs.accuracy, _describe(ours))
    finally:
        torch.set_num_threads(threads)


def _describe(result: Result) -> str:
    config = result.config
    images = f"{config.generated[0]:,} generated images" if config.data is None else "CIFAR-10"
    return (
        f"A narrow copy of the fast network on {images}, {config.epochs} epochs of "
        f"{len(result.losses) // config.epochs} steps, batch {config.batch_size}, seed {config.seed}: once with our "
        f"optimizer, once with PyTorch's, and nothing else changed."
    )
