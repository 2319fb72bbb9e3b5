"""Layers through the library's own compiled kernels: as near to the oracle, and the same citizens, as without."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.kernel_launches import noted
from parity_tests.oracle import functional as oracle
from parity_tests.test_conv import exact_with_gradients, with_gradients
from reimpl.functional.kernels import kernels_enabled, kernels_for
from reimpl.testing import SEEDS, Verdict, combine, judge, random_tensor, seeded_generator, to_oracle

pytest.importorskip("numba", reason="the kernels are compiled by Numba")
# PyTorch's word about what its forward mode imports.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

from reimpl.functional._conv import numba as _conv_numba  # noqa: E402
from reimpl.functional._norm import numba as _norm_numba  # noqa: E402
from reimpl.functional._numba_tiles import LANES  # noqa: E402


@pytest.fixture(autouse=True)
def _small_work_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels on, whatever the size."""
    for name in ("_LEAST_WORK", "_LEAST_OUTPUTS"):
        monkeypatch.setattr(_conv_numba, name, 0)
    with F.use_kernels():
        yield


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run from here on, by name."""
    names: list[str] = []
    original = _conv_numba.run

    def noting(kernel: Any, *args: Any) -> None:
        names.append(kernel.__name__)
        original(kernel, *args)

    monkeypatch.setattr(_conv_numba, "run", noting)
    noted(monkeypatch, _norm_numba, lambda input: _norm_numba._kernels(input.dtype), names)
    return names


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 16, 17, 18), (40, 16, 3, 3), {"padding": 1}),
    "3x3 over small images": ((20, 32, 4, 4), (24, 32, 3, 3), {"padding": 1}),
    "first layer": ((3, 3, 9, 20), (8, 3, 3, 3), {"padding": 1, "stride": 2}),
    "first layer, large": ((2, 1, 40, 37), (16, 1, 5, 5), {"padding": (2, 3), "dilation": (2, 1)}),
    "first layer, long windows": ((3, 3, 12, 11), (24, 3, 5, 5), {"padding": 1}),
    "5x4, dilated, groups": ((2, 6, 15, 12), (9, 2, 5, 4), {"padding": (3, 2), "dilation": (2, 1), "groups": 3}),
    "1x1, stride 3": ((2, 33, 8, 7), (17, 33, 1, 1), {"stride": (3, 2)}),
    "more stride than kernel": ((1, 2, 9, 9), (3, 2, 2, 2), {"stride": 3, "padding": 1}),
}


def note(
    rows: list[list[Verdict]], names: tuple[str, ...], record: Callable[..., Verdict], technique: str, case: str
) -> None:
    for quantity, column in zip(names, zip(*rows, strict=True), strict=True):
        verdict = combine(column)
        record(
            verdict, kind="function", technique=technique, ids=("F7" if technique == "conv2d" else "F10",), case=case,
            quantity=quantity, implementation="kernels", device="cpu", dtype=torch.float32, seeds=len(rows),
        )  # fmt: skip
        verdict.check(f"{technique}, kernels", case, quantity)


@pytest.mark.parity
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_against_the_oracle(
    case: str, layout: torch.memory_format, record: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, weight_shape, options = CONVOLUTIONS[case]
    ran, rows = counted(monkeypatch), []
    for seed in SEEDS:
        generator = seeded_generator(seed, case)
        args = tuple(random_tensor(s, torch.float32, generator) for s in (shape, weight_shape, weight_shape[:1]))
        args = (args[0].to(memory_format=layout).requires_grad_(), *(a.requires_grad_() for a in args[1:]))
        ours = with_gradients(F.conv2d, args, seed, **options)
        theirs = with_gradients(torch_functional.conv2d, args, seed, **options)
        assert ours[0].stride() == theirs[0].stride()
        grad = to_oracle(
            random_tensor(ours[0].shape, torch.float32, seeded_generator(seed, "grad", tuple(ours[0].shape)))
        )
        arrays = [to_oracle(arg) for arg in args]
        exact = exact_with_gradients(oracle.conv2d, arrays, grad, **options)
        scale = exact_with_gradients(oracle.conv2d, [np.abs(x) for x in arrays], np.abs(grad), **options)
        rows.append([judge(*row) for row in zip(ours, theirs, exact, scale, strict=True)])
    # a shorter register holds no row of these taps, or its tiles are of another height
    thin = "first layer" in case and LANES == 16
    assert {"convolve", "convolve_weight_thin" if thin else "convolve_weight", "pack_weight"} <= set(ran)
    names = ("output", "gradient 0", "gradient 1", "gradient 2")
    note(rows, names, record, "conv2d", f"{case}, {'planes' if layout is torch.contiguous_format else 'channels_last'}")


def _geometries() -> Iterator[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    rng = np.random.default_rng(1)
    for _ in range(30):
        groups, count = int(rng.choice([1, 1, 1, 2])), int(rng.choice([1, 3, 17]))
        kernel, dilation = rng.integers(1, 5, 2), rng.integers(1, 3, 2)
        padding, stride = rng.integers(0, 4, 2), rng.integers(1, 5, 2)
        size = np.maximum(1, dilation * (kernel - 1) + 1 + rng.integers(0, 8, 2) - 2 * padding)
        channels, outputs = (int(rng.choice([1, 5, 16, 33])) for _ in range(2))
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        yield (
            (count, groups * channels, *map(int, size)),
            (groups * outputs, channels, *map(int, kernel)),
            {"groups": groups} | {name: tuple(map(int, value)) for name, value in options.items()},
        )


@pytest.mark.parametrize("threads", [1, 2])
def test_random_geometries(threads: int) -> None:
    torch.set_num_threads(threads)
    for number, (shape, weight_shape, options) in enumerate(_geometries()):
        generator = seeded_generator(number, "geometry")
        args = tuple(
            random_tensor(s, torch.float32, generator).requires_grad_() for s in (shape, weight_shape, weight_shape[:1])
        )
        doubles = tuple(arg.detach().double().requires_grad_() for arg in args)
        ours = with_gradients(F.conv2d, args, number, **options)
        exact = with_gradients(torch_functional.conv2d, doubles, number, **options)
        for mine, other in zip(ours, exact, strict=True):
            # Sums of up to 2,000 products of size 1, each within half an eps of its part of the sum.
            limit = 32 * torch.finfo(torch.float32).eps * float(other.detach().abs().max().clamp_min(1))
            torch.testing.assert_close(
                mine.double(), other, rtol=0, atol=limit, msg=f"{shape} {weight_shape} {options}"
            )


@pytest.mark.parametrize(
    ("shape", "weight_shape", "options"),
    [
        ((37, 16, 8, 8), (16, 16, 3, 3), {"padding": 1}),
        ((9, 32, 16, 16), (64, 32, 3, 3), {"padding": 1, "stride": 2}),
        ((21, 32, 6, 6), (64, 16, 1, 1), {"groups": 2}),
        ((5, 64, 9, 7), (32, 64, 3, 3), {}),
        ((33, 3, 8, 8), (16, 3, 3, 3), {"padding": 1}),
    ],
    ids=["narrow", "strided", "groups", "many channels", "few channels"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_channels_last_is_the_same_sum_read_and_written_where_it_is(
    threads: int, shape: tuple[int, ...], weight_shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Bit for bit what planes give: several images at a time, and the rest of a batch that does not divide."""
    torch.set_num_threads(threads)
    generator = seeded_generator(0, "channels_last")
    x, w = (random_tensor(s, torch.float32, generator).requires_grad_() for s in (shape, weight_shape))
    planes = F.conv2d(x, w, **options)
    grad = random_tensor(planes.shape, torch.float32, generator)
    expected = planes, *torch.autograd.grad(planes, (x, w), grad)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    output = F.conv2d(x, w, **options)
    ours = output, *torch.autograd.grad(output, (x, w), grad.contiguous(memory_format=torch.channels_last))
    assert [t.is_contiguous(memory_format=torch.channels_last) for t in ours[:2]] == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    exact = torch_functional.conv2d(x.detach().double(), w.detach().double(), **options)
    # Sums of up to 576 products of size 1, each within half an eps of its part of the sum.
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=32 * 2**-23 * float(exact.abs().max()))


