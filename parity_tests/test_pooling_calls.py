"""Odd calls of pooling, which PyTorch answers or refuses: the same answer, strides included, or the same refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F
from parity_tests.functional_cases import refuses_alike

IMAGE, LINE = torch.randn(2, 3, 8, 7), torch.randn(2, 3, 9)
DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.bfloat16, torch.float16)
LAYOUTS = {"channels_last": IMAGE.to(memory_format=torch.channels_last), "transposed": IMAGE.transpose(2, 3)}
INPUTS: dict[str, Tensor] = {
    **{f"{len(shape)}-d of {shape}": torch.randn(shape) for shape in ((), (4,), (4, 5), (3, 8, 7), (1, 2, 3, 8, 7))},
    **{f"empty {shape}": torch.randn(shape) for shape in ((2, 3, 8, 0), (2, 3, 0, 7), (2, 0, 8, 7), (0, 3, 8, 7))},
    **{f"empty {shape}": torch.randn(shape) for shape in ((3, 8, 0), (0, 8, 7), (0, 0, 0, 0), (0, 3, 8, 0))},
    **{str(dtype): IMAGE.mul(9).to(dtype) for dtype in DTYPES},
    **LAYOUTS,
}
CALLS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("max_pool2d", (2,)),
    ("max_pool2d", ((3, 2), (2, 1), 1)),
    ("avg_pool2d", (2,)),
    ("avg_pool2d", ((3, 2), (2, 1), 1, True, False)),
    *((f"adaptive_{kind}_pool2d", (size,)) for kind in ("avg", "max") for size in (1, 2, (3, None), (None, None))),
)
SIZES: dict[str, Any] = {
    "too many": (2, 3, 4),
    "none": (),
    "range": range(2, 4),
    "set": {2, 3},
    "array": np.int64(2),
    "tensor": torch.tensor(2),
    "tensors": torch.tensor([2, 3]),
    "None in a pair": (None,),
    "float": 2.0,
    "large": 1 << 40,
    "negative": -1,
}


def _alike(name: str, input: Tensor, args: tuple[Any, ...]) -> None:
    theirs, ours = getattr(torch_functional, name), getattr(F, name)
    try:
        expected = theirs(input, *args)
    except Exception:
        refuses_alike(ours, theirs, (input, *args), {})
        return
    found = ours(input, *args)
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride()), (name, args)
    # means are rounded once, from sums in another order
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name: str) -> None:
    for function, args in CALLS:
        _alike(function, INPUTS[name], args)


@pytest.mark.parametrize("shape", [(3, 9), (2, 3, 0), (3, 0), (0, 3, 9), (4,), (1, 2, 3, 9)], ids=str)
def test_lines(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.int64, torch.complex64):
        for function in ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"):
            for size in (1, 2):
                _alike(function, torch.ones(shape).to(dtype), (size,))


def _options(kind: str) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    for name, input in (("max_pool2d", IMAGE), ("avg_pool2d", IMAGE), ("max_pool1d", LINE), ("avg_pool1d", LINE)):
        if (name, kind) == ("max_pool1d", "large"):  # PyTorch 2.11 counts that far
            continue
        yield from ((name, input, (*before, SIZES[kind])) for before in ((), (2,), (2, 1)))
    # so many windows would be no error; of a float, PyTorch's words are that it has no length
    if kind not in ("large", "float"):
        yield from ((f"adaptive_{how}_pool2d", IMAGE, (SIZES[kind],)) for how in ("avg", "max"))


@pytest.mark.parametrize("kind", SIZES)
def test_sizes(kind: str) -> None:
    for name, input, args in _options(kind):
        _alike(name, input, args)


@pytest.mark.parametrize("name", ["adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_no_output_size_is_refused(name: str) -> None:
    refuses_alike(getattr(F, name), getattr(torch_functional, name), (IMAGE, None), {})


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"])
def test_eight_bits_are_refused(name: str) -> None:
    for args in ((2,), *(() if name.startswith("adaptive") else ((3, 2, 1),))):
        for functions in (F, torch_functional):
            with pytest.raises(NotImplementedError, match=f'"{name}" not implemented for'):
                getattr(functions, name)(IMAGE.to(torch.float8_e4m3fn), *args)
