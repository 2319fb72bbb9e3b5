"""What CIFAR-10 training is made of: batches, names of optimizers, averages, and checkpoints on a bad day."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reimpl.data import synthetic
from scripts import _checkpoint
from scripts._averaging import Kind, WeightAverage
from scripts._batches import Batches, Normalize
from scripts._checkpoint import CheckpointError
from scripts._config import schedule
from scripts._optimizers import build_optimizer, full_name, known_optimizers, parse_settings

DATA = synthetic(200, 40)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# Batches


def batches(**changes: Any) -> Batches:
    images, labels = torch.from_numpy(DATA.train_images), torch.from_numpy(DATA.train_labels)
    plain = Batches(images, labels, Normalize.of(images, channels_last=False), 30, seed=0, flip=False, shift=0)
    return dataclasses.replace(plain, **changes)


def test_an_epoch_takes_each_image_once() -> None:
    some = batches(labels=torch.arange(200))
    taken = [torch.cat([y for _, y in some.epoch(epoch)]) for epoch in (0, 0, 1)]
    assert len(some) == 6 and len(taken[0]) == 180 == len(taken[0].unique())
    assert torch.equal(taken[0], taken[1]) and not torch.equal(taken[0], taken[2])


@pytest.mark.quick
def test_an_epoch_may_be_entered_anywhere() -> None:
    some = batches(flip=True, shift=3)
    whole = list(some.epoch(2))
    for start in (1, 4, 6):
        rest = list(some.epoch(2, start))
        assert len(rest) == 6 - start
        for (x, y), (expected_x, expected_y) in zip(rest, whole[start:]):
            assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


def test_every_image_is_flipped_in_one_of_two_epochs() -> None:
    some = batches(labels=torch.arange(200), flip=True, size=200)
    (x0, y0), (x1, y1) = next(some.epoch(0)), next(some.epoch(1))
    x0, x1 = x0[y0.argsort()], x1[y1.argsort()]
    assert torch.equal(x0.flip(-1), x1)
    flipped = (x0 != some.normalize(some.images)).flatten(1).any(1)
    assert 70 < flipped.sum() < 130  # 4 deviations about a half of 200


def test_shifts_are_crops_of_reflected_padding() -> None:
    some = batches(labels=torch.arange(200), shift=2, size=200)
    x, index = next(some.epoch(0))
    padded = nn.functional.pad(some.normalize(some.images), (2, 2, 2, 2), mode="reflect")[index]
    crops = torch.stack([padded[:, :, i : i + 32, j : j + 32] for i in range(5) for j in range(5)])
    matches = (crops == x).flatten(2).all(2)
    assert matches.any(0).all() and (matches.sum(1) > 0).all()  # each image is one of the 25, and each of them occurs


def test_normalised_images_have_mean_0_and_deviation_1() -> None:
    some = batches()
    x = some.normalize(some.images).double()
    # float32 throughout: each pixel is off by at most some 1e-6.
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)


# Optimizers by name, schedules, averages


@pytest.mark.quick
def test_optimizers_are_found_by_name() -> None:
    known = known_optimizers()
    assert known["torch.SGD"] is torch.optim.SGD
    assert known["reimpl.SGD"].__module__.startswith("reimpl.")
    assert {"reimpl.Adam", "reimpl.RMSprop", "torch.Muon", "torch.LBFGS"} <= known.keys()
    assert full_name("Adam") == "reimpl.Adam" and full_name("torch.Adam") == "torch.Adam"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("adamw", "reimpl.AdamW"),
        ("torch.Adamm", "torch.Adam"),
        ("reimpl.LBFGS", "torch.LBFGS"),
        ("numpy.SGD", "reimpl.SGD"),
    ],
)
def test_an_unknown_optimizer_is_told_the_known_ones(name: str, meant: str) -> None:
    with pytest.raises(
        ValueError, match=rf"unknown optimizer '{name}'; did you mean {meant}\? Known: reimpl\..*torch\.SGD"
    ):
        full_name(name)
    with pytest.raises(ValueError, match=r"unknown optimizer 'xyzzy'\. Known: "):
        full_name("xyzzy")


def test_settings_are_literals_or_strings() -> None:
    read = parse_settings(["lr=1e-2", "betas=(0.9, 0.99)", "nesterov=True", "momentum_form=velocity", "foreach=None"])
    assert read == {"lr": 0.01, "betas": (0.9, 0.99), "nesterov": True, "momentum_form": "velocity", "foreach": None}
    for wrong in ("lr", "=1", "a b=1"):
        with pytest.raises(ValueError, match=r"--set takes key=value, got"):
            parse_settings([wrong])


def test_biases_and_normalisations_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    decayed, free = build_optimizer("SGD", model, {"lr": 0.1, "weight_decay": 0.5}).param_groups
    assert decayed["weight_decay"] == 0.5 and [p.ndim for p in decayed["params"]] == [4]
    assert free["weight_decay"] == 0 and [p.ndim for p in free["params"]] == [1, 1, 1]
    with pytest.raises(TypeError, match=r"reimpl.SGD with \{'beta': 1\}: .*'beta'"):
        build_optimizer("SGD", model, {"beta": 1})


def test_schedules() -> None:
    assert [schedule("constant", 10)(i) for i in (0, 9)] == [1, 1]
    assert [schedule("linear", 10)(i) for i in (0, 5, 10)] == [1, 0.5, 0]
    one_cycle = [schedule("one_cycle", 10)(i) for i in (0, 1, 2, 6, 10)]
    assert one_cycle == pytest.approx([0.2, 0.6, 1, 0.5, 0], rel=1e-12)  # a few roundings of 1e-16


@pytest.mark.parametrize("kind", ["ema", "lookahead", "off"])
def test_averages_follow_their_formula(kind: Kind) -> None:
    model = nn.BatchNorm1d(3).double()
    total, average, live = 23, weights(model), weights(model)
    mean = WeightAverage(kind, model, total)
    for t in range(1, total + 1):
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.randn_like(value))
            live[name] = value.clone()
        mean.update(t)
        if kind == "ema" or (kind == "lookahead" and t % 5 == 0):
            d = min(0.99, (1 + t) / (10 + t)) if kind == "ema" else 0.95**5 * (t / total) ** 3
            average = {name: d * a + (1 - d) * live[name] if a.ndim else a for name, a in average.items()}
        if kind == "off":
            average = live
        expected = average if kind == "lookahead" and t % 5 == 0 else live
        torch.testing.assert_close(weights(model), expected, rtol=1e-12, atol=1e-12)  # lerp rounds in another order
    before = weights(model)
    with mean.applied():
        torch.testing.assert_close(weights(model), average, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    mean.finish()
    torch.testing.assert_close(weights(model), average, rtol=1e-12, atol=1e-12)


# Checkpoints

STATE = {"step": 3, "model": {"weight": torch.arange(1000.0)}, "config": {"lr": None, "widths": (1, 2)}}


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path, state = _checkpoint.read_newest(_checkpoint.save(tmp_path, 3, STATE).parent)
    assert path.name == "checkpoint-00000003.pt" and state["config"] == STATE["config"]
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 99_999_999, 100_000_000, 7):
        _checkpoint.save(tmp_path, step, STATE | {"step": step})
    assert [path.name for path in _checkpoint.found(tmp_path)] == ["checkpoint-100000000.pt", "checkpoint-99999999.pt"]
    assert len(list(tmp_path.iterdir())) == 2


def flip_byte(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "a bit of a weight": lambda data: flip_byte(data, data.index(np.float32(500).tobytes())),
    "a bit of the pickle": lambda data: flip_byte(data, data.index(b"widths")),
    "noise": lambda data: bytes(len(data)),
    "hostile": lambda data: pickle.dumps({"step": 1, "model": np.random.default_rng}),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, name: str) -> None:
    good, bad = (_checkpoint.save(tmp_path, step, STATE | {"step": step}) for step in (3, 4))
    bad.write_bytes(DAMAGE[name](bad.read_bytes()))
    with pytest.raises(CheckpointError, match=r"checkpoint-00000004.pt is (truncated or )?corrupt"):
        _checkpoint.read(bad)
    with pytest.raises(CheckpointError, match=r"The last good checkpoint is .*checkpoint-00000003.pt"):
        _checkpoint.read_newest(bad)
    with pytest.warns(UserWarning, match=r"00000004.pt is .*corrupt.* Going on from the last good one, .*00000003.pt"):
        path, state = _checkpoint.read_newest(tmp_path)
    assert path == good and state["step"] == 3
    good.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"No good checkpoint is left"):
        _checkpoint.read_newest(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"step": 1, "model": Hostile()}, tmp_path / "checkpoint-00000001.pt")
    with pytest.raises(CheckpointError, match=r"corrupt: Weights only load failed"):
        _checkpoint.read(tmp_path / "checkpoint-00000001.pt")
    assert not (tmp_path / "marker").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt is no checkpoint of this script"):
        _checkpoint.read(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in"):
        _checkpoint.read_newest(tmp_path)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _checkpoint.save(tmp_path, 3, STATE)
    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
    expected = r"cannot write .*00000004.pt \([\d,]+ bytes\): the disk is full\. The last good checkpoint is .*00000003"
    with pytest.raises(CheckpointError, match=expected):
        _checkpoint.save(tmp_path, 4, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000003.pt"]
    assert _checkpoint.read_newest(tmp_path)[1]["step"] == 3


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> list[float]:
        return [float(torch.rand(())), float(np.random.normal()), random.gauss(0, 1)]  # noqa: NPY002 - the global one

    draw()  # leaves NumPy and Python with a spare normal number in hand
    state = _checkpoint.random_state()
    expected = [draw() for _ in range(3)]
    _checkpoint.set_random_state(state)
    assert [draw() for _ in range(3)] == expected
