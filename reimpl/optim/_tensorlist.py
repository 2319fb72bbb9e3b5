"""``TensorList``: a list of tensors with the in-place methods of one, each a single ``torch._foreach_*`` call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Scalar = Any
"""A Python number, a 0-d tensor, or a ``TensorList`` of 0-d tensors (one scalar a tensor)."""


class TensorList(Sequence[Tensor]):
    """Tensors of one device and dtype that an optimizer's rule treats as if they were one.

    A method does what ``torch.Tensor``'s method of that name does to each tensor in turn, with the same roundings:
    on the CPU ``torch._foreach_*`` calls the very same operator tensor by tensor.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        return self.tensors[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TensorList:
        return TensorList([function(tensor) for tensor in self.tensors])

    def clone(self) -> TensorList:
        return self._map(torch.clone)

    def detach(self) -> TensorList:
        return self._map(torch.detach)

    def view_as_real(self) -> TensorList:
        return self._map(torch.view_as_real)

    def view_as_complex(self) -> TensorList:
        return self._map(torch.view_as_complex)

    def neg(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    def abs(self) -> TensorList:
        return TensorList(torch._foreach_abs(self.tensors))

    # DTensor knows every other foreach function that is called here; of the next three not the first, nor, in torch
    # 2.11, the others

    def _are_plain(self) -> bool:
        return all(type(tensor) in (Tensor, Parameter) for tensor in self.tensors)

    def copy_(self, other: TensorList | Tensor) -> TensorList:
        source = other.tensors if isinstance(other, TensorList) else [other] * len(self.tensors)
        if self._are_plain():
            torch._foreach_copy_(self.tensors, source)
        else:
            for tensor, new in zip(self.tensors, source, strict=True):
                tensor.copy_(new)
        return self

    def sign(self) -> TensorList:
        return TensorList(torch._foreach_sign(self.tensors)) if self._are_plain() else self._map(torch.sign)

    def reciprocal(self) -> TensorList:
        return TensorList(torch._foreach_reciprocal(self.tensors)) if self._are_plain() else self._map(torch.reciprocal)

    # torch has no foreach function for the next five

    def __gt__(self, other: Scalar) -> TensorList:
        return self._map(lambda tensor: tensor > other)

    def __lt__(self, other: Scalar) -> TensorList:
        return self._map(lambda tensor: tensor < other)

    def eq(self, other: Scalar) -> TensorList:
        return self._map(lambda tensor: tensor.eq(other))

    def masked_fill(self, mask: TensorList, value: float) -> TensorList:
        return TensorList([t.masked_fill(m, value) for t, m in zip(self.tensors, mask.tensors, strict=True)])

    def masked_fill_(self, mask: TensorList, value: float) -> TensorList:
        for tensor, where in zip(self.tensors, mask.tensors, strict=True):
            tensor.masked_fill_(where, value)
        return self

    def clamp_(self, low: float, high: float) -> TensorList:
        torch._foreach_clamp_min_(self.tensors, low)
        torch._foreach_clamp_max_(self.tensors, high)
        return self

    def sqrt(self) -> TensorList:
        return TensorList(torch._foreach_sqrt(self.tensors))

    def sqrt_(self) -> TensorList:
        torch._foreach_sqrt_(self.tensors)
        return self

    def add(self, other: TensorList | Scalar, *, alpha: Scalar = 1) -> TensorList:
        if isinstance(other, TensorList):
            if isinstance(alpha, Tensor) and torch.compiler.is_compiling():
                return TensorList(torch._foreach_add(self.tensors, torch._foreach_mul(other.tensors, alpha)))
            return TensorList(torch._foreach_add(self.tensors, other.tensors, alpha=alpha))
        return TensorList(torch._foreach_add(self.tensors, other))

    def add_(self, other: TensorList | Scalar, *, alpha: Scalar = 1) -> TensorList:
        if isinstance(other, TensorList):
            if isinstance(alpha, Tensor) and (alpha.device.type != "cpu" or torch.compiler.is_compiling()):
                # alpha= would read the number back from the device, which graph capture cannot do
                torch._foreach_add_(self.tensors, torch._foreach_mul(other.tensors, alpha))
            else:
                torch._foreach_add_(self.tensors, other.tensors, alpha=alpha)
        else:
            torch._foreach_add_(self.tensors, other)
        return self

    def mul_(self, other: TensorList | Scalar) -> TensorList:
        torch._foreach_mul_(self.tensors, _operand(other))
        return self

    def div_(self, other: TensorList | Scalar) -> TensorList:
        torch._foreach_div_(self.tensors, _operand(other))
        return self

    def addcmul(self, a: TensorList, b: TensorList, *, value: Scalar = 1) -> TensorList:
        return TensorList(torch._foreach_addcmul(self.tensors, a.tensors, b.tensors, value))

    def addcmul_(self, a: TensorList, b: TensorList, *, value: Scalar = 1) -> TensorList:
        if isinstance(value, Tensor):
            # _foreach_addcmul_ takes numbers alone
            torch._foreach_addcmul_(self.tensors, torch._foreach_mul(a.tensors, value), b.tensors, 1)
        else:
            torch._foreach_addcmul_(self.tensors, a.tensors, b.tensors, value)
        return self

    def addcdiv_(self, a: TensorList, b: TensorList, *, value: Scalar = 1) -> TensorList:
        if isinstance(value, TensorList):
            torch._foreach_addcdiv_(self.tensors, torch._foreach_mul(a.tensors, value.tensors), b.tensors)
        elif isinstance(value, Tensor):
            if value.device.type != "cpu" or torch.compiler.is_compiling():
                torch._foreach_addcdiv_(self.tensors, torch._foreach_mul(a.tensors, value), b.tensors)
            else:
                torch._foreach_addcdiv_(self.tensors, a.tensors, b.tensors, value.item())
        else:
            torch._foreach_addcdiv_(self.tensors, a.tensors, b.tensors, value)
        return self

    def lerp_(self, end: TensorList, weight: Scalar) -> TensorList:
        torch._foreach_lerp_(self.tensors, end.tensors, weight)
        return self

    def maximum_(self, other: TensorList) -> TensorList:
        torch._foreach_maximum_(self.tensors, other.tensors)
        return self

    def __truediv__(self, other: TensorList | Scalar) -> TensorList:
        return TensorList(torch._foreach_div(self.tensors, _operand(other)))

    def __rtruediv__(self, other: Scalar) -> TensorList:
        # _foreach_div takes no number on the left
        return TensorList(torch._foreach_mul(self.reciprocal().tensors, other))

    def __mul__(self, other: TensorList | Scalar) -> TensorList:
        return TensorList(torch._foreach_mul(self.tensors, _operand(other)))

    __rmul__ = __mul__

    def __add__(self, other: TensorList | Scalar) -> TensorList:
        return self.add(other)

    __radd__ = __add__

    def __sub__(self, other: TensorList | Scalar) -> TensorList:
        if isinstance(other, TensorList):
            return TensorList(torch._foreach_sub(self.tensors, other.tensors))
        return self.add(-other)

    def __rsub__(self, other: Scalar) -> TensorList:
        return TensorList(torch._foreach_add(torch._foreach_neg(self.tensors), other))

    def __rpow__(self, base: Scalar) -> TensorList:
        return TensorList(torch._foreach_pow(base, self.tensors))

    def __pow__(self, exponent: float) -> TensorList:
        return TensorList(torch._foreach_pow(self.tensors, exponent))

    def __neg__(self) -> TensorList:
        return self.neg()


def _operand(value: TensorList | Scalar) -> Any:
    return value.tensors if isinstance(value, TensorList) else value


def equal_rows(columns: Sequence[Sequence[Any]]) -> list[list[int]]:
    """The numbers of the rows of a table that are equal to each other, in the order of the first of each."""
    if all(len(set(column)) == 1 for column in columns):
        return [list(range(len(columns[0])))]  # quicker than making a key of each row
    parts: defaultdict[Any, list[int]] = defaultdict(list)
    for i, row in enumerate(zip(*columns, strict=True)):
        parts[row].append(i)
    return list(parts.values())


def increment(steps: list[Tensor]) -> None:
    """Add one to each step count."""
    if steps[0].is_cpu and not torch.compiler.is_compiling():
        # a number would be wrapped into a tensor again for each step
        torch._foreach_add_(steps, torch.tensor(1.0, device="cpu"), alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)
