"""Pooling, dropout, recurrent cells and embedding: one row each, with its sample calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as ours
import reimpl.nn
from parity_tests.declarations.functional_samples import FORBIDDEN, Draw, samples_from
from parity_tests.oracle import layers as oracle
from parity_tests.oracle import pooling
from reimpl.testing.declarations import FunctionTechnique, Sample


def _max_pool1d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 7), 2), desc="2")
    yield Sample((draw(3, 9), 3, 2, 1, 2), {"ceil_mode": True}, desc="dilated, ceil_mode, unbatched")


def _max_pool2d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 6, 4), 2), desc="2x2")
    yield Sample((draw(2, 2, 7, 6), 3, 2, 1), {"ceil_mode": True}, desc="overlapping, ceil_mode")
    yield Sample((draw(3, 7, 6), (3, 2), (1, 2), (1, 0), (2, 1)), desc="dilated, unbatched")


def _avg_pool1d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 7), 2), desc="2")
    yield Sample((draw(3, 8), 3, 2, 1, True, False), desc="overlapping, ceil_mode, padding not counted, unbatched")


def _avg_pool2d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 2, 6, 4), 2), desc="2x2")
    yield Sample((draw(1, 2, 7, 6), 3, 2, 1), {"ceil_mode": True}, desc="overlapping, ceil_mode")
    yield Sample(
        (draw(2, 5, 6), (3, 2), (2, 3), (1, 0)), {"count_include_pad": False}, desc="padding not counted, unbatched"
    )
    yield Sample((draw(1, 2, 4, 4), 2), {"divisor_override": 3}, desc="divisor_override")


def _adaptive_max_pool2d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 5, 4), (3, 2)), desc="uneven windows")
    yield Sample((draw(2, 4, 3), (6, None)), desc="more windows than rows, unbatched")


def _adaptive_avg_pool1d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 7), 3), desc="uneven windows")


def _adaptive_avg_pool2d(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 3, 5, 6), 1), desc="global")
    yield Sample((draw(2, 3, 5, 4), (3, 2)), desc="uneven windows")
    yield Sample((draw(2, 4, 3), (6, None)), desc="more windows than rows, unbatched")


def _dropout(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(3, 4), 0.4, False), desc="evaluation")
    yield Sample((draw(3, 4), 0.0), desc="nothing dropped")
    yield Sample((draw(3, 4), 1.0), desc="all dropped")


def _rnn_cell(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(2, 4), draw(2, 3), draw(3, 4), draw(3, 3), draw(3), draw(3)), desc="biases")
    yield Sample((draw(2, 3), draw(2, 2), draw(2, 3), draw(2, 2)), desc="no biases")


def _lstm_cell(draw: Draw) -> Iterator[Sample]:
    weights = draw(12, 2), draw(12, 3), draw(12), draw(12)
    yield Sample((draw(2, 2), draw(2, 3), draw(2, 3), *weights), desc="biases")
    yield Sample((draw(2, 3), draw(2, 1), draw(2, 1), draw(4, 3), draw(4, 1)), desc="no biases")


def _flat(cell: Callable[..., Any]) -> Callable[..., Any]:
    """A cell that takes its two states one after the other."""

    @functools.wraps(cell)
    def flat(input: Tensor, hidden: Tensor, memory: Tensor, *weights: Tensor) -> Any:
        return cell(input, (hidden, memory), *weights)

    return flat


def _embedding(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw.classes(5, 2, 4), draw(5, 3)), desc="table")
    yield Sample((draw.classes(4, 6), draw(5, 2)), {"padding_idx": -1}, desc="padding that does not occur")


def _skip_gram_loss(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(3, 4), draw(3, 4), draw(3, 2, 4)), desc="mean")
    yield Sample((draw(2, 3), draw(2, 3), draw(2, 3, 3)), {"reduction": "none"}, desc="none")


def _skip_gram_of_logits(center: Tensor, context: Tensor, negative: Tensor, reduction: str = "mean") -> Tensor:
    true = torch_functional.logsigmoid(torch.einsum("nd,nd->n", center, context))
    drawn = torch_functional.logsigmoid(-torch.einsum("nd,nkd->nk", center, negative)).sum(1)
    return -(true + drawn) if reduction == "none" else -(true + drawn).mean()


POOLING: tuple[FunctionTechnique, ...] = (
    FunctionTechnique(
        name="max_pool1d",
        ids=("F9",),
        source="N1; N4",
        formula=r"y_i = \max_k x_{is+kd-p}",
        ours=ours.max_pool1d,
        torch=torch_functional.max_pool1d,
        oracle=pooling.max_pool1d,
        samples=samples_from(_max_pool1d),
        magnitude=pooling.max_pool1d_magnitude,
        module=reimpl.nn.MaxPool1d,
        torch_module=torch.nn.MaxPool1d,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="max_pool2d",
        ids=("F9",),
        source="N1; N4",
        formula=r"y_{ij} = \max_{k,l} x_{is+kd-p,js+ld-p}",
        ours=ours.max_pool2d,
        torch=torch_functional.max_pool2d,
        oracle=pooling.max_pool2d,
        samples=samples_from(_max_pool2d),
        magnitude=pooling.max_pool2d_magnitude,
        module=reimpl.nn.MaxPool2d,
        torch_module=torch.nn.MaxPool2d,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="avg_pool1d",
        ids=("F9",),
        source="N1; N4",
        formula=r"y_i = \frac{1}{m_i} \sum_k x_{is+k-p}",
        ours=ours.avg_pool1d,
        torch=torch_functional.avg_pool1d,
        oracle=pooling.avg_pool1d,
        samples=samples_from(_avg_pool1d),
        module=reimpl.nn.AvgPool1d,
        torch_module=torch.nn.AvgPool1d,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="avg_pool2d",
        ids=("F9",),
        source="N1; N4",
        formula=r"y_{ij} = \frac{1}{m_{ij}} \sum_{k,l} x_{is+k-p,js+l-p}",
        ours=ours.avg_pool2d,
        torch=torch_functional.avg_pool2d,
        oracle=pooling.avg_pool2d,
        samples=samples_from(_avg_pool2d),
        module=reimpl.nn.AvgPool2d,
        torch_module=torch.nn.AvgPool2d,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="adaptive_max_pool2d",
        ids=("F9",),
        source="beyond the notes",
        formula=r"y_{ij} = \max x[\lfloor ih/m \rfloor : \lceil (i+1)h/m \rceil, \ldots]",
        ours=ours.adaptive_max_pool2d,
        torch=torch_functional.adaptive_max_pool2d,
        oracle=pooling.adaptive_max_pool2d,
        samples=samples_from(_adaptive_max_pool2d),
        magnitude=pooling.adaptive_max_pool2d_magnitude,
        module=reimpl.nn.AdaptiveMaxPool2d,
        torch_module=torch.nn.AdaptiveMaxPool2d,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="adaptive_avg_pool1d",
        ids=("F9",),
        source="N1; N4",
        formula=r"y_i = \operatorname{mean} x[\lfloor ih/m \rfloor : \lceil (i+1)h/m \rceil]",
        ours=ours.adaptive_avg_pool1d,
        torch=torch_functional.adaptive_avg_pool1d,
        oracle=pooling.adaptive_avg_pool1d,
        samples=samples_from(_adaptive_avg_pool1d),
        module=reimpl.nn.AdaptiveAvgPool1d,
        torch_module=torch.nn.AdaptiveAvgPool1d,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="adaptive_avg_pool2d",
        ids=("F9",),
        source="N1; N4",
        formula=r"y_{ij} = \operatorname{mean} x[\lfloor ih/m \rfloor : \lceil (i+1)h/m \rceil, \ldots]",
        ours=ours.adaptive_avg_pool2d,
        torch=torch_functional.adaptive_avg_pool2d,
        oracle=pooling.adaptive_avg_pool2d,
        samples=samples_from(_adaptive_avg_pool2d),
        module=reimpl.nn.AdaptiveAvgPool2d,
        torch_module=torch.nn.AdaptiveAvgPool2d,
        forbidden=FORBIDDEN,
    ),
)

LAYERS: tuple[FunctionTechnique, ...] = (
    FunctionTechnique(
        name="dropout",
        ids=("F11",),
        source="N1; N4",
        formula=r"y_i = m_i x_i/(1 - p),\ m_i \sim \operatorname{Bernoulli}(1 - p)",
        ours=ours.dropout,
        torch=torch_functional.dropout,
        oracle=oracle.dropout,
        samples=samples_from(_dropout),
        module=reimpl.nn.Dropout,
        torch_module=torch.nn.Dropout,
        random=True,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="rnn_tanh_cell",
        ids=("F14",),
        source="N2 §8.2.5",
        formula=r"h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})",
        ours=ours.rnn_tanh_cell,
        torch=torch.rnn_tanh_cell,
        oracle=oracle.rnn_tanh_cell,
        samples=samples_from(_rnn_cell),
        magnitude=oracle.rnn_tanh_cell_magnitude,
        module=reimpl.nn.RNNCell,
        torch_module=torch.nn.RNNCell,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="rnn_relu_cell",
        ids=("F14",),
        source="N2 §8.2.5",
        formula=r"h' = \max(0, W_{ih} x + b_{ih} + W_{hh} h + b_{hh})",
        ours=ours.rnn_relu_cell,
        torch=torch.rnn_relu_cell,
        oracle=oracle.rnn_relu_cell,
        samples=samples_from(_rnn_cell),
        magnitude=oracle.rnn_relu_cell_magnitude,
        module=reimpl.nn.RNNCell,
        torch_module=torch.nn.RNNCell,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="lstm_cell",
        ids=("F14",),
        source="N2 §8.7.5",
        formula=r"c' = \sigma(f) \odot c + \sigma(i) \odot \tanh g,\ h' = \sigma(o) \odot \tanh c'",
        ours=_flat(ours.lstm_cell),
        torch=_flat(torch.lstm_cell),
        oracle=oracle.lstm_cell,
        samples=samples_from(_lstm_cell),
        magnitude=oracle.lstm_cell_magnitude,
        module=reimpl.nn.LSTMCell,
        torch_module=torch.nn.LSTMCell,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="embedding",
        ids=("F15",),
        source="N4 (SCDV)",
        formula=r"y_n = W_{i_n}",
        ours=ours.embedding,
        torch=torch_functional.embedding,
        oracle=oracle.embedding,
        samples=samples_from(_embedding),
        module=reimpl.nn.Embedding,
        torch_module=torch.nn.Embedding,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="skip_gram_loss",
        ids=("F15",),
        source="N4 (SCDV); Mikolov et al. (2013)",
        formula=r"\ell_n = -\log \sigma(v_n \cdot u_n) - \sum_k \log \sigma(-v_n \cdot \tilde u_{nk})",
        ours=ours.skip_gram_loss,
        torch=None,
        composition=_skip_gram_of_logits,
        oracle=oracle.skip_gram_loss,
        samples=samples_from(_skip_gram_loss),
        magnitude=oracle.skip_gram_loss_magnitude,
        forbidden=FORBIDDEN,
    ),
)
