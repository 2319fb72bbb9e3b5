"""Shows the gradient of a deep sigmoid network vanish, and three repairs: ReLU, He's initialisation, batch norm.

    python -m scripts.demo_vanishing --out reports/demo-vanishing.png

Each network learns to tell two spirals apart by plain SGD. Left, the gradient's norm at each layer before the first
step; right, the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reimpl import init
from reimpl.diagnose import SignalReport, signal_report
from reimpl.diagnose._plots import finish, new_figure
from scripts._demo import command_line, evaluate, minibatches, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """Size and length of the runs."""

    out: Path = Path("reports/demo-vanishing.png")
    """The figure; its suffix is its format."""
    depth: int = 12
    """Hidden layers."""
    width: int = 64
    """Units of each."""
    examples: int = 1000
    """Points on both spirals together."""
    epochs: int = 60
    """Passes over them, in batches of 50."""
    lr: float = 0.02
    """Learning rate."""
    seed: int = 0
    """Seed of data, weights and order."""


@dataclass(frozen=True)
class Network:
    """One way to build the network."""

    name: str
    activation: Callable[[], nn.Module]
    rule: Callable[[Tensor], Tensor]
    batch_norm: bool = False


NETWORKS = (
    Network("sigmoid, 1/√n", nn.Sigmoid, init.lecun_normal_),
    Network("ReLU, 1/√n", nn.ReLU, init.lecun_normal_),
    Network("ReLU, He", nn.ReLU, lambda w: init.kaiming_normal_(w, nonlinearity="relu")),
    Network("sigmoid, batch norm", nn.Sigmoid, init.lecun_normal_, batch_norm=True),
    Network("ReLU, He, batch norm", nn.ReLU, lambda w: init.kaiming_normal_(w, nonlinearity="relu"), batch_norm=True),
)


@dataclass(frozen=True)
class Run:
    """One network: its signals before training, its loss after every epoch, its error rate at the end."""

    name: str
    before: SignalReport
    losses: tuple[float, ...]
    error: float

    @property
    def gradients(self) -> tuple[float, ...]:
        """The gradient's norm at each weight layer, the first layer first."""
        return tuple(layer.gradient for layer in self.before.layers if layer.kind == "Linear")

    @property
    def ratio(self) -> float:
        """The first layer's gradient as a share of the last hidden one's."""
        return self.gradients[0] / self.gradients[-2]


@dataclass(frozen=True)
class Result:
    """All networks."""

    runs: tuple[Run, ...]

    def __getitem__(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def __str__(self) -> str:
        rows = [(r.name, r.ratio, r.losses[-1], r.error, str(len(r.before.vanishing))) for r in self.runs]
        return table(("network", "gradient first/last", "loss", "error", "layers reported vanishing"), rows)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws gradients and losses."""
        figure, (gradients, losses) = new_figure(2)
        for run in self.runs:
            gradients.semilogy(range(1, len(run.gradients) + 1), run.gradients, label=run.name)
            losses.plot(range(1, len(run.losses) + 1), run.losses)
        gradients.set(title="Gradient before the first step", xlabel="layer", ylabel="norm")
        gradients.legend(fontsize="small")
        losses.set(title="Training", xlabel="epoch", ylabel="cross-entropy")
        return finish(figure, path)


def spirals(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on two spirals of one and a half turns, standardised, and which they are on."""
    label = torch.arange(n) % 2
    radius = torch.rand(n, generator=generator).sqrt()
    angle = 3 * torch.pi * radius + torch.pi * label
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    x = x + 0.01 * torch.randn(n, 2, generator=generator)
    return x / x.std(), label


def build(network: Network, depth: int, width: int) -> nn.Sequential:
    """The network, its biases 0."""
    layers: list[nn.Module] = []
    for fan_in in (2, *[width] * (depth - 1)):
        layers += [
            nn.Linear(fan_in, width),
            *([nn.BatchNorm1d(width)] if network.batch_norm else []),
            network.activation(),
        ]
    layers.append(nn.Linear(width, 2))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            network.rule(layer.weight)
            init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def train(network: Network, settings: Settings) -> Run:
    """Builds and trains one network."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    x, y = spirals(settings.examples, generator)
    model = build(network, settings.depth, settings.width)
    before = signal_report(model, x, loss=lambda logits: nn.functional.cross_entropy(logits, y))
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9)
    losses = []
    for _ in range(settings.epochs):
        total = 0.0
        batches = list(minibatches(len(x), 50, generator))
        for batch in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total / len(batches))
    return Run(network.name, before, tuple(losses), evaluate(model, x, y)[1])


def run(settings: Settings) -> Result:
    """Trains every network on the same points."""
    return Result(tuple(train(network, settings) for network in NETWORKS))


def main(arguments: Sequence[str] | None = None) -> Result:
    """The command line."""
    return command_line(Settings, run, __doc__, arguments)


if __name__ == "__main__":
    main()
