"""Checkpoints that are whole or absent: written beside, flushed to disk, renamed; checked when read."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEEP = 2
_NAME = re.compile(r"checkpoint-(\d{8,})\.pt")
_BESIDE = ".writing-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


def write_whole(path: Path, state: Any) -> None:
    """Saves ``state`` at ``path``: whole, or not at all.

    Raises:
        CheckpointError: the disk is full, or another failure of writing; nothing is left behind.
    """
    buffer = io.BytesIO()  # serialised first: a full disk then fails in our own write
    torch.save(state, buffer)
    beside = path.with_name(f"{_BESIDE}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CheckpointError(f"cannot write {path} ({buffer.getbuffer().nbytes:,} bytes): {reason}") from error


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last, where the system lets a folder be opened (Windows does not)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the checkpoint of ``step`` into ``folder`` and then removes all but the newest two.

    Raises:
        CheckpointError: it could not be written; the text names the last good one, which is still there.
    """
    path = folder / f"checkpoint-{step:08d}.pt"
    try:
        write_whole(path, state)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_last_good(folder)}") from error
    for old in found(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def found(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first."""
    paths = [path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)


def read(path: Path) -> dict[str, Any]:
    """Loads one checkpoint, running no code from it and checking every byte against the archive's checksums.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated, corrupt or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is corrupt: {damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, CheckpointError):
        raise
    except Exception as error:  # zipfile and torch raise many types on damaged input
        raise CheckpointError(f"{path} is truncated or corrupt: {error}") from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path} is no checkpoint of this script")
    return state


def read_newest(where: Path) -> tuple[Path, dict[str, Any]]:
    """Loads the checkpoint ``where``, or the newest good one of the folder ``where``; warns of any it had to pass over.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: none can be read, or the file named cannot; the text says which good one there is.
    """
    if where.is_file():
        try:
            return where, read(where)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {_last_good(where.parent, where)}") from error
    paths = found(where)
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {where}")
    failures = []
    for path in paths:
        try:
            state = read(path)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        if failures:
            warnings.warn(f"{'; '.join(failures)}. Going on from the last good one, {path}", stacklevel=2)
        return path, state
    raise CheckpointError("; ".join(failures) + ". No good checkpoint is left")


def _last_good(folder: Path, but: Path | None = None) -> str:
    for path in found(folder):
        if path != but:
            try:
                read(path)
            except CheckpointError:
                continue
            return f"The last good checkpoint is {path}"
    return "There is no other checkpoint"


def random_state() -> dict[str, Any]:
    """The state of every random generator in use, in types that ``weights_only`` loading takes."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
