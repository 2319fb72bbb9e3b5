"""CIFAR-10's loader on good, damaged and hostile files, and the generated data set."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import struct
import tarfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from models import build
from reimpl.data import SYNTHETIC_CLASSES, CIFAR10Arrays, cifar10, load_plain, synthetic

SMALL = synthetic(50, 10)


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A small data set in the published layout."""
    return cifar10.write_layout(tmp_path, SMALL)


def load(folder: Path) -> CIFAR10Arrays:
    return cifar10.load(folder, checksums=False)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], protocol: int = 2) -> None:
    content = load_plain(path)
    path.write_bytes(pickle.dumps(change(content) or content, protocol=protocol))


class Python2Pickler(pickle._Pickler):
    """Writes 8-bit strings for text and bytes, and NumPy 1's names, as Python 2 wrote the published files."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    def save_function(self, value: Any) -> None:
        assert value.__name__ == "_reconstruct"
        self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[types.FunctionType] = dispatch[types.BuiltinFunctionType] = save_function


def python2_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def assert_same(a: CIFAR10Arrays, b: CIFAR10Arrays) -> None:
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        assert getattr(a, field).dtype == getattr(b, field).dtype
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert a.classes == b.classes


# The layout


@pytest.mark.quick
def test_what_is_written_is_read(layout: Path) -> None:
    assert_same(load(layout), SMALL)
    assert_same(load(layout.parent), SMALL)


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_is_read(layout: Path, protocol: int) -> None:
    for name in cifar10.MD5:
        rewrite(layout / name, lambda content: None, protocol)
    assert_same(load(layout), SMALL)


def test_python_2_pickles_are_read(layout: Path) -> None:
    for name in cifar10.MD5:
        data = python2_bytes(load_plain(layout / name))
        assert (b"numpy.core.multiarray\n_reconstruct" in data) == ("batch" in name and name != "batches.meta")
        assert b"_codecs" not in data
        (layout / name).write_bytes(data)
    assert_same(load(layout), SMALL)


def test_keys_and_names_may_be_bytes(layout: Path) -> None:
    def to_bytes(content: dict[str, Any]) -> dict[bytes, Any]:
        names = {"label_names": [name.encode() for name in SMALL.classes]} if "label_names" in content else {}
        return {key.encode(): value for key, value in (content | names).items()}

    for name in cifar10.MD5:
        rewrite(layout / name, to_bytes, protocol=4)
    assert_same(load(layout), SMALL)


def test_arrays_of_either_order_and_scalars_are_read(tmp_path: Path) -> None:
    values = {
        "fortran": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float64(0.1),
        "bytes": b"\x00\xff",
        "nothing": b"",
        "mixed": [1, -(2**70), 0.5, True, None, "é", ("a", {"b": []})],
    }
    for protocol in range(6):
        (tmp_path / "file").write_bytes(pickle.dumps(values, protocol=protocol))
        read = load_plain(tmp_path / "file")
        np.testing.assert_array_equal(read["fortran"], values["fortran"])
        assert read["empty"].shape == (0, 3) and read["scalar"] == 0.1
        assert {k: read[k] for k in ("bytes", "nothing", "mixed")} == {
            k: values[k] for k in ("bytes", "nothing", "mixed")
        }


def test_the_layout_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cifar10, "_dump", full)
    with pytest.raises(OSError, match="No space left"):
        cifar10.write_layout(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    cifar10.write_layout(tmp_path, SMALL)
    with pytest.raises(FileExistsError, match="is already there"):
        cifar10.write_layout(tmp_path, SMALL)
    assert_same(load(tmp_path), SMALL)


def test_the_layout_needs_files_of_one_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 x 10 training images.*got 40"):
        cifar10.write_layout(tmp_path, synthetic(40, 10))


# Hostile files. Each would make the marker if its code ran.


class Reduced:
    """Pickles to a call of ``function`` on ``args``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: str) -> dict[str, tuple[bytes, str]]:
    make = f"open({marker!r}, 'w')"
    nested = (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch " + marker.encode() + b"'\ntR."
    )
    rebuild = b"cnumpy.core.multiarray\n_reconstruct\n"
    return {
        "os.system": (pickle.dumps({"data": Reduced(os.system, f"touch {marker}")}), rf"refused {os.name}\.system"),
        "builtins.eval": (pickle.dumps([Reduced(eval, make)], protocol=2), r"refused __builtin__\.eval"),
        "builtins.exec, protocol 5": (pickle.dumps(Reduced(exec, make), protocol=5), r"refused builtins\.exec"),
        "torch.load": (pickle.dumps(Reduced(torch.load, marker)), r"refused torch\.serialization\.load"),
        "a tensor": (pickle.dumps(torch.ones(2)), r"refused torch\._utils\._rebuild_tensor_v2"),
        "nested calls": (nested, r"refused builtins\.getattr"),
        "a path into an allowed name": (
            b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
            r"refused numpy\.ndarray\.__init",
        ),
        "INST": (b"(S'touch " + marker.encode() + b"'\nios\nsystem\n.", r"refused os\.system"),
        "an array of objects": (pickle.dumps(np.array([Reduced(eval, make)], dtype=object)), "dtype 'O8' is not"),
        "an object dtype": (pickle.dumps(np.array([1, None], dtype=object)), "dtype 'O8' is not a plain number's"),
        "a structured dtype": (pickle.dumps(np.zeros(2, [("a", "u1")])), "dtype 'V1' is not a plain number's"),
        "another class rebuilt": (rebuild + b"(cnumpy\ndtype\n(I0\ntS'b'\ntR.", "only numpy.ndarray itself"),
        "ndarray called": (b"cnumpy\nndarray\n(I1000000000000\ntR.", "may be named, not called"),
        "a global's state": (b"cnumpy\ndtype\n}S'_call'\nI1\nsb.", "state may not be set"),
        "a bare global": (b"cnumpy\ndtype\n.", "refused a global"),
        "a class made anew": (b"\x80\x02cnumpy\nndarray\n)\x81.", "truncated or corrupt"),
        "an array without contents": (rebuild + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR.", "contents never came"),
        "a list that holds itself": (b"(lp0\ng0\na.", "holds itself"),
        "a persistent id": (b"Psomething\n.", "persistent"),
        "a set": (pickle.dumps({1}, protocol=4), "refused a set"),
        "a huge memo index": (b"Nr\xff\xff\xff\xff0" + b"(l" + b"C", "truncated or corrupt"),
        "a huge bytearray": (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "truncated or corrupt"),
        "deep nesting": (b"(" * 10**6 + b"t" * 10**6 + b".", "truncated or corrupt"),
    }


@pytest.mark.quick
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "deep nesting" else n for n in hostile("")]
)
def test_hostile_pickles_are_refused_by_name(layout: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    data, message = hostile(str(marker))[name]
    (layout / "data_batch_3").write_bytes(data)
    with pytest.raises(pickle.UnpicklingError, match=message) as caught:
        load(layout)
    assert str(caught.value).startswith(str(layout / "data_batch_3"))
    assert not marker.exists()


def test_the_hostile_pickles_do_run_under_plain_pickle(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(hostile(str(marker))["builtins.eval"][0]).pop().close()
    assert marker.exists()


def test_shared_references_are_visited_once(tmp_path: Path) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(60):  # 2^60 elements for a reader that follows every reference
        laughs = [laughs, laughs]
    (tmp_path / "file").write_bytes(pickle.dumps(laughs))
    read = load_plain(tmp_path / "file")
    assert read[0] is read[1]


def test_damaged_files_never_raise_anything_else(tmp_path: Path) -> None:
    content = {"data": np.arange(30, dtype=np.uint8).reshape(2, 15), "labels": [1, 2], "filenames": ["a", "b"]}
    whole = python2_bytes(content)
    rng = np.random.default_rng(0)
    for length in range(len(whole)):
        path = tmp_path / f"short{length}"  # a new file each: rewriting one waits for the disk
        path.write_bytes(whole[:length])
        with pytest.raises(pickle.UnpicklingError, match=r"truncated or corrupt|never came|refused"):
            load_plain(path)
    refused = 0
    for trial in range(2_000):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path = tmp_path / f"damaged{trial}"
        path.write_bytes(damaged)
        try:
            load_plain(path)
        except pickle.UnpicklingError:
            refused += 1
    assert 200 < refused < 2_000  # most changed bytes stand inside a string or the pixels, and are read as such


# Damaged and wrong files


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_truncated_file(layout: Path, name: str) -> None:
    path = layout / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(pickle.UnpicklingError, match=rf"{name}: truncated or corrupt pickle of \d+ bytes"):
        load(layout)


def test_missing_files(layout: Path, tmp_path: Path) -> None:
    (layout / "data_batch_2").unlink()
    (layout / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_2, test_batch"):
        load(layout)
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 in .*nowhere"):
        load(tmp_path / "nowhere")


WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "shape": ("data_batch_1", lambda d: d | {"data": d["data"][:, :-1]}, r"\(10, 3072\), got \(10, 3071\)"),
    "count": ("data_batch_4", lambda d: d | {"data": d["data"][:-1]}, r"\(10, 3072\), got \(9, 3072\)"),
    "dtype": ("test_batch", lambda d: d | {"data": d["data"].astype(np.int16)}, "must be uint8, got int16"),
    "no array": ("test_batch", lambda d: d | {"data": [1]}, "data must be an array, got list"),
    "labels' count": ("data_batch_1", lambda d: d | {"labels": d["labels"][1:]}, "labels must be 10, .* got 9"),
    "label too large": ("data_batch_5", lambda d: d | {"labels": [10] * 10}, r"labels must lie in 0..9, got \[10,"),
    "negative label": ("data_batch_5", lambda d: d | {"labels": [-1] * 10}, r"labels must lie in 0..9, got \[-1,"),
    "labels no ints": ("test_batch", lambda d: d | {"labels": ["a"] * 10}, r"labels must be a list of ints, got \['a'"),
    "no labels": ("test_batch", lambda d: {"data": d["data"]}, r"expected the key 'labels', got \['data'\]"),
    "no dict": ("test_batch", lambda d: [1], "expected a dict, got list"),
    "nine names": ("batches.meta", lambda d: d | {"label_names": ["a"] * 9}, "must be a list of 10 strings"),
    "count of none": ("batches.meta", lambda d: d | {"num_cases_per_batch": 0}, "positive int, got 0"),
    "another count": ("batches.meta", lambda d: d | {"num_cases_per_batch": 9}, r"\(9, 3072\), got \(10, 3072\)"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WRONG)
def test_wrong_contents_name_the_file_and_what_came(layout: Path, name: str) -> None:
    file, change, message = WRONG[name]
    rewrite(layout / file, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(layout)
    assert str(layout) in str(caught.value)


def test_checksums_that_differ_are_a_warning(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match=r"not those of the published CIFAR-10.*data_batch_1 \(md5 .*batches.meta"):
        assert_same(cifar10.load(layout), SMALL)
    sums = {name: hashlib.md5((layout / name).read_bytes()).hexdigest() for name in cifar10.MD5}
    monkeypatch.setattr(cifar10, "MD5", sums)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cifar10.load(layout)


def test_checksums_are_torchvisions() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    published = dict(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list)
    assert published | {"batches.meta": datasets.CIFAR10.meta["md5"]} == cifar10.MD5


def test_arrays_are_checked() -> None:
    images, labels = SMALL.train_images, SMALL.train_labels
    rest = (SMALL.test_images, SMALL.test_labels, SMALL.classes)
    with pytest.raises(TypeError, match="train_images must be uint8, got float64"):
        CIFAR10Arrays(images.astype(float), labels, *rest)
    with pytest.raises(ValueError, match=r"must have shape \(N, 3, 32, 32\), got \(50, 3, 16, 32\)"):
        CIFAR10Arrays(images[:, :, :16], labels, *rest)
    with pytest.raises(ValueError, match=r"train_labels must have shape \(50,\), one an image, got \(49,\)"):
        CIFAR10Arrays(images, labels[1:], *rest)
    with pytest.raises(ValueError, match=r"train_labels must lie in 0..9, got 7..16"):
        CIFAR10Arrays(images, labels + 7, *rest)


# Download


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_an_archive_at_hand_is_unpacked_through_torchvision(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    root = layout.parent / "root"
    root.mkdir()
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(layout, arcname=cifar10.FOLDER)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert_same(load(cifar10.download(root)), SMALL)
    archive.unlink()
    assert cifar10.download(root) == root / cifar10.FOLDER  # nothing to do


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "nothing.tar.gz").as_uri())
    with pytest.raises(OSError, match=r"could not be fetched from file:.*Put cifar-10-python.tar.gz or"):
        cifar10.download(tmp_path)


def test_download_without_torchvision_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        cifar10.download(tmp_path)


# The generated set


@pytest.mark.quick
def test_the_generated_set_is_the_same_everywhere() -> None:
    data = synthetic(1_000, 200)
    digest = hashlib.sha256()
    for array in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        digest.update(array.tobytes())
    assert digest.hexdigest() == "11348ce2628f40848e7688c9e266832ab6eebb4f94e1eb9d66df566c4f4247d9"
    assert data.classes == SYNTHETIC_CLASSES
    assert np.bincount(data.train_labels).tolist() == [100] * 10 and np.bincount(data.test_labels).tolist() == [20] * 10


def test_the_test_images_do_not_depend_on_the_training_images() -> None:
    np.testing.assert_array_equal(synthetic(50, 20).test_images, synthetic(10, 20).test_images)
    assert not np.array_equal(synthetic(10, 20, seed=1).test_images, synthetic(10, 20).test_images)


def test_bad_sizes_and_seeds() -> None:
    with pytest.raises(ValueError, match="train must be at least 10, one image a class, got 9"):
        synthetic(9, 10)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        synthetic(10, 10, seed=-1)


def accuracy(model: nn.Module, data: CIFAR10Arrays, epochs: int) -> float:
    """Test accuracy after a few epochs of Adam in batches of 100."""
    x, y = (
        (torch.from_numpy(a) for a in pair)
        for pair in ((data.train_images, data.test_images), (data.train_labels, data.test_labels))
    )
    (train_x, test_x), (train_y, test_y) = [v.float() / 128 - 1 for v in x], y
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(train_y)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_x[index]), train_y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item()


def test_the_generated_set_is_learnable_and_not_trivial() -> None:
    data = synthetic(3_000, 500)
    linear = accuracy(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), data, epochs=3)
    convolutional = accuracy(build("cnn", channels=(16, 32, 32)), data, epochs=5)
    print(f"linear {linear:.3f}, convolutional {convolutional:.3f}")
    assert linear < 0.3 < 0.5 < convolutional  # chance is 0.1
