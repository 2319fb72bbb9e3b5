"""Fused steps: one kernel call for all tensors of a group, over addresses that are kept from step to step."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ._torch import check_fused_support
from ._trace import Program, split_options, trace

State = dict[str, Any]
Group = dict[str, Any]

_FORM = attrgetter("dtype", "layout", "device")
_DTYPE = attrgetter("dtype")
_SPARSE = attrgetter("is_sparse")
_PLAIN = {Tensor, Parameter}


@cache
def _warn_missing(package: str, device: str) -> None:
    warnings.warn(
        f"fused=True on {device} needs {package}, which is not installed (pip install 'reimpl[fused]'); "
        "the foreach implementation runs instead",
        stacklevel=5,
    )


COMPILERS = {"cpu": "numba", "cuda": "triton"}


@cache
def _backend(device: str) -> Any:
    """The module that compiles for a type of device, or ``None`` where its compiler is missing."""
    package = COMPILERS.get(device)
    if package is None or importlib.util.find_spec(package) is None:
        _warn_missing(package or "a compiler", device)
        return None
    return importlib.import_module("._numba" if package == "numba" else "._triton", __package__)


_KERNELS: dict[Any, tuple[Program, Any]] = {}


def _options(optimizer: Any, group: Group) -> dict[str, Any]:
    """The group's hyperparameters, without what else a user or a scheduler keeps in it."""
    return {key: group[key] for key in optimizer.defaults}


def _kernel(rule: type, options: Group, state: tuple[str, ...], device: str, dtype: torch.dtype) -> tuple[Program, Any]:
    key = (rule, split_options(options)[0], state, device, dtype)
    if key not in _KERNELS:
        program = trace(rule, options, state)
        _KERNELS[key] = program, _backend(device).Kernel(program, dtype, f"{rule.__qualname__}, {dtype}")
    return _KERNELS[key]


