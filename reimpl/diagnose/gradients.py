"""``gradient_check``: a model's gradients against differences of its loss, parameter by parameter (catalogue D10)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reimpl.diagnose._line import Line
from reimpl.diagnose._preserve import cuda_devices, preserved

# How far the roundings of a loss may add up, in eps of its dtype times the loss.
_ROUNDINGS = 10.0
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-2}


@dataclass(frozen=True)
class ParameterCheck:
    """One parameter: ``relative_error`` of the entries compared, and the ``index`` that is farthest off."""

    name: str
    relative_error: float
    index: tuple[int, ...]
    analytic: float  # the gradient there
    numeric: float  # the difference quotient there
    compared: int
    ok: bool
    within_rounding: bool  # whether the loss's rounding alone explains the error
    kinks: int  # how many entries were not compared, since a kink is what their difference quotient is off by

    def __str__(self) -> str:
        error = "within rounding" if self.within_rounding else f"relative error {self.relative_error:.1e}"
        text = f"{error} over {self.compared}; at {self.index}: autograd {self.analytic:.6g}, "
        kinks = f"; {self.kinks} beside a kink agree by other differences" if self.kinks else ""
        return f"{text}differences {self.numeric:.6g}{kinks}"


@dataclass(frozen=True)
class GradientCheck:
    """The parameters, the worst first; ``print`` it for a table."""

    parameters: tuple[ParameterCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether every parameter's gradient is right."""
        return all(parameter.ok for parameter in self.parameters)

    @property
    def worst(self) -> ParameterCheck:
        """The parameter with the largest error as a share of what it may be."""
        return self.parameters[0]

    def __str__(self) -> str:
        width = max(len(parameter.name) for parameter in self.parameters)
        lines = [f"{p.name:{width}}  {'ok   ' if p.ok else 'WRONG'}  {p}" for p in self.parameters]
        verdict = "all gradients are right" if self.ok else f"worst: {self.worst.name}"
        return "\n".join([*lines, verdict])


