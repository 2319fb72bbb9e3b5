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
from parity_tests.declarations.functional_samples import FORBIDDEN
from parity_tests.functional_cases import each_function, gradients, row_of, verdicts
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


def _in_two_steps(input: Tensor, target: Tensor, *, pos_weight: Tensor | None = None, **options: Any) -> Tensor:
    probability = F.sigmoid(input)
    weight = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    return weight * F.binary_cross_entropy(probability, target, **options)


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
    ("tanh", "cancels near 0", lambda x: 2 * F.sigmoid(2 * x) - 1),
    ("leaky_relu", "the other branch", lambda x, negative_slope=0.01: torch.where(x < 0, x, x * negative_slope)),
    ("heaviside", "0 at 0", lambda x, values: (x > 0).to(x.dtype)),
    ("maxout", "the smallest piece", lambda x, pieces, dim=1: -F.maxout(-x, pieces, dim)),
    ("mse_loss", "weights left out of the mean", lambda x, t, weight=None, **k: F.mse_loss(x, t, **k)),
    (
        "half_squared_error",
        "the half forgotten",
        lambda x, t, reduction="sum": 2 * F.half_squared_error(x, t, reduction),
    ),
    ("nll_loss", "ignored samples counted", lambda x, t, *a, **k: F.nll_loss(x, t.clamp_min(0), *a, **k)),
    ("cross_entropy_of_probabilities", "no eps", lambda y, t, **_: F.cross_entropy_of_probabilities(y, t, eps=0.0)),
    ("binary_cross_entropy", "labels swapped", lambda x, t, *a, **k: F.binary_cross_entropy(x, 1 - t, *a, **k)),
    ("binary_cross_entropy_with_logits", "in two steps", lambda x, t, **k: _in_two_steps(x, t, **k)),
    ("masked_multilabel_loss", "unknown labels counted", lambda x, t, *_, **k: F.masked_multilabel_loss(x, t, **k)),
    ("lp_penalty", "the root forgotten", lambda x, p=2.0, weight=1.0, **_: F.lp_penalty(x, p, weight, power=True)),
    ("edge_filters", "transposed", lambda *a, **k: F.edge_filters(*a, **k).mT),
    ("max_pool1d", "zeros in the padding", lambda x, *a, **k: F.max_pool1d(x, *a, **k).clamp_min(0)),
    ("avg_pool1d", "padding counted", lambda x, *a: F.avg_pool1d(x, *a[:4])),
    ("avg_pool2d", "divisor ignored", lambda x, *a, divisor_override=None, **k: F.avg_pool2d(x, *a, **k)),
    ("adaptive_max_pool2d", "a window too short", lambda x, size: F.adaptive_max_pool2d(x.roll(1, -1), size)),
    ("adaptive_avg_pool1d", "an element of 1e-5 more", lambda x, n: F.adaptive_avg_pool1d(x, n) * (1 + 1e-5)),
    ("dropout", "never off", lambda x, p=0.5, training=True: F.dropout(x, p if p else 0.5)),
    ("rnn_tanh_cell", "no recurrence", lambda x, h, w, u, *b: F.rnn_tanh_cell(x, 0 * h, w, u, *b)),
    ("rnn_relu_cell", "no recurrence", lambda x, h, w, u, *b: F.rnn_relu_cell(x, 0 * h, w, u, *b)),
    ("lstm_cell", "gates in another order", lambda x, h, c, w, *r: F.lstm_cell(x, (h, c), w.roll(h.shape[1], 0), *r)),
    ("embedding", "a gradient too large", lambda i, w, **k: 2 * F.embedding(i, w, **k) - F.embedding(i, w.detach())),
    ("skip_gram_loss", "negatives praised", lambda v, u, n, **k: F.skip_gram_loss(v, u, -n, **k)),
)


@pytest.mark.parametrize(("name", "bug", "wrong"), PLANTED, ids=[f"{name}: {bug}" for name, bug, _ in PLANTED])
def test_planted_bugs_are_caught(name: str, bug: str, wrong: Callable[..., Tensor]) -> None:
    row = row_of(name)
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
    row = row_of("conv2d")
    for number, (shape, weight_shape, options) in enumerate(_geometries()):
        generator = seeded_generator(number, "conv2d geometry")
        args = tuple(
            random_tensor(s, torch.float32, generator, device).requires_grad_()
            for s in (shape, weight_shape, weight_shape[:1])
        )
        for quantity, verdict in verdicts(row, Sample(args, options), number):
            verdict.check("conv2d", f"{shape}, {weight_shape}, {options}", quantity)


