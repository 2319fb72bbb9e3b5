"""What layers and losses refuse or warn of: PyTorch's types, and PyTorch's words where they fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.functional_cases import refuses_alike


def bad_calls() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Calls that PyTorch refuses, by the name of the function."""
    randn, long = torch.randn, lambda *shape: torch.zeros(*shape, dtype=torch.long)
    yield "linear", (randn(()), randn(4, 3)), {}
    yield "linear", (randn(2, 3), randn(3, 3, 3)), {}
    yield "linear", (randn(2, 3), randn(3), randn(1)), {}
    yield "relu", (torch.ones(2, dtype=torch.bool),), {}
    yield "relu", (torch.ones(2, dtype=torch.complex64),), {}
    for name in ("softmax", "log_softmax"):
        yield name, (randn(2, 3), 2), {}
        yield name, (randn(()), 1), {}
        yield name, (long(2, 3), 1), {}
        yield name, (randn(2, 3), 1), {"dtype": torch.int64}
        yield name, (randn(2, 3).to(torch.complex64), 1), {}
    x, t = randn(3, 5), long(3)
    yield "cross_entropy", (x, long(4)), {}
    yield "cross_entropy", (randn(5), long(2)), {}
    yield "cross_entropy", (randn(()), randn(())), {}
    yield "cross_entropy", (randn(3, 5, 4), long(3, 5)), {}
    yield "cross_entropy", (randn(3, 5, 4), long(3)), {}
    yield "cross_entropy", (randn(3, 5, 4, 4), long(3, 4, 5)), {}
    yield "cross_entropy", (randn(3, 5, 4, 4), long(2, 4, 4)), {}
    yield "cross_entropy", (randn(3, 5, 4, 4, 2), long(3, 4, 5, 2)), {}
    yield "cross_entropy", (x, long(3, 5)), {}
    yield "cross_entropy", (x, long(3, 1)), {}
    yield "cross_entropy", (x, randn(2, 5)), {}
    yield "cross_entropy", (x, t.int()), {}
    yield "cross_entropy", (x, randn(3)), {}
    yield "cross_entropy", (x, t + 5), {}
    yield "cross_entropy", (x, t - 1), {}
    yield "cross_entropy", (x, t + 5), {"label_smoothing": 0.1}
    yield "cross_entropy", (randn(3, 5, 4), long(3, 4) + 7), {}
    yield "cross_entropy", (x, t, randn(4)), {}
    yield "cross_entropy", (x, t, randn(1, 5)), {}
    yield "cross_entropy", (x, t, randn(5).double()), {}
    yield "cross_entropy", (x, t, randn(5).requires_grad_()), {}
    yield "cross_entropy", (x, x, randn(4)), {}
    yield "cross_entropy", (x, t), {"label_smoothing": 1.1}
    yield "cross_entropy", (x, x), {"label_smoothing": 1.1}
    yield "cross_entropy", (x, x), {"ignore_index": 1}
    yield "cross_entropy", (x, t), {"reduction": "some"}
    yield "cross_entropy", (x, x), {"reduction": "some"}
    yield "cross_entropy", (long(3, 5), t), {}
    image, kernel = randn(2, 3, 8, 8), randn(4, 3, 3, 3)
    yield "conv2d", (randn(3, 3), kernel), {}
    yield "conv2d", (randn(2, 3, 3, 3, 3), kernel), {}
    yield "conv2d", (image, randn(4, 2, 3, 3)), {}
    yield "conv2d", (image[0], randn(4, 2, 3, 3)), {}
    yield "conv2d", (randn(2, 4, 8, 8), randn(3, 2, 3, 3)), {"groups": 2}
    yield "conv2d", (image, kernel), {"groups": 0}
    yield "conv2d", (image, kernel, randn(5)), {}
    yield "conv2d", (image, kernel, randn(4, 1)), {}
    yield "conv2d", (image, kernel, randn(4).double()), {}
    yield "conv2d", (randn(2, 3, 2, 2), kernel), {}
    yield "conv2d", (randn(2, 3, 2, 2), kernel), {"padding": 1, "dilation": 3}
    yield "conv2d", (image, kernel), {"stride": 0}
    yield "conv2d", (image, kernel), {"stride": -1}
    yield "conv2d", (image, kernel), {"padding": -1}
    yield "conv2d", (image, kernel), {"dilation": 0}
    for options in ({}, {"padding": "same"}, {"padding": -1}, {"stride": 0}, {"padding": "same", "stride": 2}):
        yield "conv2d", (image, kernel), {"dilation": -1, **options}
    yield "conv2d", (image, kernel), {"padding": "full"}
    yield "conv2d", (image, kernel), {"padding": "same", "stride": 2}
    yield "conv2d", (image, kernel), {"stride": (1, 2, 3)}
    yield "conv2d", (image, kernel), {"padding": (1, 2, 3)}
    yield "conv2d", (image, randn(0, 3, 3, 3)), {}
    sequence, taps = randn(2, 3, 8), randn(4, 3, 3)
    yield "conv1d", (randn(8), taps), {}
    yield "conv1d", (randn(2, 3, 8, 8), taps), {}
    yield "conv1d", (sequence, randn(4, 3)), {}
    yield "conv1d", (sequence, randn(4, 3, 3, 3)), {}
    yield "conv1d", (sequence, randn(4, 2, 3)), {}
    yield "conv1d", (randn(2, 3, 2), taps), {}
    yield "conv1d", (sequence, taps, randn(5)), {}
    yield "conv1d", (sequence, taps), {"stride": (1, 2)}
    yield "conv1d", (sequence, taps), {"padding": -1}
    yield "conv1d", (sequence, taps), {"dilation": -1}
    yield "conv1d", (sequence, taps), {"padding": "same", "stride": 2}
    yield "conv1d", (randn(2, 3, 0), randn(4, 3, 1)), {"padding": 1}
    yield "conv1d", (randn(2, 6, 8), randn(4, 2, 3)), {"groups": 3}
    yield "conv2d", (randn(2, 3, 0, 4), randn(4, 3, 1, 1)), {"padding": 1}
    yield "max_pool2d", (randn(3, 3), 2), {}
    yield "max_pool2d", (image, 2), {"padding": 2}
    yield "max_pool2d", (image, 2), {"padding": -1}
    yield "max_pool2d", (image, (3, 2), 1, (2, 1), 2), {}
    yield "max_pool2d", (image, 2), {"stride": 0}
    yield "max_pool2d", (image, 2), {"dilation": 0}
    yield "max_pool2d", (image, (2, 2, 2)), {}
    yield "max_pool2d", (image, 2), {"stride": (2, 2, 2)}
    yield "max_pool2d", (image, 2), {"padding": (1, 1, 1)}
    yield "max_pool2d", (image, 2), {"dilation": (1, 1, 1)}
    yield "max_pool2d", (randn(2, 3, 1, 1), 3), {}
    yield "max_pool2d", (image > 0, 2), {}
    yield "max_pool2d", (randn(2, 0, 8, 8), 2), {}
    yield "max_pool2d", (randn(2, 3, 0, 8), 2), {}
    yield "adaptive_avg_pool2d", (randn(3, 3), 2), {}
    yield "adaptive_avg_pool2d", (image, (1, 2, 3)), {}
    yield "adaptive_avg_pool2d", (image, -1), {}
    yield "adaptive_avg_pool2d", (long(2, 3, 4, 5), 2), {}
    yield "adaptive_avg_pool2d", (randn(2, 3, 0, 5), 2), {}
    r = randn(3)
    yield "batch_norm", (randn(1, 3), None, None), {"training": True}
    yield "batch_norm", (randn(1, 3, 1, 1), None, None), {"training": True}
    yield "batch_norm", (randn(2, 3), None, None), {}
    yield "batch_norm", (randn(2, 3), r, None), {}
    yield "batch_norm", (randn(2, 3), r, None), {"training": True}
    yield "batch_norm", (randn(2, 3), randn(4), r), {}
    yield "batch_norm", (randn(2, 3), r, randn(4)), {}
    yield "batch_norm", (randn(2, 3), r, r, randn(4), r), {}
    yield "batch_norm", (randn(2, 3), r, r, r, randn(4)), {}
    yield "batch_norm", (randn(2, 3), None, None), {"training": True, "eps": 0}
    yield "batch_norm", (randn(2, 3).bfloat16(), r.bfloat16(), r.bfloat16(), r, r), {}
    yield "batch_norm", (randn(2, 3).double(), r, r, r, r), {}
    yield "batch_norm", (randn(2, 3), r, r, r.double(), r.double()), {}
    yield "batch_norm", (long(2, 3), r, r), {}
    yield "batch_norm", (randn(2, 3, requires_grad=True), randn(3, requires_grad=True), r.abs()), {}