@pytest.mark.skipif(LANES < 16, reason="registers of 16 numbers hold a row of taps")
def test_few_channels_whatever_the_gradients_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    x, w = torch.randn(5, 3, 9, 8), torch.randn(16, 3, 3, 3, requires_grad=True)
    grads = torch.randn(5, 16, 7, 6), torch.randn(5, 16, 6, 7).mT, torch.randn(5, 16, 1, 1).expand(-1, -1, 7, 6)
    for grad in (*grads, grads[0].to(memory_format=torch.channels_last)):
        (ours,) = torch.autograd.grad(F.conv2d(x, w), w, grad)
        (theirs,) = torch.autograd.grad(torch_functional.conv2d(x, w), w, grad)
        # Sums of 210 products of size 1, each within a few roundings of the largest.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * 2**-23 * float(theirs.abs().max()))
    assert ran.count("convolve_weight_thin") == 4 and "convolve_weight" not in ran


def test_is_taken_only_for_plain_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = counted(monkeypatch)
    x, w = torch.randn(2, 16, 6, 6), torch.randn(16, 16, 3, 3)
    F.conv2d(x.double(), w.double())
    F.conv2d(x.to("meta"), w.to("meta"))
    F.conv2d(x, w, algorithm="im2col")
    F.batch_norm(x.half(), None, None, training=True)
    with F.use_kernels(False):
        F.conv2d(x, w)
    assert not ran
    F.conv2d(x, w)
    assert "convolve" in ran
    assert kernels_for("_conv.numba", x.double()) is None


