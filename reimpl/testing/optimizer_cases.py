"""What a declared optimizer is run on: the reference's class, execution flags, layouts, gradients, oracle arguments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizers import (
    EXECUTION_KEYS,
    IMPLEMENTATIONS,
    Layout,
    OptimizerClass,
    make_grads,
    sparse_rows,
)


def reference_of(technique: OptimizerTechnique, config: OptimizerConfig) -> tuple[OptimizerClass, dict[str, Any]]:
    """The for-loop that a configuration is compared with: PyTorch's, or ours for a dialect that PyTorch lacks."""
    flags = flags_of(technique, "forloop")
    if technique.torch is None or config.torch_kwargs is None:
        return technique.ours, {**config.kwargs, **flags}
    return technique.torch, {**config.torch_kwargs, **flags}


def flags_of(technique: OptimizerTechnique, implementation: str) -> dict[str, Any]:
    """The keyword arguments that choose ``implementation``; none where the for-loop is all there is."""
    has_choice = len(technique.implementations) > 1
    return dict(IMPLEMENTATIONS[implementation]) if has_choice else {}


def layouts_of(technique: OptimizerTechnique, layouts: Sequence[Layout]) -> tuple[Layout, ...]:
    """Those of ``layouts`` that the technique takes."""
    return tuple(x for x in layouts if technique.takes_shape is None or technique.takes_shape(x.shape))


def grads_of(
    technique: OptimizerTechnique, layouts: Sequence[Layout], dtype: torch.dtype, *args: Any, step: int, **kwargs: Any
) -> list[torch.Tensor | None]:
    """:func:`~reimpl.testing.optimizers.make_grads`, in rows where the technique wants them sparse."""
    grads = make_grads(layouts, dtype, *args, step=step, **kwargs)
    return [None if g is None else sparse_rows(g, step) for g in grads] if technique.only_sparse else grads


def oracle_hyper(technique: OptimizerTechnique, config: OptimizerConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The configuration as the oracle takes it: tensors as numbers, no execution flags, ``lr`` always there."""
    default = inspect.signature(technique.ours).parameters["lr"].default
    kwargs = {"lr": default, **(config.kwargs if config.oracle_kwargs is None else config.oracle_kwargs)}
    if "machine_eps" in inspect.signature(technique.oracle).parameters:
        kwargs["machine_eps"] = torch.finfo(dtype).eps
    return {key: _as_number(value) for key, value in kwargs.items() if key not in EXECUTION_KEYS}


def _as_number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(_as_number(item) for item in value) if isinstance(value, tuple) else value
