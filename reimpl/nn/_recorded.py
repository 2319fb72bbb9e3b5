"""A module as one node of the graph that :func:`torch.fx.symbolic_trace` records, as PyTorch's own modules are."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.fx import Proxy


def one_node(forward: Callable[..., Any]) -> Callable[..., Any]:
    """For a ``forward`` that asks its input what a proxy cannot answer; the functions of others record themselves."""

    @wraps(forward)
    def recorded(self: torch.nn.Module, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
        return forward(self, input, *args, **kwargs)

    return recorded
