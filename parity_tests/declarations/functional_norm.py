"""The fused forms (normalisation and activation, affine map and activation): their rows and sample calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as ours
from parity_tests.declarations.functional_samples import FORBIDDEN, FORBIDDEN_TO_VARIANCES, Draw, samples_from
from parity_tests.oracle import functional_norm as oracle
from reimpl.testing.declarations import FunctionTechnique, Sample


def _batch_norm_relu(draw: Draw) -> Iterator[Sample]:
    def shifted(*shape: int) -> Tensor:
        return (draw.constant(*shape) * 2 + 1).requires_grad_()

    yield Sample((shifted(6, 3), None, None, draw(3), draw(3)), {"training": True}, desc="training, features")
    yield Sample((shifted(4, 3, 2, 3), None, None, draw(3), draw(3)), {"training": True}, desc="training, planes")
    yield Sample((shifted(4, 2, 3), None, None), {"training": True, "eps": 0.01}, desc="training, not affine")
    averages = draw.constant(3), draw.positive(3)
    yield Sample((shifted(4, 3, 2, 2), *averages, draw(3), draw(3)), desc="evaluation")


def _linear_activation(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 6), draw(3, 6), draw(3)), {"activation": "relu"}, desc="relu")
    yield Sample((draw(2, 3, 5), draw(4, 5), draw(4)), {"activation": "sigmoid"}, desc="sigmoid, 3-d")
    yield Sample((draw(4, 5), draw(4, 5)), {"activation": "tanh"}, desc="tanh, no bias")


def _torch_batch_norm_relu(*args: Any, **kwargs: Any) -> Tensor:
    return torch_functional.relu(torch_functional.batch_norm(*args, **kwargs))


def _torch_linear_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "relu"
) -> Tensor:
    value: Tensor = getattr(torch, activation)(torch_functional.linear(input, weight, bias))
    return value


FUNCTIONS: tuple[FunctionTechnique, ...] = (
    FunctionTechnique(
        name="batch_norm_relu",
        ids=("F10", "F2"),
        source="N0 eq. 4.79-4.94; N4",
        formula=r"y = \max(\gamma (x - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta, 0)",
        ours=ours.batch_norm_relu,
        torch=_torch_batch_norm_relu,
        oracle=oracle.batch_norm_relu,
        samples=samples_from(_batch_norm_relu),
        magnitude=oracle.batch_norm_relu_magnitude,
        forbidden=FORBIDDEN_TO_VARIANCES,
    ),
    FunctionTechnique(
        name="linear_activation",
        ids=("F1", "F2", "F17"),
        source="N3",
        formula=r"y = f(x W^\top + b)",
        ours=ours.linear_activation,
        torch=_torch_linear_activation,
        oracle=oracle.linear_activation,
        samples=samples_from(_linear_activation),
        magnitude=oracle.linear_activation_magnitude,
        forbidden=FORBIDDEN,
    ),
)
