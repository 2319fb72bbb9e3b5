"""What ``torch.jit.trace`` records of converted models, and what it warns of: no more than of PyTorch's own layers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import reimpl.nn as nn

# of tracing, and of its own deprecation
pytestmark = pytest.mark.filterwarnings("ignore")

SCRIPT = """
import sys, warnings
import torch
import reimpl.nn

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3),
            POOL torch.nn.Flatten(2), torch.nn.Softmax(2),
        )
        self.loss = torch.nn.CrossEntropyLoss()

    def forward(self, x, target):
        return self.loss(self.features(x), target)

model = reimpl.nn.convert(Model()).model
with warnings.catch_warnings(record=True) as caught:
    torch.jit.trace(model, (torch.randn(2, 3, 9, 9), torch.zeros(2, CELLS, dtype=torch.long)), check_trace=False)
print(*{w.filename for w in caught if issubclass(w.category, torch.jit.TracerWarning)})
"""


@pytest.mark.parametrize(("pool", "cells"), [("", 9), ("torch.nn.MaxPool2d(2),", 1)], ids=["no pooling", "pooling"])
def test_warns_of_pooling_alone(pool: str, cells: int) -> None:
    """In a process of its own, with the filters that a user has: pooling's windows are counted for one size."""
    script = SCRIPT.replace("POOL", pool).replace("CELLS", str(cells))
    root = str(Path(__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    files = run.stdout.split()
    assert bool(files) == bool(pool) and all("pooling" in name for name in files), run.stdout


CASES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, 2, 1), lambda n: (torch.randn(n, 3, 4 + n, 6 + n),)),
    "Conv2d, same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), lambda n: (torch.randn(n, 3, 4 + n, 6 + n),)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), lambda n: (torch.randn(n, 3, 4 + n),)),
    "Linear": (lambda: nn.Linear(3, 4), lambda n: (torch.randn(n, 3),)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), lambda n: (torch.randn(n, 3, n, 5),)),
    "Softmax": (lambda: nn.Softmax(1), lambda n: (torch.randn(n, n + 1),)),
    "LogSoftmax": (lambda: nn.LogSoftmax(1), lambda n: (torch.randn(n, n + 1),)),
    "Embedding": (lambda: nn.Embedding(9, 3, padding_idx=0), lambda n: (torch.arange(2 * n).view(2, n),)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), lambda n: (torch.randn(n, 3),)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), lambda n: (torch.randn(n, 3),)),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, lambda n: (torch.randn(n, 5), torch.arange(n))),
    "CrossEntropyLoss, smoothed": (
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda n: (torch.randn(n, 5 + n, n), torch.arange(n * n).view(n, n) % 5),
    ),
    "NLLLoss": (nn.NLLLoss, lambda n: (torch.randn(n, 5), torch.arange(n))),
    "MSELoss": (nn.MSELoss, lambda n: (torch.randn(n, 5), torch.randn(n, 5))),
    "BCELoss": (nn.BCELoss, lambda n: (torch.rand(n, 5), torch.rand(n, 5))),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, lambda n: (torch.rand(n, 5), torch.rand(n, 5))),
}


@pytest.mark.parametrize("name", CASES)
def test_traces_hold_for_other_sizes(name: str) -> None:
    """Why no warning is due."""
    make, arguments = CASES[name]
    torch.manual_seed(0)
    module = make()
    traced = torch.jit.trace(module, arguments(2), check_trace=False)
    buffers = [b.clone() for b in module.buffers()]
    given = arguments(4)
    found = traced(*given)
    after = [b.clone() for b in module.buffers()]
    for buffer, value in zip(module.buffers(), buffers, strict=True):
        buffer.data.copy_(value)
    torch.testing.assert_close(found, module(*given))
    torch.testing.assert_close(after, list(module.buffers()))
