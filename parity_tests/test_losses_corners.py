"""Losses at the edges of what they take, beside PyTorch's: with the library's kernels and without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as torch_functional

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.functional_cases import refuses_alike


@pytest.fixture(autouse=True, params=[False, True], ids=["as it comes", "kernels"])
def _way(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    if request.param:
        compiler = "numba" if device.type == "cpu" else "triton"
        pytest.importorskip(compiler, reason=f"the kernels are compiled by {compiler}")
    with F.use_kernels(request.param):
        yield


def check_alike(name: str, x: Tensor, *args: Any, gradient: bool = True, **options: Any) -> Tensor:
    """Value and gradient of a function are PyTorch's, NaN and infinities where it has them."""
    results = []
    for namespace in (F, torch_functional):
        leaf = x.detach().requires_grad_()
        value = getattr(namespace, name)(leaf, *args, **options)
        results.append((value, *(torch.autograd.grad(value, leaf, torch.ones_like(value)) if gradient else ())))
    torch.testing.assert_close(*results, equal_nan=True)
    return results[0][0].detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5)], ids=["rows", "planes"])
def test_weights_that_add_up_to_nothing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(shape, dtype=dtype, device=device)
    target = torch.randint(0, 2, (shape[0], *shape[2:]), device=device)
    weight = torch.tensor([0.0, 0.0, 2.0, 1.0], dtype=dtype, device=device)
    # PyTorch rounds a smoothed loss's gradient to bfloat16 several times
    gradient = dtype != torch.bfloat16
    for smoothing in (0.0, 0.1):
        for ignore_index in (-100, 1):
            options = {"gradient": gradient, "label_smoothing": smoothing, "ignore_index": ignore_index}
            assert check_alike("cross_entropy", x, target, weight, **options).isnan()
            total = check_alike("cross_entropy", x, target, weight, reduction="sum", **options)
            assert total.isfinite() and (total > 0) == (smoothing > 0)
    assert check_alike("nll_loss", x, target, weight).isnan()


def test_weights_that_cancel(device: torch.device) -> None:
    x = torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]], device=device)
    target, weight = torch.tensor([0, 1], device=device), torch.tensor([1.0, -1.0, 3.0], device=device)
    for smoothing in (0.0, 0.1):
        # of both parts of a smoothed loss the first is -2/0, the second of the sign of its sum
        with torch.no_grad():
            ours, theirs = (
                m.cross_entropy(x, target, weight, label_smoothing=smoothing) for m in (F, torch_functional)
            )
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert not ours.isfinite()


@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_all_ignored(ignore_index: int, device: torch.device) -> None:
    x, weight = torch.randn(3, 4, device=device), torch.rand(4, device=device)
    target = torch.full((3,), ignore_index, device=device)
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"weight": weight}):
        options = {"ignore_index": ignore_index, **options}
        check_alike("nll_loss", x, target, **options)
        check_alike("cross_entropy", x, target, **options)
        check_alike("cross_entropy", x, target, label_smoothing=0.2, **options)


@pytest.mark.parametrize("ignored", [-100, 1, 3], ids=["no class", "a class there", "a class"])
def test_numbers_that_are_not_finite(ignored: int, device: torch.device) -> None:
    x = torch.randn(4, 5, device=device)
    x[1, 2], x[2, 1], x[3, 0] = torch.nan, -torch.inf, -torch.inf
    target = torch.tensor([0, 1, ignored, 4], device=device)
    for reduction in ("none", "sum", "mean"):
        for name in ("nll_loss", "cross_entropy"):
            check_alike(name, x, target, ignore_index=ignored, reduction=reduction)
    for name in ("softmax", "log_softmax"):
        check_alike(name, x, 1)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", ["nll_loss", "cross_entropy"])
def test_one_sample(name: str, reduction: str, device: torch.device) -> None:
    x, target = torch.randn(5, device=device), torch.tensor(3, device=device)
    for options in ({}, {"weight": torch.rand(5, device=device)}, {"ignore_index": 3}):
        value = check_alike(name, x, target, reduction=reduction, **options)
        assert value.shape == ()
        # PyTorch's backward pass refuses this shape
        same = check_alike(name, x, target.reshape(1), gradient=False, reduction=reduction, **options)
        torch.testing.assert_close(same, value, equal_nan=True)
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(getattr(F, name)(leaf, target.reshape(1), reduction=reduction, **options), leaf)
        (expected,) = torch.autograd.grad(getattr(F, name)(leaf, target, reduction=reduction, **options), leaf)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_classes(reduction: str, device: torch.device) -> None:
    x, target = torch.randn(2, 0, device=device), torch.full((2,), 1, device=device)
    for weight in (None, torch.rand(0, device=device)):
        for name in ("nll_loss", "cross_entropy"):
            check_alike(name, x, target, weight, ignore_index=1, reduction=reduction)
        for smoothing in (0.0, 0.1):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            check_alike("cross_entropy", x, torch.randn(2, 0, device=device), weight, **options)


