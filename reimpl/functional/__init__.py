"""Layers and losses as autograd Functions behind PyTorch's signatures (:mod:`torch.nn.functional`)."""

from reimpl.functional.activation import relu, sigmoid
from reimpl.functional.conv import conv1d, conv2d
from reimpl.functional.kernels import use_kernels
from reimpl.functional.linear import linear
from reimpl.functional.linear_activation import linear_activation
from reimpl.functional.loss import cross_entropy
from reimpl.functional.normalization import batch_norm, batch_norm_relu
from reimpl.functional.pooling import adaptive_avg_pool2d, max_pool2d
from reimpl.functional.softmax import log_softmax, softmax
from reimpl.functional.sync_batch_norm import sync_batch_norm

__all__ = [
    "adaptive_avg_pool2d",
    "batch_norm",
    "batch_norm_relu",
    "conv1d",
    "conv2d",
    "cross_entropy",
    "linear",
    "linear_activation",
    "log_softmax",
    "max_pool2d",
    "relu",
    "sigmoid",
    "softmax",
    "sync_batch_norm",
    "use_kernels",
]
