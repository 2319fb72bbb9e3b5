"""What Inductor is told of the operators: that they want their images with the channels last.

Of PyTorch's own convolutions Inductor knows, and lays a graph that holds one out so. An operator of a library it gives
its arguments in the layout that they have outside of the compiler, planes, in which its loops over slices are not made
of vectors and each of our kernels begins with a transposition.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from reimpl.functional._dispatch import memory_format_of

# Per operator, how many of its first arguments are images.
_told: dict[Any, int] = {}


def prefer_channels_last(operator: Any, images: int) -> None:
    """Have Inductor, where it is at work, hand ``operator`` its first ``images`` arguments with the channels last."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or operator in _told:
        return
    _told[operator] = images
    lowering.make_fallback(operator, _constraint)


def _constraint(node: Node, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    graph = V.graph
    images = _told[node.target]
    if not graph.is_backward and not graph.nodes_prefer_channels_last:
        graph.nodes_prefer_channels_last = around(node.graph)
    if graph.is_backward:
        if not any(memory_format_of(n.meta["val"]) is torch.channels_last for n in node.args[:images]):
            return lowering.constrain_to_fx_strides(node, *args, **kwargs)
    args = [*(ir.ExternKernel.require_channels_last(a) for a in args[:images]), *args[images:]]
    return tuple(args), kwargs


def around(graph):
    from torch.utils._ordered_set import OrderedSet
    nodes = OrderedSet()
    for n in reversed(graph.nodes):
        if n.target in _told or any(u in nodes for u in n.users):
            nodes.add(n)
    for n in graph.nodes:
        if n.op not in ("placeholder", "output") and any(i in nodes for i in n.all_input_nodes):
            nodes.add(n)
    return nodes
