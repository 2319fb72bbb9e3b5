"""Modules over :mod:`reimpl.functional`, in PyTorch's names (:mod:`torch.nn`).

``import reimpl.nn as nn`` in place of ``import torch.nn as nn`` is all that a model changes: every other name, such as
containers, is PyTorch's own, and ``REIMPLEMENTED`` lists those that are not.
``Maxout`` and ``Residual`` are new.
"""

import sys as _sys

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
from reimpl._handed_on import handed_on as _handed_on
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

# As in PyTorch, ``import reimpl.nn.functional as F``.
_sys.modules.update({f"{__name__}.functional": functional, f"{__name__}.init": init})
__getattr__, __dir__ = _handed_on(__name__, _torch_nn, ("attention", "parallel", "parameter"))