def test_ignored_byte_is_no_class(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on CUDA a class that is none is a device assertion")
    for dtype in (torch.float32, torch.float16):
        # -100 as a byte
        target = torch.tensor([156, 3], dtype=torch.uint8)
        for name in ("nll_loss", "cross_entropy"):
            refuses_alike(getattr(F, name), getattr(torch_functional, name), (torch.randn(2, 20).to(dtype), target), {})


def test_gradient_of_labels_at_infinite_logits(device: torch.device) -> None:
    x = torch.tensor([-torch.inf, torch.inf, 2.0], device=device)
    for q in (0.5, 2.0):
        found = []
        for namespace in (F, torch_functional):
            t = torch.tensor([0.25, 0.5, 0.75], device=device, requires_grad=True)
            weights = torch.full((3,), q, device=device)
            loss = namespace.binary_cross_entropy_with_logits(x, t, pos_weight=weights, reduction="sum")
            found += torch.autograd.grad(loss, t)
        torch.testing.assert_close(*found)
        assert found[0].isinf().sum() == 2


def test_refuses_boolean_labels(device: torch.device) -> None:
    x, target = torch.randn(3, device=device), torch.ones(3, dtype=torch.bool, device=device)
    weights = {"weight": torch.rand(3, device=device), "pos_weight": torch.rand(3, device=device)}
    for kwargs in ({}, weights):
        for dtype in (torch.float32, torch.float64, torch.float16):
            ours, theirs = F.binary_cross_entropy_with_logits, torch_functional.binary_cross_entropy_with_logits
            refuses_alike(ours, theirs, (x.to(dtype), target), kwargs)
    refuses_alike(nn.BCEWithLogitsLoss(), torch.nn.BCEWithLogitsLoss(), (x, target), {})


@pytest.mark.parametrize("dilation", [-1, (1, -2)])
def test_convolution_refuses_negative_dilation(dilation: Any, device: torch.device) -> None:
    image, kernel = torch.randn(2, 3, 8, 8, device=device), torch.randn(4, 3, 3, 3, device=device)
    for options in ({}, {"padding": 4}, {"padding": "valid"}):
        refuses_alike(F.conv2d, torch_functional.conv2d, (image, kernel), {"dilation": dilation, **options})


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"reduction": "sum"}], ids=["mean", "ignored", "sum"])
def test_recorded_operators_do_for_other_numbers(options: dict[str, Any], weighted: bool, device: torch.device) -> None:
    """What is read from the numbers of one call (how many samples count, a divisor) is no constant in its record."""
    weight = torch.rand(5, device=device) if weighted else None

    def losses(m: Any, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        loss = m.cross_entropy(x, target, weight, **options) + m.nll_loss(
            m.log_softmax(x, 1), target, weight, **options
        )
        return loss, *torch.autograd.grad(loss, x)

    x, target = torch.randn(7, 5, device=device), torch.arange(7, device=device) % 5
    recorded = make_fx(lambda x, target: losses(F, x, target))(x, target)
    x, target = torch.randn(7, 5, device=device), torch.tensor([1, 1, 2, 3, 3, 4, 4], device=device)
    torch.testing.assert_close(recorded(x, target), losses(torch_functional, x, target))


CHECKED = {
    "cross_entropy": lambda library, x: library.cross_entropy(x, torch.tensor([1, 0], device=x.device)),
    "nll_loss": lambda library, x: library.nll_loss(x, torch.tensor([1, 0], device=x.device)),
    "binary_cross_entropy": lambda library, x: library.binary_cross_entropy(x.sigmoid(), torch.ones_like(x)),
    "embedding": lambda library, x: library.embedding(torch.tensor([0, 1], device=x.device), x),
    "batch_norm": lambda library, x: library.batch_norm(x, x.new_zeros(3), x.new_ones(3), training=True),
}


@pytest.mark.parametrize("name", CHECKED)
def test_what_looks_at_numbers_is_recorded_and_linearized(name: str, device: torch.device) -> None:
    x = torch.randn(2, 3, device=device)
    results = []
    for library in (F, torch_functional):
        value, pushforward = torch.func.linearize(partial(CHECKED[name], library), x)
        recorded = make_fx(partial(CHECKED[name], library))(x)
        results.append((value, pushforward(torch.ones_like(x)), recorded(x)))
    torch.testing.assert_close(*results)