def test_conv2d_in_parts_of_the_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of("conv2d")
    generator = seeded_generator(0, "parts")
    args = tuple(
        random_tensor(s, torch.float32, generator, device).requires_grad_() for s in ((7, 4, 9, 8), (6, 2, 3, 3), (6,))
    )
    for name in ("_ROW_BYTES_CPU", "_ROW_BYTES_OTHER"):
        monkeypatch.setattr(f"reimpl.functional._conv.windows.{name}", 3 * 4 * 3 * 3 * 5 * 4 * 4)
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
    x_classes = torch.tensor([0, 1, 2, 0], device=device)
    for ours, theirs in (
        (F.relu, torch_functional.relu),
        (F.sigmoid, torch.sigmoid),
        (lambda t: F.softmax(t, 1), lambda t: torch_functional.softmax(t, 1)),
        (lambda t: F.log_softmax(t, 1), lambda t: torch_functional.log_softmax(t, 1)),
        (lambda t: F.adaptive_avg_pool2d(t[None], 2), lambda t: torch_functional.adaptive_avg_pool2d(t[None], 2)),
        (lambda t: F.adaptive_max_pool2d(t[None], 2), lambda t: torch_functional.adaptive_max_pool2d(t[None], 2)),
        (lambda t: F.avg_pool2d(t[None], 2, 1), lambda t: torch_functional.avg_pool2d(t[None], 2, 1)),
        (lambda t: F.max_pool1d(t, 2), lambda t: torch_functional.max_pool1d(t, 2)),
        (F.tanh, torch.tanh),
        (F.leaky_relu, torch_functional.leaky_relu),
        (lambda t: F.heaviside(t, t.new_tensor(0.5)), lambda t: torch.heaviside(t, t.new_tensor(0.5))),
        (lambda t: F.mse_loss(t, t.flip(0)), lambda t: torch_functional.mse_loss(t, t.flip(0))),
        (lambda t: F.nll_loss(t, x_classes), lambda t: torch_functional.nll_loss(t, x_classes)),
        (
            lambda t: F.binary_cross_entropy_with_logits(t, torch.ones_like(t), reduction="none"),
            lambda t: torch_functional.binary_cross_entropy_with_logits(t, torch.ones_like(t), reduction="none"),
        ),
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
    used = names_used(technique.ours, follow="reimpl")
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
    with pytest.raises(IndependenceError), independence_guard(FORBIDDEN):
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
        ("nll_loss", (empty(0, 5), torch.zeros(0, dtype=torch.long, device=device)), {}),
        ("nll_loss", (empty(0, 5, 2), torch.zeros(0, 2, dtype=torch.long, device=device)), {"reduction": "sum"}),
        ("mse_loss", (empty(0, 2), empty(0, 2)), {}),
        ("binary_cross_entropy", (empty(0), empty(0)), {}),
        ("binary_cross_entropy_with_logits", (empty(0), empty(0)), {"reduction": "sum"}),
        ("leaky_relu", (empty(0, 3),), {}),
        ("tanh", (empty(0, 3),), {}),
        ("dropout", (empty(0, 3),), {}),
        ("max_pool1d", (empty(0, 3, 8), 2), {}),
        ("avg_pool1d", (empty(0, 3, 8), 2), {}),
        ("avg_pool2d", (empty(0, 3, 8, 8), 3, 2, 1), {}),
        ("adaptive_max_pool2d", (empty(0, 3, 8, 8), 2), {}),
    ):
        ours, theirs = getattr(F, name)(*args, **kwargs), getattr(torch_functional, name)(*args, **kwargs)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        (grad,) = torch.autograd.grad(ours.sum(), args[0])
        assert grad.shape == args[0].shape
    assert torch.equal(ones, torch.ones(3, device=device))


@pytest.mark.parametrize("name", ["relu", "relu_", "leaky_relu", "leaky_relu_", "sigmoid_", "tanh_"])
def test_activations_in_place(name: str) -> None:
    x = torch.randn(5, requires_grad=True)
    options = {} if name.endswith("_") else {"inplace": True}
    results = []
    for function in (getattr(F, name), getattr(torch_functional, name, None) or getattr(torch, name)):
        doubled = 2 * x
        output = function(doubled, **options)
        assert output is doubled
        results.append((output, *torch.autograd.grad(output.sum(), x)))
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            function(x, **options)
    torch.testing.assert_close(results[0], results[1])


def test_leaky_relu_in_place_with_a_negative_slope_has_no_backward() -> None:
    for function in (F.leaky_relu_, torch_functional.leaky_relu_):
        output = function(2 * torch.randn(5, requires_grad=True), -0.5)
        with pytest.raises(RuntimeError, match=r"(?i)in-?place"):
            output.sum().backward()


def test_in_place_needs_a_dtype_that_holds_the_result() -> None:
    for function in (F.sigmoid_, torch.sigmoid_, F.tanh_, torch.tanh_):
        with pytest.raises(RuntimeError, match="result type Float can't be cast to the desired output type Long"):
            function(torch.ones(3, dtype=torch.int64))


def saved_bytes(function: Callable[..., Any], sample: Sample) -> int:
    """Bytes that a call keeps for its backward pass beyond its arguments and its result."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*sample.args, **sample.kwargs)
    tensors = [*sample.args, *(output if isinstance(output, tuple) else (output,))]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@each_function
def test_keeps_no_more_for_backward_than_pytorch(technique: FunctionTechnique) -> None:
    assert technique.samples is not None
    if technique.torch is None:
        pytest.skip("PyTorch has no counterpart")
    for sample in technique.samples(torch.device("cpu"), torch.float32, seeded_generator(0, technique.name)):
        assert saved_bytes(technique.ours, sample) <= saved_bytes(technique.torch, sample), sample.desc


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_gradients_of_another_layout(name: str, dtype: torch.dtype, device: torch.device) -> None:
    functions = [getattr(F, name), getattr(torch, name, None) or getattr(torch_functional, name)]
    images = torch.randn(2, 5, 6, 7, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    for x in (torch.randn(9, 4, device=device, dtype=dtype).t(), images, images[..., ::2]):
        x = x.detach().requires_grad_()
        for grad in (x.new_ones(x.shape), x.new_ones(1).expand(x.shape), torch.ones_like(x)):
            ours, theirs = (torch.autograd.grad(function(x), x, grad)[0] for function in functions)
            assert ours.stride() == theirs.stride()
