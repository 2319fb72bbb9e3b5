"""Modules over :mod:`reimpl.functional`, in PyTorch's names (:mod:`torch.nn`).

``import reimpl.nn as nn`` in place of ``import torch.nn as nn`` is all that a model changes: every other name, such as
containers, is PyTorch's own, and ``REIMPLEMENTED`` lists those that are not.
``Maxout`` and ``Residual`` are new.
"""

from typing import Any

import torch.nn as _torch_nn
from torch.nn import (
    Buffer,
    Flatten,
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
from reimpl.nn.activation import Identity, LeakyReLU, LogSoftmax, Maxout, ReLU, Sigmoid, Softmax, Tanh
from reimpl.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from reimpl.nn.conv import Conv1d, Conv2d
from reimpl.nn.convert import Conversion, convert, revert
from reimpl.nn.dropout import Dropout
from reimpl.nn.embedding import Embedding
from reimpl.nn.linear import Linear
from reimpl.nn.loss import BCELoss, BCEWithLogitsLoss, CrossEntropyLoss, MSELoss, NLLLoss
from reimpl.nn.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool1d,
    AvgPool2d,
    MaxPool1d,
    MaxPool2d,
)
from reimpl.nn.recurrent import LSTMCell, RNNCell
from reimpl.nn.residual import Residual

REIMPLEMENTED = (
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "BCELoss",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Identity",
    "LSTMCell",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool1d",
    "MaxPool2d",
    "NLLLoss",
    "RNNCell",
    "ReLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "SyncBatchNorm",
)

__all__ = [
    "REIMPLEMENTED",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "AvgPool1d",
    "AvgPool2d",
    "BCELoss",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Buffer",
    "Conv1d",
    "Conv2d",
    "Conversion",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "Flatten",
    "Identity",
    "LSTMCell",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool1d",
    "MaxPool2d",
    "Maxout",
    "Module",
    "ModuleDict",
    "ModuleList",
    "NLLLoss",
    "Parameter",
    "ParameterDict",
    "ParameterList",
    "RNNCell",
    "ReLU",
    "Residual",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "SyncBatchNorm",
    "Tanh",
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
