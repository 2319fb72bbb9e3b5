"""Initialisations of parameters, drawn in place (:mod:`torch.nn.init`), and of whole models (:func:`apply`)."""

from reimpl.init._table import Initialisation, Initialised
from reimpl.init.biases import lstm_forget_bias_, output_bias_, relu_bias_
from reimpl.init.deprecated import (
    constant,
    dirac,
    eye,
    kaiming_normal,
    kaiming_uniform,
    normal,
    orthogonal,
    sparse,
    uniform,
    xavier_normal,
    xavier_uniform,
)
from reimpl.init.gain import calculate_gain, layer_fans
from reimpl.init.model import apply
from reimpl.init.scaled import (
    kaiming_normal_,
    kaiming_uniform_,
    lecun_normal_,
    lecun_uniform_,
    xavier_normal_,
    xavier_uniform_,
)
from reimpl.init.sequential import Scaling, layer_sequential_
from reimpl.init.simple import constant_, normal_, ones_, uniform_, zeros_
from reimpl.init.structured import dirac_, eye_, orthogonal_, sparse_
from reimpl.init.truncated import trunc_normal_
from reimpl.init.walk import random_walk_

__all__ = [
    "Initialisation",
    "Initialised",
    "Scaling",
    "apply",
    "calculate_gain",
    "constant",
    "constant_",
    "dirac",
    "dirac_",
    "eye",
    "eye_",
    "kaiming_normal",
    "kaiming_normal_",
    "kaiming_uniform",
    "kaiming_uniform_",
    "layer_fans",
    "layer_sequential_",
    "lecun_normal_",
    "lecun_uniform_",
    "lstm_forget_bias_",
    "normal",
    "normal_",
    "ones_",
    "orthogonal",
    "orthogonal_",
    "output_bias_",
    "random_walk_",
    "relu_bias_",
    "sparse",
    "sparse_",
    "trunc_normal_",
    "uniform",
    "uniform_",
    "xavier_normal",
    "xavier_normal_",
    "xavier_uniform",
    "xavier_uniform_",
    "zeros_",
]
