"""What Inductor is told of the library's operators: to lay their images out with the channels last.

PyTorch's own convolutions Inductor knows, and lays the graphs that hold them out so; a library's operators it gives
what they would get without it. In planes it makes no vectors of loops over slices of rows: in a step of ResNet-20 the
derivative of ``x[:, :, ::2, ::2]`` took 4.6 ms, with the channels last 0.9.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch._library.custom_ops import CustomOpDef
from torch.fx import Graph, Node

# Of each operator the arguments that are images; of a convolution the one that is its filter.
_IMAGES: dict[Any, tuple[int, ...]] = {}
_FILTERS: dict[Any, int] = {}
# A single one would gain nothing: what comes in and what goes out keep the layout that the caller sees.
_LEAST_CONVOLUTIONS = 2
_told: set[Any] = set()


def best_channels_last(*images: int, filter: int | None = None) -> Callable[[CustomOpDef], CustomOpDef]:
    """Declare an operator that does its arguments of these numbers best with the channels last.

    Args:
        images: the images among the arguments.
        filter: the filter, for a convolution; its result is laid out as one of the two.
    """

    def declare(operator: CustomOpDef) -> CustomOpDef:
        _IMAGES[operator._opoverload] = images
        if filter is not None:
            _FILTERS[operator._opoverload] = filter
        return operator

    return declare


def tell_inductor() -> None:
    """Pass on what was declared, if Inductor is imported by now: for fake implementations, which it calls in time."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or len(_told) == len(_IMAGES):
        return
    known = _known()
    for operator in _IMAGES.keys() - _told:
        if known:
            lowering.make_fallback(operator, _laid_out, warn=False)
        _told.add(operator)


def _known() -> bool:
    """Whether this version of Inductor has, by their names, the parts that are made use of."""
    from torch._inductor import ir, lowering

    parts = {
        lowering: ("make_fallback", "constrain_to_fx_strides"),
        ir: ("get_stride_order", "NHWC_STRIDE_ORDER"),
        ir.ExternKernel: ("require_channels_last",),
    }
    return all(hasattr(whole, part) for whole, names in parts.items() for part in names)


def _laid_out(node: Node, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of an operator, as Inductor is to lay them out."""
    from torch._inductor import ir, lowering

    images, given = _IMAGES[node.target], cast(Sequence[Node], node.args)
    if not _wanted(node, [given[i] for i in images]):
        return lowering.constrain_to_fx_strides(node, *args, **kwargs)  # type: ignore[no-any-return]
    # what comes from outside of the graph is read as it lies, and the result laid out as the filter
    within = [i for i in images if given[i].op != "placeholder"]
    if not within and node.target in _FILTERS:
        within = [_FILTERS[node.target]]
    laid_out = (ir.ExternKernel.require_channels_last(a) if i in within else a for i, a in enumerate(args))
    return tuple(laid_out), kwargs


def _wanted(node: Node, images: Sequence[Node]) -> bool:
    """Whether a call of an operator is to have these of its arguments with the channels last."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

    values, graph = [image.meta["val"] for image in images], V.graph
    if not config.layout_optimization or any(value.dim() != 4 or not value.is_cpu for value in values):
        return False
    if graph.is_backward:
        return _saved_channels_last(node.graph, graph.sizevars.shape_env)
    preferring = getattr(graph, "nodes_prefer_channels_last", None)
    if preferring is None:
        return False
    if node not in preferring:
        preferring |= _around_convolutions(node.graph)
    return node in preferring


def _saved_channels_last(graph: Graph, shapes: Any) -> bool:
    """Whether the forward pass has decided so for a graph of the backward pass."""
    from torch._inductor import ir

    calls = (node for node in graph.nodes if node.target in _IMAGES)
    images = (cast(Node, node.args[i]) for node in calls for i in _IMAGES[node.target])
    saved = (image.meta["val"] for image in images if image.op == "placeholder")
    return any(
        value.dim() == 4 and ir.get_stride_order(value.stride(), shapes) == ir.NHWC_STRIDE_ORDER for value in saved
    )


def _around_convolutions(graph: Graph) -> set[Node]:
    """What leads to convolutions or follows from them, where there are enough of these."""
    convolutions = [node for node in graph.nodes if node.target in _FILTERS]
    if len(convolutions) < _LEAST_CONVOLUTIONS:
        return set()
    around = set(convolutions)
    for node in reversed(graph.nodes):
        if any(user in around for user in node.users):
            around.add(node)
    for node in graph.nodes:
        if any(source in around for source in node.all_input_nodes):
            around.add(node)
    return around
