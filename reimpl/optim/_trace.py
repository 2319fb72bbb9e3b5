"""Runs a rule once over symbols and keeps what it did: scalar expressions, and a line of pointwise operations."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partialmethod
from numbers import Real
from typing import Any

from torch import Tensor

from ._torch import Namespace

Operation = tuple[str, ...]
"""``(result, operator, operand, ...)``; operands are earlier results, inputs, or scalars ``a0``, ``a1``, ..."""


class Scalar:
    """A number of the rule that changes from step to step: an option, the step count, or an expression of them.

    ``code`` is Python source over the options ``o[i]``, the step ``t``, numbers of the state ``k0``, ``k1``, ..., and
    the functions ``power``, ``single`` (rounds to float32) and ``double`` (does not). Comparisons see the option's
    present value, so a rule may branch on an option; an expression has no value, its comparison is a
    :class:`Condition`, and may not be branched on.
    """

    __slots__ = ("code", "value")

    def __init__(self, code: str, value: float | None = None) -> None:
        self.code, self.value = code, value

    @staticmethod
    def _binary(operator: str, left: Any, right: Any) -> Any:
        if isinstance(right, Value):
            return NotImplemented
        return Scalar(f"({_code(left)} {operator} {_code(right)})")

    def __add__(self, other: Any) -> Any:
        return self._binary("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._binary("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return self._binary("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._binary("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return self._binary("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._binary("*", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self._binary("/", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._binary("/", other, self)

    def __pow__(self, other: Any) -> Scalar:
        return Scalar(f"power({_code(self)}, {_code(other)})")

    def __rpow__(self, other: Any) -> Scalar:
        return Scalar(f"power({_code(other)}, {_code(self)})")

    def __neg__(self) -> Scalar:
        return Scalar(f"(-{self.code})")

    def clone(self) -> Scalar:
        return Scalar(self.code, self.value)

    def _compare(self, sign: str, known: Any, other: Any) -> Any:
        value = other.value if isinstance(other, Scalar) else other
        if self.value is None or value is None:
            return Condition(f"({self.code} {sign} {_code(other)})")
        return known(self.value, value)

    def __eq__(self, other: object) -> Any:
        return self._compare("==", operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compare("!=", operator.ne, other)

    __gt__ = partialmethod(_compare, ">", operator.gt)
    __lt__ = partialmethod(_compare, "<", operator.lt)
    __ge__ = partialmethod(_compare, ">=", operator.ge)
    __le__ = partialmethod(_compare, "<=", operator.le)

    __hash__ = None  # type: ignore[assignment]


class StateScalar(Scalar):
    """A number of the state, a float32 that its in-place methods change."""

    __slots__ = ()

    def mul_(self, other: Any) -> StateScalar:
        # both factors are rounded first; their product is exact in a double
        self.code = f"single({self.code} * single({_code(other)}))"
        return self

    def copy_(self, other: Any) -> StateScalar:
        self.code = f"single({_code(other)})"
        return self


class Condition:
    """A comparison whose outcome changes from step to step."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __bool__(self) -> bool:
        raise TypeError(f"a rule may branch on an option but not on the expression {self.code}")

    def where(self, a: Any, b: Any) -> Any:
        """``a`` where it holds and ``b`` elsewhere: two scalars, or two values."""
        if isinstance(a, Value):
            flag = Scalar(f"(1.0 if {self.code} else 0.0)")
            return a._new("select", a._new("gt", flag, 0.0), a, b)
        return Scalar(f"(double({_code(a)}) if {self.code} else double({_code(b)}))")


def _code(x: Any) -> str:
    return x.code if isinstance(x, Scalar) else repr(float(x))


