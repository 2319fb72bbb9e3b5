"""Layers and losses against PyTorch and the oracle: values, gradients, independence, and the edges."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.declarations import FUNCTIONS
from parity_tests.oracle import functional as oracle
from reimpl.testing import (
    REAL_DTYPES,
    SEEDS,
    FunctionTechnique,
    IndependenceError,
    Sample,
    Verdict,
    bits_equal,
    combine,
    independence_guard,
    judge,
    names_used,
    random_tensor,
    seeded_generator,
    to_oracle,
)

# PyTorch's word about a copy of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

each_function = pytest.mark.parametrize("technique", FUNCTIONS, ids=lambda technique: technique.name)


def gradients(function: Callable[..., Tensor], sample: Sample, grad_seed: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Output, and the gradient of each argument that wants one, for a random gradient of the output."""
    output = function(*sample.args, **sample.kwargs)
    wanted = {i: arg for i, arg in enumerate(sample.args) if isinstance(arg, Tensor) and arg.requires_grad}
    generator = seeded_generator(grad_seed, "grad", tuple(output.shape))
    grad = random_tensor(output.shape, output.dtype, generator, output.device)
    return output, dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), grad), strict=True))


def absolute(value: Any) -> Any:
    """Arrays of numbers without their signs; everything else as it is."""
    return np.abs(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def verdicts(technique: FunctionTechnique, sample: Sample, seed: int) -> Iterator[tuple[str, Verdict]]:
    """Output and gradients of one call, each judged."""
    assert technique.torch is not None
    ours, our_grads = gradients(technique.ours, sample, seed)
    theirs, their_grads = gradients(technique.torch, sample, seed)
    assert ours.dtype == theirs.dtype
    args = [to_oracle(arg) if isinstance(arg, Tensor) else arg for arg in sample.args]
    grad = to_oracle(random_tensor(ours.shape, ours.dtype, seeded_generator(seed, "grad", tuple(ours.shape))))
    exact, vjp = technique.oracle(*args, **sample.kwargs)
    if technique.magnitude is None:
        scale, scale_vjp = technique.oracle(*map(absolute, args), **sample.kwargs)
    else:
        scale, scale_vjp = technique.magnitude(*args, **sample.kwargs)
    yield "output", judge(ours, theirs, exact, scale)
    exact_grads, scales = vjp(grad), scale_vjp(np.abs(grad))
    for i, our_grad in our_grads.items():
        yield f"gradient {i}", judge(our_grad, their_grads[i], exact_grads[i], scales[i])


@pytest.mark.quick
@pytest.mark.parity
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@each_function
def test_three_way_parity(
    technique: FunctionTechnique, dtype: torch.dtype, device: torch.device, record: Callable[..., Verdict]
) -> None:
    assert technique.samples is not None
    found: dict[tuple[str, str], list[Verdict]] = {}
    for seed in SEEDS:
        for sample in technique.samples(device, dtype, seeded_generator(seed, technique.name)):
            for quantity, verdict in verdicts(technique, sample, seed):
                found.setdefault((sample.desc, quantity), []).append(verdict)
    together = {key: combine(rows) for key, rows in found.items()}
    for (case, quantity), verdict in together.items():
        record(
            verdict,
            kind="function",
            technique=technique.name,
            ids=technique.ids,
            case=case,
            quantity=quantity,
            implementation="eager",
            device=device,
            dtype=dtype,
            seeds=len(SEEDS),
        )
    for (case, quantity), verdict in together.items():
        verdict.check(technique.name, f"{case}, {dtype}", quantity)


def _softmax_of_unshifted(input: Tensor, dim: int) -> Tensor:
    weights = torch.exp(input)
    return weights / weights.sum(dim, keepdim=True)


def _linear_with_detached_bias(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight) + (0 if bias is None else bias.detach() + 0 * bias)


PLANTED: tuple[tuple[str, str, Callable[..., Tensor]], ...] = (
    ("linear", "a gradient lost", _linear_with_detached_bias),
    ("relu", "leaky by an ulp of 1", lambda x: torch.where(x > 0, x, x * torch.finfo(x.dtype).eps)),
    ("sigmoid", "of the wrong sign far out", lambda x: torch.where(x < -15, 0 * x, F.sigmoid(x))),
    ("softmax", "no shift", _softmax_of_unshifted),
    ("log_softmax", "log of a sum that lost the small", lambda x, dim: F.softmax(x, dim).log()),
    ("cross_entropy", "smoothing left out", lambda *a, label_smoothing=0.0, **k: F.cross_entropy(*a, **k)),
    ("conv2d", "kernel mirrored", lambda x, w, b=None, **k: F.conv2d(x, w.flip(-1), b, **k)),
    ("conv1d", "bias twice", lambda x, w, b=None, **k: F.conv1d(x, w, None if b is None else 2 * b, **k)),
    ("max_pool2d", "zeros in the padding", lambda x, *a, **k: F.max_pool2d(x, *a, **k).clamp_min(0)),
    ("adaptive_avg_pool2d", "an element of 1e-5 more", lambda x, size: F.adaptive_avg_pool2d(x, size) * (1 + 1e-5)),
    ("batch_norm_relu", "not rectified", lambda *a, **k: F.batch_norm(*a, **k)),
    (
        "linear_activation",
        "bias twice",
        lambda x, w, b=None, **k: F.linear_activation(x, w, None if b is None else 2 * b, **k),
    ),
    ("batch_norm", "another eps", lambda *a, eps=1e-5, **k: F.batch_norm(*a, eps=eps * 1.5, **k)),
)


@pytest.mark.parametrize(("name", "bug", "wrong"), PLANTED, ids=[f"{name}: {bug}" for name, bug, _ in PLANTED])
def test_planted_bugs_are_caught(name: str, bug: str, wrong: Callable[..., Tensor]) -> None:
    (row,) = (row for row in FUNCTIONS if row.name == name)
    assert row.samples is not None
    caught = False
    for sample in row.samples(torch.device("cpu"), torch.float32, seeded_generator(0, name)):
        caught |= not all(verdict.ok for _, verdict in verdicts(replace(row, ours=wrong), sample, 0))
    assert caught


def _geometries() -> Iterator[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]]:
    rng = np.random.default_rng(0)
    for _ in range(40):
        groups = int(rng.choice([1, 1, 2, 3]))
        kernel = tuple(int(k) for k in rng.integers(1, 4, 2))
        dilation = tuple(int(d) for d in rng.integers(1, 3, 2))
        options: dict[str, Any] = {"groups": groups, "dilation": dilation}
        if rng.random() < 0.25:
            options["padding"] = str(rng.choice(["same", "valid"]))
        else:
            options["padding"] = tuple(int(p) for p in rng.integers(0, 4, 2))
            options["stride"] = tuple(int(s) for s in rng.integers(1, 4, 2))
        size = [dilation[i] * (kernel[i] - 1) + 1 + int(rng.integers(0, 5)) for i in (0, 1)]
        channels = int(rng.integers(1, 3))
        yield (
            (int(rng.integers(1, 4)), groups * channels, *size),
            (groups * int(rng.integers(1, 3)), channels, *kernel),
            options,
        )


