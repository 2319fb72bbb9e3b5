"""Which compiled kernels run, noted by tests of these."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from reimpl.functional._node import native, plan


def without_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels from Python: the compiled node, which runs the same ones, has tests of its own."""
    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(native, "_SITES", {})


def noted(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, kernels: Callable[[Tensor], Any], names: list[str]
) -> None:
    """Add to ``names`` those of the kernels that ``module``'s steps run from here on.

    Args:
        module: the one that calls :func:`reimpl.functional._node.plan.run`.
        kernels: the module of compiled kernels for a step's first tensor.
    """

    def noting(step: plan.Step, tensors: Any, *args: Any, **options: Any) -> Any:
        found = {k.address: name for name, k in vars(kernels(tensors[0])).items() if hasattr(k, "address")}
        names.extend(found[address] for address, _, _ in step.launches)
        return plan.run(step, tensors, *args, **options)

    monkeypatch.setattr(module, "run", noting)
