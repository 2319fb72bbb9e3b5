"""The activations beyond the first: one row each, with its sample calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as ours
import reimpl.nn
from parity_tests.declarations.functional_samples import FORBIDDEN, Draw, samples_from
from parity_tests.oracle import activations as oracle
from reimpl.testing.declarations import FunctionTechnique, Sample


def _elementwise(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 5),), desc="matrix")
    yield Sample(((draw.constant(3, 2, 2) * 20).requires_grad_(),), desc="large values")
    yield Sample(((draw.constant(6) * 2**-12).requires_grad_(),), desc="small values")


def _leaky_relu(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 5),), desc="matrix")
    yield Sample((draw(2, 3), -0.3), desc="negative slope")
    yield Sample((draw(),), {"negative_slope": 0.0}, desc="0-d, slope 0")


def _heaviside(draw: Draw) -> Iterator[Sample]:
    zeros = draw.constant(4, 5)
    zeros[:, ::2] = 0
    for value in (0.0, 0.5, 1.0):
        yield Sample((zeros, zeros.new_tensor(value)), desc=f"{value} at 0")
    yield Sample((zeros, draw.constant(5)), desc="values along rows")


def _identity(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3),), desc="matrix")


def _maxout(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 6), 3), desc="features")
    yield Sample((draw(2, 4, 3, 2), 2), desc="channels")
    yield Sample((draw(6), 2, -1), desc="vector")


def _maxout_of_views(input: Tensor, pieces: int, dim: int = 1) -> Tensor:
    dim %= input.dim()
    return input.unflatten(dim, (-1, pieces)).max(dim + 1).values


ACTIVATIONS: tuple[FunctionTechnique, ...] = (
    FunctionTechnique(
        name="tanh",
        ids=("F2",),
        source="N1; N3",
        formula=r"y = \tanh x",
        ours=ours.tanh,
        torch=torch.tanh,
        oracle=oracle.tanh,
        samples=samples_from(_elementwise),
        magnitude=oracle.tanh_magnitude,
        module=reimpl.nn.Tanh,
        torch_module=torch.nn.Tanh,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="leaky_relu",
        ids=("F2",),
        source="beyond the notes",
        formula=r"y = x \text{ if } x > 0 \text{ else } a x",
        ours=ours.leaky_relu,
        torch=torch_functional.leaky_relu,
        oracle=oracle.leaky_relu,
        samples=samples_from(_leaky_relu),
        magnitude=oracle.leaky_relu_magnitude,
        module=reimpl.nn.LeakyReLU,
        torch_module=torch.nn.LeakyReLU,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="heaviside",
        ids=("F2",),
        source="N3",
        formula=r"y = 0 \text{ if } x < 0,\ v \text{ if } x = 0,\ 1 \text{ if } x > 0",
        ours=ours.heaviside,
        torch=torch.heaviside,
        oracle=oracle.heaviside,
        samples=samples_from(_heaviside),
        differentiable=False,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="identity",
        ids=("F2",),
        source="N3",
        formula=r"y = x",
        ours=ours.identity,
        torch=torch.nn.Identity(),
        oracle=oracle.identity,
        samples=samples_from(_identity),
        module=reimpl.nn.Identity,
        torch_module=torch.nn.Identity,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="maxout",
        ids=("F2",),
        source="N2; Goodfellow et al. (2013)",
        formula=r"y_i = \max_{j < k} x_{ik + j}",
        ours=ours.maxout,
        torch=None,
        composition=_maxout_of_views,
        oracle=oracle.maxout,
        samples=samples_from(_maxout),
        magnitude=oracle.maxout_magnitude,
        module=reimpl.nn.Maxout,
        forbidden=FORBIDDEN,
    ),
)