def test_conv2d_over_random_geometries(device: torch.device) -> None:
    (row,) = (row for row in FUNCTIONS if row.name == "conv2d")
    for number, (shape, weight_shape, options) in enumerate(_geometries()):
        generator = seeded_generator(number, "conv2d geometry")
        args = tuple(
            random_tensor(s, torch.float32, generator, device).requires_grad_()
            for s in (shape, weight_shape, weight_shape[:1])
        )
        for quantity, verdict in verdicts(row, Sample(args, options), number):
            verdict.check("conv2d", f"{shape}, {weight_shape}, {options}", quantity)


def test_conv2d_in_parts_of_the_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = (row for row in FUNCTIONS if row.name == "conv2d")
    generator = seeded_generator(0, "parts")
    args = tuple(
        random_tensor(s, torch.float32, generator, device).requires_grad_() for s in ((7, 4, 9, 8), (6, 2, 3, 3), (6,))
    )
    for name in ("_ROW_BYTES_CPU", "_ROW_BYTES_OTHER"):
        monkeypatch.setattr(f"reimpl.functional._conv_kernels.{name}", 3 * 4 * 3 * 3 * 5 * 4 * 4)
    for quantity, verdict in verdicts(row, Sample(args, {"stride": 2, "padding": 1, "groups": 2}), 0):
        verdict.check("conv2d", "three samples at a time", quantity)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_max_pool2d_indices(dtype: torch.dtype, device: torch.device) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        kernel = [int(k) for k in rng.integers(1, 5, 2)]
        dilation = [int(d) for d in rng.integers(1, 3, 2)]
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        args = (
            kernel,
            [int(s) for s in rng.integers(1, 4, 2)],
            [int(rng.integers(0, k // 2 + 1)) for k in kernel],
            dilation,
            bool(rng.random() < 0.5),
        )
        # Few different values, so that there are ties to break.
        input = torch.randint(-2, 3, (2, 2, *(r + 3 for r in reach)), generator=seeded_generator(number, "pool"))
        input = input.to(device, dtype)
        if dtype.is_floating_point:
            input[0, 0, :2, :2] = torch.nan
            input[1, 0] = -torch.inf
        ours = F.max_pool2d(input, *args, return_indices=True)
        theirs = torch_functional.max_pool2d(input, *args, return_indices=True)
        assert bits_equal(ours[0], theirs[0]), args
        assert torch.equal(ours[1], theirs[1]), args


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
def test_batch_norm_moves_the_running_averages(dtype: torch.dtype, device: torch.device) -> None:
    generator = seeded_generator(0, "running averages")
    input = random_tensor((5, 3, 4, 2), dtype, generator, device)
    for momentum in (0.1, 1.0, 0.0):
        start = random_tensor((3,), dtype, generator, device), random_tensor((3,), dtype, generator, device).abs()
        ours, theirs = ([t.clone() for t in start] for _ in range(2))
        F.batch_norm(input, *ours, training=True, momentum=momentum)
        torch_functional.batch_norm(input, *theirs, training=True, momentum=momentum)
        exact = oracle.moved_averages(to_oracle(input), *map(to_oracle, start), momentum)
        for name, mine, other, value, before in zip(("mean", "var"), ours, theirs, exact, start, strict=True):
            scale = np.abs(to_oracle(before)) + np.abs(to_oracle(input)).max() ** 2
            judge(mine, other, value, scale).check("batch_norm", f"momentum {momentum}, {dtype}", name)


def test_non_finite_values(device: torch.device) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[1.0, -inf, 2.0], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [-inf, -inf, -inf]], device=device)
    for ours, theirs in (
        (F.relu, torch_functional.relu),
        (F.sigmoid, torch.sigmoid),
        (lambda t: F.softmax(t, 1), lambda t: torch_functional.softmax(t, 1)),
        (lambda t: F.log_softmax(t, 1), lambda t: torch_functional.log_softmax(t, 1)),
        (lambda t: F.adaptive_avg_pool2d(t[None], 2), lambda t: torch_functional.adaptive_avg_pool2d(t[None], 2)),
    ):
        torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
    # A class of probability zero that is not the target costs nothing, and its logit gets no gradient.
    logits = x[:1].clone().requires_grad_()
    target = torch.tensor([2], device=device)
    loss = F.cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and grad[0, 1] == 0


def test_first_error_of_softmax_and_cross_entropy(device: torch.device) -> None:
    """F18: δ = ŷ - y."""
    logits = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0, 3, 1, 2, 2, 0], device=device)
    (delta,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction="sum"), logits)
    expected = to_oracle(logits)
    expected = np.exp(expected) / np.exp(expected).sum(1, keepdims=True) - np.eye(4)[target.cpu()]
    # ŷ and y meet in one subtraction: the scale is ŷ + y.
    judge(delta, None, expected, np.abs(expected) + 2 * np.eye(4)[target.cpu()]).check("cross_entropy", "ŷ - y")


