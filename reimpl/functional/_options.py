"""Options that are numbers or truth values, and nothing else that Python would take for one."""

from __future__ import annotations

from operator import index
from typing import Any

import torch


def integer(value: Any) -> int:
    """``value``, which a tensor or NumPy may hold, as an integer of 64 bits.

    Raises:
        TypeError: it is a truth value, or no integer; the door of :mod:`reimpl.functional` finds PyTorch's words.
        ValueError: 64 bits do not hold it.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        number: Any = value
    elif isinstance(value, bool):
        raise TypeError("expected an integer, got a truth value")
    else:
        number = index(value)
    if type(number) is int and not -(1 << 63) <= number < 1 << 63:
        raise ValueError("Overflow when unpacking long long")
    return number  # type: ignore[no-any-return]


def check_flags(*values: Any) -> None:
    """Raise a ``TypeError`` where one is not ``True`` or ``False``, but merely counts as such."""
    for value in values:
        if type(value) is not bool and not isinstance(value, torch.SymBool):
            raise TypeError(f"expected a truth value, got {value!r}")


def check_number(value: Any) -> None:
    """Raise a ``TypeError`` where it is no real number, nor a constant tensor that holds one."""
    if isinstance(value, torch.Tensor):
        if value.dim() or value.requires_grad:
            raise TypeError(f"expected a number, got a tensor of shape {list(value.shape)}")
    elif not hasattr(value, "__float__") and not hasattr(value, "__index__"):
        raise TypeError(f"expected a number, got {value!r}")
