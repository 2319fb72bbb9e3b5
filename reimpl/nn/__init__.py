"""Modules over :mod:`reimpl.functional`, in PyTorch's names (:mod:`torch.nn`).

``import reimpl.nn as nn`` in place of ``import torch.nn as nn`` is all that a model changes: every other name, such as
containers, is PyTorch's own, and ``REIMPLEMENTED`` lists those that are not.
"""

from typing import Any

import torch.nn as _torch_nn
from torch.nn import (
    Buffer,
    Flatten,
    Identity,
    Module,
    ModuleDict,
    ModuleList,
    Parameter,
    ParameterDict,
    ParameterList,
    Sequential,
    Unflatten,
)

from reimpl import functional, init
from reimpl.nn import utils
from reimpl.nn.activation import LogSoftmax, ReLU, Sigmoid, Softmax
from reimpl.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from reimpl.nn.conv import Conv1d, Conv2d
from reimpl.nn.convert import Conversion, convert, revert
from reimpl.nn.linear import Linear
from reimpl.nn.loss import CrossEntropyLoss
from reimpl.nn.pooling import AdaptiveAvgPool2d, MaxPool2d

REIMPLEMENTED = (
    "AdaptiveAvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "Linear",
    "LogSoftmax",
    "MaxPool2d",
    "ReLU",
    "Sigmoid",
    "Softmax",
    "SyncBatchNorm",
)

__all__ = [
    "REIMPLEMENTED",
    "AdaptiveAvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Buffer",
    "Conv1d",
    "Conv2d",
    "Conversion",
    "CrossEntropyLoss",
    "Flatten",
    "Identity",
    "Linear",
    "LogSoftmax",
    "MaxPool2d",
    "Module",
    "ModuleDict",
    "ModuleList",
    "Parameter",
    "ParameterDict",
    "ParameterList",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "SyncBatchNorm",
    "Unflatten",
    "convert",
    "functional",
    "init",
    "revert",
    "utils",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(_torch_nn, name)
    except AttributeError:
        raise AttributeError(f"neither module {__name__!r} nor 'torch.nn' has an attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_nn)})
