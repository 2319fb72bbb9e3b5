"""Layers and losses as autograd Functions behind PyTorch's signatures (:mod:`torch.nn.functional`)."""

from reimpl.functional.activation import relu, sigmoid
from reimpl.functional.conv import conv1d, conv2d
from reimpl.functional.linear import linear
from reimpl.functional.loss import cross_entropy
from reimpl.functional.normalization import batch_norm
from reimpl.functional.pooling import adaptive_avg_pool2d, max_pool2d
from reimpl.functional.softmax import log_softmax, softmax

__all__ = [
    "adaptive_avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "cross_entropy",
    "linear",
    "log_softmax",
    "max_pool2d",
    "relu",
    "sigmoid",
    "softmax",
]