class Value:
    """A traced tensor: in-place methods change which result it stands for, as they change a tensor's memory."""

    __slots__ = ("name", "program")

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name

    def _new(self, operator: str, *operands: Any) -> Value:
        return Value(self.program, self.program.emit(operator, *operands))

    def _set(self, operator: str, *operands: Any) -> Value:
        self.name = self.program.emit(operator, *operands)
        return self

    def clone(self) -> Value:
        return Value(self.program, self.name)

    detach = clone

    def copy_(self, other: Value) -> Value:
        self.name = other.name
        return self

    def neg(self) -> Value:
        return self._new("neg", self)

    def abs(self) -> Value:
        return self._new("abs", self)

    def sqrt(self) -> Value:
        return self._new("sqrt", self)

    def sqrt_(self) -> Value:
        return self._set("sqrt", self)

    def sign(self) -> Value:
        # 0 for NaN, as torch.sign has it
        return self._new("select", self > 0, 1, self._new("select", self < 0, -1, 0))

    def __gt__(self, other: Any) -> Value:
        return self._new("gt", self, other)

    def __lt__(self, other: Any) -> Value:
        return self._new("lt", self, other)

    def eq(self, other: Any) -> Value:
        return self._new("eq", self, other)

    def masked_fill(self, mask: Value, value: Any) -> Value:
        return self._new("select", mask, value, self)

    def masked_fill_(self, mask: Value, value: Any) -> Value:
        return self._set("select", mask, value, self)

    def clamp_(self, low: Any, high: Any) -> Value:
        return self.masked_fill_(self < low, low).masked_fill_(self > high, high)

    def _plus(self, other: Any, alpha: Any) -> tuple[Any, ...]:
        if isinstance(alpha, int | float) and alpha == 1:
            return "add", self, other
        return "fma", other, alpha, self

    def add(self, other: Any, *, alpha: Any = 1) -> Value:
        return self._new(*self._plus(other, alpha))

    def add_(self, other: Any, *, alpha: Any = 1) -> Value:
        return self._set(*self._plus(other, alpha))

    def mul_(self, other: Any) -> Value:
        return self._set("mul", self, other)

    def div_(self, other: Any) -> Value:
        return self._set("div", self, other)

    def __sub__(self, other: Any) -> Value:
        return self._new("sub", self, other)

    def __mul__(self, other: Any) -> Value:
        return self._new("mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self._new("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        # a number over a tensor is the number times the reciprocal in PyTorch
        return self._new("mul", self._new("div", 1, self), other)

    def _scaled(self, a: Any, value: Any) -> Any:
        return a if isinstance(value, int | float) and value == 1 else a._new("mul", a, value)

    def addcmul(self, a: Any, b: Any, *, value: Any = 1) -> Value:
        return self._new("fma", self._scaled(a, value), b, self)

    def addcmul_(self, a: Any, b: Any, *, value: Any = 1) -> Value:
        return self._set("fma", self._scaled(a, value), b, self)

    def addcdiv_(self, a: Any, b: Any, *, value: Any = 1) -> Value:
        return self._set("add", self, self._new("div", self._scaled(a, value), b))

    def lerp_(self, end: Any, weight: Any) -> Value:
        # torch.lerp counts from the nearer end: base + w·(end − self), w in [−½, ½)
        base = self._new("nearer", weight, self, end)
        return self._set("fma", self._new("sub", end, self), self._new("to_nearer", weight), base)

    def maximum_(self, other: Any) -> Value:
        return self._set("max", self, other)


@dataclass
class Program:
    """What a rule does to one element: loads, operations, stores; and the scalars to compute beforehand."""

    inputs: tuple[str, ...]
    operations: list[Operation] = field(default_factory=list)
    scalars: list[str] = field(default_factory=list)
    stores: dict[str, str] = field(default_factory=dict)
    created: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    """Keys of the state's numbers, which the scalars know as ``k0``, ``k1``, ... by their values before the step."""
    updates: dict[str, int] = field(default_factory=dict)
    """For each such key that changes, the place of its new value among the scalars."""

    def emit(self, operator: str, *operands: Any) -> str:
        """Append an operation, or find the one that computed the same already, and return its result's name."""
        names = tuple(self._operand(x) for x in operands)
        for result, *rest in self.operations:
            if tuple(rest) == (operator, *names):
                return result
        result = f"x{len(self.operations)}"
        self.operations.append((result, operator, *names))
        return result

    def _operand(self, x: Any) -> str:
        if isinstance(x, Value):
            return x.name
        return f"a{self.scalar(_code(x))}"

    @property
    def read(self) -> frozenset[str]:
        """The inputs that it reads."""
        used = {x for _, _, *operands in self.operations for x in operands} | set(self.stores.values())
        return frozenset(used.intersection(self.inputs))

    @property
    def written_blindly(self) -> list[str]:
        """The inputs that it writes and does not read."""
        return [name for name in self.stores if name not in self.read]

    @property
    def choice(self) -> Operation | None:
        """The comparison of two scalars that it selects by, the same for a whole tensor, if there is one."""
        scalars = {f"a{k}" for k in range(len(self.scalars))}
        conditions = {operands[0] for _, name, *operands in self.operations if name == "select"}
        alike = (each for each in self.operations if each[0] in conditions and scalars.issuperset(each[2:]))
        return next(alike, None)

    def assuming(self, condition: str, holds: bool) -> Program:
        """What is left of it where the outcome of a comparison is known."""
        same: dict[str, str] = {}
        resolved: list[Operation] = []
        for result, name, *operands in self.operations:
            operands = [same.get(x, x) for x in operands]
            if name == "select" and operands[0] == condition:
                same[result] = operands[1 if holds else 2]
            else:
                resolved.append((result, name, *operands))
        stores = {key: same.get(x, x) for key, x in self.stores.items()}
        needed = set(stores.values())
        for operation in reversed(resolved):
            if operation[0] in needed:
                needed.update(operation[2:])
        return replace(self, operations=[each for each in resolved if each[0] in needed], stores=stores)

    def scalar(self, code: str) -> int:
        """The place of an expression among the scalars, at the end if it is new."""
        if code not in self.scalars:
            self.scalars.append(code)
        return self.scalars.index(code)


def split_options(options: Mapping[str, Any]) -> tuple[tuple[tuple[str, Any], ...], list[Any]]:
    """The options that choose the program, and the numbers that are its arguments.

    A number takes part in the choice by its sign alone, a tensor by being one.
    """
    structure: list[tuple[str, Any]] = []
    numbers: list[Any] = []
    for key, value in options.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        if all(map(_is_number, parts)):
            structure.append((key, tuple(map(_sign, parts))))
            numbers.extend(parts)
        else:
            structure.append((key, value))
    return tuple(structure), numbers


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor | Real) and not isinstance(x, bool)


