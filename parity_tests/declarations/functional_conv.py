"""Convolution over sequences: its row, with its sample calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as torch_functional

import reimpl.functional as ours
import reimpl.nn
from parity_tests.declarations.functional_samples import FORBIDDEN, Draw, samples_from
from parity_tests.oracle import functional_conv as oracle
from reimpl.testing.declarations import FunctionTechnique, Sample


def _conv1d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 7), draw(4, 3, 3), draw(4)), {"padding": 1}, desc="3")
    yield Sample((draw(2, 2, 9), draw(3, 2, 4), draw(3)), {"stride": 3, "padding": 2, "dilation": 2}, desc="strided")
    yield Sample((draw(2, 4, 6), draw(6, 2, 2)), {"groups": 2, "padding": "same"}, desc="same")
    yield Sample((draw(3, 5), draw(6, 1, 3), draw(6)), {"groups": 3, "padding": "valid"}, desc="depthwise, unbatched")


FUNCTIONS: tuple[FunctionTechnique, ...] = (
    FunctionTechnique(
        name="conv1d",
        ids=("F7",),
        source="N1; N4",
        formula=r"y_{noj} = b_o + \sum_{c,l} w_{ocl}\, x_{n,c,js+ld-p}",
        ours=ours.conv1d,
        torch=torch_functional.conv1d,
        oracle=oracle.conv1d,
        samples=samples_from(_conv1d),
        module=reimpl.nn.Conv1d,
        torch_module=torch.nn.Conv1d,
        forbidden=FORBIDDEN,
    ),
)
