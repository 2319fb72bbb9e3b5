"""Convolutions of large images by bands of rows: the same numbers, and not much memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as torch_functional
from torch.profiler import ProfilerActivity, profile

import reimpl.functional as F
from parity_tests.test_conv import with_gradients
from parity_tests.test_conv_blocks import SHAPES, assert_near_double, drawn
from reimpl.functional._conv import bands as _conv_bands
from reimpl.functional._conv.arguments import Geometry

CASES = SHAPES | {
    "more padding than kernel": ((2, 20, 9, 8), (24, 20, 3, 3), {"padding": (5, 4)}),
    "more padding than kernel, first layer": ((2, 3, 9, 20), (24, 3, 2, 2), {"padding": (7, 1)}),
    "more stride than kernel, first layer": ((3, 3, 21, 40), (24, 3, 2, 2), {"stride": 4, "padding": 3}),
    "long kernel": ((3, 3, 24, 24), (20, 3, 11, 11), {"padding": 5}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_bands_give_the_same(case: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, weight_shape, options = CASES[case]
    x, w, b = drawn(case, shape, weight_shape, weight_shape[:1])
    args = (x.detach().to(memory_format=layout).requires_grad_(), w, b)
    found: list[int] = []
    for name in ("of_output", "of_input"):
        original: Callable[..., list[Any]] = getattr(_conv_bands, name)

        def noted(*args: Any, original: Callable[..., list[Any]] = original) -> list[Any]:
            result = original(*args)
            found.append(len(result) // args[0])
            return result

        monkeypatch.setattr(_conv_bands, name, noted)
    for limit in (1 << 8, 20 << 10):
        monkeypatch.setattr(_conv_bands, "_BYTES", limit)
        ours = with_gradients(F.conv2d, args, 0, **options)
        theirs = with_gradients(torch_functional.conv2d, args, 0, **options)
        same = 2 if weight_shape[2:] == (1, 1) else len(theirs)
        assert [t.stride() for t in ours[:same]] == [t.stride() for t in theirs[:same]]
        assert_near_double(ours, args, case, **options)
    assert max(found) > 1


def test_bands_hold_each_row_once() -> None:
    for rows, size, taps, stride, padding, dilation in itertools.product(
        (1, 2, 7), (1, 2, 6, 13), (1, 3), (1, 2, 4), (0, 1, 6), (1, 3)
    ):
        geometry = Geometry((stride, 1), (padding, padding, 0, 0), (dilation, 1), 1)
        height = geometry.output(size, 1, taps, 1)[0]
        if size + 2 * padding < (taps - 1) * dilation + 1:
            continue
        row_bytes = 2 * _conv_bands._BYTES // rows
        cut = _conv_bands.of_output(2, height, row_bytes, size, taps, geometry)
        assert [k for band in cut for k in range(height)[band.output]] == [*range(height)] * 2 * bool(cut)
        for band in cut:
            seen = range(size)[band.input]
            assert band.geometry.output(len(seen), 1, taps, 1)[0] == band.output.stop - band.output.start
            # the first window begins where it did
            assert seen[0] - band.geometry.padding[0] == band.output.start * stride - padding
        cut = _conv_bands.of_input(2, size, row_bytes, height, taps, geometry)
        assert [k for band in cut for k in range(size)[band.input]] == [*range(size)] * 2 * bool(cut)
        for band in cut:
            own, errors = range(size)[band.input], range(height)[band.output]
            assert errors[0] * stride - padding == own[0] - band.geometry.padding[0]
            reached = {i for i in range(height) for k in range(taps) if i * stride - padding + k * dilation in own}
            assert reached <= set(errors)


@pytest.mark.parametrize(
    ("weight", "options"),
    [((64, 3, 11, 11), {"padding": 5}), ((32, 16, 5, 5), {"padding": 2}), ((32, 32, 3, 3), {"padding": 1})],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_windows_of_large_images_take_little_memory(weight: tuple[int, ...], options: dict[str, Any]) -> None:
    """Beyond what goes in and comes out at most twice the bytes of a band, transposed and not, for either direction."""
    x, w = drawn("memory", (1, weight[1], 256, 256), weight)
    y = F.conv2d(x, w, **options)
    results = sum(t.numel() * t.element_size() for t in (y, x, w))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        F.conv2d(x, w, **options).backward(y.detach())
    now = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert results <= most <= results + 2 * 2 * _conv_bands._BYTES
