"""The constructors' arguments: checks in PyTorch's order, types and wording, and the defaults that they make."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from operator import is_, itemgetter
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling


def learning_rate(lr: Any, text: str = "Invalid learning rate:") -> None:
    """Raise ``<text> <lr>`` unless ``lr`` is a finite number of at least 0, or a tensor of one such element.

    PyTorch lets an infinite rate (and for ``SGD`` a NaN) through, which turns every parameter into NaN.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0 or math.isinf(lr.detach() if isinstance(lr, Tensor) else lr):
        raise ValueError(f"{text} {lr}")


def rate_of_foreach(lr: Any, foreach: bool | None, capturable: bool, error: type[Exception]) -> None:
    """Raise ``error`` where Adam's foreach is asked for and the rate is a tensor that no graph is to capture."""
    if foreach and not capturable and isinstance(lr, Tensor):
        raise error("lr as a Tensor is not supported for capturable=False and foreach=True")


def is_magnitude(value: Any) -> bool:
    """Whether a number, or a tensor of one, is at least 0 and neither infinite nor NaN."""
    return bool(0.0 <= value < math.inf)


def at_least_zero(name: str, value: Any) -> None:
    """Raise ``Invalid <name>: <value>`` for a value that is negative, NaN, or infinite, which PyTorch lets through."""
    if not is_magnitude(value):
        raise ValueError(f"Invalid {name}: {value}")


def each_at_least_zero(**values: Any) -> None:
    """Raise ``Invalid <name> value: <value>`` for the first that is negative or NaN."""
    for name, value in values.items():
        at_least_zero(f"{name} value", value)


MAGNITUDES = (
    "lr", "momentum", "weight_decay", "eps", "lr_decay", "initial_accumulator_value", "rho", "alpha", "lambd",
    "momentum_decay",
)  # fmt: skip
"""Options that are numbers of at least 0 in every class that has them."""


ROUNDING = 1e-12
"""How far below 0 a rate may lie: PyTorch's ``LinearLR`` ends at some -5e-18 where 0 is meant."""
_NUMBERS = (float, int)


def group(optimizer: Any, options: Mapping[str, Any], index: int) -> None:
    """Raise for what the constructor would refuse, in the options of one parameter group of ``optimizer``.

    PyTorch takes anything there.
    """
    for key in MAGNITUDES:
        value = options.get(key)
        if isinstance(value, _NUMBERS) or (isinstance(value, Tensor) and value.numel() == 1):
            _number_of_group(optimizer, key, value, index)
    for key, check in _PAIRS.items():
        if key in options:
            check(options[key])


class _Looked:
    """The options of a class that :func:`written` looks at."""

    def __init__(self, optimizer: Any) -> None:
        most = {key: 1.0 if key in optimizer.decays else sys.float_info.max for key in MAGNITUDES}
        self.limits = [(key, limit) for key, limit in most.items() if key in optimizer.defaults]
        """Numbers, with the largest that they may be."""
        self.pairs = [key for key in _PAIRS if key in optimizer.defaults]
        self.ways = [(key, way) for key, way in optimizer.dialects.items() if isinstance(way, bool | str)]
        """Flags and words of the dialects, with PyTorch's way."""
        keys = [key for key in (*dict(self.ways), "momentum", "dampening", "nesterov") if key in optimizer.defaults]
        # the first twice, since it gives a tuple of several only
        self.dialect: Any = itemgetter(*keys, keys[0]) if keys else None
        """What gives the values of those, and of the options that go with some of them only."""
        self.accepted: tuple[Any, ...] = (object(),)
        """The values that were last found to go together, as the very objects."""


_LOOKED: dict[type, _Looked] = {}


def look(optimizer: Any) -> None:
    """Prepare for :func:`written`, which ``torch.compile`` may trace."""
    if type(optimizer) not in _LOOKED:
        _LOOKED[type(optimizer)] = _Looked(optimizer)


