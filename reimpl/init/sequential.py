"""Layer-sequential initialisation: each layer's scale set by what a batch makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite, sqrt
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import Module

from reimpl.init._kinds import AFFINE, is_a
from reimpl.init._modules import buffers_restored, call, check_model, hooked, leaves, parameters_behind, rewrite
from reimpl.init._rules import Rule
from reimpl.init._table import aligned
from reimpl.init.model import apply


class Scaling(NamedTuple):
    """A layer's output variance on the batch before and after, and the factor that its weight was multiplied by."""

    before: float
    after: float
    factor: float


class Scalings(dict[str, Scaling]):
    """A :class:`Scaling` by layer name, in the order of computing; ``str`` gives a table."""

    def __str__(self) -> str:
        rows = [(name, *(f"{number:.4g}" for number in scaling)) for name, scaling in self.items()]
        return aligned([("layer", "variance before", "after", "weight times"), *rows])


def layer_sequential_(
    model: Module,
    batch: Any,
    *,
    variance: float = 1.0,
    rule: Rule | None = "orthogonal_",
    tolerance: float = 0.01,
    max_passes: int = 10,
    generator: Generator | None = None,
) -> Scalings:
    r"""Give each layer's output the same variance on a batch, layer by layer in the order in which they compute (LSUV).

    First every parameter is drawn by ``rule`` with zero biases (:func:`apply`). Then, as the batch passes through the
    model once, each linear, bilinear and convolution layer :math:`y = W x + b` is repeatedly given
    :math:`W \leftarrow W \sqrt{v / \operatorname{Var}[y]}` until :math:`|\operatorname{Var}[y]/v - 1|` is at most
    ``tolerance``, and its output computed anew before it goes on. :math:`\operatorname{Var}` is over all numbers of the
    output: samples, units and places. With :math:`b = 0` one time is enough; where biases alone have a larger variance
    no scale is, and :attr:`Scaling.after` tells.

    Assumes that the batch stands for the data, and that all of a layer's uses may share the scale of the first. The
    model runs in the mode it is in: in training mode with dropout and with batch statistics, which is what training
    will see. Buffers (running statistics) are put back afterwards, hooks are removed, also on an error; the layers
    scaled before the error keep their scale. No gradient is recorded.

    Args:
        model: any module.
        batch: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        variance: :math:`v`.
        rule: what the weights are drawn by; ``None`` keeps them, and scales what is there.
        tolerance: relative.
        max_passes: how many times a layer is scaled at most.
        generator: where the numbers come from.

    Returns:
        a dictionary by layer name, in the order of computing, which prints as a table. A layer that the batch does
        not reach, or whose weight an earlier one has too, is not in it.

    Raises:
        ValueError: no layer was reached; a lazy layer that has seen no input; ``variance``, ``tolerance`` or
            ``max_passes`` out of range; or a layer whose output has no variance (all zero, or a single number) or a
            non-finite one.

    Source: I9; Mishkin and Matas 2016, algorithm 1. PyTorch: none.
    """
    for name, value in (("variance", variance), ("tolerance", tolerance), ("max_passes", max_passes)):
        if not (value > 0 and isfinite(value)):
            raise ValueError(f"{name} must be positive, got {value}")
    check_model(model)
    if rule is not None:
        apply(model, rule, activation="linear", generator=generator)
    done = Scalings()
    touched: set[int] = set()

    def scale(name: str) -> Callable[[Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        def after(layer: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            behind = {id(parameter) for parameter in parameters_behind(layer, "weight")}
            if name in done or behind & touched:
                return None
            touched.update(behind)
            output, done[name] = _scaled(name, layer, args, kwargs, output, variance, tolerance, max_passes)
            return output

        return after

    layers = {name: leaf for name, leaf in leaves(model) if is_a(leaf, AFFINE)}
    unique = {id(leaf): (name, leaf) for name, leaf in reversed(layers.items())}
    with (
        torch.no_grad(),
        buffers_restored(model),
        hooked(leaf.register_forward_hook(scale(name), with_kwargs=True) for name, leaf in unique.values()),
    ):
        call(model, batch)
    if not done:
        raise ValueError(f"batch reached no linear or convolution layer of {type(model).__name__}")
    return done


def _scaled(
    name: str,
    layer: Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    variance: float,
    tolerance: float,
    max_passes: int,
) -> tuple[Tensor, Scaling]:
    """The layer's output with its weight scaled, and what that took."""
    before = now = _variance(name, output)
    factor = 1.0
    for _ in range(max_passes):
        if abs(now / variance - 1) <= tolerance:
            break
        step = sqrt(variance / now)
        rewrite(layer, "weight", partial(_multiply, step))
        factor *= step
        output = layer.forward(*args, **kwargs)
        now = _variance(name, output)
    return output, Scaling(before, now, factor)


def _multiply(factor: float, weight: Tensor) -> None:
    weight.mul_(factor)


def _variance(name: str, output: Tensor) -> float:
    variance = float(output.detach().to(torch.promote_types(output.dtype, torch.float32)).var(correction=0))
    if not (variance > 0 and isfinite(variance)):
        raise ValueError(
            f"the output of layer {name!r} has variance {variance} on this batch: no scale makes it another"
        )
    return variance
