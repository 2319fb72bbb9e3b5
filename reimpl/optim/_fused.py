"""Fused steps: one kernel call for all tensors of a group, over addresses that are kept from step to step."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ._torch import check_fused_support, tensor_guards
from ._trace import Program, split_options, trace

State = dict[str, Any]
Group = dict[str, Any]

_FORM = attrgetter("dtype", "layout", "device")
_DTYPE = attrgetter("dtype")
_SPARSE = attrgetter("is_sparse")
_GRAD = attrgetter("grad")
_PLAIN = {Tensor, Parameter}


@cache
def _warn_missing(package: str, device: str) -> None:
    warnings.warn(
        f"fused=True on {device} needs {package}, which is not installed (pip install 'reimpl[fused]'); "
        "the foreach implementation runs instead",
        stacklevel=_users_level(),
    )


def _users_level() -> int:
    """The ``stacklevel`` that names the user's line: how far up the first frame outside of here and PyTorch is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("reimpl", "torch"):
        level, frame = level + 1, frame.f_back
    return level


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


def _fusible(p: Tensor, g: Tensor, s: State, numbers: tuple[str, ...]) -> bool:
    if not all(v is None or isinstance(v, Tensor) for v in s.values()):
        return False
    tensors = [p, g, *(v for k, v in s.items() if v is not None and k not in numbers)]
    return all(
        type(t) in _PLAIN and _FORM(t) == _FORM(p) and t.shape == p.shape and not (t.is_neg() or t.is_conj())
        for t in tensors
    ) and (p.numel() == 0 or _dense(p))


TURNS = 8


def _places(tensors: Sequence[Tensor]) -> Any:
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


class Plan:
    """Addresses, chunks and the kernel for tensors of one device and dtype, valid while the tensors stay in place."""

    def __init__(self, rule: Any, options: Group, params: list[Tensor], states: list[State]) -> None:
        for p, s in zip(params, states, strict=True):
            _settle(p, s, ("step", *rule.scalar_state))
        keys = tuple(k for k, v in states[0].items() if k != "step" and v is not None)
        self.program, self.kernel = _kernel(rule, options, keys, params[0].device.type, params[0].dtype)
        for key in self.program.created:
            for p, s in zip(params, states, strict=True):
                s[key] = torch.empty_like(p)
        self.params, self.states = params, states
        self.kept = list(chain.from_iterable(map(dict.values, states)))
        # held, so that what the addresses point to cannot be freed and its memory given to another tensor
        self.storages = [t.untyped_storage() for t in (*params, *self.kept)]
        self.places, self.kept_places = _places(params), _places(self.kept)
        self.turn = 0
        rows = [*self.program.inputs[2:], *(["step"] if "step" in states[0] else []), *self.program.kept]
        self.dtype, self.strides = params[0].dtype, list(map(Tensor.stride, params))
        self.shapes = [p.shape for p in params]
        self.guard: Any = None
        sizes = [p.numel() for p in params]
        self.empty = [i for i, size in enumerate(sizes) if size == 0]
        self.addresses = np.zeros((len(self.program.inputs) + 1 + len(self.program.kept), len(params)), dtype=np.int64)
        self.addresses[0] = list(map(Tensor.data_ptr, params))
        for row, key in enumerate(rows, start=2):
            self.addresses[row] = [s[key].data_ptr() for s in states]
        self.launch = self.kernel.bind(self.addresses, sizes, params[0].device)
        self.steps = [s["step"] for s in states] if "step" in rows and not self.kernel.counts_steps else []

    def holds(self) -> bool:
        """Whether the parameters lie where they lay, and their state is the same objects as before.

        Raises:
            RuntimeError: a state tensor was given other memory (``state["exp_avg"].data = ...``). To look at all of
                them takes longer than the step of many small tensors, so each is looked at every ``TURNS`` steps.
        """
        now = chain.from_iterable(map(dict.values, self.states))
        same = sum(map(len, self.states)) == len(self.kept) and all(map(is_, now, self.kept))
        if not same or not np.array_equal(_places(self.params), self.places):
            return False
        self.turn = (self.turn + 1) % TURNS
        if not np.array_equal(_places(self.kept[self.turn :: TURNS]), self.kept_places[self.turn :: TURNS]):
            raise RuntimeError(
                "a tensor in the optimizer's state was given other memory during the last steps, which fused=True did "
                "not see; replace the entry of optimizer.state instead of its .data"
            )
        return True

    def takes(self, grads: list[Tensor | None]) -> bool:
        """Whether the kernel can read these gradients: plain strided tensors of the parameters' dtype.

        That they lie on the parameters' device, ``Tensor.grad`` itself sees to; of their shape, only when it is set.
        """
        # one call that compares type, dtype, layout, sizes, strides and the like with those of the step before
        if self.guard is not None and self.guard.check(*grads):
            return True
        present = [g for g in grads if g is not None]
        if (
            set(map(type, present)) - _PLAIN
            or set(map(_DTYPE, present)) - {self.dtype}
            or any(map(_SPARSE, present))
            or any(map(Tensor.is_neg, present))
            or any(g is not None and g.shape != shape for g, shape in zip(grads, self.shapes, strict=True))
            or list(map(Tensor.stride, self.params)) != self.strides
        ):
            return False
        alike = len(present) == len(grads) and list(map(Tensor.stride, present)) == self.strides
        self.guard = tensor_guards(present) if alike else None
        return True

    def run(self, numbers: list[Any], grads: list[Any], found_inf: Tensor | None) -> None:
        """One step of the tensors whose gradient is there; none, on a GPU, where ``found_inf`` is not 0."""
        row, params, steps = self.addresses[1], self.params, self.steps
        if self.guard is not None:
            row[:] = np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads))
        else:
            active = [i for i, g in enumerate(grads) if g is not None]
            # the copies live until the kernel has read them
            grads = [_like(grads[i], params[i]) for i in active]
            params, steps = [params[i] for i in active], [steps[i] for i in active if steps]
            row[:] = 0
            row[active] = [g.data_ptr() or 1 for g in grads]
        # an empty tensor has no address, and 0 says that there is no gradient
        if self.empty and self.guard is not None:
            row[self.empty] = 1
        if steps:
            torch._foreach_add_(steps, 1)
        self.launch(numbers, found_inf)
        if steps and found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        torch.autograd.graph.increment_version(params)


