"""Batch normalisation's operators: what compiled code with kernels calls, and when it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.functional as F
from parity_tests.test_conv_operators import compiled, graph_of
from reimpl.functional import _norm_operators

pytest.importorskip("numba", reason="the kernels are compiled by Numba")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

SHAPES = {"planes": (8, 16, 12, 12), "line": (64, 32, 16), "features": (512, 64)}


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with F.use_kernels():
        yield


def arguments(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[case]
    x, w, b = (torch.randn(s, generator=generator, dtype=dtype) for s in (shape, shape[1:2], shape[1:2]))
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_()


def normalize(x: Tensor, w: Tensor | None, b: Tensor | None, relu: bool = False, **averages: Any) -> Tensor:
    mean, var = averages.get("mean"), averages.get("var")
    return (F.batch_norm_relu if relu else F.batch_norm)(x, mean, var, w, b, True)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("case", SHAPES)
def test_operators_pass_pytorchs_own_check(case: str, relu: bool) -> None:
    x, w, b = arguments(case)
    # two computations in float32, whose sums are taken in other orders
    torch.library.opcheck(_norm_operators._batch_norm, (x, w, b, 1e-5, relu), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(_norm_operators._batch_norm, (x.detach(), None, None, 1e-5, relu))


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("case", SHAPES)
def test_compiled_agrees_with_eager(case: str, relu: bool) -> None:
    x, w, b = arguments(case)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (normalize, compiled(normalize)):
        mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        output = function(x, w, b, relu, mean=mean, var=var)
        results.append((output, mean, var, *torch.autograd.grad(output, (x, w, b), grad)))
    # the same kernels
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_layouts_are_eager_ones() -> None:
    x = arguments("planes")[0].detach().to(memory_format=torch.channels_last)
    assert compiled(normalize)(x, None, None).stride() == normalize(x, None, None).stride() == x.stride()


def test_some_gradients_and_none() -> None:
    for wanted in ((0,), (1,), (2,), (0, 2)):
        args = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(arguments("planes"))]
        leaves = [args[i] for i in wanted]
        grads = [torch.autograd.grad(f(*args).square().sum(), leaves) for f in (normalize, compiled(normalize))]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_gradient_of_a_gradient_inside_the_compiled_function() -> None:
    x, w, b = arguments("planes")

    def second(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.func.grad(lambda x: torch.func.grad(lambda y: normalize(y, w, b).pow(3).sum())(x).square().sum())(
            x
        )  # type: ignore[no-any-return]

    # two computations in float32, by kernels and by the composition
    torch.testing.assert_close(compiled(second)(x, w, b), second(x, w, b), rtol=1e-3, atol=1e-2)


def test_the_graph_has_the_operator_where_kernels_would_run() -> None:
    operator = "reimpl.batch_norm.default"
    x, w, b = arguments("planes")
    assert operator in graph_of(normalize, x, w, b)
    assert operator not in graph_of(normalize, *arguments("planes", torch.float64))
    with F.use_kernels(False):
        assert operator not in graph_of(normalize, x, w, b)
