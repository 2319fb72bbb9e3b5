"""Convolutions of many groups with few channels each, several of which are joined to one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.test_conv import with_gradients
from parity_tests.test_conv_blocks import assert_near_double, drawn
from reimpl.functional._conv import blocks as _conv_blocks
from reimpl.functional._conv import grouped as _grouped

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "all in one": ((3, 32, 9, 10), (32, 4, 3, 3), {"padding": 1, "groups": 8}),
    "some in one": ((2, 160, 7, 6), (160, 8, 3, 3), {"padding": 1, "groups": 20}),
    "strided": ((2, 160, 9, 8), (160, 8, 3, 2), {"padding": 1, "stride": 2, "groups": 20}),
    "dilated": ((2, 96, 12, 11), (96, 6, 3, 3), {"padding": 2, "dilation": 2, "groups": 16}),
    "more outputs": ((2, 36, 8, 9), (108, 2, 3, 3), {"groups": 18}),
    "fewer outputs": ((2, 108, 8, 9), (36, 6, 3, 3), {"groups": 18}),
    "several filters a channel": ((2, 40, 8, 9), (80, 1, 3, 3), {"padding": 1, "groups": 40}),
    "a prime number": ((2, 44, 8, 9), (55, 4, 3, 3), {"groups": 11}),
    "of a tap": ((3, 96, 8, 8), (48, 8, 1, 1), {"groups": 12}),
    "rows": ((3, 96, 2, 20), (96, 8, 1, 5), {"padding": (0, 2), "groups": 12}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_joined_groups(case: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, weight_shape, options = CASES[case]
    x, w, b = drawn(case, shape, weight_shape, weight_shape[:1])
    args = (x.detach().to(memory_format=layout).requires_grad_(), w, b)
    joined: list[int] = []
    for name in ("convolve", "convolve_input", "convolve_weight"):
        original = getattr(_conv_blocks, name)

        def noted(*values: Any, original: Any = original) -> Any:
            joined.extend(value.groups for value in values if hasattr(value, "groups"))
            return original(*values)

        monkeypatch.setattr(_conv_blocks, name, noted)
    ours = with_gradients(F.conv2d, args, 0, **options)
    assert len(joined) == 3 and all(groups < options["groups"] for groups in joined)
    theirs = with_gradients(torch_functional.conv2d, args, 0, **options)
    same = 2 if 1 in weight_shape else len(theirs)
    assert [t.stride() for t in ours[:same]] == [t.stride() for t in theirs[:same]]
    assert_near_double(ours, args, case, **options)


def test_a_group_sees_no_other_ones_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (t.detach() for t in drawn("others", (2, 32, 8, 8), (32, 4, 3, 3)))
    for bad in (torch.nan, torch.inf, -torch.inf):
        odd = x.clone()
        odd[1, 5, 3, 3] = bad
        ours, theirs = (
            with_gradients(m.conv2d, (odd.clone().requires_grad_(), w.clone().requires_grad_()), 0, groups=8)
            for m in (F, torch_functional)
        )
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine.isfinite(), other.isfinite())
    # the comparison would see it
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.tensor(True))
    assert F.conv2d(odd, w, groups=8)[:, :4].isnan().any()


def test_gradients_that_are_not_finite_stay_in_their_group() -> None:
    x, w = drawn("gradients", (2, 32, 8, 8), (32, 4, 3, 3))
    grad = torch.randn(2, 32, 6, 6)
    grad[0, 9, 2, 2] = torch.inf
    ours, theirs = (torch.autograd.grad(m.conv2d(x, w, groups=8), (x, w), grad) for m in (F, torch_functional))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isfinite(), other.isfinite())
        torch.testing.assert_close(mine.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_what_is_no_zero(number: int) -> None:
    """The factors of joined groups stand where a kernel of one group has them, and nowhere else."""
    weight = torch.arange(1.0, 12 * 2 * 3 + 1).view(12, 2, 3, 1)
    wide = weight.new_zeros(12, 2 * number, 3, 1)
    _grouped._own(wide, 6, number).copy_(weight.view(6 // number, number, 2, 2, 3).permute(0, 2, 3, 4, 1))
    for o in range(12):
        first = o // 2 % number * 2
        assert torch.equal(wide[o, first : first + 2], weight[o])
    assert wide.count_nonzero() == weight.numel()
