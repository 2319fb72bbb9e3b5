"""Collects what each parity case measured and writes it, with the versions and devices it was measured on, as JSON."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reimpl.testing.tolerance import Verdict

#: Version of the file's layout; readers refuse a greater one.
SCHEMA = 1


def header() -> dict[str, Any]:
    """Versions, devices and the date (UTC, ISO 8601): what a reader needs in order to compare two records."""
    cuda = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *cuda],
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """The processor's name and vector instructions, as far as the system tells."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: platform's word has to do
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


class Recorder:
    """Rows of one test run.

    A row is a dictionary with the keys ``kind`` (``"optimizer"``, ``"function"``, ``"init"``, ...), ``technique``,
    ``ids``, ``case``, ``quantity``, ``implementation`` (``"forloop"``, ``"foreach"``, ``"fused"``, ``"eager"``, ...),
    ``device``, ``dtype``, ``seeds``, ``ours_abs``, ``ours_ulp``, ``torch_abs``, ``torch_ulp``, ``limit_ulp``,
    ``bitwise`` and ``ok``. Where PyTorch has no counterpart its fields are ``null``; an infinite error is written as
    the string ``"inf"``, which ``float()`` reads, because JSON has no infinity.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        verdict: Verdict,
        *,
        kind: str,
        technique: str,
        case: str,
        quantity: str,
        implementation: str,
        device: str | torch.device,
        dtype: torch.dtype,
        ids: Sequence[str] = (),
        seeds: int = 1,
    ) -> Verdict:
        """Note one verdict and return it."""
        self.rows.append(
            {
                "kind": kind,
                "technique": technique,
                "ids": list(ids),
                "case": case,
                "quantity": quantity,
                "implementation": implementation,
                "device": torch.device(device).type,
                "dtype": str(dtype).removeprefix("torch."),
                "seeds": seeds,
                "ours_abs": _number(verdict.ours_abs),
                "ours_ulp": _number(verdict.ours_ulp),
                "torch_abs": _number(verdict.torch_abs),
                "torch_ulp": _number(verdict.torch_ulp),
                "limit_ulp": _number(verdict.limit_ulp),
                "bitwise": verdict.bitwise,
                "ok": verdict.ok,
            }
        )
        return verdict

    def merge(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over another recorder's rows, such as those of a pytest-xdist worker."""
        self.rows.extend(dict(row) for row in rows)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write header and rows, sorted, to ``path``: beside it first and renamed, so that a reader never sees half."""
        rows: list[dict[str, Any]] = sorted(self.rows, key=_order)
        write_json(path, {"header": header(), "rows": rows})


def read_record(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a record.

    Raises:
        ValueError: the file is no record, or one of a later layout than this version reads.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"header", "rows"} <= content.keys():
        raise ValueError(f"{os.fspath(path)} is no parity record: expected an object with 'header' and 'rows'")
    schema = content["header"].get("schema")
    if schema != SCHEMA:
        raise ValueError(f"{os.fspath(path)} has layout {schema}, expected {SCHEMA}")
    return content["header"], content["rows"]


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write ``content`` as JSON atomically: a temporary file in the same directory, then ``os.replace``."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=target.name, suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _order(row: Mapping[str, Any]) -> tuple[str, ...]:
    keys = ("kind", "technique", "case", "quantity", "implementation", "device", "dtype")
    return tuple(str(row.get(key, "")) for key in keys)
