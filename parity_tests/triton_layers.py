"""Layers through Triton kernels, against PyTorch and the oracle.

Started by test_triton_layers.py: on a GPU as it is, without one under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.functional_cases import row_of, verdicts
from parity_tests.oracle import functional_norm as oracle_norm
from parity_tests.triton_functions import avg_pool2d, cross_entropy, drawn, hold, max_pool2d, pointwise, softmax
from reimpl.functional import kernels
from reimpl.functional._conv import triton as _triton_conv
from reimpl.functional._losses import triton as _triton_losses
from reimpl.functional._norm import triton as _triton_norm
from reimpl.functional._pointwise import triton as _triton_pointwise
from reimpl.functional._pooling import triton as _triton_pooling
from reimpl.functional._pooling.windows import plan_windows
from reimpl.functional._triton_common import INTERPRETED
from reimpl.testing import Sample, judge, random_tensor, seeded_generator, to_oracle

MODULES = (_triton_conv, _triton_losses, _triton_norm, _triton_pointwise, _triton_pooling)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = [
    # of NumPy about infinities that the interpreted kernels mean, and of PyTorch about its own doings
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def ran(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Triton's kernels on whatever the device; the names of those that ran."""
    assert INTERPRETED or device.type == "cuda", "without a GPU these tests need TRITON_INTERPRET=1"
    names: list[str] = []
    for module in MODULES:

        def noting(kernel: Any, *args: Any, original: Any = module.launch, **options: Any) -> None:
            names.append(kernel.fn.__name__)
            original(kernel, *args, **options)

        monkeypatch.setattr(module, "launch", noting)
    monkeypatch.setitem(kernels.COMPILERS, device.type, "triton")
    with F.use_kernels():
        yield names


DECLARED: dict[str, Callable[..., Tensor]] = {
    **{name: pointwise(name) for name in ("relu", "leaky_relu", "sigmoid", "tanh")},
    **{name: getattr(F, name) for name in ("conv1d", "conv2d", "batch_norm", "batch_norm_relu")},
    "softmax": softmax(False),
    "log_softmax": softmax(True),
}


def _has_subnormal(sample: Sample) -> bool:
    """Whether the softmax has a number of which the interpreter, unlike a GPU, makes another one in bfloat16."""
    values = torch.softmax(sample.args[0].double(), *sample.args[1:], **sample.kwargs)
    return bool(((values > 0) & (values < torch.finfo(torch.bfloat16).tiny)).any())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DECLARED)
def test_declared_cases(name: str, dtype: torch.dtype, device: torch.device, ran: list[str]) -> None:
    technique = replace(row_of(name), ours=DECLARED[name])
    assert technique.samples is not None
    for number, sample in enumerate(technique.samples(device, dtype, seeded_generator(0, name))):
        if INTERPRETED and name == "softmax" and dtype is torch.bfloat16 and _has_subnormal(sample):
            continue
        for quantity, verdict in verdicts(technique, sample, 0):
            verdict.check(name, f"sample {number}, {dtype}", quantity)
    assert ran