def _sign(x: Any) -> Any:
    return "tensor" if isinstance(x, Tensor) else bool(x > 0) - bool(x < 0)


def trace(rule: Any, options: Mapping[str, Any], state: tuple[str, ...]) -> Program:
    """Run ``rule.prologue`` and ``rule.update`` over symbols, for the structure that ``options`` have.

    Args:
        rule: the optimizer's class.
        options: the hyperparameters of a parameter group.
        state: keys of the state that exists before the step, ``step`` left out.
    """
    kept = tuple(key for key in state if key in rule.scalar_state)
    state = tuple(key for key in state if key not in kept)
    symbols: dict[str, Any] = {}
    count = 0
    for key, value in options.items():
        parts = value if isinstance(value, tuple | list) else (value,)
        if all(map(_is_number, parts)):
            scalars = tuple(Scalar(f"o[{count + i}]", float(part)) for i, part in enumerate(parts))
            count += len(parts)
            symbols[key] = scalars if isinstance(value, tuple | list) else scalars[0]
        else:
            symbols[key] = value
    h = Namespace(**symbols)
    h.capturable = h.on_device = h.differentiable = False
    program = Program(inputs=("p", "g", *state), kept=kept)
    p, g = Value(program, "p"), Value(program, "g")
    values = {key: Value(program, key) for key in state}
    numbers = {key: StateScalar(f"k{i}") for i, key in enumerate(kept)}
    c = rule.prologue(h, Scalar("t"), *numbers.values())
    program.updates = {key: program.scalar(x.code) for i, (key, x) in enumerate(numbers.items()) if x.code != f"k{i}"}
    rule.update(p, g.neg() if h.maximize else g, values, h, c)
    program.created = tuple(key for key in values if key not in state)
    program.inputs += program.created
    program.stores = {key: value.name for key, value in {"p": p, **values}.items() if value.name != key}
    return program
