"""Maximum pooling over large windows through kernels, and of other dtypes: PyTorch's numbers and places to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.kernel_launches import noted, without_node
from reimpl.testing import bits_equal, seeded_generator

pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from reimpl.functional._pooling import numba as _pooling_numba

# Kernel, stride, padding, dilation of windows over planes of such a size.
WINDOWS = {
    "13 x 13": ((20, 23), (13, 1, 6, 1)),
    "every second": ((31, 18), (9, 2, 4, 1)),
    "apart": ((19, 40), ((3, 5), (1, 2), (1, 2), (2, 3))),
    "tiles": ((33, 36), (5, 5, 0, 1)),
    "far between": ((30, 31), (2, (7, 3), 1, 1)),
    "a line": ((1, 50), ((1, 11), (1, 1), (0, 5), 1)),
    "a column": ((37, 2), ((16, 2), (3, 1), (8, 0), 1)),
    "one": ((17, 19), ((16, 18), 3, 0, 1)),
}
# Keys at a time, and at most: whole planes, a few rows of them, none.
ROOMS = {"planes": (1 << 12, 1 << 17), "strips": (200, 1 << 17), "one by one": (1 << 12, 0)}


@pytest.fixture(params=ROOMS)
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, number in zip(("_KEYS", "_MOST_KEYS"), ROOMS[request.param], strict=True):
        monkeypatch.setattr(_pooling_numba, name, number)
    without_node(monkeypatch)
    _pooling_numba._search_step.cache_clear()
    with F.use_kernels():
        yield request.param
    _pooling_numba._search_step.cache_clear()


def _kinds_of_numbers(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Few different ones, so that there are ties; zeros of both signs; NaN of both signs; hardly one above -inf."""
    generator = seeded_generator(0, "kinds")
    ties = torch.randint(-2, 3, shape, generator=generator).float()
    chance = torch.rand(shape, generator=generator)
    yield ties
    yield torch.where(chance < 0.5, 0.0, -0.0)
    yield torch.where(chance < 0.02, torch.nan, torch.where(chance > 0.98, -torch.nan, ties))
    yield torch.where(chance < 0.01, ties, torch.where(chance > 0.995, torch.inf, -torch.inf))


@pytest.mark.parametrize("case", WINDOWS)
def test_large_windows_to_the_bit(case: str, room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plane, options = WINDOWS[case]
    ran: list[str] = []
    noted(monkeypatch, _pooling_numba, lambda _: _pooling_numba.largest_kernels(), ran)
    for x in _kinds_of_numbers((2, 3, *plane)):
        ours, theirs = (m.max_pool2d(x, *options, return_indices=True) for m in (F, torch_functional))
        assert bits_equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    one_by_one = room == "one by one" or case == "one"
    assert set(ran) == {"largest_of_planes" if one_by_one else "largest_of_overlapping"}


@pytest.mark.parametrize("size", [1, (1, 3), (4, 1), (5, 7), (40, 3)], ids=str)
def test_grids_to_the_bit(size: int | tuple[int, int], room: str) -> None:
    for x in _kinds_of_numbers((2, 3, 21, 34)):
        ours, theirs = (m.adaptive_max_pool2d(x, size, return_indices=True) for m in (F, torch_functional))
        assert bits_equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planes": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "unbatched": lambda x: x[0],
    "one channel": lambda x: x[:, :1],
}


@pytest.mark.parametrize("kernels", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_to_the_bit(dtype: torch.dtype, layout: str, kernels: bool) -> None:
    """Half the width goes by way of float32; zeros of both signs, and strides where a size is 1, stay PyTorch's."""
    calls = [("max_pool2d", args) for args in ((2,), (3, 2, 1), (3, (2, 1), 0, (1, 2)), (9, 9, 4), ((9, 3), 2))]
    calls += [("adaptive_max_pool2d", (size,)) for size in (1, (1, 4), (5, 7))]
    for kind in _kinds_of_numbers((2, 3, 9, 12)):
        x = LAYOUTS[layout](kind.to(dtype))
        for name, args in calls:
            leaf, found = x.detach().requires_grad_(), []
            for m in (F, torch_functional):
                with F.use_kernels(kernels):
                    values, places = getattr(m, name)(leaf, *args, return_indices=True)
                    grad = (torch.arange(values.numel()) % 7).view(values.shape).to(dtype)
                    found.append((values.detach(), places, *torch.autograd.grad(values, leaf, grad)))
            (values, *ours), (expected, *theirs) = found
            assert bits_equal(values, expected), (name, args)
            # the sums of few small whole numbers are exact
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True)), (name, args)
            if layout != "transposed" and not values.isnan().any():
                assert values.stride() == expected.stride(), (name, args)


@pytest.mark.parametrize("bug", ["unordered", "zeros"])
def test_a_wrong_key_is_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would notice that the first NaN counts, or the sign of zero."""
    replaced, by = {
        "unordered": ("np.int32(place) if order == _UNORDERED else np.int32(~place)", "np.int32(~place)"),
        "zeros": ("np.int32(0) if magnitude == 0 else order", "order"),
    }[bug]
    source = _pooling_numba.LARGEST_SOURCE
    assert replaced in source.read_text()
    wrong = _pooling_numba.load(source, replaced, by)
    monkeypatch.setattr(_pooling_numba, "largest_kernels", lambda: wrong)
    without_node(monkeypatch)
    _pooling_numba._search_step.cache_clear()
    try:
        with F.use_kernels():
            pairs = [
                tuple(m.max_pool2d(x, 3, 1, return_indices=True)[1] for m in (F, torch_functional))
                for x in _kinds_of_numbers((1, 1, 20, 20))
            ]
    finally:
        _pooling_numba._search_step.cache_clear()
    assert not all(torch.equal(ours, theirs) for ours, theirs in pairs)
