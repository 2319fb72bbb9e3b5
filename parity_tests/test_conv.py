"""Convolutions: each algorithm against the oracle, PyTorch's own samples and bad calls, dtypes and layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as torch_functional

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.oracle import functional as oracle
from parity_tests.oracle import functional_conv as oracle_conv
from reimpl.testing import SEEDS, Verdict, combine, judge, random_tensor, seeded_generator, to_oracle

pytestmark = [
    # PyTorch's word about a copy of its own, and about what its databases import.
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

PLAIN = ("im2col", "views")
# shape of the input, shape of the weight, options
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 8, 7, 6), (5, 8, 3, 3), {"padding": 1}),
    "3x3, groups": ((2, 6, 5, 8), (4, 3, 3, 3), {"padding": 1, "groups": 2}),
    "5x5, stride 2": ((2, 3, 9, 8), (4, 3, 5, 5), {"padding": 2, "stride": 2}),
    "3x2, dilated": ((2, 4, 9, 7), (3, 4, 3, 2), {"padding": (2, 1), "dilation": (2, 3), "stride": (1, 2)}),
    "1x1": ((2, 9, 4, 4), (7, 9, 1, 1), {}),
    "wide": ((1, 64, 6, 6), (8, 64, 3, 3), {"padding": 1}),
}


def drawn(seed: int, case: str, dtype: torch.dtype, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Input, weight and bias of a geometry, wanting gradients, and its options."""
    shape, weight_shape, options = GEOMETRIES[case]
    generator = seeded_generator(seed, case)
    shapes = (shape, weight_shape, weight_shape[:1])
    return tuple(random_tensor(s, dtype, generator, device).requires_grad_() for s in shapes), options


def with_gradients(
    function: Callable[..., Tensor], args: tuple[Tensor, ...], seed: int, **options: Any
) -> list[Tensor]:
    """The output, and the gradients for a random gradient of the output."""
    output = function(*args, **options)
    generator = seeded_generator(seed, "grad", tuple(output.shape))
    grad = random_tensor(output.shape, output.dtype, generator, output.device)
    return [output, *torch.autograd.grad(output, args, grad)]


def exact_with_gradients(function: Callable[..., Any], arrays: list[Any], grad: Any, **options: Any) -> list[Any]:
    output, vjp = function(*arrays, **options)
    return [output, *vjp(grad)]


QUANTITIES = ("output", "gradient 0", "gradient 1", "gradient 2")


@pytest.mark.quick
@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("algorithm", PLAIN)
def test_algorithms_against_the_oracle(
    algorithm: str, case: str, dtype: torch.dtype, device: torch.device, record: Callable[..., Verdict]
) -> None:
    rows: list[list[Verdict]] = []
    for seed in SEEDS:
        args, options = drawn(seed, case, dtype, device)
        ours = with_gradients(F.conv2d, args, seed, **options, algorithm=algorithm)
        theirs = with_gradients(torch_functional.conv2d, args, seed, **options)
        grad = to_oracle(random_tensor(ours[0].shape, dtype, seeded_generator(seed, "grad", tuple(ours[0].shape))))
        arrays = [to_oracle(arg) for arg in args]
        exact = exact_with_gradients(oracle.conv2d, arrays, grad, **options)
        scale = exact_with_gradients(oracle.conv2d, [np.abs(x) for x in arrays], np.abs(grad), **options)
        rows.append([judge(*row) for row in zip(ours, theirs, exact, scale, strict=True)])
    note(rows, record, case, algorithm, dtype, device)