@each_function
def test_calls_nothing_that_does_the_job(technique: FunctionTechnique) -> None:
    assert technique.samples is not None
    for sample in technique.samples(torch.device("cpu"), torch.float32, seeded_generator(0, technique.name)):
        with independence_guard(technique.forbidden) as seen:
            gradients(technique.ours, sample, 0)
        assert any(name.startswith("aten::") for name in seen)
    used = names_used(technique.ours)
    assert not [name for name in used for pattern in technique.forbidden if fnmatch.fnmatchcase(name, pattern)]


@pytest.mark.parametrize(
    "cheat",
    [
        lambda x: torch.logsumexp(x, 1),
        lambda x: x.log_softmax(1).exp(),
        lambda x: torch_functional.unfold(x[None, None], 2),
        lambda x: torch_functional.relu(x),
        lambda x: x.clamp_min(0),
        lambda x: torch.nn.Conv2d(1, 1, 2)(x[None, None]),
        lambda x: torch.var_mean(x, 0),
    ],
)
def test_the_guard_catches_what_does_the_job(cheat: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(IndependenceError), independence_guard(FUNCTIONS[0].forbidden):
        cheat(torch.ones(3, 3))


def test_empty_inputs(device: torch.device) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, requires_grad=True)

    ones = torch.ones(3, device=device)
    for name, args, kwargs in (
        ("softmax", (empty(0, 3), 0), {}),
        ("log_softmax", (empty(3, 0), 1), {}),
        ("relu", (empty(0),), {}),
        ("linear", (empty(0, 3), torch.ones(2, 3, device=device)), {}),
        ("conv2d", (empty(0, 3, 8, 8), torch.ones(4, 3, 3, 3, device=device)), {}),
        ("max_pool2d", (empty(0, 3, 8, 8), 2), {}),
        ("batch_norm", (empty(0, 3), ones.clone(), ones.clone()), {"training": True}),
        ("cross_entropy", (empty(0, 5), torch.zeros(0, dtype=torch.long, device=device)), {"reduction": "sum"}),
        ("cross_entropy", (empty(0, 5), torch.zeros(0, dtype=torch.long, device=device)), {}),
    ):
        ours, theirs = getattr(F, name)(*args, **kwargs), getattr(torch_functional, name)(*args, **kwargs)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        (grad,) = torch.autograd.grad(ours.sum(), args[0])
        assert grad.shape == args[0].shape
    assert torch.equal(ones, torch.ones(3, device=device))


def test_relu_in_place() -> None:
    x = torch.randn(5, requires_grad=True)
    doubled = 2 * x
    result = F.relu(doubled, inplace=True)
    assert result is doubled
    result.sum().backward()
    assert torch.equal(x.grad, 2.0 * (x.detach() > 0))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        F.relu(x, inplace=True)
