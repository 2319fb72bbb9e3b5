"""Depthwise convolutions as they come: sums over taps against float64, of every geometry, dtype and layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.test_conv import LAYOUTS, with_gradients
from reimpl.functional._conv import depthwise as _conv_depthwise
from reimpl.testing import random_tensor, seeded_generator

CHANNELS = 6
GEOMETRIES = {
    f"{kernel}, {stride}, {padding}, {dilation}": ((CHANNELS, 1, *kernel), (stride, padding, dilation))
    for kernel, stride, padding, dilation in itertools.product(
        ((3, 3), (2, 4), (1, 1)), (1, 2, (3, 1)), (0, 1, (2, 3)), (1, 2)
    )
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The sums that run, by name; blocks of two images, and so more than one."""
    names: list[str] = []
    for name in ("convolve", "convolve_input", "convolve_weight"):
        original = getattr(_conv_depthwise, name)

        def noting(*args: Any, name: str = name, original: Any = original) -> Any:
            names.append(name)
            return original(*args)

        monkeypatch.setattr(_conv_depthwise, name, noting)
    for name in ("_BLOCK_BYTES", "_PADDED_BYTES", "_SUM_BYTES"):
        monkeypatch.setattr(_conv_depthwise, name, 6 << 10)
    yield names


def drawn(shape: tuple[int, ...], weight_shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = seeded_generator(0, shape, weight_shape)
    return tuple(random_tensor(s, dtype, generator).requires_grad_() for s in (shape, weight_shape, weight_shape[:1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", GEOMETRIES)
def test_every_geometry(case: str, dtype: torch.dtype, calls: list[str]) -> None:
    weight_shape, (stride, padding, dilation) = GEOMETRIES[case]
    args = drawn((5, CHANNELS, 9, 8), weight_shape, dtype)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": CHANNELS}
    ours = with_gradients(F.conv2d, args, 0, **options)
    assert {"convolve", "convolve_input", "convolve_weight"} <= set(calls)
    output = ours[0].detach()
    grad = random_tensor(output.shape, dtype, seeded_generator(0, "grad", tuple(output.shape)))
    doubles = tuple(arg.detach().double().requires_grad_() for arg in args)
    exact = torch_functional.conv2d(*doubles, **options)
    true = [exact, *torch.autograd.grad(exact, doubles, grad.double())]
    for mine, other in zip(ours, true, strict=True):
        assert mine.dtype == dtype
        # sums of up to 360 products of size 1, in float32 or more, then rounded once
        limit = (16 if dtype in (torch.float32, torch.float64) else 2) * torch.finfo(dtype).eps
        atol = limit * float(other.detach().abs().max().clamp_min(1))
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=atol)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_pytorchs(layout: str, stride: int, calls: list[str]) -> None:
    x, w, b = (t.detach() for t in drawn((5, CHANNELS, 9, 8), (CHANNELS, 1, 3, 3), torch.float32))
    args = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_(), w.requires_grad_(), b.requires_grad_()
    options = {"stride": stride, "padding": 1, "groups": CHANNELS}
    ours, theirs = (with_gradients(m.conv2d, args, 0, **options) for m in (F, torch_functional))
    assert calls
    assert [t.stride() for t in ours[:2]] == [t.stride() for t in theirs[:2]]
    # a dimension of one channel has no stride of its own
    assert ours[2].is_contiguous() and theirs[2].is_contiguous()


def test_numbers_that_are_not_finite_stay_where_they_are(calls: list[str]) -> None:
    x, w, _ = (t.detach() for t in drawn((4, CHANNELS, 8, 8), (CHANNELS, 1, 3, 3), torch.float32))
    x[1, 3, 2, 7], x[2, 4, 5, 0], x[3, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    ours, theirs = (m.conv2d(x, w, padding=1, groups=CHANNELS) for m in (F, torch_functional))
    assert calls
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=16 * torch.finfo(torch.float32).eps)


def test_gradients_ignore_what_is_not_finite_in_the_padding(calls: list[str]) -> None:
    """A window that holds an infinity makes its own filter's gradient infinite, and no other's."""
    x, w, _ = (t.detach() for t in drawn((4, CHANNELS, 8, 8), (CHANNELS, 1, 3, 3), torch.float32))
    x[1, 3, 4, 7] = torch.inf
    w.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(m.conv2d(x, w, padding=1, groups=CHANNELS).sum(), w)[0] for m in (F, torch_functional)
    )
    assert calls
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=1e-4)


def test_windows_of_padding_alone(calls: list[str]) -> None:
    """No window holds the one element, and so its gradient is 0."""
    args = drawn((2, CHANNELS, 1, 1), (CHANNELS, 1, 1, 1), torch.float32)
    options = {"stride": 3, "padding": 2, "groups": CHANNELS}
    ours, theirs = (with_gradients(m.conv2d, args, 0, **options) for m in (F, torch_functional))
    assert {"convolve", "convolve_input", "convolve_weight"} <= set(calls)
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(mine, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning", "ignore::DeprecationWarning")
def test_other_tensors_go_the_other_way(calls: list[str]) -> None:
    x, w, _ = (t.detach() for t in drawn((3, CHANNELS, 6, 6), (CHANNELS, 1, 3, 3), torch.float64))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1, groups=CHANNELS)

    class Other(Tensor):
        pass

    torch.func.jvp(function, (x, w), (x, w))
    function(x.as_subclass(Other), w)
    F.conv2d(x, torch.cat([w, w]), groups=CHANNELS)
    F.conv2d(x, w, groups=CHANNELS, algorithm="im2col")
    function(x.to(torch.complex64), w.to(torch.complex64))
    assert not calls
    # a map becomes more groups
    mapped = torch.vmap(function)(torch.stack([x, -x]), torch.stack([w, w]))
    assert calls == ["convolve"]
    assert torch.equal(mapped[1], -function(x, w))


def test_derivatives_of_every_order() -> None:
    args = tuple(t.detach().requires_grad_() for t in drawn((2, 2, 4, 5), (2, 1, 3, 2), torch.float64))

    def function(*tensors: Tensor) -> Tensor:
        return F.conv2d(*tensors, padding=1, stride=(1, 2), groups=2)

    assert gradcheck(function, args, check_batched_grad=True)
    assert gradgradcheck(function, args, check_fwd_over_rev=True)
