"""The training script as a process: killed, short of disk, started from anywhere, told nonsense."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import _checkpoint

pytest.importorskip("tyro", reason="the command line needs the extra train")

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    *("--generated", "400", "40", "--widths", "4", "4", "8", "--batch-size", "40", "--epochs", "2"),
    *("--device", "cpu", "--threads", "1", "--no-progress"),
)
EPOCH = 10  # steps

# Each is run in front of the script's main().
KILL_BEFORE_STEP = """
original = Run.train_step
def train_step(self, x, y):
    if self.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, x, y)
Run.train_step = train_step
"""
KILL_WHILE_WRITING = """
def fsync(descriptor, done=[]):
    done.append(os.path.realpath(f"/proc/self/fd/{{descriptor}}"))
    if sum(".writing-" in path for path in done) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and file systems as on POSIX")


def start(*flags: str, before: str = "", cwd: Path, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the script with ``flags`` after the code ``before``."""
    code = f"import os, signal, sys\nfrom scripts.train_cifar10 import Run, main\n{before}\nmain()"
    return execute(*wrapper, sys.executable, "-c", code, *flags, cwd=cwd)


def execute(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Summary and final weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = summary(start(*FLAGS, "--out", "run", cwd=folder))
    return done, torch.load(folder / "run" / "model.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "left_at", "leftover"),
    [
        pytest.param(KILL_BEFORE_STEP.format(step=7), 6, False, id="first epoch"),
        pytest.param(KILL_BEFORE_STEP.format(step=14), 12, False, id="second epoch"),
        # The writes are those of steps 0, 3, 6, 9, 10 (the epoch's end), 12.
        pytest.param(KILL_WHILE_WRITING.format(step=6), 10, True, id="while writing"),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(
    uninterrupted: tuple[dict[str, Any], dict[str, torch.Tensor]],
    tmp_path: Path,
    before: str,
    left_at: int,
    leftover: bool,
) -> None:
    killed = start(*FLAGS, "--checkpoint-every", "3", "--out", "run", before=before, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL and killed.stdout == ""
    run = tmp_path / "run"
    state = _checkpoint.read(_checkpoint.found(run)[0])
    assert state["step"] == left_at and (state["epoch"], state["batch"]) == divmod(left_at, EPOCH)
    assert bool(list(run.glob(".writing-*"))) == leftover and not (run / "model.pt").exists()

    resumed = summary(start("--resume", "run", "--no-progress", cwd=tmp_path))
    expected, weights = uninterrupted
    for key in ("test_accuracy", "test_loss", "steps", "optimizer", "epochs"):
        assert resumed[key] == expected[key]
    ours = torch.load(run / "model.pt")
    assert list(ours) == list(weights)
    for name, value in weights.items():
        assert torch.equal(ours[name], value), name
    assert not list(run.glob(".writing-*"))


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_passed_over(
    uninterrupted: tuple[dict[str, Any], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    start(*FLAGS, "--checkpoint-every", "3", "--out", "run", before=KILL_BEFORE_STEP.format(step=8), cwd=tmp_path)
    newest, older = _checkpoint.found(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:1_000])
    refused = start("--resume", str(newest), "--no-progress", cwd=tmp_path)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"{newest} is truncated or corrupt" in refused.stderr
    assert f"The last good checkpoint is {older}" in refused.stderr
    resumed = start("--resume", "run", "--no-progress", cwd=tmp_path)
    assert f"Going on from the last good one, run/{older.name}" in resumed.stderr
    assert summary(resumed)["test_loss"] == uninterrupted[0]["test_loss"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a file system of its own cannot be mounted here")
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """On a real file system with room for two checkpoints, of which the third has to fail."""
    start(*FLAGS, "--checkpoint-every", "3", "--out", "run", before=KILL_BEFORE_STEP.format(step=4), cwd=tmp_path)
    size = _checkpoint.found(tmp_path / "run")[0].stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={5 * size // 2} tmpfs {disk} && "
    then = f"; code=$?; ls -A {disk}/run; cp {disk}/run/* {tmp_path}; exit $code"
    wrapper = ("unshare", "-rm", "sh", "-c", mount + '"$@"' + then, "sh")
    full = start(*FLAGS, "--checkpoint-every", "3", "--out", f"{disk}/run", cwd=tmp_path, wrapper=wrapper)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert f"cannot write {disk}/run/checkpoint-00000006.pt" in full.stderr
    assert "the disk is full. The last good checkpoint is" in full.stderr
    assert full.stdout.split() == ["checkpoint-00000000.pt", "checkpoint-00000003.pt"]  # and nothing half written
    assert _checkpoint.read(tmp_path / "checkpoint-00000003.pt")["step"] == 3


@pytest.mark.slow
def test_the_script_runs_from_any_folder(
    uninterrupted: tuple[dict[str, Any], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for command in ((str(ROOT / "scripts" / "train_cifar10.py"),), ("-m", "scripts.train_cifar10")):
        done = summary(execute(sys.executable, *command, *FLAGS, cwd=tmp_path))
        assert done["test_loss"] == uninterrupted[0]["test_loss"]
        assert done["optimizer"]["name"] == "reimpl.SGD" and done["versions"]["torch"] == torch.__version__
        assert (tmp_path / done["out"] / "model.pt").exists() and done["out"].startswith("runs/fast-reimpl.SGD-0-")
        shutil.rmtree(tmp_path / "runs")
