"""Between a checkpoint, an optimizer of this library and PyTorch's of the same name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._torch import Optimizer, StateDict
from ._warnings import warn

LATE_OPTIONS: dict[str, Any] = {
    "nesterov": False, "maximize": False, "foreach": None, "differentiable": False, "capturable": False,
    "amsgrad": False, "decoupled_weight_decay": False, "fused": None,
}  # fmt: skip
"""Options that PyTorch added after the first release of a class, with the value that an old checkpoint means."""
_FLAGS = {"maximize", "foreach", "capturable", "differentiable", "fused"}
"""Options that PyTorch gave its classes from 1.11 on."""
_BEFORE_FLAGS = {"nesterov", "amsgrad", "momentum", "centered"}
"""The late options that are older than those."""

Group = Mapping[str, Any]


def is_torch_way(optimizer: Any, dialect: str, value: Any) -> bool:
    """Whether PyTorch's class does what ``value`` asks of the option ``dialect``.

    ``fused`` is how a step runs and not what it computes, so it is PyTorch's way whatever its value.
    """
    return dialect == "fused" or bool(value == optimizer.dialects[dialect])


def without_torch_ways(optimizer: Any, packed: StateDict) -> StateDict:
    """A state dict without the dialects that are PyTorch's way: PyTorch's own checkpoint knows none of them."""
    for group in packed["param_groups"]:
        for key in optimizer.dialects:
            if key in group and is_torch_way(optimizer, key, group[key]):
                del group[key]
    return packed


def dialects_to_keep(optimizer: Any, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each group, the dialects that loading ``saved`` would lose; warns of those that are not PyTorch's way.

    Raises:
        ValueError: a saved group is of another dialect.
    """
    kept = []
    name = type(optimizer).__name__
    for i, (group, theirs) in enumerate(zip(optimizer.param_groups, saved, strict=False)):
        mine = {key: group[key] for key in optimizer.dialects if key in group}
        for key, value in mine.items():
            if key != "fused" and key in theirs and theirs[key] != value:
                raise ValueError(
                    f"loaded state dict has {key}={theirs[key]!r} in parameter group {i}, "
                    f"but this {name} was built with {key}={value!r}"
                )
        kept.append({key: value for key, value in mine.items() if key not in theirs})
    for i, mine in enumerate(kept):
        for key, value in mine.items():
            if not is_torch_way(optimizer, key, value):
                warn(
                    f"the loaded state dict was written with {key}={optimizer.dialects[key]!r}, PyTorch's way (group "
                    f"{i}); this {name} goes on with {key}={value!r} from that state"
                )
    return kept


@contextmanager
def checked(optimizer: Any) -> Iterator[None]:
    """Look at what ``optimizer.load_state_dict`` is about to load, and keep what PyTorch's would lose of it.

    Raises:
        ValueError: the checkpoint is of another dialect, class or shape.
    """
    found: list[tuple[StateDict, list[dict[str, Any]]]] = []

    def look(_: Optimizer, packed: StateDict) -> None:
        for i, group in enumerate(packed["param_groups"]):
            _checks.group(optimizer, group, i)
        require_own(optimizer, packed)
        found.append((packed, dialects_to_keep(optimizer, packed["param_groups"])))

    with optimizer.register_load_state_dict_pre_hook(look):  # the last, which sees what other hooks made of it
        yield
    ((packed, here),) = found
    restore_numbers(optimizer, packed, optimizer.scalar_state)
    for group, kept in zip(optimizer.param_groups, here, strict=False):
        group.update(kept)


def complete(optimizer: Any) -> None:
    """Add what an old checkpoint or another class's groups lack, and make tensors of its step counts."""
    for group in optimizer.param_groups:
        for key, value in {**optimizer.dialects, **LATE_OPTIONS, **optimizer.late_options}.items():
            if key in optimizer.defaults:
                group.setdefault(key, value)
        for p in group["params"]:
            entry = optimizer.state.get(p, {})
            for key in ("step", *optimizer.scalar_state):
                if key in entry and not torch.is_tensor(entry[key]):
                    entry[key] = optimizer.new_step(p, group).fill_(float(entry[key]))


def restore_numbers(optimizer: Optimizer, state_dict: StateDict, keys: tuple[str, ...]) -> None:
    """Give the state's numbers under ``keys`` the values and the precision that they have in a loaded ``state_dict``.

    PyTorch loads them in the parameter's dtype: coarser than they were, or finer than an uninterrupted run's.
    """
    if not keys:
        return
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=False):
        for index, p in zip(saved["params"], group["params"], strict=False):
            here, there = optimizer.state.get(p, {}), state_dict["state"].get(index, {})
            for key in keys:
                if isinstance(there.get(key), Tensor) and here[key] is not there[key]:
                    dtype = torch.promote_types(there[key].dtype, torch.float32)
                    here[key] = there[key].detach().to(device=here[key].device, dtype=dtype, copy=True)


