"""Layers and losses as autograd Functions behind PyTorch's signatures (:mod:`torch.nn.functional`).

Every other public name is ``torch.nn.functional``'s own, so that one changed import is enough.
"""

import warnings as _warnings

import torch.nn.functional as _torch_functional
from torch.jit._trace import TracerWarning as _TracerWarning

from reimpl._handed_on import handed_on as _handed_on
from reimpl.functional._public import public as _public
from reimpl.functional.activation import (
    leaky_relu,
    leaky_relu_,
    relu,
    relu_,
    sigmoid,
    sigmoid_,
    tanh,
    tanh_,
)
from reimpl.functional.average_pooling import adaptive_avg_pool1d, adaptive_avg_pool2d, avg_pool1d, avg_pool2d
from reimpl.functional.binary import binary_cross_entropy, binary_cross_entropy_with_logits, masked_multilabel_loss
from reimpl.functional.conv import conv1d, conv2d
from reimpl.functional.dropout import dropout
from reimpl.functional.embedding import embedding, skip_gram_loss
from reimpl.functional.filters import edge_filters
from reimpl.functional.kernels import use_kernels
from reimpl.functional.likelihood import cross_entropy_of_probabilities, nll_loss, zero_one_loss
from reimpl.functional.linear import linear
from reimpl.functional.linear_activation import linear_activation
from reimpl.functional.loss import cross_entropy
from reimpl.functional.max_pooling import adaptive_max_pool2d, max_pool1d, max_pool2d
from reimpl.functional.maxout import maxout
from reimpl.functional.normalization import batch_norm, batch_norm_relu
from reimpl.functional.penalty import lp_penalty
from reimpl.functional.recurrent import lstm_cell, rnn_relu_cell, rnn_tanh_cell
from reimpl.functional.regression import half_squared_error, mse_loss
from reimpl.functional.softmax import log_softmax, softmax
from reimpl.functional.step import heaviside, identity
from reimpl.functional.sync_batch_norm import sync_batch_norm

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "avg_pool1d",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_relu",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "conv1d",
    "conv2d",
    "cross_entropy",
    "cross_entropy_of_probabilities",
    "dropout",
    "edge_filters",
    "embedding",
    "half_squared_error",
    "heaviside",
    "identity",
    "leaky_relu",
    "leaky_relu_",
    "linear",
    "linear_activation",
    "log_softmax",
    "lp_penalty",
    "lstm_cell",
    "masked_multilabel_loss",
    "max_pool1d",
    "max_pool2d",
    "maxout",
    "mse_loss",
    "nll_loss",
    "relu",
    "relu_",
    "rnn_relu_cell",
    "rnn_tanh_cell",
    "sigmoid",
    "sigmoid_",
    "skip_gram_loss",
    "softmax",
    "sync_batch_norm",
    "tanh",
    "tanh_",
    "use_kernels",
    "zero_one_loss",
]

# Each function as its file has it, behind one door: here, where no file can forget it.
_without_tensors = {"edge_filters", "use_kernels"}
globals().update({_name: _public(globals()[_name]) for _name in __all__ if _name not in _without_tensors})

# As PyTorch does for its own modules: what torch.jit.trace records of these holds for other sizes too, though they look
# at sizes. Pooling alone counts its windows in Python, for one size.
_warnings.filterwarnings(
    "ignore", category=_TracerWarning, module=r"reimpl\.(functional|nn)\.(?!_pooling|average_pooling|max_pooling)"
)

__getattr__, __dir__ = _handed_on(__name__, _torch_functional)