def _like(g: Tensor, p: Tensor) -> Tensor:
    """The gradient in the parameter's strides."""
    return g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)


def _settle(p: Tensor, s: State, numbers: tuple[str, ...]) -> None:
    """Bring the state of a checkpoint to the strides that the kernel walks, and its numbers to float32."""
    for key, value in s.items():
        if key in numbers:
            if value.dtype != torch.float32 or value.device != p.device:
                s[key] = value.to(device=p.device, dtype=torch.float32)
        elif isinstance(value, Tensor) and value.stride() != p.stride():
            s[key] = torch.empty_like(p).copy_(value)


class Bundle:
    """The plans of one parameter group, and what must not have changed for them to hold."""

    def __init__(self, optimizer: Any, group: Group, plans: list[Plan], structure: tuple[tuple[str, Any], ...]) -> None:
        self.params = list(group["params"])
        self.plans = plans
        members = {id(p) for plan in plans for p in plan.params}
        self.outside = [p for p in self.params if id(p) not in members]
        self.structure = structure
        self.kept = list(optimizer.state.values())

    def _same_states(self, state: Mapping[Tensor, State]) -> bool:
        if len(self.kept) <= 4 * len(self.params):
            return len(state) == len(self.kept) and all(map(is_, state.values(), self.kept))
        # many small groups: looking up this one's entries costs less than comparing them all
        return all(state.get(p) is s for plan in self.plans for p, s in zip(plan.params, plan.states, strict=True))

    def run(self, optimizer: Any, group: Group) -> bool:
        """The step, or ``False`` with nothing done where something changed."""
        structure, numbers = split_options(_options(optimizer, group))
        if (
            structure != self.structure
            or len(self.params) != len(group["params"])
            or not all(map(is_, self.params, group["params"]))
            or any(p.grad is not None for p in self.outside)
            or not self._same_states(optimizer.state)
        ):
            return False
        grads = [list(map(_GRAD, plan.params)) for plan in self.plans]
        if not all(plan.holds() and plan.takes(row) for plan, row in zip(self.plans, grads, strict=True)):
            return False
        skip, found_inf = _scale_gradients(optimizer, grads)
        if not skip:
            for plan, row in zip(self.plans, grads, strict=True):
                plan.run(numbers, row, found_inf)
        return True


def _scale_gradients(optimizer: Any, rows: Sequence[Sequence[Tensor | None]]) -> tuple[bool, Tensor | None]:
    """Do ``GradScaler``'s part: divide the gradients by the scale, and tell whether one of them overflowed.

    Returns:
        Whether to skip the step, and the flag itself where only the device can tell (a look would wait
        for it).
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is None and scale is None:
        return False, None
    grads = [g for row in rows for g in row if g is not None]
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
    skip, found_inf = _scale_gradients(optimizer, [grads])
    if skip:
        return
    options = _options(optimizer, group)
    structure, numbers = split_options(options)
    overlapping, numbers_of_state = _overlap(params), ("step", *optimizer.scalar_state)
    parts: defaultdict[Any, list[int]] = defaultdict(list)
    for i, (p, g, s) in enumerate(zip(params, grads, states, strict=True)):
        check_fused_support(p)
        missing = tuple(key for key in optimizer.lazy_state if s.get(key) is None)
        fusible = not overlapping and _fusible(p, g, s, numbers_of_state) and _backend(p.device.type) is not None
        parts[(p.device, p.dtype, missing) if fusible else None].append(i)
    plans: list[Plan] = []
    for key, indices in parts.items():
        some = [params[i] for i in indices], [states[i] for i in indices]
        here = [grads[i] for i in indices]
        if key is None:
            if found_inf is None or not found_inf.item():
                # parameters that share memory see each other's steps, as they do in the for-loop
                (optimizer._for_loop if overlapping else optimizer._foreach)(h, some[0], here, some[1])
        else:
            plan = Plan(type(optimizer), options, *some)
            plan.takes(list(here))
            plan.run(numbers, list(here), found_inf)
            if not plan.program.created:
                plans.append(plan)
    if len(plans) == len(parts):
        bundles[index] = Bundle(optimizer, group, plans, structure)
