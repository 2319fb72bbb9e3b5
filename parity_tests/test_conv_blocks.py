"""Convolutions over blocks of the batch and the product that they use: which operator runs, when it gives way."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import reimpl.functional as F
from parity_tests.declarations.functional_samples import FORBIDDEN
from parity_tests.test_conv import with_gradients
from reimpl.functional._conv import blocks as _conv_blocks
from reimpl.functional._conv import products as _products
from reimpl.functional._conv import windows as _conv_windows
from reimpl.functional._conv.arguments import geometry_of
from reimpl.functional._conv.regions import Region
from reimpl.functional._conv.strips import IMAGES_LAST, ROWS_FIRST, Windows, planned, strips
from reimpl.testing import random_tensor, seeded_generator

ONEDNN = "mkldnn::_linear_pointwise"
needs_onednn = pytest.mark.skipif(_products._onednn() is None, reason="this PyTorch has no oneDNN product")
FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _small_work_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN's product whatever the size, and blocks of a few images."""
    monkeypatch.setattr(_products, "_LEAST_WORK", 1)
    monkeypatch.setattr(_conv_windows, "_ROW_BYTES_CPU", 64 << 10)
    yield


def operators(function: Callable[[], object]) -> set[str]:
    """Names of the operators that run, seen by the profiler, which changes nothing of what runs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        function()
    return {event.key for event in seen.key_averages()}


def drawn(seed: object, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = seeded_generator(0, seed)
    return tuple(random_tensor(shape, torch.float32, generator).requires_grad_() for shape in shapes)


def assert_near_double(ours: list[Tensor], args: tuple[Tensor, ...], what: object, **options: Any) -> None:
    """As near to the same in float64 as sums of up to 2,000 products of size 1 are, each within half an eps."""
    doubles = tuple(arg.detach().double().requires_grad_() for arg in args)
    for mine, exact in zip(ours, with_gradients(torch_functional.conv2d, doubles, 0, **options), strict=True):
        limit = 32 * FLOAT32 * float(exact.detach().abs().max().clamp_min(1))
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=limit, msg=str(what))


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "wide": ((9, 24, 7, 6), (40, 24, 3, 3), {"padding": 1}),
    "long rows": ((5, 24, 16, 16), (17, 24, 3, 3), {"padding": 1}),
    "long rows, no padding": ((5, 20, 16, 18), (17, 20, 3, 2), {}),
    "strided": ((7, 18, 16, 16), (17, 18, 3, 3), {"padding": 1, "stride": 2}),
    "first layer": ((9, 3, 16, 16), (20, 3, 3, 3), {"padding": 1, "stride": 2}),
    "first layer, 7x7 in threes": ((9, 3, 35, 34), (20, 3, 7, 7), {"padding": 3, "stride": 3}),
    "first layer, columns dealt out in turn": (
        (5, 3, 33, 37),
        (20, 3, 3, 4),
        {"padding": 2, "stride": 4, "dilation": 6},
    ),
    "few outputs, strided": ((9, 18, 17, 17), (5, 18, 3, 3), {"padding": 1, "stride": 2}),
    "very long rows": ((5, 17, 32, 32), (17, 17, 3, 3), {"padding": 1}),
    "small images": ((5, 64, 4, 4), (40, 64, 3, 3), {"padding": 1}),
    "small images, much padding": ((5, 64, 3, 2), (40, 64, 3, 5), {"padding": (3, 4), "dilation": (2, 1)}),
    "groups": ((7, 34, 9, 8), (36, 17, 3, 3), {"padding": 1, "groups": 2}),
    "groups, strided": ((7, 68, 9, 8), (72, 17, 3, 3), {"padding": 2, "stride": 2, "groups": 4}),
    "groups of a tap": ((9, 36, 8, 8), (48, 18, 1, 1), {"groups": 2}),
    "1x1, stride 2": ((9, 24, 16, 16), (17, 24, 1, 1), {"stride": 2}),
    "1x1 in padding": ((9, 24, 5, 5), (17, 24, 1, 1), {"padding": 1}),
    "1x1 over few pixels": ((9, 24, 6, 6), (17, 24, 1, 1), {"stride": 2}),
    "dilated": ((3, 17, 19, 12), (18, 17, 3, 2), {"padding": (2, 3), "dilation": (2, 3), "stride": (3, 2)}),
    "more stride than kernel": ((5, 18, 9, 9), (17, 18, 2, 2), {"stride": 3, "padding": 1}),
}


@needs_onednn
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("case", SHAPES)
def test_blocks_by_onednns_product(case: str, layout: torch.memory_format) -> None:
    shape, weight_shape, options = SHAPES[case]
    args = drawn(case, shape, weight_shape, weight_shape[:1])
    args = (args[0].detach().to(memory_format=layout).requires_grad_(), *args[1:])
    results: list[Tensor] = []
    ran = operators(lambda: results.extend(with_gradients(F.conv2d, args, 0, **options)))
    assert ONEDNN in ran
    assert not [name for name in ran for pattern in FORBIDDEN if fnmatch.fnmatchcase(name, pattern)]
    assert not [name for name in ran if name.startswith("mkldnn::") and name != ONEDNN]
    theirs = with_gradients(torch_functional.conv2d, args, 0, **options)
    # of a dimension of one tap the strides mean nothing, and differ
    same = 2 if weight_shape[2:] == (1, 1) else len(theirs)
    assert [t.stride() for t in results[:same]] == [t.stride() for t in theirs[:same]]
    assert_near_double(results, args, case, **options)


def test_numbers_that_are_not_finite_stay_where_they_are() -> None:
    x, w = (t.detach() for t in drawn("finite", (4, 20, 8, 8), (24, 20, 3, 3)))
    x[1, 3, 2, 2], x[2, 4, 5, 5], x[3, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    ours, theirs = F.conv2d(x, w, padding=1), torch_functional.conv2d(x, w, padding=1)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())
    assert torch.equal(ours.sign().nan_to_num(), theirs.sign().nan_to_num())


class _Looking(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func.name()))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning", "ignore:TF32:UserWarning"
)
def test_the_product_gives_way() -> None:
    x, w = (t.detach() for t in drawn("way", (4, 20, 8, 8), (24, 20, 3, 3)))

    class Other(Tensor):
        pass

    vmapped = torch.vmap(lambda t: F.conv2d(t, w))
    ways: dict[str, Callable[[], object]] = {
        "float64": lambda: F.conv2d(x.double(), w.double()),
        "forward mode": lambda: torch.func.jvp(lambda t: F.conv2d(t, w), (x,), (x,)),
        "subclass": lambda: F.conv2d(x.as_subclass(Other), w),
        "groups of few channels and a NaN": lambda: F.conv2d(x / 0, torch.cat([w, w])[:40, :2], groups=10),
        "views": lambda: F.conv2d(x, w, algorithm="views"),
        "oneDNN switched off": lambda: _without_onednn(lambda: F.conv2d(x, w)),
    }
    for name, call in ways.items():
        assert ONEDNN not in operators(call), name
    looking = _Looking()
    with looking:
        F.conv2d(x, w)
    assert looking.seen and ONEDNN not in looking.seen
    assert F.conv2d(x.to("meta"), w.to("meta")).shape == (4, 24, 6, 6)
    assert vmapped(x[None]).shape == (1, 4, 24, 6, 6)
    traced = torch.jit.trace(lambda t: F.conv2d(t, w), (x,), check_trace=False)
    torch.testing.assert_close(traced(x), torch_functional.conv2d(x, w))


def _without_onednn(call: Callable[[], Tensor]) -> Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        return call()


@needs_onednn
@pytest.mark.parametrize("shape", [(8, 24, 16), (1, 40, 3), (33, 1, 5), (64, 27, 1), (5, 0, 4), (0, 5, 4)], ids=str)
def test_product_of_any_strides(shape: tuple[int, int, int]) -> None:
    """Small integers, whose sums are exact in any order."""
    m, k, n = shape
    generator = seeded_generator(0, shape)
    left, right, bias = (
        torch.randint(-9, 9, size, generator=generator).float()
        for size in ((m, 2 * k + 1), (2 * k + 1, 2 * n + 1), (n,))
    )
    lefts = left[:, :k], left[:, :k].contiguous(), left[:, :k].t().contiguous().t()
    rights = right[:k, :n], right[:k, :n].contiguous(), right[:k, :n].t().contiguous().t(), right[1 : 1 + k, ::2][:, :n]
    for a in lefts:
        for b in rights:
            for offset in (None, bias):
                expected = a @ b if offset is None else a @ b + offset
                assert torch.equal(_products.product(a, b, offset), expected)


@pytest.mark.parametrize("answer", ["wrong", "raising", "missing"])
def test_an_operator_that_changed_is_not_used(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def operator(left: Tensor, filters: Tensor, *_: object) -> Tensor:
        if answer == "raising":
            raise RuntimeError("mkldnn::_linear_pointwise() takes other arguments")
        return (left @ filters.t()).neg()

    class Namespace:
        if answer != "missing":
            _linear_pointwise = type("Overloads", (), {"default": staticmethod(operator)})

    monkeypatch.setattr(torch.ops, "mkldnn", Namespace)
    _products._onednn.cache_clear()
    try:
        assert _products._onednn() is None
        a, b = (t.detach() for t in drawn("changed", (8, 9), (9, 10)))
        assert torch.equal(_products.product(a, b), a @ b)
    finally:
        _products._onednn.cache_clear()


def test_memory_between_blocks_does_not_leak_into_results() -> None:
    """Padding stays zero, and a last block that is smaller than the others sees its own images only."""
    args = drawn("leak", (11, 20, 16, 16), (18, 20, 3, 3), (18,))
    assert _conv_blocks.fits(geometry_of(args[1], 1, 1, 1, 1, None), 18, 20, *(t.detach() for t in args))
    ours = with_gradients(F.conv2d, args, 0, padding=1)
    one_by_one = torch.cat([F.conv2d(image[None], *args[1:], padding=1) for image in args[0]])
    torch.testing.assert_close(ours[0], one_by_one, rtol=0, atol=64 * FLOAT32 * float(one_by_one.detach().abs().max()))
    assert_near_double(ours, args, "leak", padding=1)


STRIPS: dict[str, tuple[int, tuple[int, ...], dict[str, Any], list[int]]] = {
    "3x3": (100, (3, 3), {"padding": 1}, [3]),
    "3x3, strided": (100, (3, 3), {"padding": 1, "stride": 2}, [2, 1]),
    "tap by tap": (160, (3, 3), {"padding": 1}, [3, 3]),
    "two rows in one": (40, (3, 3), {"padding": 1}, [1, 1]),
    "dilated": (90, (4, 3), {"padding": 3, "dilation": (2, 3), "stride": (2, 1)}, [4, 4, 4]),
    "a row": (24, (1, 3), {"padding": 1}, [1]),
}


@pytest.mark.parametrize("case", STRIPS)
def test_boxes_some_rows_apart_share_their_windows(case: str) -> None:
    """As many to a strip as expected; each box's matrix has the numbers of its taps, and zeros of the padding."""
    channels, kernel, options, shared = STRIPS[case]
    (x,) = (t.detach() for t in drawn(case, (3, channels, 6, 7)))
    geometry = geometry_of(
        x.new_empty(1, 1, *kernel), **{"stride": 1, "dilation": 1, **options}, groups=1, algorithm=None
    )
    output = geometry.output(6, 7, *kernel)
    cut = planned(kernel, channels, 384, (6, 7), output, geometry)
    assert sorted((len(strip.regions) for strip in cut), reverse=True) == shared
    top, bottom, left, right = geometry.padding
    padded = torch_functional.pad(x, (left, right, top, bottom))
    for order in (ROWS_FIRST, IMAGES_LAST):
        windows = Windows(x, [slice(0, 3)], again := strips([r for strip in cut for r in strip.regions], order))
        windows._room.fill_(torch.nan)
        windows.load(x)
        for region, matrix in (pair for strip in again for pair in windows.matrices(strip)):
            rows, columns, some = region.box
            taps = torch.stack([_seen(padded[:, some], k, j, region) for k in _range(rows) for j in _range(columns)], 4)
            pixels = taps.permute(2, 0, 3, 4, 1) if order == ROWS_FIRST else taps.permute(2, 3, 0, 4, 1)
            assert torch.equal(matrix, pixels.reshape(matrix.shape)), (order, region)


