"""Fused steps: one kernel call for all tensors of a group, over addresses that are kept from step to step."""

from __future__ import annotations

import importlib
import importlib.util
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from numbers import Real
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._shards import is_cut_up, local, local_parts
from ._torch import FakeTensor, check_fused_support
from ._trace import Program, split_options, trace
from ._walk import Question
from ._warnings import warn
from ._watch import PLAIN, SameEntries, SameItems, walker, watch

State = dict[str, Any]
Group = dict[str, Any]

_FIXED = (Real, str, Tensor, tuple)
_FORM = attrgetter("dtype", "layout", "device")


@cache
def _warn_missing(package: str, device: str) -> None:
    warn(
        f"fused=True on {device} needs {package}, which is not installed (pip install 'reimpl[fused]'); "
        "the foreach implementation runs instead"
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


def _overlap(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether a parameter shares memory with another, or with a gradient, which some rules read after they changed it.

    Then the steps must come one after the other, as in the for-loop.
    """
    own = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in params if _has_memory(p))
    if any(end > after for (_, end), (after, _) in pairwise(own)):
        return True
    for g in grads:
        if not _has_memory(g):
            continue
        start = g.data_ptr()
        end = start + g.element_size() * (1 + sum((n - 1) * s for n, s in zip(g.shape, g.stride(), strict=True)))
        last = bisect_left(own, (end,)) - 1  # of the parameters that begin before the gradient's end
        if last >= 0 and own[last][1] > start:
            return True
    return False


def _has_memory(t: Tensor) -> bool:
    return type(t) in PLAIN and t.layout == torch.strided and t.numel() != 0


def _fusible(p: Tensor, g: Tensor, s: State, numbers: tuple[str, ...]) -> bool:
    if not all(v is None or isinstance(v, Tensor) for v in s.values()):
        return False
    tensors = local_parts(p, [g, *(v for k, v in s.items() if v is not None and k not in numbers)])
    if tensors is None or (is_cut_up(p) and any(t.stride() != tensors[0].stride() for t in tensors[2:])):
        return False
    if any(t.is_inference() for t in (tensors[0], *tensors[2:])):
        return False  # may be changed in inference mode alone, which an operator of PyTorch's sees to
    first = tensors[0]
    return all(
        type(t) in PLAIN and _FORM(t) == _FORM(first) and t.shape == first.shape and not (t.is_neg() or t.is_conj())
        for t in tensors
    ) and (first.numel() == 0 or _dense(first))


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
        rows = [*self.program.inputs[2:], *(["step"] if "step" in states[0] else []), *self.program.kept]
        self.addresses = np.zeros((len(self.program.inputs) + 1 + len(self.program.kept), len(params)), dtype=np.int64)
        self.addresses[0] = [local(p).data_ptr() for p in params]
        for row, key in enumerate(rows, start=2):
            self.addresses[row] = [local(s[key]).data_ptr() for s in states]
        self.watch = watch(params, states, self.addresses[1])
        self.launch = self.kernel.bind(self.addresses, [local(p).numel() for p in params], params[0].device)
        self.steps = [s["step"] for s in states] if "step" in rows and not self.kernel.counts_steps else []

    def run(self, numbers: list[Any], found_inf: Tensor | None) -> None:
        """One step of the tensors whose gradient's address is known; none, on a GPU, where ``found_inf`` is not 0."""
        steps, places = self.steps, self.addresses[1]
        if steps and not places.all():
            steps = [steps[i] for i in places.nonzero()[0].tolist()]
        if steps:
            torch._foreach_add_(steps, 1)
        self.launch(numbers, found_inf)
        if steps and found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
        self.watch.count_change()


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
        self.plans, self.structure = plans, structure
        self.options: tuple[list[Any], Any, list[Any]] | None = None
        self.params = SameItems(group["params"], walker())
        members = {id(p) for plan in plans for p in plan.params}
        self.outside = [p for p in group["params"] if id(p) not in members]
        # of many small groups, each looks up its own entries, which costs less than comparing them all
        few = len(optimizer.state) <= 4 * len(group["params"])
        self.all_states = SameEntries([optimizer.state], walker()) if few else None
        self.question: Question | None = None
        """Whether the group, its list of parameters and the optimizer's state are as noted when nothing changed."""

    def _same_states(self, state: Mapping[Tensor, State]) -> bool:
        if self.all_states is not None:
            return self.all_states.dictionaries[0] is state and self.all_states.hold()
        return all(state.get(p) is s for plan in self.plans for p, s in zip(plan.params, plan.states, strict=True))

    def _split(self, optimizer: Any, group: Group) -> tuple[Any, list[Any]]:
        """``split_options`` of the group, anew only where an option is another object than it was."""
        now = [group[key] for key in optimizer.defaults]
        if self.options is None or len(now) != len(self.options[0]) or not all(map(is_, now, self.options[0])):
            structure, numbers = split_options(_options(optimizer, group))
            # an object that can be changed from within, such as a list, is looked at each time
            fixed = all(value is None or isinstance(value, _FIXED) for value in now)
            self.options, self.question = (now, structure, numbers) if fixed else None, None
            return structure, numbers
        if not self._is_as_noted(optimizer, group):
            self._note(optimizer, group)
        return self.options[1:]

    def _note(self, optimizer: Any, group: Group) -> None:
        """Prepare to ask in one call, from the next step on, whether group and state are as they are now."""
        found, self.question = walker(), None
        if found is None or self.options is None or self.all_states is None or not self.all_states.plain:
            return
        if group["params"] is self.params.source:
            self.noted, self.numbers = SameEntries([group, optimizer.state], found), self.options[2]
            self.question = found.question(**self.params.parts, **self.noted.parts)

    def _is_as_noted(self, optimizer: Any, group: Group) -> bool:
        if self.question is None:
            return False
        noted_group, noted_state = self.noted.dictionaries
        return noted_group is group and noted_state is optimizer.state and self.question.holds()

    def run_unchanged(self, optimizer: Any, group: Group) -> bool:
        """The step, or ``False`` with nothing done where a quick look does not find everything as it was."""
        if (
            not self._is_as_noted(optimizer, group)
            or any(p.grad is not None for p in self.outside)
            or _is_scaled(optimizer)
            or not all(plan.watch.unchanged() for plan in self.plans)
        ):
            return False
        for plan in self.plans:
            plan.run(self.numbers, None)
        return True

    def run(self, optimizer: Any, group: Group) -> bool:
        """The step, or ``False`` with nothing done where something changed."""
        structure, numbers = self._split(optimizer, group)
        if (
            structure != self.structure
            or not self.params.hold(group["params"])
            or any(p.grad is not None for p in self.outside)
            or not self._same_states(optimizer.state)
        ):
            return False
        # copies of gradients in other strides live until the kernel has read them
        copies = [plan.watch.gradients() for plan in self.plans]
        if any(copied is None for copied in copies) or not all(plan.watch.holds() for plan in self.plans):
            return False
        scaled = _is_scaled(optimizer)
        if scaled:
            skip, found_inf = _scale_gradients(optimizer, [p.grad for plan in self.plans for p in plan.params])
            if skip:
                return True
            copies = [plan.watch.gradients() for plan in self.plans]
        for plan in self.plans:
            plan.run(numbers, found_inf if scaled else None)
        return True


def _is_scaled(optimizer: Any) -> bool:
    """Whether ``GradScaler`` has left its part to the step."""
    return getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None


def _scale_gradients(optimizer: Any, grads: Sequence[Tensor | None]) -> tuple[bool, Tensor | None]:
    """Do ``GradScaler``'s part: divide the gradients by the scale, and tell whether one of them overflowed.

    Returns:
        Whether to skip the step, and the flag itself where only the device can tell (a look would wait
        for it).
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    present = [g for g in grads if g is not None]
    on_gpu = bool(present) and all(g.is_cuda for g in present)
    if found_inf is not None and not on_gpu and found_inf.item():
        return True, None
    if scale is not None and present:
        torch._foreach_div_(present, scale.to(present[0].device))
    return False, found_inf.to(present[0].device) if on_gpu and found_inf is not None else None


def streams(optimizer: Any) -> int:
    """How many parameter-sized tensors the next fused step reads, plus how many it writes.

    Raises:
        ValueError: the optimizer has taken no fused step, or its tensors need several kernels.
    """
    bundles = optimizer.__dict__.get("_fused_bundles", {})
    kernels = {id(plan.program): (i, plan) for i, bundle in bundles.items() for plan in bundle.plans}
    if len(kernels) != 1:
        raise ValueError(f"expected an optimizer that steps by one kernel, but this one has {len(kernels)}")
    ((index, plan),) = kernels.values()
    numbers = split_options(_options(optimizer, optimizer.param_groups[index]))[1]
    program = plan.kernel.next_program(numbers, plan.states[0])
    return len(program.read) + len(program.stores)


def _bundle(optimizer: Any, index: int) -> Bundle | None:
    bundles: dict[int, Bundle] = optimizer.__dict__.get("_fused_bundles", {})
    return bundles.get(index)


def run_unchanged(optimizer: Any, index: int, group: Group) -> bool:
    """Step a group as in the last step; ``False``, with nothing done, where options, tensors or state are others."""
    bundle = _bundle(optimizer, index)
    return bundle is not None and bundle.run_unchanged(optimizer, group)


def run_plan(optimizer: Any, index: int, group: Group) -> bool:
    """Step a group by the plan of the last step; ``False``, with nothing done, where there is none that holds."""
    bundle = _bundle(optimizer, index)
    return bundle is not None and bundle.run(optimizer, group)


def step(
    optimizer: Any, index: int, group: Group, h: Any, params: list[Tensor], grads: list[Tensor], states: list[State]
) -> None:
    """Step a group and keep the plan for the next step."""
    bundles = optimizer.__dict__.setdefault("_fused_bundles", {})
    bundles.pop(index, None)
    skip, found_inf = _scale_gradients(optimizer, grads) if _is_scaled(optimizer) else (False, None)
    if skip:
        return
    options = _options(optimizer, group)
    structure, numbers = split_options(options)
    overlapping = _overlap(list(map(local, params)), list(map(local, grads)))
    h.on_device = h.on_device or any(type(p) is FakeTensor for p in params)  # whose step count has no value to read
    numbers_of_state = ("step", *optimizer.scalar_state)
    parts: defaultdict[Any, list[int]] = defaultdict(list)
    for i, (p, g, s) in enumerate(zip(params, grads, states, strict=True)):
        check_fused_support(p)
        missing = tuple(key for key in optimizer.lazy_state if s.get(key) is None)
        fusible = not overlapping and _fusible(p, g, s, numbers_of_state) and _backend(p.device.type) is not None
        parts[(p.device, p.dtype, is_cut_up(p), missing) if fusible else None].append(i)
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
            copies = plan.watch.gradients()
            plan.run(numbers, found_inf)
            del copies
            if not plan.program.created:
                plans.append(plan)
    if len(plans) == len(parts):
        bundles[index] = Bundle(optimizer, group, plans, structure)
