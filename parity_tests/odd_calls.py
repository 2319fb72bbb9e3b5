"""The table of odd calls: a library's functions ``f``, its modules ``nn``, and what a call is given, ``x``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[Any, Any, Any], Any]

_BINARY: tuple[Call, ...] = (
    # weights that torch.func differentiates by
    lambda f, nn, x: torch.func.grad(lambda w: f.binary_cross_entropy_with_logits(x.randn(3), x.rand(3), w))(x.rand(3)),
    lambda f, nn, x: torch.func.grad(lambda w: f.binary_cross_entropy_with_logits(x.randn(3), x.rand(3), w))(x.rand(1)),
    lambda f, nn, x: torch.func.grad(
        lambda q: f.binary_cross_entropy_with_logits(x.randn(2, 3), x.rand(2, 3), pos_weight=q)
    )(x.rand(3)),
    lambda f, nn, x: torch.func.jacrev(
        lambda w: f.binary_cross_entropy_with_logits(x.randn(3), x.rand(3), w, reduction="none")
    )(x.rand(3)),
    lambda f, nn, x: torch.func.grad(lambda w: f.binary_cross_entropy(x.rand(3), x.rand(3), w))(x.rand(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), x.leaf(x.rand(3))),
    # numbers that are no probabilities, under vmap
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy)(x.rand(3, 2) + 1, x.rand(3, 2)),
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy)(x.rand(3, 2), x.rand(3, 2) - 1),
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy, (0, None))(x.rand(3, 2), x.rand(2) * torch.nan),
    lambda f, nn, x: torch.vmap(torch.func.grad(f.binary_cross_entropy))(x.rand(3, 2), x.rand(3, 2) + 1),
    lambda f, nn, x: torch.vmap(f.binary_cross_entropy)(x.rand(3, 2), x.rand(3, 2)),
    # complex and boolean weights and targets
    lambda f, nn, x: f.binary_cross_entropy(x.rand(3), x.rand(3), x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), pos_weight=x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.grad(3), x.rand(3), pos_weight=x.bool(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.randn(3), x.complex(3)),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(x.randn(3), x.bool(3)),
    # strides of the target's gradient
    *(
        lambda f, nn, x, shape=shape, how=how: f.binary_cross_entropy_with_logits(
            x.leaf(x.randn(3, 2).t()), x.leaf(x.rand(3, 2).t()), pos_weight=x.rand(*shape), reduction=how
        )
        for shape in ((3,), (2, 1), (), (2, 3))
        for how in ("none", "mean")
    ),
    lambda f, nn, x: f.binary_cross_entropy_with_logits(
        x.grad(2, 3), x.leaf(x.rand(3, 2).t()), x.rand(2, 3), pos_weight=x.rand(3, 2).t(), reduction="none"
    ),
)

ROWS: dict[str, tuple[Call, ...]] = {
    "binary cross-entropy": _BINARY,
}
