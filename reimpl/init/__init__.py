"""Initialisations of parameters, drawn in place (:mod:`torch.nn.init`)."""

from reimpl.init.gain import calculate_gain
from reimpl.init.scaled import (
    kaiming_normal_,
    kaiming_uniform_,
    lecun_normal_,
    lecun_uniform_,
    xavier_normal_,
    xavier_uniform_,
)
from reimpl.init.simple import constant_, normal_, ones_, uniform_, zeros_

__all__ = [
    "calculate_gain",
    "constant_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "lecun_normal_",
    "lecun_uniform_",
    "normal_",
    "ones_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "zeros_",
]
