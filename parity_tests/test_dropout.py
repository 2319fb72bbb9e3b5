"""Dropout: PyTorch's bits for the same seed, what its mask is, and every way of differentiating through it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import reimpl.functional as F
import reimpl.nn as nn
from parity_tests.versions import IS_REFERENCE
from reimpl.testing import bits_equal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def from_seed(function: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    torch.manual_seed(11)
    return function(*args, **kwargs)


# PyTorch's CUDA kernel draws four numbers a thread and pairs them with elements in an order of its own.
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_pytorchs(dtype: torch.dtype, p: float, inplace: bool) -> None:
    if dtype.is_complex and p not in (0, 1) and not IS_REFERENCE:
        pytest.skip("older PyTorch draws no complex numbers")
    values = torch.randn(33, 7).to(dtype)
    if not dtype.is_complex:  # the product of a complex infinity is not the same for every way of multiplying
        values[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for layout in (values, values.t(), values[:, ::2], values[:0]):
        results = []
        for function in (F.dropout, torch.nn.functional.dropout):
            leaf = layout.clone().requires_grad_()
            output = from_seed(function, leaf * 1, p, True, inplace)
            (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
            results.append((output, grad, torch.rand(1)))
        for ours, theirs in zip(*results, strict=True):
            assert bits_equal(ours, theirs)


@pytest.mark.parametrize("module", [nn.Dropout(0.4), nn.Dropout(0.4, inplace=True)], ids=str)
def test_module_drops_while_training_and_passes_in_evaluation(module: nn.Dropout) -> None:
    x = torch.randn(64)
    reference = torch.nn.Dropout(module.p, module.inplace)
    data = x.clone()
    output = from_seed(module, data)
    assert (output is data) == module.inplace
    assert bits_equal(output, from_seed(reference, x.clone()))
    assert module.eval()(x) is x
    module.train()


def test_expectation_is_kept(device: torch.device) -> None:
    torch.manual_seed(0)
    p, count = 0.3, 200_000
    output = F.dropout(torch.ones(count, device=device), p)
    assert set(output.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    # The mean's standard deviation is sqrt(p/(1 - p)/count) = 0.0015; five of them.
    assert abs(output.mean().item() - 1) < 5 * (p / (1 - p) / count) ** 0.5


def test_leaves_that_want_a_gradient_are_not_written_into() -> None:
    leaf = torch.ones(4, requires_grad=True)
    for function in (F.dropout, torch.nn.functional.dropout):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            function(leaf, 0.5, True, True)


def test_derivatives_of_every_kind() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def dropped(t: Tensor) -> Tensor:
        return from_seed(F.dropout, t, 0.4) * t

    assert gradcheck(dropped, (x,), check_forward_ad=True)
    assert gradgradcheck(dropped, (x,), check_fwd_over_rev=True)


def test_vmap_asks_for_its_randomness() -> None:
    x = torch.ones(5, 100)
    with pytest.raises(RuntimeError, match="called random operation while in randomness error mode"):
        torch.vmap(F.dropout)(x)
    same = torch.vmap(F.dropout, randomness="same")(x)
    assert torch.equal(same, same[:1].expand(5, -1))
    different = torch.vmap(F.dropout, randomness="different")(x)
    assert not torch.equal(different, different[:1].expand(5, -1))


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    output = torch.compile(F.dropout, fullgraph=True, backend="aot_eager")(x, 0.25)
    (grad,) = torch.autograd.grad(output.sum(), x)
    kept = output != 0
    assert 0 < int(kept.sum()) < 40
    torch.testing.assert_close(output, torch.where(kept, x / 0.75, 0))
    torch.testing.assert_close(grad, kept.double() / 0.75)


def test_meta_tensors_have_their_shape() -> None:
    x = torch.empty(3, 4, device="meta", requires_grad=True)
    output = F.dropout(x, 0.5)
    assert output.is_meta and output.shape == x.shape
    assert torch.autograd.grad(output.sum(), x)[0].shape == x.shape