def require_own(optimizer: Any, state_dict: StateDict) -> None:
    """Raise where ``state_dict`` is not one that ``optimizer``'s class, or one of the same rule, can have written.

    PyTorch loads it, and at the next step goes another way, fails in the middle, or broadcasts.

    Raises:
        ValueError: names the options that a group lacks, or has from another class; the state that a parameter lacks,
            or whose shape is another parameter's.
    """
    for number, (saved, group) in enumerate(zip(state_dict["param_groups"], optimizer.param_groups, strict=False)):
        _require_options(optimizer, saved, group, number)
        for index, p in zip(saved["params"], group["params"], strict=False):
            entry = state_dict["state"].get(index)
            if entry:
                _require_state(optimizer, entry, p, {**group, **saved}, number)


def _require_options(optimizer: Any, saved: Group, group: Group, number: int) -> None:
    late = {*LATE_OPTIONS, *optimizer.late_options}
    if not _FLAGS.isdisjoint(saved):
        late -= _BEFORE_FLAGS
    missing = [key for key in optimizer.defaults if key not in saved and key not in (late | optimizer.dialects.keys())]
    if missing:
        _refuse(optimizer, f"has no {', '.join(missing)} in parameter group {number}")
    twin = getattr(optimizer.torch_class, "__name__", None)
    for key in saved:
        owners = [] if key in group or key in optimizer.defaults or key in _FLAGS else _options_of_torch().get(key, [])
        if owners and twin not in owners:  # else it is a note of the user's own, or newer than this library
            _refuse(optimizer, f"has {key}, an option of {', '.join(owners)}, in parameter group {number}")


def _require_state(optimizer: Any, entry: Mapping[str, Any], p: Tensor, options: Group, number: int) -> None:
    fresh: dict[str, Any] = {}
    if optimizer.is_stateful(options):
        fresh = optimizer.init_state(torch.empty(p.shape, dtype=p.dtype, device="meta"), options)
    missing = [key for key in fresh if key not in entry]
    if missing:
        _refuse(optimizer, f"has no {', '.join(missing)} in the state of a parameter of group {number}")
    numbers = ("step", *optimizer.scalar_state)
    for key, value in entry.items():
        if isinstance(value, Tensor) and value.dim() and key not in numbers:
            expected = fresh[key].shape if isinstance(fresh.get(key), Tensor) else p.shape
            if value.shape != expected:
                raise ValueError(
                    f"loaded state dict has {key} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(p.shape)} (parameter group {number}), where {tuple(expected)} was expected"
                )


def _refuse(optimizer: Any, reason: str) -> None:
    raise ValueError(f"loaded state dict {reason}: it is not one of {type(optimizer).__name__}")


@cache
def _options_of_torch() -> dict[str, list[str]]:
    """The options of ``torch.optim``'s classes, each with the names of the classes that have it."""
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for name in torch.optim.__all__:
        cls = getattr(torch.optim, name)
        if isinstance(cls, type) and cls is not Optimizer:
            for option in signature(cls).parameters:
                owners[option].append(name)
    return dict(owners)


def refuse_dialects(optimizer: Any) -> None:
    """Raise unless PyTorch's class of the same name does what every group of ``optimizer`` asks for.

    Raises:
        ValueError: there is no such class, or a dialect is in use that it cannot express.
    """
    name = type(optimizer).__name__
    if optimizer.torch_class is None:
        raise ValueError(f"torch.optim has no counterpart of {name}")
    for i, group in enumerate(optimizer.param_groups):
        for key in optimizer.dialects:
            if not is_torch_way(optimizer, key, group[key]):
                raise ValueError(f"torch.optim.{name} has no equivalent of {key}={group[key]!r} (parameter group {i})")


def torch_twin(optimizer: Any) -> Optimizer:
    """PyTorch's optimizer of the same name over the same parameters, with a copy of the state.

    Raises:
        ValueError: there is none, or a dialect is in use that it cannot express.
    """
    refuse_dialects(optimizer)
    names = ["param_names" in group for group in optimizer.param_groups]
    groups = [
        {"params": list(zip(g["param_names"], g["params"], strict=True)) if named else g["params"]}
        for g, named in zip(optimizer.param_groups, names, strict=True)
    ]
    twin: Optimizer = optimizer.torch_class(groups)
    packed = deepcopy(Optimizer.state_dict(optimizer))
    for group in packed["param_groups"]:
        for key in optimizer.dialects:
            group.pop(key, None)
    twin.load_state_dict(packed)
    restore_numbers(twin, packed, optimizer.scalar_state)
    return twin
