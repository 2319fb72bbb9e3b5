"""Shows that one shuffle of the data is enough: against a new order every epoch, and against none.

    python -m scripts.demo_shuffling --out reports/demo-shuffling.png

The examples lie sorted by class, as they do in many a folder. A small network is trained on them in that order, in one
random order for all epochs, and in a new one each epoch, with several seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from reimpl.diagnose._plots import finish, new_figure
from scripts._demo import command_line, evaluate, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Order = Literal["none", "once", "every epoch"]
_FEATURES, _CLASSES, _BATCH = 20, 5, 50


@dataclass(frozen=True)
class Settings:
    """Size and length of the runs."""

    out: Path = Path("reports/demo-shuffling.png")
    """The figure; its suffix is its format."""
    examples: int = 4000
    """Training examples; as many are tested on."""
    epochs: int = 15
    """Passes over them."""
    lr: float = 0.1
    """Learning rate of plain SGD."""
    seeds: int = 5
    """Runs of each order."""


@dataclass(frozen=True)
class Result:
    """Test error after each epoch, by order and seed."""

    errors: dict[Order, list[list[float]]]

    def final(self, order: Order) -> list[float]:
        """The error at the end, of each seed."""
        return [curve[-1] for curve in self.errors[order]]

    def __str__(self) -> str:
        spread = {order: stdev(self.final(order)) if len(self.final(order)) > 1 else 0.0 for order in self.errors}
        rows = [(order, fmean(self.final(order)), spread[order]) for order in self.errors]
        return table(("shuffled", "test error", "deviation between seeds"), rows)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the mean over the seeds, and their range."""
        figure, (ax,) = new_figure()
        for order, curves in self.errors.items():
            epochs = range(1, len(curves[0]) + 1)
            ax.plot(epochs, [fmean(values) for values in zip(*curves)], label=order)
            ax.fill_between(epochs, [min(v) for v in zip(*curves)], [max(v) for v in zip(*curves)], alpha=0.2)
        ax.set(title="Shuffled: none, once, every epoch", xlabel="epoch", ylabel="test error", ylim=(0, None))
        ax.legend()
        return finish(figure, path)


def generate(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Examples whose class a fixed random network decides."""
    teacher = torch.Generator().manual_seed(1234)
    first = torch.randn(_FEATURES, 30, generator=teacher)
    second = torch.randn(30, _CLASSES, generator=teacher)
    x = torch.randn(n, _FEATURES, generator=torch.Generator().manual_seed(seed))
    scores = torch.tanh(x @ first / _FEATURES**0.5) @ second
    return x, scores.argmax(1)


def train(order: Order, seed: int, settings: Settings) -> list[float]:
    """The test error after each epoch of one run."""
    x, y = generate(settings.examples, 2 * seed)
    test = generate(settings.examples, 2 * seed + 1)
    index = y.argsort(stable=True)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(_FEATURES, 64), nn.ReLU(), nn.Linear(64, _CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), settings.lr)
    errors = []
    for epoch in range(settings.epochs):
        if order == "every epoch" or (order == "once" and epoch == 0):
            index = torch.randperm(len(y), generator=generator)
        for batch in index.split(_BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        errors.append(evaluate(model, *test)[1])
    return errors


def run(settings: Settings) -> Result:
    """Trains in every order with every seed."""
    return Result(
        {order: [train(order, seed, settings) for seed in range(settings.seeds)] for order in get_args(Order)}
    )


def main(arguments: Sequence[str] | None = None) -> Result:
    """The command line."""
    return command_line(Settings, run, __doc__, arguments)


if __name__ == "__main__":
    main()
