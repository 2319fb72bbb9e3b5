"""Odd calls of layers and losses: PyTorch's answer, with its dtype, strides, gradients and warnings, or its refusal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.odd_calls import ROWS
from parity_tests.versions import IS_REFERENCE

LIBRARIES = ((F, nn), (torch_functional, torch.nn))


class Given:
    """The tensors of one call, the same numbers for both libraries, and those of them that want a gradient."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(3)
        self.leaves: list[Tensor] = []

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device, dtype)

    def long(self, *shape: int) -> Tensor:
        return torch.randint(0, 3, shape, generator=self.generator).to(self.device)

    def bool(self, *shape: int) -> Tensor:
        return self.randn(*shape) > 0

    def complex(self, *shape: int) -> Tensor:
        return torch.complex(self.randn(*shape), self.randn(*shape))

    def leaf(self, tensor: Tensor) -> Tensor:
        self.leaves.append(tensor.detach().requires_grad_())
        return self.leaves[-1]

    def grad(self, *shape: int) -> Tensor:
        return self.leaf(self.randn(*shape))


def _tensors(output: Any) -> Iterator[Tensor]:
    for each in (output,) if isinstance(output, Tensor) else output if isinstance(output, (tuple, list)) else ():
        yield from (each,) if isinstance(each, Tensor) else _tensors(each)


def _gradients(given: Given, output: Any) -> list[Tensor | None]:
    wanted = [each for each in _tensors(output) if each.requires_grad]
    if not wanted or not given.leaves:
        return []
    ones = [torch.ones_like(each) for each in wanted]
    return list(torch.autograd.grad(wanted, given.leaves, ones, allow_unused=True))


def outcome(call: Callable[..., Any], library: tuple[Any, Any], device: torch.device) -> tuple[Any, list[Tensor]]:
    """What a call comes to: an exception, or how its results and gradients are described; and these themselves."""
    given = Given(device)
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            output = call(*library, given)
            found = [*_tensors(output), *given.leaves, *_gradients(given, output)]
        except Exception as error:
            return (type(error), str(error)), []
    said = [(w.category, str(w.message).split("(Triggered")[0].rstrip()) for w in caught]
    described = [each if each is None else (each.dtype, each.shape, each.stride()) for each in found]
    return (described, said), [each.detach() for each in found if each is not None]


@pytest.fixture
def _says_everything() -> Iterator[None]:
    """Warnings that are given once are given each time."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("_says_everything")
@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
@pytest.mark.parametrize("name", ROWS)
def test_answers_or_refuses_as_pytorch_does(name: str, kernels: bool) -> None:
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    device = torch.device("cpu")  # whose texts and strides these are
    for number, call in enumerate(ROWS[name]):
        with F.use_kernels(kernels):
            ours, our_tensors = outcome(call, LIBRARIES[0], device)
        theirs, their_tensors = outcome(call, LIBRARIES[1], device)
        where = f"row {number} of {name}"
        if IS_REFERENCE:
            assert ours == theirs, where
        else:
            assert isinstance(ours[0], type) == isinstance(theirs[0], type), where
        for found, expected in zip(our_tensors, their_tensors, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True, msg=lambda text, at=where: f"{at}: {text}")