@pytest.mark.parametrize("name", sorted({name for name, _, _ in bad_calls()}))
def test_refuses_what_pytorch_refuses_in_its_words(name: str) -> None:
    for function, args, kwargs in bad_calls():
        if function == name:
            refuses_alike(getattr(F, name), getattr(torch_functional, name), args, kwargs)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        # Type and meaning are PyTorch's; its own text names a kernel or a library that is not called here.
        ("linear", (torch.ones(2, 3), torch.ones(4, 5)), r"cannot be multiplied \(2x3 and 5x4\)"),
        ("linear", (torch.ones(2, 3), torch.ones(4, 3), torch.ones(5)), r"expanded size of the tensor \(4\)"),
        ("linear", (torch.ones(2, 3), torch.ones(4, 3).double()), "same dtype"),
        ("conv2d", (torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3)), r"Expected 3-dimensional input for .* \[4, 3, 3\]"),
        ("conv2d", (torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3).double()), "weight type .* should be the same"),
        ("conv2d", (torch.ones(2, 3, 8, 8), torch.ones(4, 3, 0, 0)), "at least 1 x 1"),
        ("max_pool2d", (torch.ones(2, 3, 8, 8), 0), "greater than zero|should not be zero"),
    ],
)
def test_refuses_in_other_words(name: str, args: tuple[Any, ...], words: str) -> None:
    with pytest.raises(Exception) as theirs:
        getattr(torch_functional, name)(*args)
    with pytest.raises(theirs.type, match=words):
        getattr(F, name)(*args)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_dim_left_out_warns_as_pytorch_does(name: str) -> None:
    for shape in ((3,), (2, 3), (2, 3, 4), (2, 3, 2, 2)):
        x = torch.randn(shape)
        results = []
        for module in (F, torch_functional):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                value = getattr(module, name)(x)
            results.append((value, [(w.category, str(w.message), w.filename) for w in caught]))
        torch.testing.assert_close(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]


def test_deprecated_reduction_arguments() -> None:
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for options in ({"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            ours = F.cross_entropy(x, target, **options)
        with pytest.warns(UserWarning):
            torch.testing.assert_close(ours, torch_functional.cross_entropy(x, target, **options))


def test_max_pool2d_refuses_a_window_in_the_padding_alone() -> None:
    # PyTorch without indices answers -inf here, whose gradient has no place to go.
    x = torch.zeros(1, 1, 2, 2)
    assert torch_functional.max_pool2d(x, 2, 1, 1, 3).eq(-torch.inf).any()
    with pytest.raises(RuntimeError, match="window in the padding alone"):
        F.max_pool2d(x, 2, 1, 1, 3)


def test_every_other_name_is_pytorchs() -> None:
    assert F.gelu is torch_functional.gelu and F.conv2d is not torch_functional.conv2d
    assert set(dir(torch_functional)) <= set(dir(F))
    with pytest.raises(AttributeError, match=r"neither module .reimpl\.functional. nor .torch\.nn\.functional. has"):
        F.no_such_function  # noqa: B018
