"""Activations and pooling through compiled kernels and in blocks: as near to the oracle, and PyTorch's to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.functional_cases import row_of, verdicts
from parity_tests.kernel_launches import noted, without_node
from reimpl.functional import _plain
from reimpl.functional._pooling import plain as _pooling_plain
from reimpl.testing import SEEDS, Sample, Verdict, bits_equal, combine, random_tensor, seeded_generator

pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from reimpl.functional._pointwise import numba as _pointwise_numba
from reimpl.functional._pooling import numba as _pooling_numba

ACTIVATIONS = ("relu", "leaky_relu", "sigmoid", "tanh")
SHAPES: dict[str, tuple[int, ...]] = {"vector": (37,), "planes": (3, 5, 6, 7), "beyond a block": (70_003,)}


@pytest.fixture(params=["kernels", "blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compiled kernels, or PyTorch's operators over short blocks."""
    without_node(monkeypatch)
    monkeypatch.setattr(_pointwise_numba, "_GRAIN", 1 << 10)
    monkeypatch.setattr(_plain, "_BLOCK", 50)
    with F.use_kernels(request.param == "kernels"):
        yield request.param


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run from here on, by name."""
    names: list[str] = []
    pooling = SimpleNamespace(**{**vars(_pooling_numba.average_kernels()), **vars(_pooling_numba.largest_kernels())})
    for module, kernels in ((_pointwise_numba, _pointwise_numba._KERNELS), (_pooling_numba, pooling)):
        noted(monkeypatch, module, lambda _, kernels=kernels: kernels, names)
    return names


def torch_of(name: str) -> Callable[..., Any]:
    return getattr(torch, name) if name in ("sigmoid", "tanh") else getattr(torch_functional, name)


def with_gradient(function: Callable[..., Any], x: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y) if grad is None else grad)[0]


@pytest.mark.parity
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_against_the_oracle(
    name: str,
    layout: torch.memory_format,
    way: str,
    record: Callable[..., Verdict],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran, found = counted(monkeypatch), {}
    for desc, shape in SHAPES.items():
        if layout == torch.channels_last and len(shape) != 4:
            continue
        for seed in SEEDS:
            for factor in (1, 20, 2**-12):
                x = factor * random_tensor(shape, torch.float32, seeded_generator(seed, name, desc))
                x = x.to(memory_format=layout).requires_grad_()
                for quantity, verdict in verdicts(row_of(name), Sample((x,)), seed):
                    found.setdefault((desc, factor, quantity), []).append(verdict)
    # the gradient is contiguous, and goes another way where the output is not
    differentiated = {"differentiate"} if layout == torch.contiguous_format else set()
    assert set(ran) == ({"activate"} | differentiated if way == "kernels" else set())
    for (desc, factor, quantity), rows in found.items():
        verdict = combine(rows)
        record(
            verdict, kind="function", technique=name, ids=("F2",), case=f"{desc}, times {factor}, {layout}",
            quantity=quantity, implementation=way, device="cpu", dtype=torch.float32, seeds=len(rows),
        )  # fmt: skip
        verdict.check(f"{name}, {way}", f"{desc}, times {factor}", quantity)


@pytest.mark.parametrize("bug", ["constant", "slope"])
def test_a_wrong_activation_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would notice one ulp of 1, and a wrong branch."""
    original = _pointwise_numba.forward

    def wrong(name: str, input: Tensor, slope: float = 0.0) -> Tensor:
        output = original(name, input, slope * 1.01)
        return output + 2**-20 if bug == "constant" else output

    monkeypatch.setattr(_pointwise_numba, "forward", wrong)
    without_node(monkeypatch)
    x = random_tensor((100,), torch.float32, seeded_generator(0, "bug")).requires_grad_()
    with F.use_kernels():
        assert not all(verdict.ok for _, verdict in verdicts(row_of("leaky_relu"), Sample((x,)), 0))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_finite_passes(name: str, way: str) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, -nan, 1e-40, -1e-40, 3.0, -3.0] * 20)
    grad = torch.tensor([1.0, nan, inf, -inf, -0.0, 2.0, -1.0] * 30)[: len(x)]
    ours, theirs = (with_gradient(function, x, grad) for function in (getattr(F, name), torch_of(name)))
    for mine, other in zip(ours, theirs, strict=True):
        if name in ("relu", "leaky_relu"):
            assert torch.equal(mine.isnan(), other.isnan())
            assert torch.equal(mine.nan_to_num(7), other.nan_to_num(7))
        else:
            torch.testing.assert_close(mine, other, equal_nan=True)


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, 1.5, -0.3])
def test_slopes_of_leaky_relu(slope: float, way: str) -> None:
    x, grad = torch.randn(2, 317)
    ours = with_gradient(lambda x: F.leaky_relu(x, slope), x, grad)
    theirs = with_gradient(lambda x: torch_functional.leaky_relu(x, slope), x, grad)
    # One product, by a slope that both take in float32.
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_tensors_laid_out_otherwise_are_left_to_operators(way: str) -> None:
    x = torch.randn(8, 6, 5, 10)
    for strided in (x[:, ::2], x.transpose(1, 3), x[:1].expand(4, -1, -1, -1)):
        for name in ACTIVATIONS:
            for grad in (torch.randn_like(strided), torch.ones(()).expand(strided.shape)):
                ours, theirs = (with_gradient(f, strided, grad) for f in (getattr(F, name), torch_of(name)))
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_channels_last_both_ways(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    x, grad = (torch.randn(3, 5, 6, 7).to(memory_format=torch.channels_last) for _ in range(2))
    ours, theirs = (with_gradient(function, x, grad) for function in (getattr(F, name), torch_of(name)))
    torch.testing.assert_close(ours, theirs)
    assert all(mine.stride() == x.stride() for mine in ours)
    assert set(ran) == ({"activate", "differentiate"} if way == "kernels" else set())


def _geometries() -> Iterator[tuple[tuple[int, ...], tuple[Any, ...]]]:
    rng = np.random.default_rng(0)
    for _ in range(40):
        kernel, dilation, stride = rng.integers(1, 5, 2), rng.integers(1, 3, 2), rng.integers(1, 4, 2)
        padding = [int(rng.integers(0, k // 2 + 1)) for k in kernel]
        # at least as large as a window and its padding
        size = dilation * (kernel - 1) + 1 + rng.integers(0, 7, 2) + padding
        shape = (int(rng.integers(1, 4)), int(rng.choice([1, 3, 17])), *map(int, size))
        options = (*(tuple(map(int, v)) for v in (kernel, stride, padding, dilation)), bool(rng.random() < 0.3))
        yield shape, options
    yield (3, 17, 8, 6), ((2, 2), (2, 2), (0, 0), (1, 1), False)
    yield (2, 3, 7, 9), ((2, 2), (2, 2), (0, 0), (1, 1), False)


def _threads(number: int) -> int:
    """Two for a few of the geometries: where other processes keep the cores busy, two threads wait for each other."""
    return 2 if number % 7 == 0 else 1


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "unbatched": lambda x: x[0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("finite", [False, True], ids=["whatever", "finite"])
def test_largest_of_each_window_to_the_bit(
    finite: bool, layout: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, plainly = counted(monkeypatch), []
    for name in ("largest", "largest_of_grid"):
        original = getattr(_pooling_plain, name)

        def noting(*args: Any, original: Any = original) -> Any:
            plainly.append((result := original(*args)) is not None)
            return result

        monkeypatch.setattr(_pooling_plain, name, noting)
    for number, (shape, options) in enumerate(_geometries()):
        torch.set_num_threads(_threads(number))
        # Few different values, so that there are ties to break.
        x = torch.randint(-2, 3, shape, generator=seeded_generator(number, "largest")).float()
        if not finite:
            x[0, 0, :2, :2], x[-1, -1] = torch.nan, -torch.inf
        x = LAYOUTS[layout](x)
        half = (max(1, shape[2] // 2), max(1, shape[3] // 2))
        calls = [("max_pool2d", options), *(("adaptive_max_pool2d", (size,)) for size in ((3, 5), 1, half, (1, 2)))]
        for name, args in calls:
            ours, theirs = (getattr(m, name)(x, *args, return_indices=True) for m in (F, torch_functional))
            assert bits_equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]), (name, shape, args)
            grad = torch.randint(-9, 9, theirs[0].shape, generator=seeded_generator(number, "grad")).float()
            (_, mine), (_, other) = (
                with_gradient(lambda x, m=m: getattr(m, name)(x, *args), x, grad)  # noqa: B023
                for m in (F, torch_functional)
            )
            assert torch.equal(mine, other), (name, shape, args)
    one_by_one = {"largest_of_planes", "scatter"}
    expected = one_by_one | {"largest_of_overlapping"} | ({"largest_of_pixels"} if layout == "channels_last" else set())
    assert set(ran) == (expected if way == "kernels" else set())
    if way == "blocks":
        assert any(plainly) and (finite or not all(plainly))
        assert all(plainly) or not finite or layout == "unbatched"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), ((2, 3), (2, 3), 0), (3, 1, 1), (2, 3, 1)], ids=str)
def test_largest_of_pixels_of_many_channels(window: tuple[Any, ...], layout: str, way: str) -> None:
    """Zeros of both signs tie; what is not finite, and -0, reach in the gradient no other element than the largest."""
    for channels in (3, 40):
        shape, generator = (4, channels, 9, 8), seeded_generator(channels, "pixels")
        signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
        x = LAYOUTS[layout](torch.randint(0, 2, shape, generator=generator) * signs)
        y = F.max_pool2d(x, *window)
        assert bits_equal(y, torch_functional.max_pool2d(x, *window))
        grad = torch.randn(y.shape, generator=generator)
        for numbers in ((-0.0, 0.0), (-torch.inf, torch.inf), (torch.nan, -0.0)):
            grad[..., 0, :2] = torch.tensor(numbers)
            (_, mine), (_, other) = (
                with_gradient(lambda x, m=m: m.max_pool2d(x, *window), x, grad) for m in (F, torch_functional)
            )
            torch.testing.assert_close(mine, other, equal_nan=True)
            assert mine.stride() == other.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_largest_of_tiles_is_differentiable_twice(layout: str, way: str) -> None:
    x, weight = torch.randn(3, 8, 6, 6, generator=seeded_generator(0, "twice")), torch.arange(9.0).view(3, 3)
    x = LAYOUTS[layout](x).requires_grad_()
    results = []
    for m in (F, torch_functional):
        scale = torch.tensor(2.0, requires_grad=True)
        (grad,) = torch.autograd.grad((m.max_pool2d(x, 2) * weight * scale).sum(), x, create_graph=True)
        results.append((grad.detach(), *torch.autograd.grad((grad * x.detach()).sum(), scale)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_means_of_each_window(layout: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    for number, (shape, (kernel, stride, padding, _, ceil_mode)) in enumerate(_geometries()):
        torch.set_num_threads(_threads(number))
        x = LAYOUTS[layout](random_tensor(shape, torch.float32, seeded_generator(number, "means")))
        windows = (kernel, stride, padding, ceil_mode, number % 2 == 0, 3 if number % 5 == 0 else None)
        for name, args in (("avg_pool2d", windows), ("adaptive_avg_pool2d", ((3, 5),)), ("adaptive_avg_pool2d", (1,))):
            leaf = x.detach().requires_grad_()
            for quantity, verdict in verdicts(row_of(name), Sample((leaf, *args)), number):
                verdict.check(f"{name}, {way}", f"{shape}, {args}, {layout}", quantity)
    assert set(ran) == ({"average"} if way == "kernels" else set())


@pytest.mark.parametrize("plane", [(1, 1), (1, 2), (3, 5), (4, 4), (7, 9), (8, 8), (9, 11)], ids=str)
def test_means_of_whole_planes(plane: tuple[int, int], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, count = counted(monkeypatch), plane[0] * plane[1]
    x = random_tensor((5, 3, *plane), torch.float32, seeded_generator(0, "whole", plane))
    x[1, 1, 0, 0], x[2, 0, -1, -1] = torch.nan, torch.inf
    grad = random_tensor((5, 3, 1, 1), torch.float32, seeded_generator(1, "whole"))
    y, found = with_gradient(lambda x: F.adaptive_avg_pool2d(x, 1), x, grad)
    exact = x.double().mean((-2, -1), keepdim=True)
    # sums of up to 99 numbers of size 1, in several parts, then one division
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=16 * 2**-23, equal_nan=True)
    assert torch.equal(found, (grad / count).expand_as(x))
    assert set(ran) == ({"average"} if way == "kernels" else set())


def test_kernels_keep_the_strides_of_channels_last(way: str) -> None:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    for call in (
        lambda m, x: m.max_pool2d(x, 2),
        lambda m, x: m.avg_pool2d(x, 3, 2, 1),
        lambda m, x: m.adaptive_avg_pool2d(x, (3, 2)),
        lambda m, x: m.adaptive_max_pool2d(x, 4),
        lambda m, x: m.relu(x),
    ):
        assert call(F, x).stride() == call(torch_functional, x).stride()


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
def test_linear_activation(activation: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    for seed in SEEDS:
        generator = seeded_generator(seed, "linear_activation")
        args = (random_tensor(s, torch.float32, generator).requires_grad_() for s in ((9, 7), (13, 7), (13,)))
        for quantity, verdict in verdicts(row_of("linear_activation"), Sample((*args, activation)), seed):
            verdict.check(f"linear_activation, {way}", activation, quantity)
    assert set(ran) == ({"activate", "differentiate"} if way == "kernels" else set())


def test_only_plain_float32_runs_through_kernels(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    x = torch.randn(2, 4, 8, 8)
    for other in (x.double(), x.bfloat16(), x.to("meta")):
        F.tanh(other), F.relu(other), F.avg_pool2d(other, 2)
    for other in (x.double(), x.to("meta")):
        F.max_pool2d(other, 2)
    torch.vmap(F.relu)(x)
    torch.func.jvp(F.sigmoid, (x,), (x,))
    torch.vmap(lambda x: F.max_pool2d(x, 2))(x)
    assert not ran


def test_gradients_of_gradients(way: str) -> None:
    x = torch.randn(2, 3, 8, 8)

    def loss(namespace: Any, x: Tensor) -> Tensor:
        y = namespace.avg_pool2d(namespace.max_pool2d(namespace.relu(x), 2), 2)
        sigmoid, tanh = (getattr(F if namespace is F else torch, name) for name in ("sigmoid", "tanh"))
        return sigmoid(tanh(namespace.adaptive_avg_pool2d(y, 1))).pow(3).sum()  # type: ignore[no-any-return]

    results = []
    for namespace, point in ((F, x), (torch_functional, x.double())):
        leaf = point.requires_grad_()
        (grad,) = torch.autograd.grad(loss(namespace, leaf), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    # A chain of six functions in float32, twice differentiated, against float64.
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_shift_beyond_the_width_leaves_nothing(dtype: torch.dtype, device: torch.device) -> None:
    """What masking a gradient by its bits relies on: the bits of 1 as a shift, over vectors and their remainders."""
    one = torch.ones(1037, dtype=dtype, device=device)
    bits = _plain.of_bits(one).dtype
    if device.type == "cpu":
        for pattern in (-1, 1, torch.iinfo(bits).min):
            numbers = torch.full_like(one, pattern, dtype=bits)
            for shift in (one.view(bits), one.view(bits)[::2]):
                shifted = torch.bitwise_left_shift(numbers[: len(shift)], shift)
                assert not shifted.any()
                assert torch.equal(
                    torch.bitwise_left_shift(shifted + pattern, torch.zeros_like(shift)), shifted + pattern
                )
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, 3.0], dtype=dtype, device=device)
    kept = _plain.masked(special, torch.ones_like(special))
    assert bits_equal(kept, special) and not _plain.masked(special, torch.zeros_like(special)).any()
    rectified = one.clone()
    rectified[::2] = 0
    assert torch.equal(_plain.masked(2 * one, rectified), 2 * rectified)


@pytest.mark.parametrize("layout", ["planes", "channels_last"])
def test_pooling_of_empty_batches_and_beside_another_default_device(layout: str, way: str) -> None:
    calls: tuple[Callable[[Any, Tensor], Tensor], ...] = (
        lambda m, x: m.max_pool2d(x, 2),
        lambda m, x: m.max_pool2d(x, 3, 2, 1),
        lambda m, x: m.adaptive_max_pool2d(x, 4),
        lambda m, x: m.adaptive_max_pool2d(x, 1),
        lambda m, x: m.avg_pool2d(x, 2),
        # as many windows as would tile the plane, but shifted by the padding
        lambda m, x: m.avg_pool2d(x, 3, 3, 1),
        lambda m, x: m.adaptive_avg_pool2d(x, 4),
    )
    x = LAYOUTS[layout](random_tensor((2, 4, 9, 6), torch.float32, seeded_generator(0, "default")))
    for call in calls:
        theirs = with_gradient(lambda x, call=call: call(torch_functional, x), x)  # type: ignore[misc]
        torch.set_default_device("meta")
        try:
            ours = with_gradient(lambda x, call=call: call(F, x), x)  # type: ignore[misc]
        finally:
            torch.set_default_device(None)
        torch.testing.assert_close(ours, theirs)
        empty = with_gradient(lambda x, call=call: call(F, x), x[:0])  # type: ignore[misc]
        assert empty[0].shape == (0, *theirs[0].shape[1:]) and empty[1].shape == (0, *x.shape[1:])
