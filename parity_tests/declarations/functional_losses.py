"""The losses and penalties beyond cross-entropy: one row each, with its sample calls."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

import reimpl.functional as ours
import reimpl.nn
from parity_tests.declarations.functional_samples import FORBIDDEN, Draw, samples_from
from parity_tests.oracle import losses as oracle
from reimpl.testing.declarations import FunctionTechnique, Sample


def _mse_loss(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 5), draw(4, 5)), desc="mean")
    yield Sample((draw(3, 2), draw(3, 2)), {"reduction": "none"}, desc="none")
    yield Sample((draw(3, 4), draw(3, 4)), {"weight": draw.positive(3, 4)}, desc="weighted mean")


def _half_squared_error(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 3), draw(4, 3)), desc="sum")
    yield Sample((draw(4, 3), draw(4, 3)), {"reduction": "mean"}, desc="mean")


def _half_mse(input: Tensor, target: Tensor, reduction: str = "sum") -> Tensor:
    return torch_functional.mse_loss(input, target, reduction=reduction) / 2


def _nll_loss(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(6, 5), draw.classes(5, 6)), desc="mean")
    ignoring = draw.classes(4, 3, 2, 2)
    ignoring[::2, 0] = -100
    yield Sample((draw(3, 4, 2, 2), ignoring, draw.positive(4)), desc="planes, weights, ignored")
    yield Sample((draw(3, 4, 2), draw.classes(4, 3, 2)), {"reduction": "none"}, desc="none")


def _guarded(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw.unit(5, 4).requires_grad_(), draw.classes(4, 5)), desc="indices")
    yield Sample((draw.unit(3, 4).requires_grad_(), draw.unit(3, 4).requires_grad_()), {"eps": 0.01}, desc="one-hot")


def _guarded_composition(input: Tensor, target: Tensor, eps: float = 1e-7, reduction: str = "mean") -> Tensor:
    if target.shape == input.shape:
        return -(target * (input + eps).log()).sum() / len(input)
    return torch_functional.nll_loss((input + eps).log(), target, reduction=reduction)


def _zero_one_loss(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw.constant(12, 5), draw.classes(5, 12)), desc="mean")
    yield Sample((draw.constant(3, 4, 2), draw.classes(4, 3, 2)), {"ignore_index": 1, "reduction": "none"}, desc="none")


def _binary(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw.unit(4, 3).requires_grad_(), draw.unit(4, 3).requires_grad_()), desc="mean")
    labels = draw.classes(2, 3, 4).to(draw.dtype)
    yield Sample(
        (draw.unit(3, 4).requires_grad_(), labels, draw.positive(4)), {"reduction": "none"}, desc="labels, weights"
    )


def _with_logits(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 3), draw.unit(4, 3).requires_grad_()), desc="mean")
    logits = (draw.constant(3, 4) * 20).requires_grad_()
    options = {"weight": draw.positive(4), "pos_weight": draw.positive(4), "reduction": "none"}
    yield Sample((logits, draw.classes(2, 3, 4).to(draw.dtype)), options, desc="large logits, weights")


def _masked(draw: Draw) -> Iterator[Sample]:
    labels = draw.classes(2, 4, 3).to(draw.dtype)
    yield Sample((draw(4, 3), labels, draw.classes(2, 4, 3).bool()), desc="mask")
    unknown = labels.masked_fill(draw.classes(2, 4, 3).bool(), torch.nan)
    yield Sample((draw(4, 3), unknown), {"reduction": "sum", "pos_weight": draw.positive(3)}, desc="NaN")


def _masked_composition(
    input: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    known = ~target.isnan() if mask is None else mask
    losses = torch_functional.binary_cross_entropy_with_logits(
        input, target.nan_to_num(), known.to(input.dtype), pos_weight=pos_weight, reduction="none"
    )
    return losses.sum() / known.sum() if reduction == "mean" else losses.sum()


def _penalty(draw: Draw) -> Iterator[Sample]:
    yield Sample((draw(4, 3), 1), {"weight": 0.1}, desc="L1")
    yield Sample((draw(4, 3), 2), {"weight": 0.1, "power": True}, desc="L2, power")
    yield Sample((draw(2, 3), 2), desc="L2, norm")
    yield Sample((draw(2, 3), 3.5), desc="L3.5, norm")


def _penalty_of_norm(input: Tensor, p: float = 2.0, weight: float = 1.0, *, power: bool = False) -> Tensor:
    norm = torch.linalg.vector_norm(input, p)
    return weight / p * (norm**p if power else norm)


def _edge_filters(draw: Draw) -> Iterator[Sample]:
    placed = {"dtype": draw.dtype, "device": draw.device}
    yield Sample((), placed, desc="both directions")
    yield Sample(("sobel_vertical", "scharr_horizontal", "laplacian"), {"channels": 3, **placed}, desc="others")
    yield Sample(("scharr_vertical", "sobel_horizontal", "diagonal"), placed, desc="and others")


LOSSES: tuple[FunctionTechnique, ...] = (
    FunctionTechnique(
        name="mse_loss",
        ids=("F4",),
        source="N3",
        formula=r"\ell_i = w_i (x_i - t_i)^2",
        ours=ours.mse_loss,
        torch=torch_functional.mse_loss,
        oracle=oracle.mse_loss,
        samples=samples_from(_mse_loss),
        magnitude=oracle.mse_loss_magnitude,
        module=reimpl.nn.MSELoss,
        torch_module=torch.nn.MSELoss,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="half_squared_error",
        ids=("F4", "F18"),
        source="N3",
        formula=r"E = \frac{1}{2} \sum_i (x_i - t_i)^2",
        ours=ours.half_squared_error,
        torch=None,
        composition=_half_mse,
        oracle=oracle.half_squared_error,
        samples=samples_from(_half_squared_error),
        magnitude=oracle.half_squared_error_magnitude,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="nll_loss",
        ids=("F5", "F6"),
        source="N2 §8.1.2; N3",
        formula=r"\ell_n = -w_{t_n} x_{n t_n}",
        ours=ours.nll_loss,
        torch=torch_functional.nll_loss,
        oracle=oracle.nll_loss,
        samples=samples_from(_nll_loss),
        module=reimpl.nn.NLLLoss,
        torch_module=torch.nn.NLLLoss,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="cross_entropy_of_probabilities",
        ids=("F5",),
        source="N3",
        formula=r"\ell_n = -\sum_c t_{nc} \log(y_{nc} + \epsilon)",
        ours=ours.cross_entropy_of_probabilities,
        torch=None,
        composition=_guarded_composition,
        oracle=oracle.cross_entropy_of_probabilities,
        samples=samples_from(_guarded),
        magnitude=oracle.cross_entropy_of_probabilities_magnitude,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="zero_one_loss",
        ids=("F6",),
        source="N2 §8.1.2",
        formula=r"\ell_n = [\operatorname{argmax}_c x_{nc} \ne t_n]",
        ours=ours.zero_one_loss,
        torch=None,
        oracle=oracle.zero_one_loss,
        samples=samples_from(_zero_one_loss),
        differentiable=False,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="binary_cross_entropy",
        ids=("F5",),
        source="N3; N4",
        formula=r"\ell_i = -w_i [t_i \log x_i + (1 - t_i) \log(1 - x_i)]",
        ours=ours.binary_cross_entropy,
        torch=torch_functional.binary_cross_entropy,
        oracle=oracle.binary_cross_entropy,
        samples=samples_from(_binary),
        magnitude=oracle.binary_cross_entropy_magnitude,
        module=reimpl.nn.BCELoss,
        torch_module=torch.nn.BCELoss,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="binary_cross_entropy_with_logits",
        ids=("F5", "F18"),
        source="N3; N4",
        formula=r"\ell_i = w_i [(1 - t_i) x_i + (1 + (q_i - 1) t_i) \log(1 + e^{-x_i})]",
        ours=ours.binary_cross_entropy_with_logits,
        torch=torch_functional.binary_cross_entropy_with_logits,
        oracle=oracle.binary_cross_entropy_with_logits,
        samples=samples_from(_with_logits),
        magnitude=oracle.binary_cross_entropy_with_logits_magnitude,
        module=reimpl.nn.BCEWithLogitsLoss,
        torch_module=torch.nn.BCEWithLogitsLoss,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="masked_multilabel_loss",
        ids=("F16",),
        source="N4 (multi-task learning)",
        formula=r"E = \frac{1}{\sum_i m_i} \sum_i m_i \ell_i",
        ours=ours.masked_multilabel_loss,
        torch=None,
        composition=_masked_composition,
        oracle=oracle.masked_multilabel_loss,
        samples=samples_from(_masked),
        magnitude=oracle.masked_multilabel_loss_magnitude,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="lp_penalty",
        ids=("F12",),
        source="N1; N4",
        formula=r"\frac{\lambda}{p} \|x\|_p \text{ or } \frac{\lambda}{p} \|x\|_p^p",
        ours=ours.lp_penalty,
        torch=None,
        composition=_penalty_of_norm,
        oracle=oracle.lp_penalty,
        samples=samples_from(_penalty),
        magnitude=oracle.lp_penalty_magnitude,
        forbidden=FORBIDDEN,
    ),
    FunctionTechnique(
        name="edge_filters",
        ids=("F8",),
        source="N4",
        formula=r"w = s\, d^\top,\ d = (1, 0, -1)",
        ours=ours.edge_filters,
        torch=None,
        oracle=oracle.edge_filters,
        samples=samples_from(_edge_filters),
        differentiable=False,
        forbidden=FORBIDDEN,
    ),
)
