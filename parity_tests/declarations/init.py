"""The initialisations: one row each, with the distribution that the oracle expects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from math import sqrt
from typing import Any

import torch

import reimpl.init
from parity_tests.oracle import init as oracle
from reimpl.testing.declarations import InitTechnique


def _of_shape(distribution: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """An oracle that does not look at the shape."""

    def of_shape(shape: Sequence[int], **kwargs: Any) -> dict[str, Any]:
        return distribution(**kwargs)

    return of_shape


def _for_linear(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """PyTorch's function with gain 1, still under its own name."""
    return wraps(function)(partial(function, nonlinearity="linear"))


INITS: tuple[InitTechnique, ...] = (
    InitTechnique(
        name="zeros_",
        ids=("I1",),
        source="N0; N2",
        formula=r"w = 0",
        ours=reimpl.init.zeros_,
        torch=torch.nn.init.zeros_,
        oracle=_of_shape(lambda: oracle.constant(0.0)),
    ),
    InitTechnique(
        name="ones_",
        ids=("I1",),
        source="N0; N2",
        formula=r"w = 1",
        ours=reimpl.init.ones_,
        torch=torch.nn.init.ones_,
        oracle=_of_shape(lambda: oracle.constant(1.0)),
    ),
    InitTechnique(
        name="constant_",
        ids=("I1",),
        source="N0; N2",
        formula=r"w = c",
        ours=reimpl.init.constant_,
        torch=torch.nn.init.constant_,
        oracle=_of_shape(lambda val: oracle.constant(val)),
        kwargs=({"val": 0.5}, {"val": -3.0}),
    ),
    InitTechnique(
        name="uniform_",
        ids=("I1",),
        source="N0; N2",
        formula=r"w \sim U(a, b)",
        ours=reimpl.init.uniform_,
        torch=torch.nn.init.uniform_,
        oracle=_of_shape(lambda a=0.0, b=1.0: oracle.uniform(a, b)),
        kwargs=({}, {"a": -2.0, "b": 0.5}),
    ),
    InitTechnique(
        name="normal_",
        ids=("I1",),
        source="N0; N2",
        formula=r"w \sim N(\mu, \sigma^2)",
        ours=reimpl.init.normal_,
        torch=torch.nn.init.normal_,
        oracle=_of_shape(lambda mean=0.0, std=1.0: oracle.normal(mean, std)),
        kwargs=({}, {"mean": 1.0, "std": 0.25}),
    ),
    InitTechnique(
        name="lecun_normal_",
        ids=("I2", "I5"),
        source="N0 eq. 4.43-4.48; N1",
        formula=r"w \sim N(0, 1/n_{in})",
        ours=reimpl.init.lecun_normal_,
        torch=_for_linear(torch.nn.init.kaiming_normal_),
        oracle=partial(oracle.lecun, "normal"),
    ),
    InitTechnique(
        name="lecun_uniform_",
        ids=("I3",),
        source="N0, errata 4; LeCun et al. 1998 eq. 16",
        formula=r"w \sim U(-\sqrt{3/n_{in}}, \sqrt{3/n_{in}})",
        ours=reimpl.init.lecun_uniform_,
        torch=_for_linear(torch.nn.init.kaiming_uniform_),
        oracle=partial(oracle.lecun, "uniform"),
    ),
    InitTechnique(
        name="xavier_normal_",
        ids=("I4",),
        source="N0; N2 §8.4; Glorot and Bengio 2010",
        formula=r"w \sim N(0, 2/(n_{in} + n_{out}))",
        ours=reimpl.init.xavier_normal_,
        torch=torch.nn.init.xavier_normal_,
        oracle=partial(oracle.xavier, "normal"),
        kwargs=({}, {"gain": 5 / 3}),
    ),
    InitTechnique(
        name="xavier_uniform_",
        ids=("I4",),
        source="N0; N2 §8.4; Glorot and Bengio 2010 eq. 16",
        formula=r"w \sim U(\pm\sqrt{6/(n_{in} + n_{out})})",
        ours=reimpl.init.xavier_uniform_,
        torch=torch.nn.init.xavier_uniform_,
        oracle=partial(oracle.xavier, "uniform"),
        kwargs=({}, {"gain": 5 / 3}),
    ),
    InitTechnique(
        name="kaiming_normal_",
        ids=("I6", "I7"),
        source="N0; N1; N4; He et al. 2015 eq. 10",
        formula=r"w \sim N(0, 2/n_{in})",
        ours=reimpl.init.kaiming_normal_,
        torch=torch.nn.init.kaiming_normal_,
        oracle=partial(oracle.kaiming, "normal"),
        kwargs=(
            {},
            {"mode": "fan_out", "nonlinearity": "relu"},
            {"nonlinearity": "tanh"},
            {"a": 0.2},
            {"nonlinearity": "selu"},
        ),
    ),
    InitTechnique(
        name="kaiming_uniform_",
        ids=("I6", "I7"),
        source="N0; N1; N4; He et al. 2015 eq. 10",
        formula=r"w \sim U(\pm\sqrt{6/n_{in}})",
        ours=reimpl.init.kaiming_uniform_,
        torch=torch.nn.init.kaiming_uniform_,
        oracle=partial(oracle.kaiming, "uniform"),
        kwargs=({}, {"mode": "fan_out", "nonlinearity": "relu"}, {"a": sqrt(5)}, {"nonlinearity": "sigmoid"}),
    ),
    InitTechnique(
        name="random_walk_",
        ids=("I10",),
        source="N2 §8.4; Sussillo and Abbott 2014",
        formula=r"w \sim N(0, g^2/n_{in}), \; E[\ln(|\delta_{d}|^2/|\delta_{d+1}|^2)] = 0",
        ours=reimpl.init.random_walk_,
        torch=None,
        oracle=oracle.random_walk,
        kwargs=({}, {"nonlinearity": "linear"}, {"nonlinearity": "leaky_relu", "a": 0.2}),
    ),
    InitTechnique(
        name="trunc_normal_",
        ids=("I11",),
        source="beyond the notes",
        formula=r"w \sim N(\mu, \sigma^2) | a \leq w \leq b",
        ours=reimpl.init.trunc_normal_,
        torch=torch.nn.init.trunc_normal_,
        oracle=_of_shape(oracle.truncated),
        # The last two keep less than 0.3 of the normal distribution: they are drawn by accepting uniform proposals.
        kwargs=(
            {},
            {"std": 0.02},
            {"mean": 0.5, "std": 0.5, "a": 0.0, "b": 2.0},
            {"a": 1.0, "b": 3.0},
            {"std": 2.0, "a": -0.5, "b": 0.5},
        ),
    ),
    InitTechnique(
        name="eye_",
        ids=("I11",),
        source="beyond the notes",
        formula=r"w_{ij} = [i = j]",
        ours=reimpl.init.eye_,
        torch=torch.nn.init.eye_,
        oracle=oracle.eye,
        shapes=((5, 5), (3, 7), (7, 3), (1, 1)),
    ),
    InitTechnique(
        name="dirac_",
        ids=("I11",),
        source="beyond the notes",
        formula=r"w_{oik} = [o = i][k = \lfloor f/2 \rfloor]",
        ours=reimpl.init.dirac_,
        torch=torch.nn.init.dirac_,
        oracle=oracle.dirac,
        shapes=((8, 3, 5), (4, 8, 3, 3), (6, 2, 2, 3, 4), (2, 1, 1)),
        kwargs=({}, {"groups": 2}),
    ),
    InitTechnique(
        name="orthogonal_",
        ids=("I11",),
        source="beyond the notes; Saxe et al. 2013",
        formula=r"w = \mathrm{gain} \cdot Q, \; Q^\top Q = I",
        ours=reimpl.init.orthogonal_,
        torch=torch.nn.init.orthogonal_,
        oracle=oracle.orthogonal,
        dtypes=(torch.float64, torch.float32),
        kwargs=({}, {"gain": sqrt(2)}),
    ),
    InitTechnique(
        name="sparse_",
        ids=("I11",),
        source="beyond the notes; Martens 2010",
        formula=r"w_{ij} \sim N(0, \sigma^2), \; \lceil s n \rceil \text{ of each column } 0",
        ours=reimpl.init.sparse_,
        torch=torch.nn.init.sparse_,
        oracle=oracle.sparse,
        shapes=((64, 32), (5, 7), (1, 1)),
        kwargs=({"sparsity": 0.1}, {"sparsity": 0.9, "std": 1.0}, {"sparsity": 0.0}),
    ),
)
