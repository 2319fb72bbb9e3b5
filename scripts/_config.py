"""The flags of a CIFAR-10 run, each network's defaults, and what may change when a run is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scripts._averaging import Kind
from scripts._optimizers import full_name, parse_settings


@dataclass(frozen=True)
class Config:
    """What a run is made of. ``None`` stands for the network's own default, which is in ``PRESETS``."""

    data: Path | None = None
    """Folder of CIFAR-10 in the published Python layout; without it the generated set is trained on."""
    download: bool = False
    """Fetch CIFAR-10 into the folder of --data first, through torchvision."""
    generated: tuple[int, int] = (10_000, 2_000)
    """Training and test images of the generated set."""
    model: str = "fast"
    """fast, cnn, or resnet20 (any resnet<depth> of depth 6n + 2)."""
    widths: tuple[int, int, int] | None = None
    """Channels of the fast network's three groups."""
    backend: Literal["torch", "reimpl"] = "torch"
    """Whose layers the network is built of."""
    optimizer: str = "SGD"
    """A name like reimpl.Adam or torch.AdamW; a bare name is ours."""
    lr: float | None = None
    """Highest learning rate of the schedule."""
    set: tuple[str, ...] = ()
    """Arguments of the optimizer as key=value; may be given several times."""
    epochs: int = 4
    """Passes over the training images."""
    batch_size: int | None = None
    """Images a step."""
    schedule: Literal["one_cycle", "linear", "constant"] | None = None
    """one_cycle climbs for a fifth of the steps and falls to zero; linear falls all the way."""
    label_smoothing: float | None = None
    """Share of each target spread over all classes."""
    average: Kind | None = None
    """Averaging of the weights: ema, lookahead or off."""
    flip: bool = True
    """Mirror a random half of the images, and each one anew every epoch."""
    shift: int | None = None
    """Move each image by up to so many pixels, the edge reflected."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast."""
    channels_last: bool = True
    """Memory layout of the images, faster with PyTorch's convolutions."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: int | None = None
    """CPU threads; PyTorch's own choice by default."""
    seed: int = 0
    """Seed of the weights, the order of the images and their augmentation."""
    out: Path | None = None
    """Folder of checkpoints, final weights and curves; by default runs/MODEL-OPTIMIZER-SEED-TIME."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides the one after each epoch."""
    tensorboard: bool = False
    """Write curves for TensorBoard into the run's folder."""
    resume: Path | None = None
    """Go on with the run in this folder (or from this checkpoint), with the flags that it was started with."""
    progress: bool = True
    """Show a progress bar."""


# Plain SGD's arguments are in "sgd"; any other optimizer starts from its own defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "batch_size": 500,
        "schedule": "one_cycle",
        "label_smoothing": 0.2,
        "average": "lookahead",
        "shift": 2,
        "sgd": {"lr": 0.8, "momentum": 0.85, "nesterov": True, "weight_decay": 1e-3},
    },
    "resnet": {
        "batch_size": 128,
        "schedule": "one_cycle",
        "label_smoothing": 0.0,
        "average": "off",
        "shift": 4,
        "sgd": {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    },
    "cnn": {
        "batch_size": 128,
        "schedule": "linear",
        "label_smoothing": 0.0,
        "average": "off",
        "shift": 2,
        "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    },
}

# Flags that may differ when a run is resumed: they do not touch the weights.
FREE = {"data", "download", "device", "out", "checkpoint_every", "tensorboard", "resume", "progress"}


def _family(model: str) -> str:
    """The key of ``PRESETS`` for a network's name; an unknown name fails where the network is built."""
    return model if model in PRESETS else "resnet"


def with_presets(config: Config) -> Config:
    """``config`` with every ``None`` that the network has a default for filled in, and checked."""
    preset = PRESETS[_family(config.model)]
    config = dataclasses.replace(config, optimizer=full_name(config.optimizer))
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    config = dataclasses.replace(config, **{k: v for k, v in preset.items() if given.get(k, 0) is None})
    for name, low in (("epochs", 1), ("batch_size", 1), ("shift", 0), ("seed", 0), ("checkpoint_every", 0)):
        if getattr(config, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(config, name)}")
    if config.seed >= 2**32:
        raise ValueError(f"--seed must be below 2**32, got {config.seed}")
    if config.shift > 31:
        raise ValueError(f"--shift must be at most 31, as the images have 32 pixels a side, got {config.shift}")
    if not 0 <= config.label_smoothing <= 1:
        raise ValueError(f"--label-smoothing must lie in 0..1, got {config.label_smoothing}")
    return config


def optimizer_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of the optimizer: the network's for SGD, then --lr, then --set.

    Raises:
        ValueError: a setting is malformed, or the learning rate is given twice.
    """
    settings = parse_settings(config.set)
    arguments = dict(PRESETS[_family(config.model)]["sgd"]) if config.optimizer.endswith(".SGD") else {}
    if config.lr is not None:
        if "lr" in settings:
            raise ValueError(f"the learning rate is given twice: --lr {config.lr} and --set lr={settings['lr']}")
        arguments["lr"] = config.lr
    return arguments | settings


def schedule(kind: str, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate for each of ``steps`` steps, counted from 0; it would be 0 for the step after.

    ``one_cycle`` climbs linearly from 0.2 to 1 over the first fifth, then falls linearly; ``linear`` falls from 1.
    """

    def factor(step: int) -> float:
        left = (steps - step) / steps
        if kind == "constant":
            return 1.0
        if kind == "linear":
            return left
        return 1 - 0.8 * (left - 0.8) / 0.2 if left > 0.8 else left / 0.8

    return factor


def plain(config: Config) -> dict[str, Any]:
    """``config`` in types that a checkpoint may hold."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def resumed(config: Config, saved: dict[str, Any], folder: Path) -> Config:
    """The configuration of the run in ``folder``, as ``saved`` in its checkpoint, with the free flags of ``config``.

    Raises:
        ValueError: a flag that the weights depend on is given and differs from the run's.
    """
    paths = {k: Path(saved[k]) for k in ("data", "out", "resume") if saved[k] is not None}
    run, default = Config(**(saved | paths)), Config()
    free = {}
    for name in (f.name for f in dataclasses.fields(Config)):
        given = getattr(config, name)
        if given == getattr(default, name):
            continue
        if name in FREE:
            free[name] = given
        elif (full_name(given) if name == "optimizer" else given) != getattr(run, name):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} {given} differs from the resumed run's {getattr(run, name)}; leave it out")
    return dataclasses.replace(run, **({"out": folder} | free))
