"""Options of another type than the one that is due: refused as PyTorch refuses them, also once a layer is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.functional_cases import refuses_alike
from parity_tests.versions import IS_REFERENCE

pytestmark = pytest.mark.quick

SCORES, CLASSES = torch.randn(3, 5), torch.tensor([0, 1, 2])
IMAGE, LINE, TABLE = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8), torch.randn(5, 3)
AVERAGES = torch.zeros(5), torch.ones(5)
NO_INTEGER = (1.5, 2.0, True, "x", [1], 1j, torch.tensor(0.5), np.float64(1))
NO_FLAG = (1, 0, 1.0, "x", None, [1], torch.tensor(True), np.int64(1))
NO_NUMBER = ("x", None, [1.5], 1j)
NO_SIZE = (1.5, True, "x", (1.5,), (True,), 1j)

# The function, what it is given, an option, and values that are none.
ROWS: tuple[tuple[str, tuple[Any, ...], str, tuple[Any, ...]], ...] = (
    ("cross_entropy", (SCORES, CLASSES), "ignore_index", (*NO_INTEGER, None)),
    ("cross_entropy", (SCORES, SCORES.softmax(1)), "ignore_index", NO_INTEGER),
    ("cross_entropy", (SCORES, CLASSES), "label_smoothing", NO_NUMBER),
    ("nll_loss", (SCORES, CLASSES), "ignore_index", (*NO_INTEGER, None)),
    *((name, (SCORES, SCORES.sigmoid()), "reduction", (3, None, 1.5, True)) for name in ("mse_loss", "cross_entropy")),
    ("nll_loss", (SCORES, CLASSES), "reduction", (3, None, True)),
    ("binary_cross_entropy", (SCORES.sigmoid(), SCORES.sigmoid()), "reduction", (3, None, True)),
    ("binary_cross_entropy_with_logits", (SCORES, SCORES.sigmoid()), "reduction", (3, None, True)),
    *(("max_pool2d", (IMAGE, 2), option, NO_SIZE) for option in ("stride", "padding", "dilation")),
    *(("max_pool1d", (LINE, 2), option, NO_SIZE) for option in ("stride", "padding", "dilation")),
    ("max_pool2d", (IMAGE, 2), "ceil_mode", NO_FLAG),
    ("max_pool1d", (LINE, 2), "ceil_mode", NO_FLAG),
    *(("avg_pool2d", (IMAGE, 2), option, (1.5, True, "x")) for option in ("stride", "padding")),
    *(("avg_pool1d", (LINE, 2), option, (1.5, True, "x")) for option in ("stride", "padding")),
    *(("avg_pool2d", (IMAGE, 2), option, NO_FLAG) for option in ("ceil_mode", "count_include_pad")),
    *(("avg_pool1d", (LINE, 2), option, NO_FLAG) for option in ("ceil_mode", "count_include_pad")),
    ("avg_pool2d", (IMAGE, 2), "divisor_override", NO_INTEGER),
    *((f"adaptive_{kind}_pool2d", (IMAGE,), "output_size", (True, (1.0, 1.0))) for kind in ("avg", "max")),
    ("batch_norm", (SCORES, *AVERAGES), "training", NO_FLAG),
    ("batch_norm", (SCORES, *AVERAGES), "momentum", NO_NUMBER),
    ("batch_norm", (SCORES, *AVERAGES), "eps", (-1.0,)),
    ("dropout", (SCORES,), "training", NO_FLAG),
    ("softmax", (SCORES,), "dim", NO_INTEGER),
    ("log_softmax", (SCORES,), "dim", NO_INTEGER),
    *((name, (SCORES, 1), "dtype", (3, "x", 1.5)) for name in ("softmax", "log_softmax")),
    ("embedding", (CLASSES, TABLE), "padding_idx", (1.5, 2.0, True, torch.tensor(0.5), np.float64(1))),
    *(("embedding", (CLASSES, TABLE), option, NO_FLAG) for option in ("scale_grad_by_freq", "sparse")),
)


def _cases() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    for name, args, option, values in ROWS:
        for value in values:
            yield name, args, {option: value}


@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
@pytest.mark.parametrize("name", sorted({row[0] for row in ROWS}))
def test_refuses_other_types_as_pytorch_does(name: str, kernels: bool) -> None:
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    with F.use_kernels(kernels):
        for function, args, option in _cases():
            if function == name:
                refuses_alike(getattr(F, name), getattr(torch_functional, name), args, option)


@pytest.mark.parametrize("option", ["stride", "padding", "dilation", "groups"])
def test_convolutions_refuse_other_types(option: str) -> None:
    """PyTorch's words list every way to call its operator."""
    for value in (1.5, True, "x", (1.0, 1.0), torch.tensor(0.5)):
        if (option, value) == ("padding", "x"):
            continue  # names a kind of padding
        for namespace in (F, torch_functional):
            with pytest.raises(TypeError, match=r"must be|invalid combination"):
                namespace.conv2d(IMAGE, torch.ones(3, 3, 1, 1), **{option: value})


# What the compiled node has done for an option is not done for what is equal to it, and no more than that.
EQUAL: tuple[tuple[str, tuple[Any, ...], str, Any, Any], ...] = (
    ("cross_entropy", (SCORES, CLASSES), "ignore_index", 2, 2.0),
    ("cross_entropy", (SCORES, CLASSES), "ignore_index", 1, True),
    ("nll_loss", (SCORES, CLASSES), "ignore_index", 2, 2.0),
    ("softmax", (SCORES,), "dim", 1, True),
    ("max_pool2d", (IMAGE, 2), "ceil_mode", False, 0),
    ("max_pool2d", (IMAGE, 2), "stride", 1, True),
    ("avg_pool2d", (IMAGE, 2), "count_include_pad", True, 1),
    ("batch_norm", (SCORES, *AVERAGES), "training", True, 1),
)


@pytest.mark.parametrize("row", EQUAL, ids=lambda row: f"{row[0]}-{row[2]}-{row[4]}")
def test_refuses_what_equals_a_known_option(row: tuple[str, tuple[Any, ...], str, Any, Any]) -> None:
    pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    name, args, option, right, wrong = row
    with F.use_kernels():
        for _ in range(2):
            getattr(F, name)(*args, **{option: right})
        refuses_alike(getattr(F, name), getattr(torch_functional, name), args, {option: wrong})


@pytest.mark.parametrize("held", [torch.tensor, np.int64], ids=["tensor", "NumPy"])
def test_takes_integers_that_others_hold(held: Any) -> None:
    calls = (
        ("cross_entropy", (SCORES, CLASSES), {"ignore_index": 1}),
        ("nll_loss", (SCORES, CLASSES), {"ignore_index": 1}),
        ("max_pool2d", (IMAGE,), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("max_pool1d", (LINE,), {"kernel_size": 3, "stride": 2}),
        ("avg_pool2d", (IMAGE,), {"kernel_size": 3, "stride": 2}),
        ("softmax", (SCORES,), {"dim": 0}),
        ("conv2d", (IMAGE, torch.ones(3, 1, 2, 2)), {"stride": 2, "padding": 1, "dilation": 1, "groups": 3}),
    )
    for name, args, options in calls:
        given = {option: held(value) for option, value in options.items()}
        ours, theirs = (getattr(n, name)(*args, **given) for n in (F, torch_functional))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not IS_REFERENCE, reason="the corner is this PyTorch's")
def test_smoothing_by_nan_is_none() -> None:
    for target in (CLASSES, SCORES.softmax(1)):
        ours, theirs = (n.cross_entropy(SCORES, target, label_smoothing=torch.nan) for n in (F, torch_functional))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
