"""CIFAR-10 training: ours beside PyTorch's, resuming to the last bit, and what a wrong flag is told."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reimpl.data import synthetic
from scripts._checkpoint import CheckpointError
from scripts.train_cifar10 import Config, Run, main, train

DATA = synthetic(200, 40)
TINY = Config(generated=(200, 40), widths=(4, 4, 8), batch_size=40, epochs=2, progress=False, device="cpu")
STEPS = 10


def tiny(**changes: Any) -> Config:
    return dataclasses.replace(TINY, **changes)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


@pytest.mark.quick
def test_our_sgd_and_pytorchs_train_alike_to_the_last_bit() -> None:
    ours, theirs = (train(tiny(optimizer=f"{owner}.SGD"), DATA) for owner in ("reimpl", "torch"))
    assert ours.losses == theirs.losses and len(ours.losses) == STEPS
    assert ours.history == theirs.history
    assert_same_bits(weights(ours.model), weights(theirs.model))
    assert train(tiny(seed=1), DATA).losses != ours.losses


def test_our_layers_and_pytorchs_train_alike() -> None:
    ours, theirs = (train(tiny(backend=backend), DATA) for backend in ("reimpl", "torch"))
    # float32 through ten steps of a network at a high rate: roundings of 1e-7 grow about a thousandfold.
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-3)
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)


@pytest.mark.parametrize("model", ["cnn", "resnet8"])
def test_other_networks_train(model: str) -> None:
    result = train(tiny(model=model, widths=None, epochs=4, lr=0.02), DATA)
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    assert result.summary()["model"] == model


def test_a_run_learns() -> None:
    result = train(tiny(generated=(2_000, 400), widths=(16, 32, 32), epochs=4))
    print(f"accuracy {result.accuracy:.3f}")
    assert result.accuracy > 0.5  # chance is 0.1
    assert result.history[-1]["loss"] < result.history[0]["loss"]


class Stopped(Exception):
    pass


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next run fail before the step after ``step``."""
    original = Run.train_step

    def train_step(self: Run, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.step == step:
            raise Stopped
        return original(self, x, y)

    monkeypatch.setattr(Run, "train_step", train_step)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "Adam", "average": "ema"},
        {"optimizer": "RMSprop", "set": ("momentum=0.9", "lr=0.001"), "average": "off"},
        {"optimizer": "torch.AdamW", "schedule": "constant"},
        {"optimizer": "Adadelta", "set": ("fused=True",)},
        {"optimizer": "torch.LBFGS", "set": ("max_iter=2",), "channels_last": False},
        {"backend": "reimpl", "precision": "bfloat16", "channels_last": False},
        {"model": "cnn", "widths": None},
    ],
    ids=str,
)
def test_resuming_gives_the_same_bits(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(**changes)
    whole = train(config, DATA)
    for step in (3, 8):  # in the first epoch and in the second
        out = tmp_path / str(step)
        with monkeypatch.context() as context, pytest.raises(Stopped):
            stop_at(step, context)
            train(dataclasses.replace(config, out=out, checkpoint_every=1), DATA)
        torch.rand(7)  # the generators elsewhere
        resumed = train(Config(resume=out, progress=False), DATA)
        assert resumed.losses == whole.losses and resumed.history == whole.history
        assert_same_bits(weights(resumed.model), weights(whole.model))
        assert_same_bits(torch.load(out / "model.pt"), weights(whole.model))


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    whole = train(tiny(out=tmp_path), DATA)
    again = train(Config(resume=tmp_path, progress=False), DATA)
    assert again.history == whole.history
    assert_same_bits(weights(again.model), weights(whole.model))


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    train(tiny(out=tmp_path), DATA)
    with pytest.raises(ValueError, match=r"--out .* holds another run's checkpoints: --resume it, or name another"):
        Run(tiny(out=tmp_path), DATA)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*Not a directory"):
        train(tiny(out=tmp_path / "file" / "run"), DATA)


def test_a_resumed_run_keeps_its_flags_and_images(tmp_path: Path) -> None:
    train(tiny(out=tmp_path, optimizer="Adam", lr=0.01), DATA)
    resumed = Run(Config(resume=tmp_path, optimizer="Adam", lr=0.01, progress=False), DATA).config
    assert (resumed.optimizer, resumed.lr, resumed.batch_size, resumed.out) == ("reimpl.Adam", 0.01, 40, tmp_path)
    with pytest.raises(ValueError, match=r"--lr 0.02 differs from the resumed run's 0.01; leave it out"):
        Run(Config(resume=tmp_path, lr=0.02), DATA)
    with pytest.raises(ValueError, match=r"the training images are not those that the run was started with"):
        Run(Config(resume=tmp_path), synthetic(200, 40, seed=1))


def test_a_diverging_run_stops() -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 5: try a lower --lr"):
        train(tiny(lr=1e30, average="off"), DATA)


def test_bad_flags_are_named() -> None:
    for changes, message in (
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"shift": 32}, "--shift must be at most 31"),
        ({"label_smoothing": 1.5}, r"--label-smoothing must lie in 0\.\.1, got 1\.5"),
        ({"model": "vgg", "widths": None}, r"model must be one of .*got 'vgg'"),
        ({"model": "cnn"}, "--widths belongs to the fast network, and --model is cnn"),
        ({"device": "tpu"}, "--device must be cpu, cuda, cuda:N or auto, got 'tpu'"),
        ({"lr": 0.1, "set": ("lr=0.2",)}, "the learning rate is given twice"),
        ({"download": True}, "--download needs --data"),
        ({"optimizer": "SGDD"}, "did you mean reimpl.SGD"),
        ({"tensorboard": True}, "--tensorboard needs --out"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(tiny(**changes))


def test_curves_are_written_for_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(tiny(out=tmp_path, tensorboard=True), DATA)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == {step: pytest.approx(result.losses[step - 1]) for step in (5, 10)}
    assert [event.value for event in events.Scalars("test/accuracy")] == pytest.approx(
        [epoch["accuracy"] for epoch in result.history]
    )


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"needs tqdm: pip install 'reimpl\[train\]', or --no-progress"):
        train(tiny(progress=True), DATA)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"--tensorboard needs the package tensorboard: pip install"):
        train(tiny(out=tmp_path, tensorboard=True), DATA)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--optimizer adamw",
            "unknown optimizer 'adamw'; did you mean reimpl.AdamW? Known: reimpl.ASGD, reimpl.Adadelta",
        ),
        ("--set momentum=0.9 --set beta=1", "reimpl.SGD with {'lr': 0.8, 'momentum': 0.9, "),
        ("--data .", "lacks batches.meta, data_batch_1"),
        ("--resume nowhere", "no checkpoint in nowhere"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(
    flags: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tyro")
    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_cifar10", *flags.split()])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as caught:
        main()
    assert str(caught.value).startswith("train_cifar10: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()
