"""The first layers and losses, convolution and batch normalisation: one row each, with its sample calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as ours
import reimpl.nn
from parity_tests.declarations.functional_samples import FORBIDDEN, FORBIDDEN_TO_VARIANCES, Draw, samples_from
from parity_tests.oracle import functional as oracle
from reimpl.testing.declarations import FunctionTechnique, Sample


def _linear(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 6), draw(3, 6), draw(3)), desc="matrix")
    yield Sample((draw(2, 3, 5), draw(4, 5)), desc="3-d, no bias")
    yield Sample((draw(7), draw(3, 7), draw(3)), desc="vector")
    yield Sample((draw(3, 5), draw(5)), desc="weight of one dimension")


def _elementwise(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 5),), desc="matrix")
    yield Sample(((draw.constant(3, 2, 4) * 20).requires_grad_(),), desc="large values")
    yield Sample((draw(),), desc="0-d")


def _along_dim(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 7),), {"dim": 1}, desc="rows")
    yield Sample((draw(3, 5, 4),), {"dim": 1}, desc="inner dimension")
    yield Sample(((draw.constant(3, 6) * 100).requires_grad_(),), {"dim": -1}, desc="large values")


def _cross_entropy(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(6, 5), draw.classes(5, 6)), desc="indices")
    yield Sample((draw(4), draw.classes(4)), desc="one sample")
    ignoring = draw.classes(5, 6)
    ignoring[::3] = -100
    yield Sample((draw(6, 5), ignoring, draw.positive(5)), {"label_smoothing": 0.1}, desc="weights, smoothing, ignored")
    yield Sample((draw(3, 4, 2, 3), draw.classes(4, 3, 2, 3)), {"reduction": "sum"}, desc="planes, sum")
    yield Sample((draw(3, 4, 5), draw.classes(4, 3, 5), draw.positive(4)), {"reduction": "none"}, desc="none")
    probabilities = torch.rand(5, 4, generator=draw.generator).to(draw.device, draw.dtype).requires_grad_()
    weight = draw.positive(4).requires_grad_()
    yield Sample(
        (draw(5, 4), probabilities, weight), {"label_smoothing": 0.2}, desc="probabilities, weights, smoothing"
    )
    yield Sample((draw(3, 4, 2), draw(3, 4, 2)), {"reduction": "none"}, desc="probabilities, none")


def _conv2d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 6, 5), draw(4, 3, 3, 3), draw(4)), {"padding": 1}, desc="3x3")
    yield Sample((draw(2, 2, 7, 6), draw(3, 2, 3, 2), draw(3)), {"stride": (2, 1), "padding": (1, 0)}, desc="strided")
    yield Sample(
        (draw(2, 4, 5, 6), draw(6, 2, 2, 3)), {"groups": 2, "dilation": (1, 2), "padding": "same"}, desc="same"
    )
    yield Sample(
        (draw(3, 5, 4), draw(3, 1, 3, 3), draw(3)), {"groups": 3, "padding": "valid"}, desc="depthwise, unbatched"
    )
    yield Sample((draw(2, 5, 3, 4), draw(4, 5, 1, 1), draw(4)), desc="1x1")


def _batch_norm(draw: Draw) -> Iterator[Sample]:
    def shifted(*shape: int) -> Tensor:
        return (draw.constant(*shape) * 2 + 1).requires_grad_()

    yield Sample((shifted(6, 3), None, None, draw(3), draw(3)), {"training": True}, desc="training, features")
    yield Sample((shifted(4, 3, 2, 3), None, None, draw(3), draw(3)), {"training": True}, desc="training, planes")
    yield Sample((shifted(4, 2, 3), None, None), {"training": True, "eps": 0.01}, desc="training, not affine")
    averages = draw.constant(3), draw.positive(3)
    yield Sample((shifted(4, 3, 2, 2), *averages, draw(3), draw(3)), desc="evaluation")
    full = torch.float32 if draw.dtype == torch.bfloat16 else draw.dtype
    averages = draw.constant(3, dtype=full), draw.positive(3, dtype=full)
    yield Sample((shifted(4, 3, 2), *averages, draw(3, dtype=full)), desc="evaluation, full-width weight")


FUNCTIONS: tuple[FunctionTechnique, ...] = (
    FunctionTechnique(
        name="linear",
        ids=("F1",),
        source="N3",
        formula=r"y = x W^\top + b",
        ours=ours.linear,
        torch=torch_functional.linear,
        oracle=oracle.linear,
        samples=samples_from(_linear),
        module=reimpl.nn.Linear,
        torch_module=torch.nn.Linear,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="relu",
        ids=("F2",),
        source="N1; N3",
        formula=r"y = \max(x, 0)",
        ours=ours.relu,
        torch=torch_functional.relu,
        oracle=oracle.relu,
        samples=samples_from(_elementwise),
        magnitude=oracle.relu_magnitude,
        module=reimpl.nn.ReLU,
        torch_module=torch.nn.ReLU,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="sigmoid",
        ids=("F2",),
        source="N1; N2; N3",
        formula=r"y = 1/(1 + e^{-x})",
        ours=ours.sigmoid,
        torch=torch.sigmoid,
        oracle=oracle.sigmoid,
        samples=samples_from(_elementwise),
        magnitude=oracle.sigmoid_magnitude,
        module=reimpl.nn.Sigmoid,
        torch_module=torch.nn.Sigmoid,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="softmax",
        ids=("F3",),
        source="N3; N4",
        formula=r"y_i = e^{x_i - m} / \sum_j e^{x_j - m},\ m = \max_j x_j",
        ours=ours.softmax,
        torch=torch_functional.softmax,
        oracle=oracle.softmax,
        samples=samples_from(_along_dim),
        magnitude=oracle.softmax_magnitude,
        module=reimpl.nn.Softmax,
        torch_module=torch.nn.Softmax,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="log_softmax",
        ids=("F3",),
        source="N3; N4",
        formula=r"y_i = (x_i - m) - \log \sum_j e^{x_j - m},\ m = \max_j x_j",
        ours=ours.log_softmax,
        torch=torch_functional.log_softmax,
        oracle=oracle.log_softmax,
        samples=samples_from(_along_dim),
        magnitude=oracle.log_softmax_magnitude,
        module=reimpl.nn.LogSoftmax,
        torch_module=torch.nn.LogSoftmax,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="cross_entropy",
        ids=("F5", "F18"),
        source="N3; N4",
        formula=r"\ell_n = -\sum_c w_c q_{nc} \log \operatorname{softmax}(x_n)_c,\ q = (1 - \epsilon) t + \epsilon/C",
        ours=ours.cross_entropy,
        torch=torch_functional.cross_entropy,
        oracle=oracle.cross_entropy,
        samples=samples_from(_cross_entropy),
        magnitude=oracle.cross_entropy_magnitude,
        module=reimpl.nn.CrossEntropyLoss,
        torch_module=torch.nn.CrossEntropyLoss,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="conv2d",
        ids=("F7",),
        source="N1; N4",
        formula=r"y_{noij} = b_o + \sum_{c,k,l} w_{ockl}\, x_{n,c,is+kd-p,js+ld-p}",
        ours=ours.conv2d,
        torch=torch_functional.conv2d,
        oracle=oracle.conv2d,
        samples=samples_from(_conv2d),
        module=reimpl.nn.Conv2d,
        torch_module=torch.nn.Conv2d,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="batch_norm",
        ids=("F10",),
        source="N0 eq. 4.79-4.94; N1; N2; N4",
        formula=r"y = \gamma (x - \mu)/\sqrt{\sigma^2 + \epsilon} + \beta",
        ours=ours.batch_norm,
        torch=torch_functional.batch_norm,
        oracle=oracle.batch_norm,
        samples=samples_from(_batch_norm),
        magnitude=oracle.batch_norm_magnitude,
        module=reimpl.nn.BatchNorm2d,
        torch_module=torch.nn.BatchNorm2d,
        forbidden=FORBIDDEN_TO_VARIANCES,
    ),
)
