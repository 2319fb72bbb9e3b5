"""Batch normalisation through compiled kernels: against the oracle in every layout, mode and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.kernel_launches import noted, without_node
from parity_tests.oracle import functional as oracle
from parity_tests.oracle import functional_norm as oracle_norm
from parity_tests.test_conv import exact_with_gradients, with_gradients
from reimpl.testing import SEEDS, Verdict, combine, judge, random_tensor, seeded_generator, to_oracle

pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from reimpl.functional._dispatch import CHANNELS_LAST
from reimpl.functional._norm import numba as _norm_numba
from reimpl.functional.kernels import kernels_for

# (N, C, *) and whether it lies as channels_last: whole planes to a strip, blocks of small planes, pixels, features.
BATCHES: dict[str, tuple[tuple[int, ...], bool]] = {
    "planes": ((6, 5, 13, 11), False),
    "small planes": ((9, 140, 4, 4), False),
    "small planes, few channels": ((33, 3, 3, 2), False),
    "line": ((4, 3, 9), False),
    "volume": ((2, 3, 2, 9, 8), False),
    "channels_last": ((5, 7, 6, 5), True),
    "channels_last, many channels": ((3, 700, 2, 3), True),
    "volume by pixel": ((2, 5, 2, 4, 3), True),
    "features": ((75, 19), False),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels on; plans are kept, so that what a test changes must not outlive it."""
    without_node(monkeypatch)
    forget()
    with F.use_kernels():
        yield
    forget()


