"""Where a layer or loss cannot do something, or answers other than PyTorch: every case, as the page lists it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.versions import IS_REFERENCE

PAGE = Path(__file__).parents[1] / "docs" / "functional.md"
TORCH = torch.nn.functional


@dataclass(frozen=True)
class Exceptional:
    """One row of the page: what is asked of which function, and what each library does, an error or a number."""

    name: str
    what: str
    call: Callable[[Any], Tensor]
    ours: type[Exception] | float
    theirs: type[Exception] | float


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def grad_of(output: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(output.sum(), leaf)[0].to_dense().sum()


def heaviside(library: Any) -> Any:
    return library.heaviside if library is F else torch.heaviside


def gradient_of_heaviside(library: Any) -> Tensor:
    x = leaf(3)
    return grad_of(heaviside(library)(x, torch.ones(())), x)


def gradient_of_compiled_heaviside(library: Any) -> Tensor:
    torch._dynamo.reset()
    step = torch.compile(lambda x: heaviside(library)(x, torch.ones(())), backend="aot_eager")
    return step(leaf(3)).sum().detach()  # type: ignore[no-any-return]


def gradient_of_class_weights(library: Any) -> Tensor:
    weight = leaf(3)
    return grad_of(library.cross_entropy(leaf(2, 3), torch.tensor([0, 2]), weight), weight)


def gradient_of_nll_weights(library: Any) -> Tensor:
    weight = leaf(3)
    return grad_of(library.nll_loss(leaf(2, 3), torch.tensor([0, 2]), weight), weight)


def gradient_of_bce_weight(library: Any) -> Tensor:
    weight = leaf(3)
    return grad_of(library.binary_cross_entropy(torch.full((3,), 0.5), torch.ones(3), weight), weight)


def gradient_of_averages(library: Any) -> Tensor:
    mean = leaf(3)
    return grad_of(library.batch_norm(torch.ones(2, 3), mean, torch.ones(3)), mean)


def leaky_in_place(library: Any) -> Tensor:
    x = leaf(3)
    return grad_of(library.leaky_relu(x * 1, -0.5, inplace=True), x)


def dropout_under_vmap(library: Any) -> Tensor:
    return torch.vmap(library.dropout)(torch.ones(3, 2)).sum()  # type: ignore[no-any-return]


def window_in_the_padding(library: Any) -> Tensor:
    return library.max_pool2d(torch.zeros(1, 1, 2, 2), 2, 1, 1, 3).max().clamp_min(-1)  # type: ignore[no-any-return]


def gradient_of_an_empty_grid(library: Any) -> Tensor:
    x = leaf(1, 2, 3)
    return grad_of(library.adaptive_avg_pool2d(x, (0, 2)), x) + grad_of(library.adaptive_max_pool2d(x, (0, 2)), x)


def layer(library: Any) -> torch.nn.Module:
    return (nn if library is F else torch.nn).Linear(2, 3)  # type: ignore[no-any-return]


def scripted(library: Any) -> Tensor:
    return torch.jit.script(layer(library))(torch.ones(2)).detach().sum() * 0  # type: ignore[no-any-return]


def rows(library: Any, table: Tensor, **options: Any) -> Tensor:
    return library.embedding(torch.tensor([0, 2, 2]), table, **options)  # type: ignore[no-any-return]


def compiled_sparse_embedding(library: Any) -> Tensor:
    torch._dynamo.reset()
    table = leaf(3, 2)
    lookup = torch.compile(lambda t: rows(library, t, sparse=True), backend="aot_eager", fullgraph=True)
    return grad_of(lookup(table), table)


def forward_over_reverse(library: Any, **options: Any) -> Tensor:
    def gradient(table: Tensor) -> Tensor:
        return torch.func.grad(lambda t: rows(library, t, **options).square().sum())(table)  # type: ignore[no-any-return]

    table = torch.ones(3, 2)
    return torch.func.jvp(gradient, (table,), (table,))[1].to_dense().sum()  # type: ignore[no-any-return]


def tangent_of_the_padding_row(library: Any) -> Tensor:
    table = torch.ones(3, 2)
    _, tangent = torch.func.jvp(lambda t: rows(library, t, padding_idx=0), (table,), (table,))
    return tangent[0, 0]  # type: ignore[no-any-return]


def tangent_of_class_weights(library: Any) -> Tensor:
    def loss(weight: Tensor) -> Tensor:
        x, target = torch.full((2, 3), -1.0), torch.tensor([0, 2])
        return library.nll_loss(x, target, weight, reduction="sum")  # type: ignore[no-any-return]

    return torch.func.jvp(loss, (torch.ones(3),), (torch.ones(3),))[1]  # type: ignore[no-any-return]


def gradient_of_planes_in_channels_last(library: Any) -> Tensor:
    x = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    return grad_of(library.nll_loss(x, torch.ones(2, 4, 4, dtype=torch.long)), x)


def gradient_of_one_sample(library: Any) -> Tensor:
    x = leaf(3)
    return grad_of(library.nll_loss(x, torch.tensor([1])), x)


def gradient_of_a_complex_table(library: Any) -> Tensor:
    table = torch.ones(3, 2, dtype=torch.complex64, requires_grad=True)
    return grad_of(rows(library, table).real, table).real


EXCEPTIONS = (
    Exceptional("heaviside", "its gradient", gradient_of_heaviside, RuntimeError, RuntimeError),
    Exceptional(
        "heaviside", "compiled, of a tensor that wants a gradient", gradient_of_compiled_heaviside, 3.0, Exception
    ),
    Exceptional("cross_entropy", "the gradient of `weight`", gradient_of_class_weights, RuntimeError, RuntimeError),
    Exceptional("nll_loss", "the gradient of `weight`", gradient_of_nll_weights, RuntimeError, RuntimeError),
    Exceptional("binary_cross_entropy", "the gradient of `weight`", gradient_of_bce_weight, RuntimeError, RuntimeError),
    Exceptional("batch_norm", "the gradient of a running average", gradient_of_averages, RuntimeError, RuntimeError),
    Exceptional("leaky_relu", "the gradient in place at a negative slope", leaky_in_place, RuntimeError, RuntimeError),
    Exceptional("dropout", "under `vmap` without `randomness=`", dropout_under_vmap, RuntimeError, RuntimeError),
    Exceptional("max_pool2d", "a window in the padding alone", window_in_the_padding, RuntimeError, -1.0),
    Exceptional("adaptive_avg_pool2d", "the gradient of an empty result", gradient_of_an_empty_grid, 0.0, RuntimeError),
    Exceptional("embedding", "`sparse=True` with a gradient, compiled", compiled_sparse_embedding, Exception, 6.0),
    Exceptional(
        "embedding",
        "`sparse=True`, forward over reverse",
        lambda library: forward_over_reverse(library, sparse=True),
        NotImplementedError,
        Exception,
    ),
    Exceptional(
        "embedding",
        "`scale_grad_by_freq=True`, forward over reverse",
        lambda library: forward_over_reverse(library, scale_grad_by_freq=True),
        NotImplementedError,
        8.0,
    ),
    Exceptional(
        "nll_loss",
        "the tangent of `weight`; `cross_entropy`'s and `binary_cross_entropy`'s likewise",
        tangent_of_class_weights,
        2.0,
        0.0,
    ),
    Exceptional(
        "nll_loss",
        "the gradient of planes in `channels_last`",
        gradient_of_planes_in_channels_last,
        -1.0,
        RuntimeError,
    ),
    Exceptional(
        "nll_loss",
        "the gradient of one sample whose target has a dimension; `cross_entropy`'s likewise",
        gradient_of_one_sample,
        -1.0,
        RuntimeError,
    ),
    Exceptional("embedding", "the gradient of a complex table", gradient_of_a_complex_table, 6.0, NotImplementedError),
    Exceptional("embedding", "the tangent of the padding row", tangent_of_the_padding_row, 0.0, 1.0),
    Exceptional("Linear", "`torch.jit.script`", scripted, ValueError, 0.0),
)


def check(expected: type[Exception] | float, call: Callable[[Any], Tensor], library: Any) -> None:
    if isinstance(expected, float):
        assert float(call(library)) == expected
        return
    with pytest.raises(expected) as raised:
        call(library)
    # Dynamo wraps what the traced function raises
    assert expected is not Exception or library is TORCH or "NotImplementedError" in str(raised.value)


@pytest.mark.parametrize("row", EXCEPTIONS, ids=lambda row: f"{row.name}: {row.what}")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_exceptions_are_what_the_page_says(row: Exceptional) -> None:
    check(row.ours, row.call, F)
    if IS_REFERENCE:
        check(row.theirs, row.call, TORCH)


def test_the_page_names_everything_and_its_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    names = [name for name in F.__all__ if not name.endswith("_")]
    assert [name for name in (*names, *nn.REIMPLEMENTED, "Maxout", "Residual") if f"`{name}`" not in page] == []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for number, (language, text) in enumerate(blocks):
        if language == "python":
            capsys.readouterr()
            exec(compile(text, f"functional.md, block {number}", "exec"), {})
        else:
            assert capsys.readouterr().out == text


def test_the_page_lists_them_all_and_no_others() -> None:
    lines = PAGE.read_text().split("## What it does not do")[1].split("\n## ")[0].splitlines()
    listed = [line.split(" | ")[:2] for line in lines if line.startswith("| `")]
    assert sorted((name.strip("|` "), what) for name, what in listed) == sorted(
        (row.name, row.what) for row in EXCEPTIONS
    )
