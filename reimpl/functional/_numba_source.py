"""Loads a file of Numba kernels so that its compiled code is kept for the next process, and starts them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch

from reimpl.functional import _numba_tiles
from reimpl.functional._losses import numba_math as _losses_numba_math
from reimpl.functional._node.plan import run_once
from reimpl.optim import _kernel_cache, _numba_ops


def load(path: Path, replaced: str = "", by: str = "") -> ModuleType:
    """The kernels of a file, compiled or read back; a piece of it can be replaced, which
    makes another module of it."""
    source = path.read_text().replace(replaced, by, 1)
    files = (_numba_tiles.__file__, _losses_numba_math.__file__, _numba_ops.__file__)
    versions = (numba.__version__, np.__version__, *(Path(file).read_text() for file in files))
    return _kernel_cache.load(source, versions)


def run(kernel: Any, words: Sequence[int], tasks: int) -> None:
    """Call a kernel on PyTorch's threads with a table of words, the first of them the address of two shared counters:
    one for the tasks, one for whatever else the threads share."""
    run_once(kernel.address, words, min(torch.get_num_threads(), tasks))