def forget() -> None:
    for kept in (_norm_numba._cut, _norm_numba._forward_step, _norm_numba._backward_step):
        kept.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run from here on, by name."""
    names: list[str] = []
    noted(monkeypatch, _norm_numba, lambda input: _norm_numba._kernels(input.dtype), names)
    return names


def batch(case: str, dtype: torch.dtype, seed: int) -> Tensor:
    shape, by_pixel = BATCHES[case]
    x = 2 * random_tensor(shape, dtype, seeded_generator(seed, case)) + 1
    return (x.to(memory_format=CHANNELS_LAST[x.dim()]) if by_pixel else x).requires_grad_()


def arguments(case: str, dtype: torch.dtype, seed: int, training: bool) -> tuple[Tensor | None, ...]:
    """Input, running averages (in evaluation), weight and bias."""
    x, generator = batch(case, dtype, seed), seeded_generator(seed, "vectors")
    mean, var, weight, bias = (random_tensor(x.shape[1:2], dtype, generator) for _ in range(4))
    averages = (None, None) if training else (mean, var.abs() + 0.5)
    return x, *averages, weight.requires_grad_(), bias.requires_grad_()


def torch_relu(*args: Any, **kwargs: Any) -> Tensor:
    return torch_functional.relu(torch_functional.batch_norm(*args, **kwargs))


@pytest.mark.parity
@pytest.mark.parametrize("chunk", [None, 64], ids=["whole", "in chunks"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BATCHES)
def test_against_the_oracle(
    case: str,
    dtype: torch.dtype,
    training: bool,
    relu: bool,
    chunk: int | None,
    ran: list[str],
    record: Callable[..., Verdict],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunk is not None:
        monkeypatch.setattr(_norm_numba, "_CHUNK", chunk)
    function = F.batch_norm_relu if relu else F.batch_norm
    torch_function = torch_relu if relu else torch_functional.batch_norm
    exact_function = oracle_norm.batch_norm_relu if relu else oracle.batch_norm
    magnitude = oracle_norm.batch_norm_relu_magnitude if relu else oracle.batch_norm_magnitude
    rows = []
    for seed in SEEDS:
        args = arguments(case, dtype, seed, training)
        if relu and dtype == torch.bfloat16:
            # values at the corner round to either side of it, and the gradient jumps there
            args = (args[0], *args[1:4], torch.full_like(args[4], 64.0).requires_grad_())  # type: ignore[arg-type]
        differentiated = (args[0], *args[3:])

        def of(call: Callable[..., Any], averages: Any = args[1:3]) -> Callable[..., Any]:
            return lambda x, weight, bias: call(x, *averages, weight, bias, training=training)

        ours, theirs = (with_gradients(of(call), differentiated, seed) for call in (function, torch_function))
        assert ours[0].stride() == args[0].stride() and ours[1].stride() == args[0].stride()  # type: ignore[union-attr]
        grad = to_oracle(random_tensor(ours[0].shape, dtype, seeded_generator(seed, "grad", tuple(ours[0].shape))))
        arrays = [None if a is None else to_oracle(a) for a in args]
        exact = exact_with_gradients(exact_function, arrays, grad, training=training)
        scale = exact_with_gradients(magnitude, arrays, np.abs(grad), training=training)
        rows.append(
            [judge(*row) for row in zip(ours, theirs, exact[:2] + exact[4:], scale[:2] + scale[4:], strict=True)]
        )
    assert set(ran) == {"forward", "backward", "add_up"}
    technique = "batch_norm_relu" if relu else "batch_norm"
    desc = f"{'training' if training else 'evaluation'}, {case}{'' if chunk is None else ', in chunks'}"
    for quantity, column in zip(
        ("output", *(f"gradient {i}" for i in (0, 3, 4))), zip(*rows, strict=True), strict=True
    ):
        verdict = combine(column)
        record(
            verdict, kind="function", technique=technique, ids=("F10",), case=desc, quantity=quantity,
            implementation="kernels", device="cpu", dtype=dtype, seeds=len(rows),
        )  # fmt: skip
        verdict.check(f"{technique}, kernels", desc, quantity)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", BATCHES)
def test_only_what_is_wanted(case: str, training: bool, ran: list[str]) -> None:
    """Each gradient alone equals the one among all, and none is made up where there is no parameter."""
    args = arguments(case, torch.float32, 0, training)
    leaves = [args[0], *args[3:]]
    grad = torch.randn_like(F.batch_norm(*args, training=training))  # type: ignore[arg-type]
    together = torch.autograd.grad(F.batch_norm(*args, training=training), leaves, grad)  # type: ignore[arg-type]
    for i, expected in zip((0, 3, 4), together, strict=True):
        one = [a if a is None or k == i else a.detach() for k, a in enumerate(args)]
        (alone,) = torch.autograd.grad(F.batch_norm(*one, training=training), one[i], grad)  # type: ignore[arg-type]
        assert torch.equal(alone, expected)
    bare = (args[0], *args[1:3])
    y = F.batch_norm(*bare, training=training)  # type: ignore[arg-type]
    affine = F.batch_norm(*bare, *(torch.full_like(args[3], v) for v in (1, 0)), training=training)  # type: ignore[arg-type]
    assert torch.equal(y, affine) and len(ran) >= 11


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_bfloat16_beside_float32_parameters(training: bool, ran: list[str]) -> None:
    """As under autocast: statistics and gradients of the parameters in float32."""
    x = torch.randn(9, 6, 5, 4).bfloat16().requires_grad_()
    weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
    averages = torch.randn(6), torch.rand(6) + 0.5
    ours_averages, exact_averages = [a.clone() for a in averages], [a.double() for a in averages]
    y = F.batch_norm(x, *ours_averages, weight, bias, training)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact = torch_functional.batch_norm(doubles[0], *exact_averages, *doubles[1:], training)
    grad = torch.randn_like(x)
    grads = torch.autograd.grad(y, (x, weight, bias), grad)
    expected = torch.autograd.grad(exact, doubles, grad.double())
    assert y.dtype == grads[0].dtype == torch.bfloat16 and grads[1].dtype == grads[2].dtype == torch.float32
    for ours, right in zip((y, grads[0]), (exact, expected[0]), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2**-8, atol=1e-4)  # rounded once, at the end
    for ours, right in zip((*grads[1:], *ours_averages), (*expected[1:], *exact_averages), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-4)  # float32 sums of 180 terms
    assert set(ran) == {"forward", "backward", "add_up"}


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_is_not_finite_passes_through(case: str, training: bool) -> None:
    args = [a if a is None else a.detach().clone() for a in arguments(case, torch.float32, 0, training)]
    first = (0,) * (args[0].dim() - 2)  # type: ignore[union-attr]
    args[0][(1, 0, *first)], args[0][(1, 2, *first)] = torch.nan, torch.inf  # type: ignore[index]
    for ours, theirs in ((F.batch_norm, torch_functional.batch_norm), (F.batch_norm_relu, torch_relu)):
        x = args[0].requires_grad_()  # type: ignore[union-attr]
        results = []
        for function in (ours, theirs):
            y = function(*args, training=training)  # type: ignore[operator]
            results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine.isnan(), other.isnan())
            torch.testing.assert_close(mine.isinf(), other.isinf())


def test_a_gradient_in_another_layout(ran: list[str]) -> None:
    for by_pixel in (False, True):
        x = torch.randn(4, 6, 5, 3)
        x = (x.to(memory_format=torch.channels_last) if by_pixel else x).requires_grad_()
        y = F.batch_norm(x, None, None, training=True)
        grad = torch.randn(4, 6, 5, 3)
        expected = torch_functional.batch_norm(exact := x.detach().double().requires_grad_(), None, None, training=True)
        (right,) = torch.autograd.grad(expected, exact, grad.double())
        for g in (grad, grad.to(memory_format=torch.channels_last), torch.cat([grad, grad], 3)[..., 3:]):
            (mine,) = torch.autograd.grad(y, x, g, retain_graph=True)
            torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5)  # float32 sums of 60 terms
    assert ran.count("backward") == 6


def test_gives_way() -> None:
    x = torch.randn(8, 4, 6)
    assert kernels_for("_norm.numba", x) and kernels_for("_norm.numba", x.bfloat16(), x.double())
    for other in (x.half(), x.to("meta")):
        assert kernels_for("_norm.numba", other) is None
    assert not _norm_numba.worth_it(torch.randn(3)) and not _norm_numba.worth_it(x.transpose(1, 2))
    assert not _norm_numba.worth_it(torch.randn(0, 3)) and _norm_numba.worth_it(x)
    empty = F.batch_norm(torch.randn(0, 3, 2, 2), torch.zeros(3), torch.ones(3))
    assert empty.shape == (0, 3, 2, 2)
