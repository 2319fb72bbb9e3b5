"""The one switch between PyTorch's layers and ours: a namespace of layer classes, losses and initialisations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

Backend = Literal["torch", "reimpl"]
Make = Callable[..., nn.Module]


@dataclass(frozen=True)
class Layers:
    """What a network is made of. Containers, tensor arithmetic and reshaping are PyTorch's under either backend."""

    Conv2d: Make
    Linear: Make
    BatchNorm2d: Make
    MaxPool2d: Make
    ReLU: Make
    CrossEntropyLoss: Make
    kaiming_normal_: Callable[..., torch.Tensor]


def layers(backend: Backend) -> Layers:
    """The layers of ``torch.nn`` (``"torch"``) or of ``reimpl.nn`` (``"reimpl"``).

    Raises:
        ValueError: ``backend`` is neither.
    """
    source: Any
    init: Any
    if backend == "torch":
        source, init = nn, nn.init
    elif backend == "reimpl":
        import reimpl.init
        import reimpl.nn

        source, init = reimpl.nn, reimpl.init
    else:
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    names = [name for name in Layers.__dataclass_fields__ if name != "kaiming_normal_"]
    return Layers(**{name: getattr(source, name) for name in names}, kaiming_normal_=init.kaiming_normal_)
