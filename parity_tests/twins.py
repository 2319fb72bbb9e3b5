"""One model trained twice, by ours and by PyTorch's optimizer, and held to the same weights after every step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import assert_same, fused_differences
from reimpl.testing.optimizers import IMPLEMENTATIONS, construct, parameters, synchronise
from reimpl.testing.samples import random_tensor, seeded_generator
from reimpl.testing.tolerance import to_oracle

Optimizer = torch.optim.Optimizer
Use = Callable[[nn.Module, Optimizer, int], None]
#: The implementations that every elementwise optimizer has.
EXECUTIONS = ("forloop", "foreach", "fused")
#: Options that give each optimizer all the state it can have.
RICH: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05, "weight_decay": 0.1, "lr_decay": 0.01},
    "Adadelta": {"lr": 0.5, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "weight_decay": 0.1, "betas": (0.5, 0.75)},
    "ASGD": {"lr": 0.05, "lambd": 0.1, "t0": 1, "weight_decay": 0.1},
    "Rprop": {"lr": 0.01},
    "SparseAdam": {"lr": 0.01, "betas": (0.5, 0.75)},
    "Adafactor": {"lr": 0.1, "weight_decay": 0.1, "d": 1.5},
    "Muon": {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.8},
}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two linear layers, the same numbers every time."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step."""
    generator = seeded_generator(step, "batch")
    return random_tensor((4, 5), dtype, generator), random_tensor((4, 3), dtype, generator)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """The mean squared error on the batch of a step."""
    x, y = batch(step, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def plain_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """What a training loop does for a batch."""
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


class Twins:
    """A model and its twin: the first trained by ours, the second by PyTorch's for-loop, its foreach parting in some.

    Args:
        technique: of which both are.
        groups: the parameter groups of a model; its parameters if not given.
        implementation: of ours. For-loop and foreach are held to PyTorch's bits. Fused is held to the bound of one
            fused step, from PyTorch's state: after each it is set back to that.
        kwargs: arguments for both, over :data:`RICH`.
    """

    def __init__(
        self,
        technique: OptimizerTechnique,
        groups: Callable[[nn.Module], Any] | None = None,
        *,
        implementation: str = "forloop",
        **kwargs: Any,
    ) -> None:
        assert technique.torch is not None
        self.technique, self.fused = technique, implementation == "fused"
        select = groups or (lambda model: model.parameters())
        self.models = [small_model() for _ in range(2)]
        options = {**RICH[technique.name], **kwargs}
        flags = {**IMPLEMENTATIONS[implementation], **{k: v for k, v in kwargs.items() if k == "foreach"}}
        self.optimizers: list[Optimizer] = [
            construct(technique.ours, select(self.models[0]), **{**options, **flags}),
            construct(technique.torch, select(self.models[1]), **{**options, "foreach": False}),
        ]

    def train(self, steps: int, first: int = 0, use: Use = plain_step) -> None:
        """Let ``use`` train both, and compare after each step."""
        for step in range(first, first + steps):
            before = {q: values_of(self.optimizers[1], q) for q in parameters(self.optimizers[1])}
            for model, optimizer in zip(self.models, self.optimizers):
                use(model, optimizer, step)
            if self.fused:
                self._compare_fused(before, step)
                synchronise(*self.optimizers)
            else:
                assert_same(*self.optimizers, technique=self.technique.name, case="training", step=step + 1)

    def _compare_fused(self, before: dict[torch.Tensor, dict[str, torch.Tensor]], step: int) -> None:
        ours, theirs = self.optimizers
        known = inspect.signature(self.technique.oracle).parameters
        for group, mine in zip(theirs.param_groups, ours.param_groups, strict=True):
            config = OptimizerConfig("twins", {key: value for key, value in group.items() if key in known})
            for q, p in zip(group["params"], mine["params"], strict=True):
                old = {key: to_oracle(value) for key, value in before[q].items()}
                differences = fused_differences(
                    self.technique, config, old, q.grad, values_of(ours, p), values_of(theirs, q)
                )
                for key, (ulp, verdict) in differences.items():
                    if verdict is not None:
                        verdict.check(
                            self.technique.name, f"{ulp:.3g} ulp from the for-loop", f"{key}, step {step + 1}"
                        )


def values_of(optimizer: Optimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """A copy of the parameter and its state."""
    state = optimizer.state.get(param, {})
    return {"param": param.detach().clone(), **{k: v.clone() for k, v in state.items() if v is not None}}
