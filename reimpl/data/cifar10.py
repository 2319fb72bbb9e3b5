"""CIFAR-10 in its published Python layout: a loader that runs no code from the files, a writer, a download."""

from __future__ import annotations

import hashlib
import pickle
import reprlib
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from reimpl.data._arrays import CIFAR10Arrays, Images, Labels
from reimpl.data._pickle import load_plain
from reimpl.data._synthetic import synthetic

__all__ = ["FOLDER", "MD5", "CIFAR10Arrays", "download", "load", "synthetic", "write_layout"]

FOLDER = "cifar-10-batches-py"
META = "batches.meta"
TRAIN_FILES: tuple[str, ...] = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"
PIXELS = 3 * 32 * 32

MD5: dict[str, str] = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
"""Checksums of the published files."""


def load(root: str | Path, *, checksums: bool = True) -> CIFAR10Arrays:
    """Reads CIFAR-10 from the published Python layout.

    The files are pickles; they are read by :func:`reimpl.data.load_plain`, which calls nothing they name. Every batch
    must hold as many images as ``batches.meta`` says (10,000 in the published set).

    Args:
        root: the folder ``cifar-10-batches-py``, or the one that holds it.
        checksums: compare MD5 sums with the published files' and warn where they differ.

    Returns:
        Images uint8 (N, 3, 32, 32), labels int64 (N,), training batches joined in order.

    Raises:
        FileNotFoundError: the folder or one of its seven files is missing.
        pickle.UnpicklingError: a file is truncated or corrupt, or names a class or function it has no need of.
        ValueError: a shape, dtype, count or label differs; the text names the file, what came and what was expected.

    Warns:
        UserWarning: files whose checksums are not the published ones.

    Source: A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """
    folder = _folder(Path(root))
    if checksums:
        _warn_of_checksums(folder)
    count, classes = _read_meta(folder / META)
    batches = [_read_batch(folder / name, count, len(classes)) for name in TRAIN_FILES]
    test_images, test_labels = _read_batch(folder / TEST_FILE, count, len(classes))
    train_images = np.concatenate([images for images, _ in batches])
    train_labels = np.concatenate([labels for _, labels in batches])
    return CIFAR10Arrays(train_images, train_labels, test_images, test_labels, classes)