def _geometries() -> Iterator[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    rng = np.random.default_rng(1)
    for _ in range(18):
        groups, count = int(rng.choice([1, 1, 1, 2])), int(rng.choice([1, 3, 7]))
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


def test_convolutions_of_random_geometries(device: torch.device, ran: list[str]) -> None:
    for number, (shape, weight_shape, options) in enumerate(_geometries()):
        dtype, layout = DTYPES[number % 3], (torch.contiguous_format, torch.channels_last)[number % 2]
        shapes = (shape, weight_shape, weight_shape[:1])
        args = [drawn(s, dtype, device, number, i) for i, s in enumerate(shapes)]
        args[0] = args[0].detach().to(memory_format=layout).requires_grad_()
        output = hold(
            partial(F.conv2d, **options), partial(torch_functional.conv2d, **options), tuple(args), 32,
            f"{shape} {weight_shape} {options}",
        )  # fmt: skip
        assert output.stride() == torch_functional.conv2d(*(a.detach() for a in args), **options).stride()
    assert set(ran) == {"convolve", "convolve_input", "convolve_weight"}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_batch_norm_in_every_layout(
    training: bool, device: torch.device, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # many parts of planes; many parts of rows; small planes; a tile that fits; features; sequences; volumes
    shapes = [(9, 2, 23, 25), (300, 3, 5, 5), (9, 35, 4, 4), (4, 1, 16, 16), (301, 7), (4, 3, 9), (2, 3, 2, 9, 8)]
    layouts = {
        4: (torch.contiguous_format, torch.channels_last),
        5: (torch.contiguous_format, torch.channels_last_3d),
    }
    cases = [(shape, layout) for shape in shapes for layout in layouts.get(len(shape), (torch.contiguous_format,))]
    for number, ((shape, layout), relu) in enumerate(product(cases, (False, True))):
        # one tile to a program, or all of a channel
        monkeypatch.setattr(_triton_norm, "programs_wanted", lambda device, n=(1, 64)[number // 2 % 2 ^ relu]: n)
        dtype = DTYPES[number % 3]
        x = (2 * drawn(shape, dtype, device, shape).detach() + 1).to(memory_format=layout).requires_grad_()
        weight, bias = (drawn(shape[1:2], torch.float32, device, shape, name) for name in "wb")
        mean, var = torch.linspace(-1, 1, shape[1], device=device), torch.linspace(0.5, 2, shape[1], device=device)
        output = hold(
            partial(_ours, mean=mean, var=var, training=training, relu=relu),
            partial(_batch_norm, mean=mean.double(), var=var.double(), training=training, relu=relu),
            (x, weight, bias), 64, (shape, str(layout), relu, training),
        )  # fmt: skip
        assert output.stride() == x.stride() and output.dtype == x.dtype
    assert set(ran) == {"normalize", "gradient", "error_sums"} | ({"moments"} if training else set())


def _ours(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, training: bool, relu: bool) -> Tensor:
    function = F.batch_norm_relu if relu else F.batch_norm
    return function(x, mean.clone(), var.clone(), w, b, training=training)


def _batch_norm(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, training: bool, relu: bool) -> Tensor:
    output = torch_functional.batch_norm(x, mean.clone(), var.clone(), w, b, training)
    return torch_functional.relu(output) if relu else output


def test_batch_norm_of_numbers_far_from_zero(device: torch.device) -> None:
    """A variance from the mean of the squares would have no digit left: 1e4² against 1."""
    x = random_tensor((6, 3, 20, 20), torch.float32, seeded_generator(0), device) + 1e4
    for layout in (torch.contiguous_format, torch.channels_last):
        _, mean, var = _triton_norm.forward(x.contiguous(memory_format=layout), None, None, 1e-5, False)
        exact = x.double().movedim(1, 0).flatten(1)
        # the numbers themselves stand 1e-3 apart, and the mean is known to half of that
        torch.testing.assert_close(var.double(), exact.var(1, correction=0), rtol=1e-6, atol=0)
        torch.testing.assert_close(mean.double(), exact.mean(1), rtol=torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax_of_every_shape(log: bool, device: torch.device) -> None:
    reference = torch_functional.log_softmax if log else torch_functional.softmax
    # narrow; wider than a tile; many rows; side by side, narrow and wide; the last of several; one number; one class
    cases = [((5, 10), 1), ((2, 5_000), 1), ((700, 3), 0), ((3, 7, 11), 1), ((2, 200, 5), 1), ((2, 3, 4), -1)]
    for number, (shape, dim) in enumerate([*cases, ((6,), 0), ((3, 1, 4), 1)]):
        x = (4 * drawn(shape, DTYPES[number % 3], device, shape).detach()).requires_grad_()
        hold(partial(softmax(log), dim=dim), partial(reference, dim=dim), (x,), 16, (shape, dim))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy_with_every_option(reduction: str, device: torch.device, ran: list[str]) -> None:
    for shape in [(5, 10), (3, 5_000), (3, 21, 5, 7), (2, 200, 9), (70, 4), (1, 4)]:
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=seeded_generator(0, shape)).to(device)
        target.view(-1)[0] = 2
        for number, (weighted, smoothing, ignored) in enumerate(product((False, True), (0.0, 0.1), (-100, 2))):
            x = (4 * drawn(shape, DTYPES[number % 3], device, shape).detach()).requires_grad_()
            weight = torch.linspace(0.5, 1.5, shape[1], device=device) if weighted else None
            options = {"ignore_index": ignored, "reduction": reduction, "label_smoothing": smoothing}
            if target.numel() > 1:
                hold(
                    partial(cross_entropy, target=target, weight=weight, **options),
                    partial(
                        torch_functional.cross_entropy, target=target,
                        weight=None if weight is None else weight.double(), **options,
                    ),
                    (x,), 32, (shape, weighted, options),
                )  # fmt: skip
    assert set(ran) == {"_loss_forward", "_loss_backward"} | (set() if reduction == "none" else {"_loss_finish"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_losses_of_every_width(dtype: torch.dtype, device: torch.device, ran: list[str]) -> None:
    x, weight = drawn((6, 5, 3), dtype, device), torch.linspace(0.5, 1.5, 5, device=device, dtype=dtype)
    target = torch.randint(5, (6, 3), generator=seeded_generator(0, "target")).to(device)
    for name in ("softmax", "log_softmax"):
        hold(partial(getattr(F, name), dim=1), partial(getattr(torch_functional, name), dim=1), (x,), 16, name)
    for reduction in ("none", "mean"):
        options = {"target": target, "ignore_index": 1, "reduction": reduction}
        ours = partial(F.cross_entropy, weight=weight, **options)
        reference = partial(torch_functional.cross_entropy, weight=weight.double(), **options)
        assert hold(ours, reference, (x,), 32, options).dtype is dtype
    assert set(ran) == {"_forward", "_backward", "_loss_forward", "_loss_backward", "_loss_finish"}
    # a gradient that is itself differentiated takes operators
    ran.clear()
    (first,) = torch.autograd.grad(F.cross_entropy(x, target), x, create_graph=True)
    assert first.dtype is dtype and torch.autograd.grad(first.sum(), x)[0].dtype is dtype
    assert set(ran) == {"_loss_forward", "_loss_finish"}


POOLINGS = [(2, 2, 0, 1, False), (3, 2, 1, 1, True), ((3, 2), (1, 2), (1, 0), (2, 1), False), (5, 1, 2, 1, False)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
def test_pooling_with_every_option(layout: torch.memory_format, device: torch.device) -> None:
    for number, (kernel, stride, padding, dilation, ceil) in enumerate(POOLINGS):
        shape, options = ((2, 3, 9, 11), (1, 17, 8, 8))[number % 2], (kernel, stride, padding)
        x = drawn(shape, DTYPES[number % 3], device, shape).detach().to(memory_format=layout).requires_grad_()
        case = (shape, *options, dilation)
        windows = plan_windows("max_pool2d", x, *options, dilation, ceil)
        reference = partial(
            torch_functional.max_pool2d, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation,
            ceil_mode=ceil, return_indices=True,
        )  # fmt: skip
        plane, output, step = (x.shape[-2], x.shape[-1]), windows.output, windows.dilation
        lines = _triton_pooling.bounds(windows, plane)
        ours = partial(max_pool2d, lines=lines, output=output, step=step)
        hold(ours, lambda x, f=reference: f(x)[0], (x,), 25, case)
        results = _triton_pooling.largest(x.detach(), lines, output, step)
        for mine, other in zip(results, reference(x.detach()), strict=True):
            assert torch.equal(mine, other) and mine.stride() == other.stride()
        for include_pad, override in ((True, None), (False, None), (True, 5)) if dilation == 1 else ():
            hold(
                partial(avg_pool2d, lines=_triton_pooling.bounds(windows, plane, include_pad, override), output=output),
                lambda x, o=(*options, ceil, include_pad, override): torch_functional.avg_pool2d(x, *o),
                (x,), 25, (case, include_pad, override),
            )  # fmt: skip
    for number, sizes in enumerate([(1, 1), (2, 3), (9, 4)]):
        channels = 33 if sizes == (1, 1) else 5
        x = drawn((1, channels, 7, 8), DTYPES[number % 3], device).detach().to(memory_format=layout).requires_grad_()
        lines = _triton_pooling.adaptive(sizes, (7, 8))
        reference = partial(torch_functional.adaptive_avg_pool2d, output_size=sizes)
        output = hold(partial(avg_pool2d, lines=lines, output=sizes), reference, (x,), 56, sizes)
        assert output.stride() == reference(x).stride()
        reference = partial(torch_functional.adaptive_max_pool2d, output_size=sizes, return_indices=True)
        ours = partial(max_pool2d, lines=lines, output=sizes, step=(1, 1))
        hold(ours, lambda x, f=reference: f(x)[0], (x,), 56, sizes)
        _, places = _triton_pooling.largest(x.detach(), lines, sizes, (1, 1))
        assert torch.equal(places, reference(x)[1])


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_activation(
    activation: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton_pointwise, "programs_wanted", lambda device: 3)
    for shape in [(7, 5), (3, 50, 37), (1, 1), (2_000, 3)]:
        u, bias = drawn(shape, dtype, device, shape).detach(), drawn(shape[-1:], dtype, device, "bias").detach()
        grad = drawn(shape, dtype, device, "grad").detach()
        y = _triton_pointwise.bias_activation(u, bias, activation)
        error, sums = _triton_pointwise.bias_activation_backward(grad, y, activation)
        arrays, g = [to_oracle(t) for t in (u + bias, y)], to_oracle(grad)
        # the oracle's activation of the exact sum, and its derivative at what was kept
        exact = oracle_norm._activation(to_oracle(u) + to_oracle(bias), activation)[0]
        size = np.abs(to_oracle(u)) + np.abs(to_oracle(bias))
        judge(y, None, exact, np.maximum(np.abs(exact), size)).check("bias_activation", f"{activation}, {dtype}")
        slope = {"relu": arrays[1] > 0, "sigmoid": arrays[1] - arrays[1] ** 2, "tanh": 1 - arrays[1] ** 2}[activation]
        judge(error, None, g * slope, np.abs(g)).check("bias_activation", f"{activation}, {dtype}", "error")
        axes = tuple(range(len(shape) - 1))
        judge(sums, None, (g * slope).sum(axes), np.abs(g).sum(axes)).check("bias_activation", activation, "bias")


def test_numbers_that_are_not_finite(device: torch.device) -> None:
    nan, inf = torch.nan, torch.inf
    x = torch.tensor([[nan, inf, -inf, 0.0, -0.0], [1.0, nan, 3.0, nan, 0.0], [-inf] * 5, [-inf, 1.0, 2.0, 3.0, 4.0]])
    x = x.to(device)
    for name in ("relu", "leaky_relu", "sigmoid", "tanh"):
        expected = getattr(torch_functional, name)(x)
        torch.testing.assert_close(_triton_pointwise.forward(name, x, 0.01), expected, equal_nan=True)
    assert _triton_pointwise.forward("tanh", x)[0, 4].signbit()
    for log, reference in ((False, torch_functional.softmax), (True, torch_functional.log_softmax)):
        torch.testing.assert_close(_triton_losses.softmax(x, 1, log), reference(x, 1), equal_nan=True)
        wide = torch.full((2, 5_000), -inf, device=device)
        wide[0, 4_500] = 1.0
        torch.testing.assert_close(_triton_losses.softmax(wide, 1, log), reference(wide, 1), equal_nan=True)
    windows = plan_windows("max_pool2d", x[None], 2, 2, 1, 1, False)
    ours = _triton_pooling.largest(x[None], _triton_pooling.bounds(windows, (4, 5)), windows.output, (1, 1))
    expected = torch_functional.max_pool2d(x[None], 2, 2, 1, return_indices=True)
    torch.testing.assert_close(ours, expected, equal_nan=True)
    planes = torch.ones(1, 16, 6, 6, device=device)
    planes[0, 0, 1, 1], planes[0, 3, 4, 4] = nan, inf
    weight = torch.ones(16, 16, 3, 3, device=device)
    expected = torch_functional.conv2d(planes, weight, padding=1)
    torch.testing.assert_close(F.conv2d(planes, weight, padding=1), expected, equal_nan=True)
    expected = torch_functional.relu(torch_functional.batch_norm(planes, None, None, training=True))
    ours_norm = F.batch_norm_relu(planes, None, None, training=True)
    torch.testing.assert_close(ours_norm, expected, equal_nan=True)


def test_strides_of_every_kind(device: torch.device) -> None:
    base = drawn((6, 8, 10), torch.float32, device).detach()
    for x in (base.permute(2, 0, 1), base[:, ::2, ::3], base[:1].expand(4, 8, 10), base[0, 0, 0], base[:0]):
        torch.testing.assert_close(_triton_losses.softmax(x, -1, True), torch_functional.log_softmax(x, -1))
        y = _triton_pointwise.forward("sigmoid", x)
        torch.testing.assert_close(y, torch.sigmoid(x))
        assert y.stride() == torch.sigmoid(x).stride()
        grad = torch.ones((), device=device).expand(x.shape)
        torch.testing.assert_close(_triton_pointwise.backward("sigmoid", grad, y), y * (1 - y))
    out = torch.empty_like(base)
    assert _triton_pointwise.forward("relu", base, out=out) is out and torch.equal(out, base.clamp_min(0))
    torch.testing.assert_close(_triton_losses.softmax(base.mT, 1, False), torch_functional.softmax(base.mT, 1))
    windows = plan_windows("max_pool2d", base.mT, 2, 2, 0, 1, False)
    lines = _triton_pooling.bounds(windows, (10, 8))
    values, _ = _triton_pooling.largest(base.mT, lines, windows.output, (1, 1))
    assert torch.equal(values, torch_functional.max_pool2d(base.mT, 2))


def test_gives_way_where_it_must(device: torch.device, ran: list[str]) -> None:
    x, w = drawn((2, 4, 6, 6), torch.float32, device), drawn((8, 4, 3, 3), torch.float32, device)

    def loss(namespace: Any, x: Tensor, w: Tensor) -> Tensor:
        y = namespace.batch_norm(namespace.conv2d(x, w, padding=1), None, None, training=True)
        return y.pow(3).mean()  # type: ignore[no-any-return]

    F.conv2d(x.detach().double(), w.detach().double())
    F.conv2d(x.detach().to("meta"), w.detach().to("meta"))
    F.conv2d(x, w, algorithm="im2col")
    torch.vmap(lambda t: F.batch_norm(t, None, None, training=True))(x.detach()[None])
    torch.func.jvp(lambda t: loss(F, t, w.detach()), (x.detach(),), (x.detach(),))
    with F.use_kernels(False):
        F.conv2d(x, w)
    assert not ran

    def second(namespace: Any, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss(namespace, x, w), (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w))

    doubles = tuple(t.detach().double().requires_grad_() for t in (x, w))
    for mine, other in zip(second(F, x, w), second(torch_functional, *doubles), strict=True):
        limit = 256 * torch.finfo(torch.float32).eps * float(other.abs().max())  # a chain of eight layers of sums
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=limit)
    assert ran


def test_losses_of_no_sample(device: torch.device) -> None:
    none = torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    ignored = torch.randn(3, 5, device=device), torch.full((3,), -100, device=device)
    for x, target in (none, ignored):
        for reduction in ("none", "mean", "sum"):
            loss, probabilities, divisor = _triton_losses.index_loss(x, target, -100, None, 0.0, reduction)
            expected = torch_functional.cross_entropy(x, target, reduction=reduction)
            torch.testing.assert_close(loss, expected, equal_nan=True)
            grad = torch.ones_like(loss)
            assert not _triton_losses.index_loss_gradient(grad, probabilities, target, -100, None, 0.0, divisor).any()


def test_empty_batches(device: torch.device, ran: list[str]) -> None:
    w = drawn((16, 16, 3, 3), torch.float32, device)
    x = torch.randn(0, 16, 6, 6, device=device, requires_grad=True)
    y = F.conv2d(x, w, padding=1)
    grads = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (0, 16, 6, 6) and grads[0].shape == x.shape and not grads[1].any()
    assert F.batch_norm(x, torch.zeros(16, device=device), torch.ones(16, device=device)).shape == x.shape
    assert not ran