def note(
    rows: list[list[Verdict]],
    record: Callable[..., Verdict],
    case: str,
    algorithm: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Record the verdicts of all seeds together, then require them."""
    together = {name: combine(column) for name, column in zip(QUANTITIES, zip(*rows, strict=True), strict=False)}
    for quantity, verdict in together.items():
        record(
            verdict, kind="function", technique="conv2d", ids=("F7",), case=case, quantity=quantity,
            implementation=algorithm, device=device, dtype=dtype, seeds=len(rows),
        )  # fmt: skip
    for quantity, verdict in together.items():
        verdict.check(f"conv2d, {algorithm}", f"{case}, {dtype}", quantity)


WINOGRAD = {
    "odd and even": ((2, 8, 7, 6), (5, 8, 3, 3), 1),
    "many channels": ((1, 64, 8, 8), (16, 64, 3, 3), 1),
    "no padding": ((2, 3, 6, 9), (4, 3, 3, 3), 0),
    "more padding than the kernel": ((1, 3, 4, 3), (2, 3, 3, 3), 3),
}


@pytest.mark.quick
@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WINOGRAD)
def test_winograd_within_its_own_bound(
    case: str, dtype: torch.dtype, device: torch.device, record: Callable[..., Verdict]
) -> None:
    """Its errors are those of its own sums, which are larger than the convolution's.

    The limit is the usual one, but counted in ulp of the sum of absolute values that pass through Winograd's
    transforms: (|Aᵀ| [(|G||w||Gᵀ|) ⊙ (|Bᵀ||x||B|)] |A|), at most 81 times the convolution's own, (3 · 3/2 · 2)².
    """
    shape, weight_shape, padding = WINOGRAD[case]
    rows = []
    for seed in SEEDS:
        generator = seeded_generator(seed, case)
        args = tuple(random_tensor(s, dtype, generator, device).requires_grad_() for s in (shape, weight_shape))
        ours = with_gradients(F.conv2d, args, seed, padding=padding, algorithm="winograd")
        grad = to_oracle(random_tensor(ours[0].shape, dtype, seeded_generator(seed, "grad", tuple(ours[0].shape))))
        arrays = [to_oracle(arg) for arg in args]
        exact = exact_with_gradients(oracle.conv2d, arrays, grad, padding=padding)
        scale = exact_with_gradients(oracle_conv.winograd_magnitude, arrays, grad, padding=padding)
        plain = exact_with_gradients(oracle.conv2d, [np.abs(x) for x in arrays], np.abs(grad), padding=padding)
        assert all(np.all(s <= 81 * np.maximum(p, p.max())) for s, p in zip(scale[:3], plain[:3], strict=True))
        rows.append([judge(*row) for row in zip(ours, [None] * 3, exact[:3], scale[:3], strict=True)])
    note(rows, record, case, "winograd", dtype, device)


def test_winograd_is_never_chosen_unasked(device: torch.device) -> None:
    for channels in (3, 16, 64, 128):
        generator = seeded_generator(0, "winograd", channels)
        x, w = (
            random_tensor(shape, torch.float32, generator, device)
            for shape in ((2, channels, 16, 16), (channels, channels, 3, 3))
        )
        by_algorithm = {name: F.conv2d(x, w, padding=1, algorithm=name) for name in (None, *PLAIN, "winograd")}
        assert any(torch.equal(by_algorithm[None], by_algorithm[name]) for name in PLAIN)
        assert not torch.equal(by_algorithm[None], by_algorithm["winograd"])


@pytest.mark.parametrize("algorithm", [*PLAIN, "winograd"])
def test_derivatives_of_each_algorithm(algorithm: str) -> None:
    generator = seeded_generator(0, algorithm)
    shapes = (2, 2, 4, 5), (2, 2, 3, 3), (2,)
    args = tuple(random_tensor(s, torch.float64, generator).requires_grad_() for s in shapes)

    def function(*tensors: Tensor) -> Tensor:
        return F.conv2d(*tensors, padding=1, algorithm=algorithm)

    assert gradcheck(function, args, check_batched_grad=True)
    assert gradgradcheck(function, args, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [((3, 2), {}), ((3, 3), {"stride": 2}), ((3, 3), {"dilation": (1, 2)}), ((5, 5), {"padding": "same"})],
)
def test_winograd_names_what_it_does_not_do(kernel: tuple[int, int], options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="algorithm='winograd'"):
        F.conv2d(torch.ones(1, 2, 9, 9), torch.ones(2, 2, *kernel), **options, algorithm="winograd")
    with pytest.raises(NotImplementedError, match="algorithm='winograd'"):
        F.conv1d(torch.ones(1, 2, 9), torch.ones(2, 2, 3), algorithm="winograd")


def test_an_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algorithm must be None or one of .* got 'fft'"):
        F.conv2d(torch.ones(1, 2, 9, 9), torch.ones(2, 2, 3, 3), algorithm="fft")


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64)
# Two computations of sums of up to 100 products, each within a few roundings of the result's size.
ROUNDINGS = 16


def assert_near(ours: Tensor, theirs: Tensor, what: object) -> None:
    """Equal within roundings of the tensor's largest number, since cancellation is nobody's fault."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    if ours.numel() and (ours.is_floating_point() or ours.is_complex()):
        limit = ROUNDINGS * torch.finfo(ours.dtype).eps * float(theirs.detach().abs().max())
        assert float((ours - theirs).detach().abs().max()) <= limit, what
    else:
        assert torch.equal(ours, theirs), what


@pytest.mark.parametrize("name", ["conv1d", "conv2d"])
def test_integers_and_their_edges(name: str, device: torch.device) -> None:
    dims = int(name[4])
    x = torch.arange(2 * 3 * 5**dims, device=device).reshape(2, 3, *(5,) * dims) % 7
    w = torch.arange(4 * 3 * 2**dims, device=device).reshape(4, 3, *(2,) * dims) % 5 - 2
    assert torch.equal(getattr(F, name)(x, w, padding=1), getattr(torch_functional, name)(x, w, padding=1))
    with pytest.raises(NotImplementedError, match="not implemented for 'Bool'"):
        getattr(F, name)(x > 0, w > 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "expanded"])