def gradient_check(
    model: nn.Module | Mapping[str, Tensor],
    loss: Callable[[], Tensor],
    *,
    eps: float | None = None,
    tolerance: float | None = None,
    samples: int | None = 20,
    seed: int = 0,
) -> GradientCheck:
    r"""Compares autograd's gradients with central differences.

    .. math::
        g^\text{num}_i = \frac{E(w + h e_i) - E(w - h e_i)}{2h}, \qquad
        \text{error} = \frac{\max(0, \lVert g^\text{num} - g \rVert - r)}{\lVert g^\text{num} \rVert + \lVert g \rVert}

    with :math:`h = \epsilon \max(1, |w_i|)` and r the rounding that E/h must be expected to have, without which a
    gradient that is 0 could not be told from a wrong one. float64 finds errors of one in 10⁵, float32 of one in 10²,
    both only in gradients well above r.

    A kink within h (ReLU at 0, another maximum) bends the difference and not the gradient. So an entry that is off is
    looked at again, with shorter steps from both sides and from one; where two successive ones agree with autograd,
    by more than their measured noise can do, the entry counts as ``kinks`` and not as wrong. In float32 h is 0.005 and
    most of a convolution's weights have a kink so near: ``model.double()`` is the sharper test.

    Parameters, accumulated gradients, buffers and random number generators are afterwards as they were. Each
    evaluation begins from the same random numbers, so that dropout does not disturb.

    Args:
        model: whose parameters that require a gradient are checked, or tensors by name.
        loss: evaluates E, a scalar, with the parameters as they are.
        eps: ε, by default the cube root of the dtype's spacing.
        tolerance: the largest error that is right, by default 1e-5 in float64 and 1e-2 in float32.
        samples: how many entries of each parameter are compared, drawn at random; ``None`` compares all.
        seed: of that draw.

    Raises:
        ValueError: nothing requires a gradient, a dtype is neither float32 nor float64, the loss is no scalar, not
            finite, or differs when it is evaluated again.

    Source: D10 (N3, N4). PyTorch: :func:`torch.autograd.gradcheck`, which takes functions of their inputs.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    holder = model if isinstance(model, nn.Module) else nn.Module()
    named = dict(model.named_parameters() if isinstance(model, nn.Module) else model)
    named = {name: p for name, p in named.items() if p.requires_grad}
    if not named:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    for name, p in named.items():
        if p.dtype not in _TOLERANCES:
            raise ValueError(f"{name} must be float32 or float64 to be checked by differences, got {p.dtype}")
    generator = torch.Generator().manual_seed(seed)
    with preserved(holder):
        evaluate = _repeatable(loss, list(named.values()))
        value = evaluate()
        _check_loss(value, evaluate())
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        with torch.no_grad():
            checks = [
                _check(name, p, grad, evaluate, float(value.detach().abs()), eps, tolerance, samples, generator)
                for (name, p), grad in zip(named.items(), grads)
            ]
    order = sorted(checks, key=lambda pair: -pair[0])
    return GradientCheck(tuple(check for _, check in order))


def _repeatable(loss: Callable[[], Tensor], tensors: list[Tensor]) -> Callable[[], Tensor]:
    """``loss`` from the same random numbers every time."""
    devices = cuda_devices(tensors)

    def evaluate() -> Tensor:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return loss()

    return evaluate


def _check_loss(value: Any, again: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a tensor of one number that has a gradient, got {got}")
    if not value.isfinite().all():
        raise ValueError(f"loss must be finite, got {value.item()}")
    value = value.detach()
    if float((value - again.detach()).abs()) > _ROUNDINGS * torch.finfo(value.dtype).eps * float(value.abs()):
        raise ValueError(f"loss must be the same when it is evaluated again, got {value.item()} and {again.item()}")


def _check(
    name: str,
    p: Tensor,
    grad: Tensor | None,
    evaluate: Callable[[], Tensor],
    scale: float,
    eps: float | None,
    tolerance: float | None,
    samples: int | None,
    generator: torch.Generator,
) -> tuple[float, ParameterCheck]:
    """The check of one parameter, behind its error as a share of the tolerance."""
    spacing = torch.finfo(p.dtype).eps
    h = spacing ** (1 / 3) if eps is None else eps
    t = _TOLERANCES[p.dtype] if tolerance is None else tolerance
    count = p.numel() if samples is None else min(samples, p.numel())
    entries = torch.randperm(p.numel(), generator=generator)[:count].tolist()
    indices = [tuple(int(i) for i in torch.unravel_index(torch.tensor(e), p.shape)) for e in entries]
    lines = [Line(p, index, evaluate) for index in indices]
    numeric = torch.tensor([line.slope(h * line.unit, -h * line.unit)[0] for line in lines], dtype=torch.float64)
    analytic = torch.tensor([0.0 if grad is None else float(grad[index]) for index in indices], dtype=torch.float64)
    rounding = _ROUNDINGS * spacing * scale / h
    smooth = torch.ones(count, dtype=torch.bool)
    if not _errors(numeric, analytic, rounding)[1] <= t:
        # Were each of them within its own allowance, all together would be within theirs.
        for i in ((numeric - analytic).abs() > rounding + t * (numeric.abs() + analytic.abs())).nonzero().flatten():
            smooth[i] = not lines[i].is_kinked(h * lines[i].unit, float(analytic[i]), t)
    error, beyond = _errors(numeric[smooth], analytic[smooth], rounding)
    worst = int((numeric - analytic).abs().where(smooth, -1).argmax())
    compared = int(smooth.sum())
    check = ParameterCheck(
        name, error, indices[worst], float(analytic[worst]), float(numeric[worst]), compared, beyond <= t,
        beyond == 0, count - compared,
    )  # fmt: skip
    return math.inf if math.isnan(beyond) else beyond / t, check


def _errors(numeric: Tensor, analytic: Tensor, rounding: float) -> tuple[float, float]:
    """The relative error, and what of it ``rounding``, expected of each difference, cannot explain."""
    distance, size = float((numeric - analytic).norm()), float(numeric.norm() + analytic.norm())
    if distance == 0:
        return 0.0, 0.0
    # In this order, in which NaN comes through.
    return distance / size, max(distance - rounding * len(numeric) ** 0.5, 0.0) / size