def written(optimizer: Any, options: Mapping[str, Any], index: int) -> None:
    """Raise for a number that the constructor would refuse, written into a parameter group of ``optimizer`` since.

    PyTorch steps by it. It is asked at every step, so a tensor's value is not looked at: that could wait for a GPU.
    A compiled step is traced anew, and so asked again, when an option has changed.
    """
    looked = _LOOKED[type(optimizer)]
    for key, limit in looked.limits:
        value = options.get(key)
        if isinstance(value, _NUMBERS) and not 0.0 <= value <= limit:
            _number_of_group(optimizer, key, value, index)
    for key in looked.pairs:
        pair = options.get(key)
        if isinstance(pair, tuple | list) and all(isinstance(value, _NUMBERS) for value in pair):
            _PAIRS[key](pair)
    if is_compiling():
        optimizer.check_dialects(options)  # what was accepted would be guarded, and the step compiled twice for it
        return
    for key, way in looked.ways:
        if options[key] is not way:
            dialect = looked.dialect(options)
            if not all(map(is_, dialect, looked.accepted)):
                optimizer.check_dialects(options)
                looked.accepted = dialect
            break


def _number_of_group(optimizer: Any, key: str, value: Any, index: int) -> None:
    if not is_magnitude(value + ROUNDING if key == "lr" else value) or (key in optimizer.decays and value > 1.0):
        name = "learning rate" if key == "lr" else f"{key} value"
        raise ValueError(f"Invalid {name}: {value} (parameter group {index})")


def should_be(name: str, condition: str, value: Any, holds: Any) -> None:
    """Raise ``<name> should be <condition> but is: <value>`` unless ``holds``."""
    if not holds:
        raise ValueError(f"{name} should be {condition} but is: {value}")


def flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is ``True`` or ``False``: ``"no"`` would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but got {value!r}")


def flags(**values: Any) -> None:
    """:func:`flag` of each."""
    for name, value in values.items():
        flag(name, value)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the names in ``allowed``."""
    if value not in allowed:
        raise ValueError(f"Invalid {name}: {value!r} (expected one of {', '.join(map(repr, allowed))})")


def needs(name: str, value: Any, other: str, present: Any, allowed: tuple[Any, ...]) -> None:
    """Raise where ``value`` is given and the argument ``other`` is none of those that go with it."""
    if value and present not in allowed:
        wanted = " or ".join(map(repr, allowed))
        raise ValueError(f"{name}={value} needs {other}={wanted}, but it is {present!r}")


def betas(values: tuple[float | Tensor, ...]) -> None:
    """Raise unless both decay rates lie in [0, 1)."""
    for i, beta in enumerate(values):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def decay(name: str, value: Any) -> None:
    """Raise unless the rate of a running mean lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"Invalid {name} value: {value}")


def etas(values: tuple[float, float]) -> None:
    """Raise unless Rprop's factors lie below and above 1, and the first above 0."""
    if not 0.0 < values[0] < 1.0 < values[1]:
        raise ValueError(f"Invalid eta values: {values[0]}, {values[1]}")


def step_sizes(values: tuple[float, float]) -> None:
    """Raise unless Rprop's smallest and largest step are two numbers of at least 0 in order."""
    if not 0.0 <= values[0] <= values[1]:
        raise ValueError(f"Invalid step sizes: {values[0]}, {values[1]}")


_PAIRS: dict[str, Callable[[Any], None]] = {"betas": betas, "etas": etas, "step_sizes": step_sizes}
"""What is asked of the options that are two numbers."""


def arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's defaults: what its constructor was given, from the constructor's ``locals()``."""
    return {key: value for key, value in scope.items() if key not in ("self", "params", "__class__")}


def adam_family(
    lr: float | Tensor, eps: float, values: tuple[float | Tensor, float | Tensor], weight_decay: float
) -> None:
    """What Adam and its relatives ask of the arguments that they share, in PyTorch's order."""
    learning_rate(lr)
    each_at_least_zero(epsilon=eps)
    betas(values)
    each_at_least_zero(weight_decay=weight_decay)


def beta_types(values: tuple[float | Tensor, float | Tensor], takes_tensors: bool) -> None:
    """Raise unless both decay rates are floats, or both tensors of one element where the implementation takes those."""
    if not (all(isinstance(beta, float) for beta in values) or all(isinstance(beta, Tensor) for beta in values)):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(values):
        if isinstance(beta, Tensor):
            if not takes_tensors:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