@pytest.mark.parametrize("algorithm", [None, *PLAIN, "winograd"])
def test_strides_of_output_and_gradients(layout: str, algorithm: str | None, device: torch.device) -> None:
    base = torch.randn(4, 6, 8, 8, device=device, dtype=torch.float64)
    x = {
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "permuted": base.permute(0, 1, 3, 2),
        "sliced": base[:, ::2],
        "expanded": base[:1].expand(4, -1, -1, -1),
    }[layout].detach()
    w = torch.randn(5, x.shape[1], 3, 3, device=device, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    mine = F.conv2d(x, w, padding=1, algorithm=algorithm)
    other = torch_functional.conv2d(x, w, padding=1)
    assert mine.stride() == other.stride()
    grad = torch.randn_like(other)
    for ours, theirs in zip(
        torch.autograd.grad(mine, (x, w), grad), torch.autograd.grad(other, (x, w), grad), strict=True
    ):
        assert_near(ours, theirs, layout)
    assert mine.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


LAYOUTS = {"planes": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
@pytest.mark.parametrize("case", ["3x3", "3x3, groups", "5x5, stride 2", "wide"])
def test_layouts_of_gradients(case: str, kernels: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Input, weight and gradient in planes or with their channels last: strides of the gradients are PyTorch's."""
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    args, options = drawn(0, case, dtype, device)
    for names in itertools.product(LAYOUTS, repeat=3):
        first, second, third = (LAYOUTS[name] for name in names)
        x, w = args[0].detach().contiguous(memory_format=first), args[1].detach().contiguous(memory_format=second)
        x.requires_grad_(), w.requires_grad_()
        with F.use_kernels(kernels):
            mine = F.conv2d(x, w, **options)
            grad = torch.ones_like(mine).contiguous(memory_format=third)
            ours = mine, *torch.autograd.grad(mine, (x, w), grad)
        other = torch_functional.conv2d(x, w, **options)
        theirs = other, *torch.autograd.grad(other, (x, w), grad)
        assert [t.stride() for t in ours] == [t.stride() for t in theirs], names


@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
def test_sequences_have_one_layout(kernels: bool, device: torch.device) -> None:
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    x = torch.ones(4, 33, 24, device=device).transpose(1, 2).requires_grad_()
    w = torch.ones(16, 3, 24, device=device).transpose(1, 2).requires_grad_()
    with F.use_kernels(kernels):
        ours = F.conv1d(x, w, padding=1)
        tensors = ours, *torch.autograd.grad(ours, (x, w), torch.ones_like(ours))
    assert all(t.is_contiguous() for t in tensors)
    other = torch_functional.conv1d(x, w, padding=1)
    theirs = other, *torch.autograd.grad(other, (x, w), torch.ones_like(other))
    assert all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d"])
def test_padding_modes(name: str, padding: int | str, mode: str, device: torch.device) -> None:
    dims = int(name[4])
    x = torch.randn(2, 4, *(7, 6)[:dims], device=device, dtype=torch.float64)
    results = []
    for namespace in (nn, torch.nn):
        torch.manual_seed(3)
        module = getattr(namespace, name)(4, 6, 3, padding=padding, dilation=2, groups=2, padding_mode=mode)
        results.append(module.to(device, torch.float64)(x))
    assert_near(results[0], results[1], (padding, mode))


def test_a_sum_over_no_channels_is_the_bias(device: torch.device) -> None:
    """PyTorch answers with no output channels at all, and so loses the bias."""
    x, w, b = torch.ones(2, 0, 4, 4, device=device), torch.ones(4, 0, 1, 1, device=device), torch.arange(4.0)
    assert torch_functional.conv2d(x, w, b.to(device)).shape == (2, 0, 4, 4)
    expected = b.to(device).reshape(-1, 1, 1).expand(2, 4, 4, 4)
    for algorithm in (None, *PLAIN):
        assert torch.equal(F.conv2d(x, w, b.to(device), algorithm=algorithm), expected)


def test_empty_batches(device: torch.device) -> None:
    for name, shape, weight_shape in (
        ("conv1d", (0, 3, 8), (4, 3, 3)),
        ("conv2d", (0, 3, 8, 8), (4, 3, 3, 3)),
    ):
        args = tuple(torch.ones(s, device=device, requires_grad=True) for s in (shape, weight_shape, weight_shape[:1]))
        for algorithm in (None, *PLAIN):
            ours = with_gradients(getattr(F, name), args, 0, padding=1, algorithm=algorithm)
            theirs = with_gradients(getattr(torch_functional, name), args, 0, padding=1)
            assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_non_finite_numbers_pass_as_pytorchs(device: torch.device) -> None:
    x = torch.ones(1, 2, 5, 5, device=device)
    x[0, 0, 1, 1], x[0, 1, 3, 3] = torch.nan, torch.inf
    w = torch.ones(3, 2, 3, 3, device=device)
    expected = torch_functional.conv2d(x, w, padding=1)
    for algorithm in (None, *PLAIN):
        torch.testing.assert_close(F.conv2d(x, w, padding=1, algorithm=algorithm), expected, equal_nan=True)


def test_worked_numbers_of_the_notes() -> None:
    """N4: 6 x 6 with padding 1, a filter of 2 and stride 1 gives 7 x 7; N1's 8 x 8 example gives 4 x 4, not 3 x 3."""
    assert F.conv2d(torch.ones(1, 1, 6, 6), torch.ones(1, 1, 2, 2), padding=1).shape == (1, 1, 7, 7)
    assert F.conv2d(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 3, 3), padding=1, stride=2).shape == (1, 1, 4, 4)
    assert sum(p.numel() for p in nn.Conv2d(3, 2, 3).parameters()) == 56
    assert sum(p.numel() for p in nn.Conv2d(3, 6, 5).parameters()) == 456