def test_half_precision_is_multiplied_in_float32_and_rounded_once() -> None:
    x, w = torch.randn(2, 16, 6, 6).bfloat16(), torch.randn(16, 16, 3, 3).bfloat16()
    assert torch.equal(F.conv2d(x, w), F.conv2d(x.float(), w.float()).bfloat16())


def test_derivatives_of_every_kind_still_work() -> None:
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)

    def loss(namespace: Any, x: Tensor, w: Tensor) -> Tensor:
        y = namespace.conv2d(x, w, padding=1)
        y = namespace.batch_norm(y, None, None, training=True)
        return y.pow(3).mean()  # type: ignore[no-any-return]

    def second(namespace: Any, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss(namespace, x, w), (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w))

    reference = second(torch_functional, x.detach().double().requires_grad_(), w.detach().double().requires_grad_())
    for mine, other in zip(second(F, x, w), reference, strict=True):
        limit = 256 * torch.finfo(torch.float32).eps * float(other.abs().max())  # a chain of eight layers of sums
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=limit)
    point, direction = x.detach(), torch.randn_like(x)
    for ours, theirs in zip(
        torch.func.jvp(lambda x: loss(F, x, w.detach()), (point,), (direction,)),
        torch.func.jvp(lambda x: loss(torch_functional, x, w.detach()), (point,), (direction,)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # float32 through two layers of sums
    batch = torch.randn(3, *x.shape)
    mapped = torch.vmap(lambda x: F.conv2d(x, w.detach(), padding=1))(batch)
    torch.testing.assert_close(
        mapped, torch.stack([F.conv2d(x, w.detach(), padding=1) for x in batch]), rtol=0, atol=1e-4
    )


def test_a_network_trains_as_without() -> None:
    curves = []
    for mode in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 4),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator, losses = torch.Generator().manual_seed(0), []
        with F.use_kernels(mode):
            for _ in range(5):
                x, target = torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4
                loss = nn.CrossEntropyLoss()(model(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(losses)
    # Roundings of 6e-8, magnified by five steps through two normalisations.
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-4, atol=1e-5)


def test_the_switch() -> None:
    assert kernels_enabled()
    with F.use_kernels(False):
        assert not kernels_enabled()
        with F.use_kernels(True):
            assert kernels_enabled()
        assert not kernels_enabled()
    assert kernels_enabled()
    with pytest.raises(TypeError, match="mode must be a bool, but got int"):
        F.use_kernels(1)
    assert kernels_enabled()


def test_the_switch_as_a_decorator() -> None:
    @F.use_kernels(False)
    def one() -> bool:
        return kernels_enabled()

    @F.use_kernels(False)
    def several() -> Iterator[bool]:
        yield kernels_enabled()
        yield kernels_enabled()

    assert kernels_enabled() and not one()
    for inside in several():
        assert not inside and kernels_enabled()


_WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
import torch, reimpl.functional as F
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        with F.use_kernels():
            y = F.conv2d(torch.ones(2, 16, 9, 9), torch.ones(16, 16, 3, 3))
assert y.shape == (2, 16, 7, 7)
print([str(w.message) for w in caught if w.filename == "<string>"])
"""


@pytest.mark.slow
def test_without_numba_it_warns_once_and_runs() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", _WITHOUT_NUMBA], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("use_kernels needs numba") == 1 and "reimpl[fused]" in finished.stdout


def test_empty_batches_and_non_finite_numbers() -> None:
    w = torch.randn(16, 16, 3, 3, requires_grad=True)
    x = torch.randn(0, 16, 6, 6, requires_grad=True)
    y = F.conv2d(x, w, padding=1)
    grads = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (0, 16, 6, 6) and grads[0].shape == x.shape and not grads[1].any()
    x = torch.ones(1, 16, 6, 6)
    x[0, 0, 1, 1], x[0, 3, 4, 4] = torch.nan, torch.inf
    ones = torch.ones(16, 16, 3, 3)
    expected = torch_functional.conv2d(x, ones, padding=1)
    torch.testing.assert_close(F.conv2d(x, ones, padding=1), expected, equal_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = F.batch_norm_relu(x, None, None, training=True)
    expected = torch_functional.relu(torch_functional.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(ours, expected, equal_nan=True)


def test_a_network_compiles_whole_with_kernels_on() -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 16, 16, generator=generator)
    leaves = [torch.randn(s, generator=generator, requires_grad=True) for s in ((16, 3, 3, 3), (16,), (10, 256), (10,))]
    target = torch.arange(8)

    def loss(x: Tensor, kernel: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.max_pool2d(F.batch_norm_relu(F.conv2d(x, kernel, padding=1), None, None, gamma, training=True), 2)
        y = F.leaky_relu(F.tanh(F.avg_pool2d(y, 2)) + F.sigmoid(F.relu(F.adaptive_avg_pool2d(y, 4))))
        scores = F.linear(y.flatten(1), weight, bias)
        return F.cross_entropy(scores, target) + F.nll_loss(F.log_softmax(scores, 1), target) + F.mse_loss(x, x * 2)

    results = []
    with F.use_kernels():
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            value = function(x, *leaves)
            results.append((value, *torch.autograd.grad(value, leaves)))
    # two computations in float32, whose sums are taken in other orders
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 8, 16])
@pytest.mark.parametrize("padding", [0, 1])
def test_convolution_of_any_number_of_pixels(outputs: int, padding: int, device: torch.device) -> None:
    """A sum of more terms than one run has is added to, and the last tile is filled up with its last pixel."""
    pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(outputs, 32, 3, 3, generator=generator).to(device)
    for width in range(18, 35):
        x = torch.randn(3, 32, 21, width, generator=generator).to(device)
        with F.use_kernels():
            ours = F.conv2d(x, w, padding=padding)
        theirs = torch.nn.functional.conv2d(x.double(), w.double(), padding=padding)
        # sums of 288 products of size 1 are rounded by some 1e-5; a part that is added twice is off by some 10
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-3)
