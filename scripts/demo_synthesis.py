"""Shows what training data made by mixing are worth, and that few variations are soon overfitted.

    python -m scripts.demo_synthesis --out reports/demo-synthesis.png

The target's signals lie under noise, the training set's do not. Noise is mixed into them with ``reimpl.data.Mix``, from
a stock of 1 to 500 different recordings, and the network is tested under the noises it was trained with and under
others of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reimpl.data import Mix
from reimpl.diagnose._plots import finish, new_figure
from scripts._demo import command_line, evaluate, minibatches, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LENGTH, _CLASSES, _RANK = 64, 10, 30  # of a signal; of its shapes; dimensions of the space that the noises span


@dataclass(frozen=True)
class Settings:
    """Size and length of the runs."""

    out: Path = Path("reports/demo-synthesis.png")
    """The figure; its suffix is its format."""
    stocks: tuple[int, ...] = (1, 3, 10, 30, 100, 500)
    """Numbers of different noises."""
    examples: int = 2000
    """Clean training signals."""
    epochs: int = 40
    """Passes over them, mixed anew each time."""
    amount: float = 4.0
    """Strength of the noise, as a multiple of the signal."""
    seed: int = 0
    """Seed of everything."""


@dataclass(frozen=True)
class Result:
    """Error rates: of a network trained on clean signals, and by stock, under noises known and new."""

    clean: float
    known: dict[int, float]
    new: dict[int, float]

    def __str__(self) -> str:
        rows = [("none", "", self.clean), *((str(k), self.known[k], self.new[k]) for k in self.known)]
        return table(("noises in training", "error under these", "error under new ones"), rows)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the errors against the number of noises."""
        figure, (ax,) = new_figure()
        ax.semilogx(list(self.new), list(self.new.values()), "o-", label="under new noises")
        ax.semilogx(list(self.known), list(self.known.values()), "s-", label="under the noises of training")
        ax.axhline(self.clean, color="0.6", linestyle=":", label="trained on clean signals, under new noises")
        ax.set(title="Synthesis with few variations", xlabel="noises in training", ylabel="error", ylim=(0, None))
        ax.legend()
        return finish(figure, path)


def normal(*shape: int, seed: int) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signals(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Clean signals, each one of ten shapes with a gain and a little hiss, and which."""
    shapes = normal(_CLASSES, _LENGTH, seed=1000)
    y = torch.arange(n) % _CLASSES
    return (1 + 0.2 * normal(n, 1, seed=seed)) * shapes[y] + 0.3 * normal(n, _LENGTH, seed=seed + 1), y


def noises(n: int, seed: int) -> Tensor:
    """Recordings of noise, all from one subspace."""
    basis = torch.linalg.qr(normal(_LENGTH, _RANK, seed=1001)).Q
    return (_LENGTH / _RANK) ** 0.5 * normal(n, _RANK, seed=seed) @ basis.mT


def train(stock: Tensor | None, settings: Settings) -> nn.Module:
    """A network trained on signals into which ``stock`` is mixed."""
    x, y = signals(settings.examples, settings.seed + 1)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    mix = None if stock is None else Mix(stock, amount=(settings.amount, settings.amount))
    model = nn.Sequential(nn.Linear(_LENGTH, 64), nn.ReLU(), nn.Linear(64, _CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(settings.epochs):
        for batch in minibatches(len(x), 100, generator):
            inputs = x[batch] if mix is None else mix(x[batch], generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), y[batch]).backward()
            optimizer.step()
    return model


def error_under(model: nn.Module, stock: Tensor, settings: Settings) -> float:
    """The error rate on new signals under noises from ``stock``."""
    x, y = signals(2000, settings.seed + 3)
    noisy = Mix(stock, amount=(settings.amount, settings.amount))(x, torch.Generator().manual_seed(settings.seed))
    return evaluate(model, noisy, y)[1]


def run(settings: Settings) -> Result:
    """Trains with every stock, and without noise."""
    target = noises(2000, settings.seed + 5)
    known, new = {}, {}
    for size in settings.stocks:
        stock = noises(size, settings.seed + 6)
        model = train(stock, settings)
        known[size], new[size] = error_under(model, stock, settings), error_under(model, target, settings)
    return Result(error_under(train(None, settings), target, settings), known, new)


def main(arguments: Sequence[str] | None = None) -> Result:
    """The command line."""
    return command_line(Settings, run, __doc__, arguments)


if __name__ == "__main__":
    main()
