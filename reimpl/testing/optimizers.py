"""What an optimizer is tried on: parameters and gradients in many layouts, constructors, one step, synchronisation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from reimpl.testing.samples import random_tensor, seeded_generator

OptimizerClass = Callable[..., torch.optim.Optimizer]

#: How an optimizer runs: the keyword arguments that choose it.
IMPLEMENTATIONS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True},
}
#: Keyword arguments that choose how, not what: an oracle does not get them.
EXECUTION_KEYS = frozenset({"foreach", "fused", "capturable", "differentiable"})


@dataclass(frozen=True)
class Layout:
    """A parameter's shape and strides, and those of its gradient."""

    name: str
    shape: tuple[int, ...]
    arrange: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous
    arrange_grad: Callable[[torch.Tensor], torch.Tensor] | None = None


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def _expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand(tensor.shape)


#: No dimension, nothing at all, sizes around the vector widths, and every order of strides that training meets.
DENSE_LAYOUTS = (
    Layout("scalar", ()),
    Layout("empty", (0,)),
    *(Layout(f"vector{n}", (n,)) for n in (1, 3, 7, 8, 9, 17, 33, 67)),
    Layout("matrix", (5, 13)),
    Layout("channels_last", (2, 3, 4, 5), _channels_last),
    Layout("transposed", (5, 7), _transposed),
)
#: Parameters with gaps, and gradients whose strides are not their parameter's.
STRIDED_LAYOUTS = (
    Layout("strided", (11,), _strided),
    Layout("transposed, contiguous gradient", (6, 5), _transposed, torch.Tensor.contiguous),
    Layout("contiguous, transposed gradient", (6, 5), torch.Tensor.contiguous, _transposed),
    Layout("channels_last, contiguous gradient", (2, 3, 4, 5), _channels_last, torch.Tensor.contiguous),
    Layout("contiguous, strided gradient", (4, 9), torch.Tensor.contiguous, _strided),
    Layout("contiguous, expanded gradient", (4, 9), torch.Tensor.contiguous, _expanded),
)
#: Longer than one chunk of work, with an odd rest.
LONG_LAYOUT = Layout("long", (40_003,))


def make_params(
    layouts: Iterable[Layout], dtype: torch.dtype, device: str | torch.device = "cpu", *, seed: int = 0
) -> list[torch.Tensor]:
    """Leaf tensors that require a gradient, one for each layout."""
    params = []
    for layout in layouts:
        values = random_tensor(layout.shape, dtype, seeded_generator(seed, "param", layout.name))
        params.append(layout.arrange(values.to(device)).detach().requires_grad_())
    return params


def make_grads(
    layouts: Iterable[Layout],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    seed: int = 0,
    step: int = 0,
    scale: float = 1.0,
    skip: Callable[[int, int], bool] | None = None,
) -> list[torch.Tensor | None]:
    """Normal gradients of one step, times ``scale``; ``None`` where ``skip(index, step)`` says so."""
    grads: list[torch.Tensor | None] = []
    for index, layout in enumerate(layouts):
        if skip is not None and skip(index, step):
            grads.append(None)
            continue
        values = random_tensor(layout.shape, dtype, seeded_generator(seed, "grad", step, layout.name)) * scale
        grads.append((layout.arrange_grad or layout.arrange)(values.to(device)))
    return grads


def skip_some(index: int, step: int) -> bool:
    """Every third parameter misses every third gradient, so that step counts differ."""
    return index % 3 == 1 and step % 3 == 1


def construct(optimizer: OptimizerClass, params: Sequence[torch.Tensor], **kwargs: Any) -> torch.optim.Optimizer:
    """``optimizer(params, **kwargs)`` with tensors among the arguments copied, so that no two optimizers share one."""
    return optimizer(params, **copy.deepcopy(kwargs))


def clone_params(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Leaf copies with the same strides."""
    return [
        torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)
        .copy_(p.detach())
        .requires_grad_(p.requires_grad)
        for p in params
    ]


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All parameters, in the order of the groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_with(optimizer: torch.optim.Optimizer, grads: Sequence[torch.Tensor | None]) -> None:
    """Set the gradients and step; optimizers that are compared may be given the same tensors, which they only read."""
    for param, grad in zip(parameters(optimizer), grads):
        param.grad = None if grad is None else grad.clone()
        if grad is not None and grad.layout is torch.strided and param.grad.stride() != grad.stride():  # type: ignore[union-attr]
            param.grad = grad  # an expanded gradient: a clone would lose its strides
    optimizer.step()


def sparse_rows(grad: torch.Tensor, step: int = 0) -> torch.Tensor:
    """Every other row of ``grad`` as a sparse tensor, its first row in two halves as an embedding's gradient may be."""
    rows = torch.arange(grad.shape[0], device=grad.device)[step % 2 :: 2]
    values = grad[rows]
    if len(rows):
        rows, values = torch.cat([rows, rows[:1]]), torch.cat([values, values[:1]])
        values[[0, -1]] /= 2  # exact, so that their sum is the row again
    return torch.sparse_coo_tensor(rows[None], values, grad.shape, check_invariants=True)


@torch.no_grad()
def synchronise(optimizer: torch.optim.Optimizer, source: torch.optim.Optimizer) -> None:
    """Set parameters and state of ``optimizer`` to those of ``source``, in place."""
    for param, wanted in zip(parameters(optimizer), parameters(source), strict=True):
        param.copy_(wanted)
        for key, value in source.state.get(wanted, {}).items():
            if isinstance(value, torch.Tensor):
                optimizer.state[param][key].copy_(value)