def _range(part: slice) -> range:
    return range(part.start, part.stop)


def _seen(padded: Tensor, row: int, column: int, region: Region) -> Tensor:
    """What a tap sees of padded images for the outputs of a region, ``(N, C, rows, columns)``."""
    (s_h, s_w), (d_h, d_w) = region.geometry.stride, region.geometry.dilation
    down = [row * d_h + i * s_h for i in _range(region.down)]
    across = [column * d_w + j * s_w for j in _range(region.across)]
    return padded[:, :, down][:, :, :, across]


def root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
@pytest.mark.parametrize(
    ("shape", "weight_shape", "options"),
    [((8, 512, 4, 4), (512, 512, 3, 3), {"padding": 1}), ((64, 256, 8, 8), (128, 256, 1, 1), {"stride": 2})],
    ids=["4,608 terms a window", "1,024 pixels a tap"],
)
def test_long_sums_err_as_pytorchs(
    shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    options: dict[str, Any],
    kernels: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's sums have parts of 192 terms, or of about 100 pixels; the error goes with the root of a part's length,
    and ours have up to 256 of each. In one run the errors are 2.5 to 4.9 times PyTorch's."""
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    monkeypatch.undo()  # blocks as large as they come
    args = drawn("long", shape, weight_shape)
    with F.use_kernels(kernels):
        ours = with_gradients(F.conv2d, args, 0, **options)
    theirs = with_gradients(torch_functional.conv2d, args, 0, **options)
    doubles = tuple(arg.detach().double().requires_grad_() for arg in args)
    exact = with_gradients(torch_functional.conv2d, doubles, 0, **options)
    limit = 1.5 if weight_shape[2] == 3 else 2.0
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert root_mean_square(mine - true) <= limit * root_mean_square(other - true)


@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
@pytest.mark.parametrize("form", ["every other", "one for all", "a column"])
def test_a_bias_of_any_strides(form: str, kernels: bool, device: torch.device) -> None:
    numbers = torch.randn(256, 3, device=device)
    bias = {
        "every other": numbers.view(-1)[:512:2],
        "one for all": numbers[:1, 0].expand(256),
        "a column": numbers[:, 0],
    }
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    # as large as what goes to oneDNN's product, in both
    images, lines = torch.randn(4, 3, 12, 12, device=device), torch.randn(4, 16, 50, device=device)
    filters, rows = torch.randn(256, 3, 3, 3, device=device), torch.randn(256, 16, 3, device=device)
    with F.use_kernels(kernels):
        for function, input, weight in ((F.conv2d, images, filters), (F.conv1d, lines, rows)):
            # the bias is added once, to sums that do not change
            dense = function(input, weight, bias[form].contiguous())
            assert torch.equal(function(input, weight, bias[form]), dense)
