"""Where a run happens: device, seeds, determinism, versions, the progress bar and TensorBoard's curves."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import reimpl

Show = Callable[[int, Mapping[str, float]], None]


def pick_device(name: str) -> torch.device:
    """``"auto"`` is the GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch finds no CUDA device here")
    return device


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def seed_all(seed: int) -> None:
    """Seeds the global generators of PyTorch, NumPy and Python."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what is meant
    torch.manual_seed(seed)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """PyTorch keeps to deterministic kernels on a GPU inside the ``with`` block; on the CPU it does so anyway."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = {"reimpl": reimpl.__version__, "torch": str(torch.__version__), "numpy": np.__version__}
    return {"python": platform.python_version(), **packages}


@contextmanager
def progress_bar(shown: bool, total: int, step: int) -> Iterator[Show]:
    """Yields a function that moves a bar to a step and writes values beside it."""
    if not shown:
        yield lambda step, values: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'reimpl[train]', or --no-progress") from error
    with tqdm(total=total, initial=step, unit="step", disable=None) as bar:  # none where no one watches
        text: dict[str, str] = {}

        def show(step: int, values: Mapping[str, float]) -> None:
            text.update({name: f"{value:.4g}" for name, value in values.items()})
            bar.set_postfix(text, refresh=False)
            bar.update(step - bar.n)

        yield show


@contextmanager
def curves(folder: Path | None, step: int) -> Iterator[Show]:
    """Yields a function that writes values at a step for TensorBoard, those after ``step`` replacing older ones."""
    if folder is None:
        yield lambda step, values: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs the package tensorboard: pip install 'reimpl[train]'") from error
    with SummaryWriter(folder, purge_step=step) as writer:

        def log(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log