def _folder(root: Path) -> Path:
    folder = root if (root / META).exists() and not (root / FOLDER).exists() else root / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"no CIFAR-10 in {root}: expected the folder {FOLDER} with {META} and six batches")
    missing = [name for name in (META, *TRAIN_FILES, TEST_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return folder


def _warn_of_checksums(folder: Path) -> None:
    wrong = []
    for name, expected in MD5.items():
        with (folder / name).open("rb") as file:
            actual = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if actual != expected:
            wrong.append(f"{name} (md5 {actual}, published {expected})")
    if wrong:
        warnings.warn(
            f"checksums in {folder} are not those of the published CIFAR-10, so the images may be others: "
            + ", ".join(wrong),
            stacklevel=3,
        )


def _read_dict(path: Path, *keys: str) -> dict[str, Any]:
    content = load_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict, got {type(content).__name__}")
    named = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    for key in keys:
        if key not in named:
            raise ValueError(f"{path}: expected the key {key!r}, got {reprlib.repr(sorted(map(str, named)))}")
    return named


def _read_meta(path: Path) -> tuple[int, tuple[str, ...]]:
    meta = _read_dict(path, "label_names", "num_cases_per_batch")
    names, count = meta["label_names"], meta["num_cases_per_batch"]
    if not isinstance(names, list) or len(names) != 10 or not all(isinstance(name, (str, bytes)) for name in names):
        raise ValueError(f"{path}: label_names must be a list of 10 strings, got {reprlib.repr(names)}")
    if type(count) is not int or count < 1:
        raise ValueError(f"{path}: num_cases_per_batch must be a positive int, got {reprlib.repr(count)}")
    return count, tuple(name.decode("utf-8") if isinstance(name, bytes) else name for name in names)


def _read_batch(path: Path, count: int, classes: int) -> tuple[Images, Labels]:
    batch = _read_dict(path, "data", "labels")
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, np.ndarray):
        raise ValueError(f"{path}: data must be an array, got {type(data).__name__}")
    if data.dtype != np.uint8:
        raise ValueError(f"{path}: data must be uint8, got {data.dtype}")
    if data.shape != (count, PIXELS):
        raise ValueError(f"{path}: data must have shape {(count, PIXELS)}, got {data.shape}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: labels must be a list of ints, got {reprlib.repr(labels)}")
    if len(labels) != count:
        raise ValueError(f"{path}: labels must be {count}, one an image, got {len(labels)}")
    outside = [label for label in labels if not 0 <= label < classes]
    if outside:
        raise ValueError(f"{path}: labels must lie in 0..{classes - 1}, got {reprlib.repr(outside)}")
    return data.reshape(count, 3, 32, 32), np.array(labels, dtype=np.int64)


def write_layout(dest: str | Path, arrays: CIFAR10Arrays) -> Path:
    """Writes ``arrays`` in the published layout, ``dest/cifar-10-batches-py``, and returns that folder.

    The folder appears whole or not at all: it is written beside under another name and renamed.

    Raises:
        FileExistsError: the folder is already there.
        ValueError: the training images are not five times the test images, as the layout has it: six files of one size.
    """
    count = len(arrays.test_labels)
    if len(arrays.train_labels) != len(TRAIN_FILES) * count:
        expected = f"{len(TRAIN_FILES)} x {count} training images, as many a file as the test images"
        raise ValueError(f"arrays must hold {expected}, got {len(arrays.train_labels)}")
    final = Path(dest) / FOLDER
    if final.exists():
        raise FileExistsError(f"{final} is already there")
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=final.parent))
    try:
        for i, name in enumerate(TRAIN_FILES):
            part = slice(i * count, (i + 1) * count)
            label = f"training batch {i + 1} of {len(TRAIN_FILES)}"
            _dump(beside / name, _batch(label, name, arrays.train_images[part], arrays.train_labels[part]))
        label = "testing batch 1 of 1"
        _dump(beside / TEST_FILE, _batch(label, TEST_FILE, arrays.test_images, arrays.test_labels))
        meta = {"num_cases_per_batch": count, "label_names": list(arrays.classes), "num_vis": PIXELS}
        _dump(beside / META, meta)
        beside.chmod(0o755)
        beside.rename(final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return final


def _batch(label: str, name: str, images: Images, labels: Labels) -> dict[str, Any]:
    return {
        "batch_label": label,
        "labels": labels.tolist(),
        "data": np.ascontiguousarray(images).reshape(len(images), PIXELS),
        "filenames": [f"{name}_{i:05d}.png" for i in range(len(images))],
    }


def _dump(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=2)  # the published files' protocol


def download(root: str | Path) -> Path:
    """Puts the published CIFAR-10 into ``root`` through torchvision and returns its folder, which may be there already.

    An archive ``cifar-10-python.tar.gz`` that lies in ``root`` already and has the published checksum is unpacked
    without a network.

    Raises:
        ImportError: torchvision is not installed.
        OSError: the archive could not be fetched, or its checksum is wrong.
    """
    folder = Path(root) / FOLDER
    if folder.is_dir():
        return folder
    try:
        from torchvision.datasets import CIFAR10
        from torchvision.datasets.utils import download_and_extract_archive
    except ImportError as error:
        raise ImportError("downloading CIFAR-10 needs torchvision: pip install torchvision") from error
    try:
        # The function below the class: the class would unpickle the files without restriction.
        download_and_extract_archive(CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as error:  # RuntimeError is torchvision's for a wrong checksum
        raise OSError(
            f"CIFAR-10 could not be fetched from {CIFAR10.url}: {error}. Put {CIFAR10.filename} or {FOLDER} into "
            f"{root}, or train on the generated data set"
        ) from error
    return folder
