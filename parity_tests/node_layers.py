"""The layers that the compiled autograd node does, as its tests call them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.functional as F
from reimpl.testing import random_tensor, seeded_generator


@dataclass(frozen=True)
class Layer:
    """A call: the function's name, its first argument, the others, and its options."""

    name: str
    input: Tensor
    others: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        """The function of a module, its constants as wide as ``x``."""
        wide = [t.to(x.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in self.others]
        return getattr(module, self.name)(x, *wide, **self.options)  # type: ignore[no-any-return]


def _layers() -> Iterator[tuple[str, Layer]]:
    """What the node does."""
    generator = seeded_generator(0, "node")
    x, planes = (random_tensor(shape, torch.float32, generator) for shape in ((64, 40), (3, 5, 7, 4)))
    share, inside = (torch.rand(64, 40, generator=generator) for _ in range(2))
    labels, pixels = (torch.randint(n, s, generator=generator) for n, s in ((40, (64,)), (5, (3, 7, 4))))
    w, v = (torch.rand(classes, generator=generator) for classes in (40, 5))
    smooth = {"label_smoothing": 0.1, "reduction": "sum"}
    yield "softmax", Layer("softmax", x, (-1,))
    yield "softmax, planes", Layer("softmax", planes, (1,))
    yield "log_softmax", Layer("log_softmax", x, (1,))
    yield "nll_loss", Layer("nll_loss", x, (labels,))
    yield "nll_loss, weights", Layer("nll_loss", planes, (pixels, v), {"ignore_index": 2})
    yield "nll_loss, each", Layer("nll_loss", x, (labels, w), {"reduction": "none"})
    yield "cross_entropy", Layer("cross_entropy", x, (labels,))
    yield "cross_entropy, each", Layer("cross_entropy", x, (labels,), {"reduction": "none"})
    yield "cross_entropy, options", Layer("cross_entropy", planes, (pixels, v), {"ignore_index": 1, **smooth})
    yield "cross_entropy of probabilities", Layer("cross_entropy", x, (share,))
    yield "cross_entropy of probabilities, options", Layer("cross_entropy", x, (share, w), smooth)
    yield "mse_loss", Layer("mse_loss", x, (share,))
    yield "binary_cross_entropy", Layer("binary_cross_entropy", inside, (share,), {"reduction": "sum"})
    yield "binary_cross_entropy_with_logits", Layer("binary_cross_entropy_with_logits", x, (share,))
    by_pixel = planes.to(memory_format=torch.channels_last)
    yield "relu", Layer("relu", planes)
    yield "leaky_relu", Layer("leaky_relu", by_pixel, (0.2,))
    yield "leaky_relu, negative slope", Layer("leaky_relu", x, (-0.5,))
    yield "sigmoid", Layer("sigmoid", by_pixel)
    yield "tanh", Layer("tanh", x)
    for layout, batch in (("planes", planes), ("channels_last", by_pixel)):
        yield f"max_pool2d, {layout}", Layer("max_pool2d", batch, (2,))
        yield f"max_pool2d, options, {layout}", Layer("max_pool2d", batch, (3, (2, 1), 1), {"ceil_mode": True})
        yield f"adaptive_max_pool2d, {layout}", Layer("adaptive_max_pool2d", batch, ((3, 2),))
        yield f"avg_pool2d, {layout}", Layer("avg_pool2d", batch, (3, 2, 1, False, False))
        yield f"adaptive_avg_pool2d, {layout}", Layer("adaptive_avg_pool2d", batch, (1,))
        yield f"batch_norm, {layout}", Layer("batch_norm", batch, (None, None, v, -v, True))
        yield f"batch_norm, evaluation, {layout}", Layer("batch_norm", batch, (-v, v, v, v, False, 0.1, 0.5))
    yield "batch_norm, no weight", Layer("batch_norm", x, (w, w), {"training": True})


LAYERS = dict(_layers())
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=list(LAYERS))


def taught(layer: Layer) -> Tensor:
    """An input that wants a gradient, of a layer that the node has learned."""
    x = layer.input.clone().requires_grad_()
    layer(F, x)
    return x


def by_node(output: Tensor) -> bool:
    """Whether the compiled node has recorded it."""
    assert output.grad_fn is not None
    return output.grad_fn.name().endswith("KernelBackward")


def grad_like(output: Tensor) -> Tensor:
    return torch.empty_like(output).copy_(random_tensor(output.shape, torch.float32, seeded_generator(1, "grad")))
