"""Times one optimizer step, ours beside PyTorch's and other libraries', over large networks and many small tensors."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import reimpl.optim
from reimpl.optim._fused import streams
from reimpl.testing.timing import Timings, interleave

Shape = tuple[int, ...]
_DRAWN = 1 << 20

OPTIMIZERS: Mapping[str, Mapping[str, float]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9},
    "Adagrad": {"lr": 1e-3},
    "Adadelta": {"lr": 1.0},
    "RMSprop": {"lr": 1e-3},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3},
    "Adamax": {"lr": 1e-3},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    "ASGD": {"lr": 1e-3},
    "Rprop": {"lr": 1e-3},
}
"""The elementwise optimizers: those with a fused step."""
MOVES_LITTLE = ("ASGD",)
"""Those of which PyTorch's own loop makes so few passes that memory allows no half of its time (ASGD before t0)."""
EXECUTIONS: Mapping[str, Mapping[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
THIRD_PARTIES: Mapping[str, Mapping[str, str]] = {
    "pytorch_optimizer": {"Adadelta": "AdaDelta", "Adamax": "AdaMax", "RAdam": "RAdam", "ASGD": "ASGD"},
    "heavyball": {"SGD": "SGD", "RMSprop": "RMSprop", "AdamW": "AdamW", "NAdam": "NAdam"},
}
"""Classes of other libraries, by the name that they have here; what they take over from PyTorch is left out."""


@dataclass(frozen=True)
class Workload:
    """Tensors to step over."""

    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32

    @cached_property
    def numel(self) -> int:
        """How many numbers there are."""
        return sum(map(math.prod, self.shapes))

    @property
    def is_large(self) -> bool:
        """Whether they are so far beyond every cache that contenders may share parameters and gradients."""
        return self.numel > 20_000_000

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether the bytes, and not the calls, are what a step costs."""
        return self.numel > 5_000_000


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


def _gpt2_small_shapes() -> tuple[Shape, ...]:
    """GPT-2 small with its head tied to the embedding: 148 parameters, 124,439,808 numbers."""
    d = 768
    block: list[Shape] = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)]
    block += [(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return ((50257, d), (1024, d), *(block * 12), (d,), (d,))


WORKLOADS: Mapping[str, Workload] = {
    "ResNet-18": Workload(_resnet18_shapes()),
    "1,000 x 64": Workload(((64,),) * 1000),
}
LARGE_WORKLOADS: Mapping[str, Workload] = {
    "one of 25 M": Workload(((25_000_000,),)),
    "GPT-2": Workload(_gpt2_small_shapes()),
    "GPT-2 bf16": Workload(_gpt2_small_shapes(), torch.bfloat16),
}
EVERY_WORKLOAD: Mapping[str, Workload] = {**WORKLOADS, **LARGE_WORKLOADS}
MEMORY = "memory"
"""The name, among the contenders over many numbers, of an in-place pass over as many bytes as the step moves."""
SAME_STREAMS = "same streams"
"""The name of an in-place pass over the very tensors that the step writes, if those are as many streams."""
PASS_BYTES = 400_000_000
"""The most that such a pass goes over: beyond this the caches make no difference to its speed."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds per step of one optimizer over one workload; the names are ``"ours fused"``, ``"torch for-loop"``, …"""

    optimizer: str
    workload: str
    device: str
    timings: Timings
    streams: int = 0
    """How often a step must read or write as many bytes as the parameters are, where that is known."""
    pass_streams: float = 0
    """How often the in-place pass does."""

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

    @property
    def passes(self) -> float | None:
        """Our fused step's time in in-place passes over the same streams, where such a pass was timed."""
        return self.timings.ratio("ours fused", SAME_STREAMS) if SAME_STREAMS in self.timings.names else None

    @property
    def share_of_memory_speed(self) -> float | None:
        """How fast our fused step moves the bytes that it must, as a share of an in-place ``add_``'s speed.

        1 where every byte moves once at the speed of a pass that reads and writes, over as much memory: of a smaller
        pass the caches would hold a larger part.
        """
        if MEMORY not in self.timings.names or not self.streams:
            return None
        return self.streams / self.pass_streams * self.timings.ratio(MEMORY, "ours fused")


def make_parameters(
    shapes: Sequence[Shape], device: torch.device | str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters of these shapes, standard normal, each with a standard normal gradient.

    In tensors of more than a million numbers, so many repeat: drawing hundreds of millions takes seconds.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape) -> torch.Tensor:
        n = math.prod(shape)
        drawn = torch.randn(min(n, _DRAWN), device=device, generator=generator, dtype=dtype)
        return (drawn if n <= _DRAWN else drawn.repeat(-(-n // _DRAWN))[:n].clone()).view(shape)

    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(normal(shape))
        parameter.grad = normal(shape)
        parameters.append(parameter)
    return parameters


def make_optimizer(
    namespace: object,
    name: str,
    execution: str | None,
    workload: Workload,
    device: torch.device | str = "cpu",
    parameters: list[torch.nn.Parameter] | None = None,
) -> torch.optim.Optimizer | None:
    """An optimizer, or ``None`` where the namespace has no such execution of it.

    Args:
        namespace: ``reimpl.optim`` or ``torch.optim``.
        name: a key of ``OPTIMIZERS``.
        execution: a key of ``EXECUTIONS``, or ``None`` for the class's own choice.
        workload: what to step over.
        device: where.
        parameters: to be stepped; made if there are none.
    """
    cls = getattr(namespace, name)
    flags = EXECUTIONS[execution] if execution is not None else {}
    if not flags.keys() <= inspect.signature(cls).parameters.keys():
        return None
    if parameters is None:
        parameters = make_parameters(workload.shapes, device, dtype=workload.dtype)
    optimizer: torch.optim.Optimizer = cls(parameters, **OPTIMIZERS[name], **flags)
    return optimizer


def contenders(
    name: str,
    workload: Workload,
    device: torch.device | str = "cpu",
    ours: Sequence[str] = tuple(EXECUTIONS),
    torchs: Sequence[str] = tuple(EXECUTIONS),
) -> dict[str, torch.optim.Optimizer]:
    """Optimizers of our executions named in ``ours`` and of PyTorch's in ``torchs``.

    Each has parameters of its own, as in a program of its own; where no cache could hold them they are shared.
    """
    shared = make_parameters(workload.shapes, device, dtype=workload.dtype) if workload.is_large else None
    found: dict[str, torch.optim.Optimizer] = {}
    for owner, namespace, executions in (("ours", reimpl.optim, ours), ("torch", torch.optim, torchs)):
        for execution in executions:
            optimizer = make_optimizer(namespace, name, execution, workload, device, shared)
            if optimizer is not None:
                found[f"{owner} {execution}"] = optimizer
    return found


def third_parties(
    name: str, workload: Workload, device: torch.device | str = "cpu"
) -> dict[str, torch.optim.Optimizer]:
    """Other libraries' optimizers of that name, by library, where those are installed."""
    found = {}
    for package, classes in THIRD_PARTIES.items():
        if name in classes and importlib.util.find_spec(package) is not None:
            cls: Any = getattr(importlib.import_module(package), classes[name])
            parameters = make_parameters(workload.shapes, device, dtype=workload.dtype)
            found[package] = cls(parameters, lr=OPTIMIZERS[name]["lr"])
    return found


def gradients_kept(optimizers: Mapping[str, torch.optim.Optimizer]) -> Callable[[], None]:
    """A call that gives every parameter back the gradient that it has now: heavyball's step takes them away."""
    params = [p for each in optimizers.values() for group in each.param_groups for p in group["params"]]
    grads = [p.grad for p in params]

    def restore() -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    return restore


def time_steps(
    name: str,
    workload: str,
    device: torch.device | str = "cpu",
    rounds: int = 30,
    ours: Sequence[str] = tuple(EXECUTIONS),
    max_seconds: float | None = None,
) -> StepTimes:
    """Interleaved times of one optimizer's step over ``EVERY_WORKLOAD[workload]``."""
    load = EVERY_WORKLOAD[workload]
    optimizers = contenders(name, load, device, ours)
    steps: dict[str, Callable[[], object]] = {key: optimizer.step for key, optimizer in optimizers.items()}
    moved, passed = 0, 0.0
    if load.is_bound_by_memory and "ours fused" in optimizers:
        for _ in range(2):
            optimizers["ours fused"].step()  # the first makes the state
        moved = streams(optimizers["ours fused"])
        steps[MEMORY], passed = _pass_over_memory(load, moved, device)
        if name in MOVES_LITTLE:
            steps[SAME_STREAMS] = _pass_in_place(optimizers["ours fused"], moved)
    warmup = 1 if load.is_large else 3
    timings = interleave(steps, rounds=rounds, warmup=warmup, max_seconds=max_seconds, device=device)
    return StepTimes(name, workload, torch.device(device).type, timings, moved, passed)


def _pass_in_place(optimizer: torch.optim.Optimizer, moved: int) -> Callable[[], object]:
    """Reads and writes the parameters and their state, which must be ``moved`` streams, in place."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [v for p in params for v in optimizer.state[p].values() if v.shape == p.shape]
    if 2 * (len(params) + len(states)) != moved * len(params):
        raise ValueError(f"a pass over parameters and state is not the step's {moved} streams")
    tensors = [*(p.data for p in params), *states]
    return lambda: torch._foreach_add_(tensors, 0)


def _pass_over_memory(workload: Workload, moved: int, device: torch.device | str) -> tuple[Callable[[], object], float]:
    """An in-place pass over as much as ``moved`` streams are, and how many streams it is."""
    of_one = workload.numel * workload.dtype.itemsize
    # float32 whatever the workload's dtype: the bytes count, not the arithmetic
    numbers = torch.zeros(min(moved * of_one // 2, PASS_BYTES) // 4, device=device)
    return lambda: numbers.add_(1), 2 * numbers.nbytes / of_one
