"""The folder of compiled kernels: after an upgrade, removed, read-only, full, or with no home to be in."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from reimpl.optim import _kernel_cache

pytestmark = pytest.mark.quick
TEXT = "VALUE = 1\n"
ROOT = Path(__file__).resolve().parents[1]
STEP = """
import torch
from reimpl.optim import SGD, _kernel_cache
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
SGD([p], lr=0.1, fused=True).step()
print(_kernel_cache.folder(), round(p[0].item(), 6))
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("REIMPL_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def _load(*versions: str, text: str = TEXT) -> Path:
    """Where a kernel was loaded from."""
    module = _kernel_cache.load(text, versions)
    assert module.VALUE == 1 and module.__file__ is not None
    return Path(module.__file__)


def _fail(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def test_an_upgrade_starts_afresh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the compiler, of PyTorch, of Python, and of the rule; what was compiled before is left for its users."""
    seen = [_load("compiler 1"), _load("compiler 2"), _load("compiler 1", text=TEXT + "# another rule\n")]
    with monkeypatch.context() as upgraded:
        upgraded.setattr(torch, "__version__", "99.0")
        seen.append(_load("compiler 1"))
    with monkeypatch.context() as upgraded:
        upgraded.setattr(sys, "version", "99.0")
        seen.append(_load("compiler 1"))
    assert len(set(seen)) == 5 == len(list(folder.glob("*.py")))
    assert _load("compiler 1") == seen[0] and len(list(folder.glob("*.py"))) == 5


def test_a_folder_that_was_removed_is_made_again(folder: Path) -> None:
    first = _load()
    shutil.rmtree(folder)
    assert _load() == first and first.parent == folder and first.exists()


def test_a_folder_that_cannot_be_written_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _load()
    monkeypatch.setattr(_kernel_cache.tempfile, "TemporaryFile", _fail(errno.EROFS))
    assert _kernel_cache.folder() is None
    assert _load().parent != folder and kept.exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_a_read_only_folder_is_done_without(folder: Path) -> None:
    """The real thing: a folder without write permission, and a fused step of a process that has to compile."""
    pytest.importorskip("numba", reason="compiles a kernel")
    command = [sys.executable, "-c", STEP]
    if os.geteuid() == 0:  # whom no permission binds
        bound = ["setpriv", "--bounding-set", "-dac_override"]
        if shutil.which("setpriv") is None or subprocess.run([*bound, "true"], capture_output=True).returncode:
            pytest.skip("root writes everywhere, and setpriv, which would bind it, is missing or not allowed to")
        command = [*bound, *command]
    _load()
    before = sorted(folder.rglob("*"))
    folder.chmod(0o555)
    try:
        run = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    finally:
        folder.chmod(0o755)
    assert (run.returncode, run.stdout) == (0, "None 0.9\n"), run.stderr
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_is_told_and_nothing_half_written_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        (_fail(errno.ENOSPC) if Path(target).parent == folder else replace)(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="compiled kernels are not kept: .*No space left"):
        assert _load("full").parent != folder
    assert list(folder.iterdir()) == []


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REIMPL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: _no_home()))
    assert _kernel_cache.folder() is None
    assert _load("no home").exists()


def _no_home() -> NoReturn:
    raise RuntimeError("Could not determine home directory.")
