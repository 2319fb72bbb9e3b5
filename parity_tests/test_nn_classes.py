"""A layer is an instance of PyTorch's class, for whoever asks, and does nothing that PyTorch's class does."""

from __future__ import annotations

import torch

import pytest

import reimpl.nn as nn
from reimpl.nn.convert import twins

pytestmark = pytest.mark.quick
each_twin = pytest.mark.parametrize(
    ("theirs", "ours"), twins(), ids=[ours.__name__ for _, ours in sorted(twins(), key=str)] and None
)


@pytest.mark.parametrize("name", nn.REIMPLEMENTED)
def test_derives_from_pytorchs_class_and_takes_nothing_from_it(name: str) -> None:
    ours, theirs = getattr(nn, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    pytorchs = {cls for cls in theirs.__mro__ if cls not in torch.nn.Module.__mro__}
    taken = {
        attribute
        for cls in pytorchs
        for attribute, value in vars(cls).items()
        if callable(getattr(value, "__func__", value))
        and next(base for base in ours.__mro__ if attribute in vars(base)) in pytorchs
    }
    print(name, taken)
    assert taken <= _UNUSED.get(name, set()), taken


_UNUSED: dict[str, set[str]] = {}
