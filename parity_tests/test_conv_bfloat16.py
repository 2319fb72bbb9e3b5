"""Convolutions of bfloat16 by the processor's products of that dtype: sums in float32, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.test_conv_blocks import SHAPES, drawn
from reimpl.functional._conv import bands as _conv_bands
from reimpl.functional._conv import blocks as _conv_blocks
from reimpl.functional._conv import products as _products
from reimpl.functional._conv import windows as _conv_windows

pytestmark = pytest.mark.skipif(
    not _products._multiplies_bfloat16(), reason="this processor has no product of bfloat16: float32 stands in for it"
)
CASES = {name: case for name, case in SHAPES.items() if min(case[1][:2]) > 16 and case[1][2:] != (1, 1)} | {
    "more padding than kernel": ((2, 20, 9, 8), (24, 20, 3, 3), {"padding": (5, 4)}),
    "groups joined": ((2, 160, 9, 8), (160, 8, 3, 3), {"padding": 1, "stride": 2, "groups": 20}),
}


def gradients(function: Any, args: tuple[Tensor, ...], grad: Tensor, **options: Any) -> list[Tensor]:
    leaves = tuple(arg.detach().clone(memory_format=torch.preserve_format).requires_grad_() for arg in args)
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def check(args: tuple[Tensor, ...], parted: bool = False, **options: Any) -> list[Tensor]:
    """Half a unit in the last place, float32's errors over the terms' sizes, and of a kernel's gradient in parts half a
    unit of each, together at most that of all sizes."""
    wide = [arg.double() for arg in args]
    y = torch_functional.conv2d(*wide, **options)
    grad = torch.randn(y.shape).bfloat16()
    ours = gradients(F.conv2d, args, grad, **options)
    exact = gradients(torch_functional.conv2d, tuple(wide), grad.double(), **options)
    sizes = gradients(torch_functional.conv2d, tuple(t.abs() for t in wide), grad.double().abs(), **options)
    eps, single = torch.finfo(torch.bfloat16).eps, torch.finfo(torch.float32).eps
    for k, (mine, right, size) in enumerate(zip(ours, exact, sizes, strict=True)):
        assert mine.dtype is torch.bfloat16
        limit = 0.51 * eps * right.abs() + 64 * single * size
        if k == 2 and parted:
            limit += 0.51 * eps * size
        assert ((mine.double() - right).abs() <= limit).all(), k
    return ours


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_sums_are_rounded_once(case: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, weight_shape, options = CASES[case]
    x, w, b = (t.detach().bfloat16() for t in drawn(case, shape, weight_shape, weight_shape[:1]))
    args = (x.to(memory_format=layout), w, b)
    monkeypatch.setattr(_conv_windows, "_ROW_BYTES_CPU", 64 << 10)
    called: list[str] = []
    for name in ("convolve", "convolve_input", "convolve_weight"):
        original = getattr(_conv_blocks, name)

        def noted(first: Tensor, *values: Any, name: str = name, original: Any = original) -> Any:
            assert first.dtype is torch.bfloat16
            called.append(name)
            return original(first, *values)

        monkeypatch.setattr(_conv_blocks, name, noted)
    ours = check(args, **options)
    assert called == ["convolve", "convolve_input", "convolve_weight"]
    grad = torch.ones_like(ours[0])
    theirs = gradients(torch_functional.conv2d, args, grad, **options)
    assert [t.stride() for t in ours] == [t.stride() for t in theirs]


def test_bands_and_blocks_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = (t.detach().bfloat16() for t in drawn("bands", (3, 20, 12, 11), (24, 20, 3, 3), (24,)))
    monkeypatch.setattr(_conv_blocks, "_BYTES_OF_BFLOAT16", 1 << 10)
    check((x, w, b), parted=True, padding=1)
    monkeypatch.setattr(_conv_bands, "_BYTES", 20 << 10)
    check((x, w, b), parted=True, padding=1)


@pytest.mark.filterwarnings("ignore:TF32:UserWarning")
def test_what_is_quick_in_float32_goes_there() -> None:
    def takes(shape: tuple[int, ...], kernel: tuple[int, ...], **options: Any) -> bool:
        seen: list[torch.dtype] = []
        with pytest.MonkeyPatch.context() as patch:
            original = _products.product
            patch.setattr(_conv_blocks, "product", lambda *args: seen.append(args[0].dtype) or original(*args))
            F.conv2d(torch.ones(shape).bfloat16(), torch.ones(kernel).bfloat16(), **options)
        return torch.bfloat16 in seen

    assert takes((2, 24, 12, 12), (24, 24, 3, 3))
    assert not takes((2, 24, 12, 12), (24, 24, 1, 1))
    assert not takes((2, 3, 12, 12), (24, 3, 3, 3))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes((2, 24, 12, 12), (24, 24, 3, 3))
