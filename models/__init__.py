"""Networks on ``torch.nn`` or on ``reimpl.nn`` by one switch; the two share state-dict keys and load each other's."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from models.cnn import PlainCNN
from models.fast import FastNet
from models.layers import Backend, Layers, layers
from models.resnet import ResNet

MODELS: dict[str, Callable[..., nn.Module]] = {"cnn": PlainCNN, "resnet": ResNet, "fast": FastNet}

__all__ = ["MODELS", "Backend", "FastNet", "Layers", "PlainCNN", "ResNet", "build", "layers"]


def build(name: str, *, backend: Backend = "torch", num_classes: int = 10, **options: Any) -> nn.Module:
    """Builds a network by name.

    Args:
        name: ``"cnn"`` (M2), ``"resnet"`` (M4; also ``"resnet20"``, ``"resnet56"``, any ``"resnet<depth>"``) or
            ``"fast"`` (M10).
        backend: ``"torch"`` or ``"reimpl"``, whose layers to build with. Random numbers are drawn alike, so one seed
            gives both the same weights.
        num_classes: number of logits.
        options: passed on to the network's class, e.g. ``widths`` of ``"fast"``.

    Raises:
        ValueError: an unknown name or backend, or an option out of range.
        TypeError: an option that the network has not.
    """
    known = name
    if name.startswith("resnet") and name.removeprefix("resnet").isdecimal():
        known, options = "resnet", {"depth": int(name.removeprefix("resnet")), **options}
    if known not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"model must be one of {', '.join(MODELS)}, or resnet<depth>, got {name!r}{hint}")
    return MODELS[known](layers(backend), num_classes, **options)
