"""Times one optimizer step, ours and PyTorch's in every execution, over a large network and over many small tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

import reimpl.optim
from reimpl.testing.timing import Timings, interleave

Shape = tuple[int, ...]

OPTIMIZERS: Mapping[str, Mapping[str, float]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9},
    "Adagrad": {"lr": 1e-3},
    "Adadelta": {"lr": 1.0},
    "RMSprop": {"lr": 1e-3},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3},
}
EXECUTIONS: Mapping[str, Mapping[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def _resnet18_shapes() -> tuple[Shape, ...]:
    """ResNet-18 for ImageNet: 62 parameters, 11,689,512 numbers."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    fan_in = 64
    for channels in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(channels, fan_in, 3, 3), (channels,), (channels,)]
            shapes += [(channels, channels, 3, 3), (channels,), (channels,)]
            if block == 0 and fan_in != channels:  # the projection on the skip connection
                shapes += [(channels, fan_in, 1, 1), (channels,), (channels,)]
            fan_in = channels
    return (*shapes, (1000, 512), (1000,))


WORKLOADS: Mapping[str, tuple[Shape, ...]] = {
    "ResNet-18": _resnet18_shapes(),
    "1,000 x 64": ((64,),) * 1000,
}


@dataclass(frozen=True)
class StepTimes:
    """Seconds per step of one optimizer over one workload; the names are ``"ours fused"``, ``"torch for-loop"``, …"""

    optimizer: str
    workload: str
    device: str
    timings: Timings

    @property
    def torch_names(self) -> tuple[str, ...]:
        """PyTorch's executions that exist here."""
        return tuple(name for name in self.timings.names if name.startswith("torch "))

    @property
    def torch_best(self) -> str:
        """PyTorch's execution with the least median."""
        return self.timings.fastest(self.torch_names)

    @property
    def ratio(self) -> float:
        """Ours, fused, against PyTorch's best: under 1 means that ours is faster."""
        return self.timings.ratio("ours fused", self.torch_best)


def make_parameters(shapes: Sequence[Shape], device: torch.device | str, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters of these shapes, standard normal, each with a standard normal gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(shape, device=device, generator=generator))
        parameter.grad = torch.randn(shape, device=device, generator=generator)
        parameters.append(parameter)
    return parameters


def make_optimizer(
    namespace: object, name: str, execution: str, shapes: Sequence[Shape], device: torch.device | str = "cpu"
) -> torch.optim.Optimizer | None:
    """An optimizer over parameters of its own, or ``None`` where the namespace has no such execution of it."""
    cls = getattr(namespace, name)
    flags = EXECUTIONS[execution]
    if not flags.keys() <= inspect.signature(cls).parameters.keys():
        return None
    return cls(make_parameters(shapes, device), **OPTIMIZERS[name], **flags)


def contenders(
    name: str, shapes: Sequence[Shape], device: torch.device | str = "cpu", ours: Sequence[str] = tuple(EXECUTIONS)
) -> dict[str, Callable[[], object]]:
    """``step`` of our executions named in ``ours`` and of all of PyTorch's, each over its own parameters."""
    steps: dict[str, Callable[[], object]] = {}
    for owner, namespace, executions in (("ours", reimpl.optim, ours), ("torch", torch.optim, tuple(EXECUTIONS))):
        for execution in executions:
            optimizer = make_optimizer(namespace, name, execution, shapes, device)
            if optimizer is not None:
                steps[f"{owner} {execution}"] = optimizer.step
    return steps


def time_steps(
    name: str,
    workload: str,
    device: torch.device | str = "cpu",
    rounds: int = 30,
    ours: Sequence[str] = tuple(EXECUTIONS),
    max_seconds: float | None = None,
) -> StepTimes:
    """Interleaved times of one optimizer's step over ``WORKLOADS[workload]``."""
    steps = contenders(name, WORKLOADS[workload], device, ours)
    timings = interleave(steps, rounds=rounds, warmup=3, max_seconds=max_seconds, device=device)
    return StepTimes(name, workload, torch.device(device).type, timings)
