"""How the results of losses number by number lie in memory, for arguments that lie in different ways: as PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as F

pytestmark = pytest.mark.quick

CALLS: dict[str, Callable[[Any, Tensor, Tensor, str], Tensor]] = {
    "mse_loss": lambda m, x, t, how: m.mse_loss(x, t, reduction=how),
    "binary_cross_entropy": lambda m, x, t, how: m.binary_cross_entropy(x, t, reduction=how),
    "binary_cross_entropy, weighted": lambda m, x, t, how: m.binary_cross_entropy(x, t, t.detach(), reduction=how),
    "with logits": lambda m, x, t, how: m.binary_cross_entropy_with_logits(x, t, reduction=how),
    "with logits, pos_weight": lambda m, x, t, how: m.binary_cross_entropy_with_logits(
        x, t, reduction=how, pos_weight=t.detach().contiguous()
    ),
}


def _layouts(shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Tensors of a shape: contiguous, channels_last, transposed in two ways, with gaps, expanded."""
    yield torch.rand(shape, device=device)
    if len(shape) == 4:
        yield torch.rand(shape, device=device).to(memory_format=torch.channels_last)
    yield torch.rand(shape[::-1], device=device).permute(*range(len(shape))[::-1])
    yield torch.rand((shape[1], shape[0], *shape[2:]), device=device).transpose(0, 1)
    yield torch.rand((*shape[:-1], 2 * shape[-1]), device=device)[..., ::2]
    yield torch.rand((*shape[:-1], 1), device=device).expand(shape)


def _strides(namespace: Any, name: str, x: Tensor, t: Tensor, how: str) -> list[tuple[int, ...]]:
    """Of the result, of both gradients, and the same for a target that is fixed."""
    x, t = (tensor.detach().requires_grad_() for tensor in (x, t))
    found = []
    for target, leaves in ((t, (x, t)), (t.detach(), (x,))):
        y = CALLS[name](namespace, x, target, how)
        found += [y.stride(), *(g.stride() for g in torch.autograd.grad(y, leaves, torch.ones_like(y)))]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [False, True], ids=["as it comes", "kernels"])
@pytest.mark.parametrize("name", CALLS)
def test_strides_are_pytorchs(name: str, kernels: bool, dtype: torch.dtype, device: torch.device) -> None:
    if kernels:
        pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    with F.use_kernels(kernels):
        for shape in ((4, 6), (2, 3, 4), (2, 3, 5, 4)):
            for pair in product(_layouts(shape, device), repeat=2):
                x, t = (tensor.to(dtype) for tensor in pair)
                for how in ("none", "mean"):
                    ours, theirs = (_strides(m, name, x, t, how) for m in (F, torch_functional))
                    assert ours == theirs, (shape, x.stride(), t.stride(), how)


def test_strides_of_binary_cross_entropy_over_single_channels(device: torch.device) -> None:
    """They say nothing of where the numbers lie, and are PyTorch's nevertheless: those of the probabilities."""
    for shape in ((1, 3, 5, 4), (2, 1, 5, 4), (2, 3, 1, 1), (3, 1)):
        for x, t in product(_layouts(shape, device), repeat=2):
            ours, theirs = (_strides(m, "binary_cross_entropy", x, t, "none") for m in (F, torch_functional))
            assert [*ours[:2], *ours[3:]] == [*theirs[:2], *theirs[3:]], (shape, x.stride(), t.stride())


def test_values_do_not_depend_on_the_layout(device: torch.device) -> None:
    for name, call in CALLS.items():
        for x, t in product(_layouts((2, 3, 5, 4), device), repeat=2):
            leaves = [x.detach().requires_grad_(), t.detach().requires_grad_()]
            dense = [leaf.detach().contiguous().requires_grad_() for leaf in leaves]
            results = []
            for pair in (leaves, dense):
                y = call(F, *pair, "none")
                results.append((y, *torch.autograd.grad(y, pair, torch.ones_like(y))))
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