def _dense(t: Tensor) -> bool:
    """Whether the tensor fills its stretch of memory with no gap and no overlap."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _overlap(params: list[Tensor]) -> bool:
    """Whether two parameters share memory, so that their steps must come one after the other."""
    plain = sorted((p.data_ptr(), p.nbytes) for p in params if type(p) in _PLAIN and p.numel())
    return any(start + size > after for (start, size), (after, _) in pairwise(plain))


def _fusible(p: Tensor, g: Tensor, s: State) -> bool:
    tensors = [p, g, *(v for k, v in s.items() if isinstance(v, Tensor) and k != "step")]
    return all(
        type(t) in _PLAIN and _FORM(t) == _FORM(p) and t.shape == p.shape and not (t.is_neg() or t.is_conj())
        for t in tensors
    ) and (p.numel() == 0 or _dense(p))


class Plan:
    """Addresses, chunks and the kernel for tensors of one device and dtype, valid while the tensors stay in place."""

    def __init__(self, rule: type, options: Group, params: list[Tensor], states: list[State]) -> None:
        for p, s in zip(params, states, strict=True):
            _settle(p, s)
        keys = tuple(k for k, v in states[0].items() if k != "step" and v is not None)
        self.program, self.kernel = _kernel(rule, options, keys, params[0].device.type, params[0].dtype)
        for key in self.program.created:
            for p, s in zip(params, states, strict=True):
                s[key] = torch.empty_like(p)
        self.params, self.states = params, states
        self.keys = list(self.program.inputs[2:]) + (["step"] if "step" in states[0] else [])
        self.kept = [s[k] for k in self.keys for s in states]
        self.dtype = params[0].dtype
        self.strides = list(map(Tensor.stride, params))
        self.fixed = self._fixed_addresses()
        rows = np.array(self.fixed, dtype=np.int64).reshape(-1, len(params))
        self.addresses = np.zeros((len(self.program.inputs) + 1, len(params)), dtype=np.int64)
        self.addresses[0] = rows[0]
        self.addresses[2 : 1 + len(rows)] = rows[1:]
        self.launch = self.kernel.bind(self.addresses, [p.numel() for p in params], params[0].device)
        self.steps = [s["step"] for s in states] if self.keys[-1:] == ["step"] and not self.kernel.counts_steps else []

    def _fixed_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.params)) + list(map(Tensor.data_ptr, self.kept))

    def holds(self, state: Mapping[Tensor, State]) -> bool:
        """Whether every tensor still is the same object at the same place with the same strides."""
        states = [state[p] for p in self.params] if self.keys else self.states
        return (
            all(map(is_, [s.get(k) for k in self.keys for s in states], self.kept))
            and self._fixed_addresses() == self.fixed
            and list(map(Tensor.stride, self.params)) == self.strides
        )

    def takes(self, grads: Sequence[Tensor]) -> bool:
        """Whether the kernel can read these gradients: plain strided tensors of the parameters' dtype.

        That they lie on the parameters' device and have their shape, ``Tensor.grad`` itself sees to.
        """
        return (
            not set(map(type, grads)) - _PLAIN
            and not set(map(_DTYPE, grads)) - {self.dtype}
            and not any(map(Tensor.is_neg, grads))
            and not any(map(_SPARSE, grads))
        )

    def run(self, numbers: list[Any], grads: list[Tensor | None], found_inf: Tensor | None) -> None:
        """One step of the tensors whose gradient is there; none, on a GPU, where ``found_inf`` is not 0."""
        present = [g for g in grads if g is not None]
        params, strides, row = self.params, self.strides, self.addresses[1]
        active: Any = slice(None)
        if len(present) < len(grads):
            active = [i for i, g in enumerate(grads) if g is not None]
            params, strides = [params[i] for i in active], [strides[i] for i in active]
            row[:] = 0
        if list(map(Tensor.stride, present)) != strides:
            present = [
                g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
                for g, p in zip(present, params, strict=True)
            ]
        # an empty tensor has no address, and 0 says that there is no gradient
        row[active] = [g.data_ptr() or 1 for g in present]
        steps = self.steps if len(present) == len(grads) or not self.steps else [self.steps[i] for i in active]
        if steps:
            torch._foreach_add_(steps, 1)
        self.launch(numbers, found_inf)
        if steps and found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        torch.autograd.graph.increment_version(params)


def _settle(p: Tensor, s: State) -> None:
    """Bring the state of a checkpoint to the strides that the kernel walks, and its step count to float32."""
    for key, value in s.items():
        if key == "step":
            if value.dtype != torch.float32 or value.device != p.device:
                s[key] = value.to(device=p.device, dtype=torch.float32)
        elif isinstance(value, Tensor) and value.stride() != p.stride():
            s[key] = torch.empty_like(p).copy_(value)


class Bundle:
    """The plans of one parameter group, and what must not have changed for them to hold."""

    def __init__(self, group: Group, plans: list[Plan], structure: tuple[tuple[str, Any], ...]) -> None:
        self.params = list(group["params"])
        self.plans = plans
        members = {id(p) for plan in plans for p in plan.params}
        self.outside = [p for p in self.params if id(p) not in members]
        self.structure = structure

    def run(self, optimizer: Any, group: Group) -> bool:
        """The step, or ``False`` with nothing done where something changed."""
        structure, numbers = split_options(_options(optimizer, group))
        if (
            structure != self.structure
            or len(self.params) != len(group["params"])
            or not all(map(is_, self.params, group["params"]))
            or any(p.grad is not None for p in self.outside)
        ):
            return False
        grads = [[p.grad for p in plan.params] for plan in self.plans]
        for plan, row in zip(self.plans, grads, strict=True):
            if not plan.holds(optimizer.state) or not plan.takes([g for g in row if g is not None]):
                return False
        skip, found_inf = _scale_gradients(optimizer, [g for row in grads for g in row if g is not None])
        if not skip:
            for plan, row in zip(self.plans, grads, strict=True):
                plan.run(numbers, row, found_inf)
        return True


def _scale_gradients(optimizer: Any, grads: list[Tensor]) -> tuple[bool, Tensor | None]:
    """Do ``GradScaler``'s part: divide the gradients by the scale, and tell whether one of them overflowed.

    Returns:
        Whether to skip the step, and the flag itself where only the device can tell (a look would wait
        for it).
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is None and scale is None:
        return False, None
    on_gpu = bool(grads) and all(g.is_cuda for g in grads)
    if found_inf is not None and not on_gpu and found_inf.item():
        return True, None
    if scale is not None and grads:
        torch._foreach_div_(grads, scale.to(grads[0].device))
    return False, found_inf.to(grads[0].device) if on_gpu and found_inf is not None else None


def run_plan(optimizer: Any, index: int, group: Group) -> bool:
    """Step a group by the plan of the last step; ``False``, with nothing done, where there is none that holds."""
    bundle = optimizer.__dict__.get("_fused_bundles", {}).get(index)
    return bundle is not None and bundle.run(optimizer, group)


def step(
    optimizer: Any, index: int, group: Group, h: Any, params: list[Tensor], grads: list[Tensor], states: list[State]
) -> None:
    """Step a group and keep the plan for the next step."""
    bundles = optimizer.__dict__.setdefault("_fused_bundles", {})
    bundles.pop(index, None)
    skip, found_inf = _scale_gradients(optimizer, grads)
    if skip:
        return
    options = _options(optimizer, group)
    structure, numbers = split_options(options)
    overlapping = _overlap(params)
    parts: defaultdict[Any, list[int]] = defaultdict(list)
    for i, (p, g, s) in enumerate(zip(params, grads, states, strict=True)):
        if not p.is_floating_point():
            check_fused_support(p)
        missing = tuple(key for key in optimizer.lazy_state if s.get(key) is None)
        fusible = not overlapping and _fusible(p, g, s) and _backend(p.device.type) is not None
        parts[(p.device, p.dtype, missing) if fusible else None].append(i)
    plans: list[Plan] = []
    for key, indices in parts.items():
        some = [params[i] for i in indices], [states[i] for i in indices]
        here = [grads[i] for i in indices]
        if key is None:
            if found_inf is None or not found_inf.item():
                optimizer._foreach(h, some[0], here, some[1])
        else:
            plan = Plan(type(optimizer), options, *some)
            plan.run(numbers, list(here), found_inf)
            if not plan.program.created:
                plans.append(plan)
    if len(plans) == len(parts):
        bundles[index] = Bundle(group, plans, structure)
