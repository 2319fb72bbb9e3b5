"""``fuse`` and ``unfuse``: turn PyTorch's optimizer into this library's of the same name, and back, while it trains."""

from __future__ import annotations

from typing import Any

from . import _checkpoints
from ._engine import RuleOptimizer
from ._torch import LRScheduler, Optimizer, check_fused_support
from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .asgd import ASGD
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD

_FUSIBLE: dict[Any, type[RuleOptimizer]] = {
    cls.torch_class: cls
    for cls in (SGD, Adagrad, Adadelta, RMSprop, Adam, AdamW, Adamax, NAdam, RAdam, ASGD, Rprop)
}  # fmt: skip


def fuse(optimizer: Optimizer) -> RuleOptimizer:
    """Turn PyTorch's optimizer into this library's of the same name, with ``fused=True``, wherever training stands.

    The object itself changes its class, as ``torch.distributed.fsdp.fully_shard`` does with a module. So whatever
    holds it holds the fused one from now on: schedulers, a ``GradScaler``, ``accelerate``, hooks on parameters.
    Groups, options, names, hooks and state are what they were, the same tensors, and nothing is copied; only
    ``foreach``, which excludes ``fused``, is ``None`` until :func:`unfuse`. (On a GPU the
    step counts, which PyTorch keeps on the CPU unless fused or captured, move to the GPU at the first step.)

    Args:
        optimizer: one of ``torch.optim``'s own SGD, Adagrad, Adadelta, RMSprop, Adam, AdamW, Adamax, NAdam, RAdam,
            ASGD or Rprop; or this library's of these names, fused or not. Its ``step``, bound or wrapped before, steps
            ours from now on; if it was compiled, it raises a ``RuntimeError``: compile it anew.

    Returns:
        ``optimizer``, now of the class of its name in ``reimpl.optim``. :func:`unfuse` goes back.

    Raises:
        TypeError: it is of another class; a subclass of PyTorch's may have another rule and is another class.
        RuntimeError: a group is ``differentiable``, or a parameter is not of floating point, as the constructor says;
            a gradient is sparse. One that becomes so later is refused by ``step``.
    """
    given: Any = type(optimizer)
    ours: type[RuleOptimizer] | None = given if given in _FUSIBLE.values() else _FUSIBLE.get(given)
    if ours is None:
        raise TypeError(f"fuse() takes an optimizer of torch.optim's own {_names()}, but got {_name(optimizer)}")
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        for p in group["params"]:
            check_fused_support(p)
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError("fuse() takes no optimizer whose parameters have sparse gradients")
    if given is not ours:
        _change_class(optimizer, ours)
        for options in (optimizer.defaults, *optimizer.param_groups):
            options.update(ours.dialects)
    before: list[bool | None] = vars(optimizer).setdefault("_foreach_before", [])
    for i, options in enumerate((optimizer.defaults, *optimizer.param_groups)):
        if i == len(before):  # else this is a second call
            before.append(options.get("foreach"))
        options.update(foreach=None, fused=True)  # which exclude each other
    optimizer.__setstate__({"_step_supports_amp_scaling": True})
    assert isinstance(optimizer, RuleOptimizer)
    return optimizer


def unfuse(optimizer: Optimizer) -> Optimizer:
    """Turn this library's optimizer into PyTorch's of the same name: the way back from :func:`fuse`.

    The object itself changes its class, and everything else is kept as there; ``fused`` is off afterwards, so PyTorch
    chooses between its for-loop and foreach, or obeys the groups' ``foreach``. ``to_torch()`` gives a second optimizer
    instead, with a copy of the state.

    Args:
        optimizer: one of ``reimpl.optim``'s classes that :func:`fuse` gives, fused or not.

    Returns:
        ``optimizer``, now of the class of its name in ``torch.optim``.

    Raises:
        TypeError: it is of another class.
        ValueError: a dialect is in use that PyTorch's class cannot express.
    """
    if not isinstance(optimizer, RuleOptimizer) or type(optimizer) not in _FUSIBLE.values():
        raise TypeError(f"unfuse() takes an optimizer of reimpl.optim's own {_names()}, but got {_name(optimizer)}")
    _checkpoints.refuse_dialects(optimizer)
    _numbers_to_their_places(optimizer)
    own = optimizer.dialects
    _change_class(optimizer, optimizer.torch_class)
    every = (optimizer.defaults, *optimizer.param_groups)
    for options in every:
        options["fused"] = None
        for key in own:
            options.pop(key, None)
    for options, foreach in zip(every, vars(optimizer).pop("_foreach_before", ()), strict=False):
        options["foreach"] = foreach
    for name in ("_step_supports_amp_scaling", "_fused_bundles"):
        vars(optimizer).pop(name, None)
    optimizer.__setstate__({})
    return optimizer


class _StepTracker(LRScheduler):
    """A scheduler that sets no rate, and is made for what each does to ``optimizer.step``: see that it was called."""

    def _initial_step(self) -> None:
        pass


def _change_class(optimizer: Optimizer, cls: Any) -> None:
    """Give the object another class, and that class's ``step`` where schedulers count the calls of the old one's."""
    counted = getattr(vars(optimizer).get("step"), "__wrapped__", None) is type(optimizer).step
    if counted:
        del optimizer.step
    optimizer.__class__ = cls
    optimizer._patch_step_function()
    if counted:
        _StepTracker(optimizer)


def _numbers_to_their_places(optimizer: RuleOptimizer) -> None:
    """Bring step counts and the like to the devices where PyTorch keeps them unless it is fused."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for key in ("step", *optimizer.scalar_state):
                if key in state:
                    state[key] = state[key].to(optimizer.new_step(p, {**group, "fused": None}).device)


def _names() -> str:
    return ", ".join(cls.__name__ for cls in _FUSIBLE.values())


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
