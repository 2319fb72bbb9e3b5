"""Shows a network overfit a few hundred images, and what L1, L2, dropout and early stopping do about it.

    python -m scripts.demo_overfitting --out reports/demo-overfitting.png

The images are generated (``reimpl.data.synthetic``). Each network is trained on the same of them; losses are those of
the images alone, without the penalty. Early stopping needs no run of its own: it is the run without any remedy, ended
where its dev loss has risen for a while, with the best weights brought back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reimpl.data import Standardize, synthetic
from reimpl.diagnose import LearningCurve, learning_curve
from reimpl.diagnose._plots import finish, new_figure
from reimpl.strategies import EarlyStopping
from scripts._demo import command_line, evaluate, minibatches, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY = "early stopping"


@dataclass(frozen=True)
class Settings:
    """Size and length of the runs."""

    out: Path = Path("reports/demo-overfitting.png")
    """The figure; its suffix is its format."""
    train: int = 500
    """Training images."""
    held_out: int = 1000
    """Dev images, and as many test images."""
    epochs: int = 40
    """Passes over the training images, in batches of 50."""
    width: int = 16
    """Channels of the first convolution."""
    l1: float = 5e-4
    """λ of λ Σ|w|."""
    l2: float = 2e-2
    """λ of (λ/2) Σw²."""
    dropout: float = 0.5
    """Share of the features before the last layer that is dropped."""
    patience: int = 5
    """Epochs that early stopping bears without a new best."""
    seed: int = 0
    """Seed of images, weights and order."""


@dataclass(frozen=True)
class Remedy:
    """A way to regularise; all numbers 0 is none."""

    name: str
    l1: float = 0.0
    l2: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Run:
    """One remedy: losses over the epochs, test loss and error at the end, the weights' norm and share near 0."""

    name: str
    curve: LearningCurve
    test_loss: float
    test_error: float
    norm: float
    zeros: float


@dataclass(frozen=True)
class Result:
    """All remedies."""

    runs: tuple[Run, ...]

    def __getitem__(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def __str__(self) -> str:
        head = ("remedy", "train loss", "dev loss", "test loss", "test error", "|w|", "weights under 0.001", "")
        return table(
            head,
            [
                (
                    *(r.name, r.curve.train[-1], r.curve.dev[-1], r.test_loss, r.test_error, r.norm, f"{r.zeros:.0%}"),
                    f"overfits from epoch {r.curve.x[r.curve.best]:g} on" if r.curve.overfits else "",
                )
                for r in self.runs
            ],
        )

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draws the losses over the epochs and the test losses at the end."""
        figure, (losses, tests) = new_figure(2)
        for i, run in enumerate(self.runs):
            if run.name == EARLY:
                losses.axvline(run.curve.x[run.curve.best], color="0.4", linestyle=":", label="early stopping's best")
                continue
            losses.plot(run.curve.x, run.curve.dev, color=f"C{i}", label=f"{run.name}, dev")
            losses.plot(run.curve.x, run.curve.train, color=f"C{i}", linestyle="--")
        losses.set(
            title="Loss on dev (solid) and training (dashed)", xlabel="epoch", ylabel="cross-entropy", ylim=(0, None)
        )
        losses.legend(fontsize="small")
        tests.bar([run.name for run in self.runs], [run.test_loss for run in self.runs])
        tests.set(title="Test loss at the end", ylabel="cross-entropy")
        tests.tick_params(axis="x", rotation=20)
        return finish(figure, path)


@dataclass(frozen=True)
class Images:
    """Standardised images and labels of the three sets."""

    train: tuple[Tensor, Tensor]
    dev: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(settings: Settings) -> Images:
    """The generated set; dev and test are the halves of its test images."""
    arrays = synthetic(settings.train, 2 * settings.held_out, seed=settings.seed)
    scale = Standardize().fit(arrays.train_images)
    x, held = (scale(torch.from_numpy(images)) for images in (arrays.train_images, arrays.test_images))
    y, labels = torch.from_numpy(arrays.train_labels), torch.from_numpy(arrays.test_labels)
    half = settings.held_out
    return Images((x, y), (held[:half], labels[:half]), (held[half:], labels[half:]))


def build(width: int, dropout: float) -> nn.Sequential:
    """Two convolutions and a hidden layer."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 8 * 8, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, 10),
    )


def train(remedy: Remedy, images: Images, settings: Settings) -> tuple[Run, Run | None]:
    """One run, and for the one without a remedy also the run that early stopping makes of it."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model = build(settings.width, remedy.dropout)
    weights = [p for p in model.parameters() if p.dim() > 1]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    stopping = EarlyStopping(settings.patience)
    losses: list[tuple[float, float]] = []
    x, y = images.train
    for _ in range(settings.epochs):
        for batch in minibatches(len(y), 50, generator):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            if remedy.l1:
                loss = loss + remedy.l1 * sum(w.abs().sum() for w in weights)
            if remedy.l2:
                loss = loss + remedy.l2 / 2 * sum(w.square().sum() for w in weights)
            loss.backward()
            optimizer.step()
        losses.append((evaluate(model, *images.train)[0], evaluate(model, *images.dev)[0]))
        if not stopping.stopped:
            stopping.step(losses[-1][1], model)
    whole = measure(remedy.name, model, losses, images)
    if stopping.best_step is None or remedy != Remedy(remedy.name):
        return whole, None
    stopping.restore(model)
    return whole, measure(EARLY, model, losses[: stopping.best_step + 1], images)


def measure(name: str, model: nn.Module, losses: list[tuple[float, float]], images: Images) -> Run:
    """The run in numbers."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    near_zero = float((weights.abs() < 1e-3).double().mean())
    train_losses, dev_losses = zip(*losses)
    curve = learning_curve(train_losses, dev_losses)
    return Run(name, curve, *evaluate(model, *images.test), float(weights.norm()), near_zero)


def run(settings: Settings) -> Result:
    """Trains with every remedy."""
    images = load(settings)
    plain, early = train(Remedy("none"), images, settings)
    remedies = (
        Remedy("L1", l1=settings.l1),
        Remedy("L2", l2=settings.l2),
        Remedy("dropout", dropout=settings.dropout),
    )
    others = [train(remedy, images, settings)[0] for remedy in remedies]
    return Result((plain, *others, *([early] if early else [])))


def main(arguments: Sequence[str] | None = None) -> Result:
    """The command line."""
    return command_line(Settings, run, __doc__, arguments)


if __name__ == "__main__":
    main()
