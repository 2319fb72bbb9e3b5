"""Trains a network on CIFAR-10, or on a generated set like it, with any optimizer of ours or PyTorch's.

    python -m scripts.train_cifar10                                   the generated set, the fast network, our SGD
    python -m scripts.train_cifar10 --data DIR --download             the real images, fetched through torchvision
    python -m scripts.train_cifar10 --model resnet20 --optimizer torch.AdamW --set weight_decay=0.05
    python -m scripts.train_cifar10 --resume runs/NAME                goes on with a run that was cut off

A flag whose default is None takes the network's own, which is in scripts/_config.py. The last line printed is a JSON
object with the test accuracy and what it was reached with.

Evidence: --data DIR --epochs 1 (the fast network, reimpl.SGD) on all 50,000 images, recompressed as JPEG, reached a
test accuracy of 71.2%, the mean of seeds 0 to 2 (70.6, 71.1, 72.0), on two CPU cores in 165 to 210 s of processor
time, with PyTorch 2.15 in November 2026. With torch.SGD and seed 0, every loss and the final weights are the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from models import FastNet, layers
from reimpl.data import CIFAR10Arrays, cifar10
from scripts import _checkpoint
from scripts._averaging import WeightAverage
from scripts._batches import Batches, Normalize
from scripts._checkpoint import CheckpointError
from scripts._config import Config, optimizer_arguments, plain, resumed, schedule, with_presets
from scripts._environment import curves, deterministic, device_name, pick_device, progress_bar, seed_all, versions
from scripts._optimizers import build_optimizer, full_name

__all__ = ["Config", "Result", "Run", "train"]

LOG_EVERY = 10  # steps between two points of the curves, and two looks at the loss


@dataclass
class Result:
    """What came out: the loss of every step, and after every epoch the test accuracy and loss."""

    config: Config
    losses: list[float]
    history: list[dict[str, float]]
    seconds: float
    optimizer: dict[str, Any]
    device: str
    out: Path | None
    model: nn.Module = field(repr=False)

    @property
    def accuracy(self) -> float:
        """Share of test images that the final weights name rightly."""
        return self.history[-1]["accuracy"]

    def summary(self) -> dict[str, Any]:
        """The run in a few numbers, ready for JSON."""
        return {
            "test_accuracy": self.accuracy,
            "test_loss": self.history[-1]["loss"],
            "seconds": round(self.seconds, 1),
            "model": self.config.model,
            "backend": self.config.backend,
            "optimizer": self.optimizer,
            "epochs": self.config.epochs,
            "steps": len(self.losses),
            "data": "generated" if self.config.data is None else "CIFAR-10",
            "seed": self.config.seed,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "out": None if self.out is None else str(self.out),
        }


def train(config: Config, arrays: CIFAR10Arrays | None = None) -> Result:
    """Trains as ``config`` says, on ``arrays`` if given, and returns the curves and the trained network.

    Seeds PyTorch's, NumPy's and Python's global generators. Writes nothing where ``config.out`` is ``None``.

    Raises:
        ValueError: a flag, an optimizer argument or a data file is wrong; the text says which and what was expected.
        FloatingPointError: the loss is no longer finite.
        scripts._checkpoint.CheckpointError: a checkpoint could not be written, or none could be read.
    """
    return Run(config, arrays).fit()


class Run:
    """A run in progress: everything that a checkpoint holds, and the loop over it."""

    def __init__(self, config: Config, arrays: CIFAR10Arrays | None = None) -> None:
        saved = None
        if config.resume is not None:
            path, saved = _checkpoint.read_newest(config.resume)
            config = resumed(config, saved["config"], path.parent)
        self.config = config = with_presets(config)
        if config.tensorboard and config.out is None:
            raise ValueError("--tensorboard needs --out, the folder to write the curves into")
        if saved is None and config.out is not None and _checkpoint.found(config.out):
            raise ValueError(f"--out {config.out} holds another run's checkpoints: --resume it, or name another folder")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = pick_device(config.device)
        arrays = load_arrays(config) if arrays is None else arrays
        self.fingerprint = zlib.crc32(arrays.train_labels.tobytes(), zlib.crc32(arrays.train_images.tobytes()))
        self.test_images = torch.from_numpy(arrays.test_images).to(self.device)
        self.test_labels = torch.from_numpy(arrays.test_labels).to(self.device)
        images, labels = torch.from_numpy(arrays.train_images), torch.from_numpy(arrays.train_labels)
        normalize = Normalize.of(images, config.channels_last).to(self.device)
        size = min(config.batch_size, len(labels))
        images, labels = images.to(self.device), labels.to(self.device)
        self.batches = Batches(images, labels, normalize, size, config.seed, config.flip, config.shift)

        seed_all(config.seed)
        self.model = build_model(config, len(arrays.classes))
        if isinstance(self.model, FastNet) and saved is None:
            self.model.whiten_(normalize.to(torch.device("cpu"))(torch.from_numpy(arrays.train_images[:5_000])))
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout)
        self.criterion = layers(config.backend).CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.arguments = optimizer_arguments(config)
        self.optimizer = build_optimizer(config.optimizer, self.model, self.arguments)
        self.steps = config.epochs * len(self.batches)
        factor = schedule(config.schedule, self.steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.average = WeightAverage(config.average, self.model, self.steps)
        self.epoch = self.batch = self.step = 0  # the next batch to take, and the steps done
        self.losses = torch.zeros(self.steps, device=self.device)
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        if saved is not None:
            self.load_state_dict(saved)

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs."""
        return {
            "config": plain(self.config),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses[: self.step].clone().cpu(),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict(),
            "random": _checkpoint.random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a run where ``state`` left it.

        Raises:
            ValueError: the training images are not those of the run.
        """
        if state["fingerprint"] != self.fingerprint:
            raise ValueError("the training images are not those that the run was started with (their checksums differ)")
        for name, now in (("versions", versions()), ("threads", torch.get_num_threads())):
            if state[name] != now:
                text = f"the run had {name} {state[name]}, this is {now}: the weights may differ in their last bits"
                warnings.warn(text, stacklevel=2)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.average.load_state_dict(state["average"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.losses[: self.step] = state["losses"]
        self.history, self.seconds = state["history"], state["seconds"]
        _checkpoint.set_random_state(state["random"])

    def fit(self) -> Result:
        """Trains to the end."""
        config = self.config
        folder = config.out / "tensorboard" if config.tensorboard else None
        bar = progress_bar(config.progress, self.steps, self.step)
        with deterministic(self.device), bar as show, curves(folder, self.step) as log:
            if self.step == 0:
                self.checkpoint()  # a folder that cannot be written to fails now, not after an epoch
            began = time.perf_counter() - self.seconds
            while self.epoch < config.epochs:
                for x, y in self.batches.epoch(self.epoch, self.batch):
                    self.losses[self.step] = self.train_step(x, y)
                    self.step, self.batch = self.step + 1, self.batch + 1
                    self.average.update(self.step)
                    if self.step % LOG_EVERY == 0 or self.batch == len(self.batches):
                        self.look(show, log)
                    if self.batch < len(self.batches) and self.step % (config.checkpoint_every or self.steps) == 0:
                        self.seconds = time.perf_counter() - began
                        self.checkpoint()
                self.epoch, self.batch = self.epoch + 1, 0
                if self.epoch == config.epochs:
                    self.average.finish()
                with self.average.applied():
                    self.history.append(self.evaluate())
                log(self.step, {f"test/{name}": value for name, value in self.history[-1].items()})
                show(self.step, self.history[-1])
                self.seconds = time.perf_counter() - began
                self.checkpoint()
        if config.out is not None:
            _checkpoint.write_whole(config.out / "model.pt", self.model.state_dict())
        name = {"name": full_name(config.optimizer), **self.arguments}
        losses = self.losses.tolist()
        return Result(
            config, losses, self.history, self.seconds, name, device_name(self.device), config.out, self.model
        )

    def train_step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One step of the optimizer on one batch; returns the loss before it."""

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            with self.autocast():
                loss = self.criterion(self.model(x), y)
            loss.backward()
            return loss

        loss = self.optimizer.step(closure)
        self.scheduler.step()
        return loss.detach()

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Accuracy and cross-entropy over the test images, in the network's evaluation mode."""
        self.model.eval()
        right, total = 0, 0.0
        for images, labels in zip(self.test_images.split(1_000), self.test_labels.split(1_000)):
            with self.autocast():
                logits = self.model(self.batches.normalize(images)).float()
            right += int((logits.argmax(1) == labels).sum())
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        self.model.train()
        return {"accuracy": right / len(self.test_labels), "loss": total / len(self.test_labels)}

    def autocast(self) -> torch.autocast:
        """The precision that the network runs in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def look(self, show: Callable[..., None], log: Callable[..., None]) -> None:
        """Shows and logs the loss, and stops where it is no number any more."""
        loss, lr = float(self.losses[self.step - 1]), self.scheduler.get_last_lr()[0]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}: try a lower --lr")
        log(self.step, {"train/loss": loss, "train/lr": lr})
        show(self.step, {"loss": loss, "lr": lr})

    def checkpoint(self) -> None:
        """Writes a checkpoint into the run's folder, if it has one."""
        if self.config.out is not None:
            _checkpoint.save(self.config.out, self.step, self.state_dict())


def load_arrays(config: Config) -> CIFAR10Arrays:
    """The images that ``config`` names, or the generated ones."""
    if config.data is None:
        if config.download:
            raise ValueError("--download needs --data, the folder to put CIFAR-10 into")
        return cifar10.synthetic(*config.generated)
    if config.download:
        cifar10.download(config.data)
    return cifar10.load(config.data)


def build_model(config: Config, classes: int) -> nn.Module:
    """The network that ``config`` names."""
    options: dict[str, Any] = {}
    if config.widths is not None:
        if config.model != "fast":
            raise ValueError(f"--widths belongs to the fast network, and --model is {config.model}")
        options["widths"] = config.widths
    return models.build(config.model, backend=config.backend, num_classes=classes, **options)


def default_out(config: Config) -> Path:
    """A new folder under ``runs``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{config.model}-{full_name(config.optimizer)}-{config.seed}-{stamp}"


def main() -> None:
    """Reads the flags, trains, prints the summary."""
    try:
        import tyro
    except ImportError:
        sys.exit("training from the command line needs tyro: pip install 'reimpl[train]'")
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    config = tyro.cli(Config, description=__doc__, config=(tyro.conf.UseAppendAction,))
    try:
        if config.resume is None and config.out is None:
            config = dataclasses.replace(config, out=default_out(config))
        run = Run(config)
    except (ValueError, TypeError, OSError, ImportError, pickle.UnpicklingError, CheckpointError) as error:
        sys.exit(f"train_cifar10: {error}")
    print(f"Checkpoints and weights go to {run.config.out}", file=sys.stderr)
    try:
        result = run.fit()
    except (CheckpointError, FloatingPointError, ImportError) as error:
        sys.exit(f"train_cifar10: {error}")
    except KeyboardInterrupt:
        sys.exit(f"train_cifar10: interrupted at step {run.step}; go on with --resume {run.config.out}")
    print(json.dumps(result.summary()))


if __name__ == "__main__":
    main()
