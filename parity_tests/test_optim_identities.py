"""What the dialects are to each other: identities that hold at a constant rate, and break when it changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import reimpl.optim as optim
from parity_tests.optim_cases import TECHNIQUES
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizers import step_with
from reimpl.testing.samples import random_tensor, seeded_generator

pytestmark = pytest.mark.quick
GENERATOR_STEPS = 12
CONSTANT = [0.1] * GENERATOR_STEPS
CHANGING = [0.1] * (GENERATOR_STEPS // 2) + [0.02] * (GENERATOR_STEPS // 2)


def _draw(label: str) -> torch.Tensor:
    return random_tensor((20,), torch.float64, seeded_generator(0, "identity", label))


GRADS = [_draw(f"grad {step}") for step in range(GENERATOR_STEPS)]


def _path(cls: Any, rates: Sequence[float], **kwargs: Any) -> list[torch.Tensor]:
    """The parameter before the first and after each step."""
    param = _draw("param").requires_grad_()
    optimizer = cls([param], lr=rates[0], foreach=False, **kwargs)
    path = [param.detach().clone()]
    for rate, grad in zip(rates, GRADS):
        optimizer.param_groups[0]["lr"] = rate
        step_with(optimizer, [grad])
        path.append(param.detach().clone())
    return path


def _distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


# Twelve steps in float64 with numbers of size 1 round by 1e-16 each: equal paths differ by less than 1e-13, and paths
# that part do so by a tenth of a step, more than 1e-3.
SAME, APART = 1e-13, 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_velocity_and_torch_momentum_agree_until_the_rate_changes(nesterov: bool) -> None:
    """O2 and O2t: v = -εb at a constant rate only."""
    forms = [{"momentum": 0.9, "nesterov": nesterov, "momentum_form": form} for form in ("velocity", "torch")]
    assert _distance(*(_path(optim.SGD, CONSTANT, **form) for form in forms)) < SAME
    assert _distance(*(_path(optim.SGD, CHANGING, **form) for form in forms)) > APART


@pytest.mark.parametrize("nesterov", [False, True])
def test_rmsprops_velocity_and_torch_momentum_agree_until_the_rate_changes(nesterov: bool) -> None:
    """O8m."""
    forms = [{"momentum": 0.9, "nesterov": nesterov, "momentum_form": form} for form in ("velocity", "torch")]
    assert _distance(*(_path(optim.RMSprop, CONSTANT, **form) for form in forms)) < SAME
    assert _distance(*(_path(optim.RMSprop, CHANGING, **form) for form in forms)) > APART


@pytest.mark.parametrize("rates", [CONSTANT, CHANGING], ids=["constant", "changing"])
def test_velocity_is_the_heavy_ball(rates: list[float]) -> None:
    """O2 (N1 ⑤): θ' = θ + α(θ - θ_before) - εg, whatever the rate does."""
    path = _path(optim.SGD, rates, momentum=0.9, momentum_form="velocity")
    ball = [path[0], path[0] - rates[0] * GRADS[0]]
    for rate, grad in zip(rates[1:], GRADS[1:]):
        ball.append(ball[-1] + 0.9 * (ball[-1] - ball[-2]) - rate * grad)
    assert _distance(path, ball) < SAME


def test_ewa_is_not_dampening() -> None:
    """O3: PyTorch's ``dampening=momentum`` starts from the gradient itself, the average from zero."""
    average = _path(optim.SGD, CONSTANT, momentum=0.9, momentum_form="ewa")
    damped = _path(optim.SGD, CONSTANT, momentum=0.9, dampening=0.9)
    assert _distance(average, damped) > APART
    first = GRADS[0] * 0.1
    torch.testing.assert_close(average[0] - average[1], 0.1 * first)  # (1 - β) of the gradient
    torch.testing.assert_close(damped[0] - damped[1], first)


def test_ewa_with_bias_correction_is_a_weighted_mean_of_the_gradients() -> None:
    """O3: after t steps the weights (1 - β)βᵏ/(1 - βᵗ) sum to one, so equal gradients give back the gradient."""
    param = _draw("param").requires_grad_()
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, momentum_form="ewa", bias_correction=True)
    for _ in range(5):
        before = param.detach().clone()
        step_with(optimizer, [GRADS[0]])
        torch.testing.assert_close(before - param.detach(), 0.1 * GRADS[0])


def test_momentums_step_grows_to_a_multiple_of_the_rate() -> None:
    """Erratum 7: momentum does not lower the rate; under a constant gradient the step tends to ε/(1 - γ)·g."""
    param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, momentum_form="velocity")
    steps = []
    for _ in range(200):
        before = param.item()
        step_with(optimizer, [torch.ones(1, dtype=torch.float64)])
        steps.append(before - param.item())
    assert all(later > earlier for earlier, later in pairwise(steps[:50]))
    assert steps[-1] == pytest.approx(0.1 / (1 - 0.9), rel=1e-8)  # 0.9²⁰⁰ is 7e-10 short of it


def test_the_notes_minus_sign_climbs() -> None:
    """Erratum 1 (N0 eq. 4.52, 4.54): with v = -εg + ..., θ - v goes uphill; θ + v goes down."""

    def losses(sign: float) -> list[float]:
        theta, v, seen = 1.0, 0.0, []
        for _ in range(10):
            v = 0.5 * v - 0.1 * theta  # the gradient of θ²/2 is θ
            theta += sign * v
            seen.append(theta * theta / 2)
        return seen

    climbing, falling = losses(-1.0), losses(1.0)
    assert all(b > a for a, b in zip([0.5, *climbing], climbing)) and climbing[-1] > 2
    assert falling[-1] < 0.05
    param = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.5, momentum_form="velocity")
    for _ in range(10):
        step_with(optimizer, [param.detach().clone()])
    assert param.item() ** 2 / 2 == pytest.approx(falling[-1], rel=1e-12)  # a dozen roundings


@pytest.mark.parametrize(
    ("cls", "kwargs", "square"),
    [(optim.Adagrad, {}, 1.0), (optim.RMSprop, {"alpha": 0.9}, 0.1)],
    ids=["Adagrad", "RMSprop"],
)
def test_where_eps_stands(cls: Any, kwargs: dict[str, Any], square: float) -> None:
    """O6 and O6i, O8 and O8i: the first step is εg/(√(wg²) + δ) or εg/√(wg² + δ), far apart once g is small."""
    g, delta = 1e-3, 1e-4
    expected = {False: g / (np.sqrt(square) * g + delta), True: g / np.sqrt(square * g * g + delta)}
    for inside, size in expected.items():
        param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        step_with(cls([param], lr=1.0, eps=delta, eps_inside_sqrt=inside, **kwargs), [torch.full_like(param, g)])
        assert -param.item() == pytest.approx(size, rel=1e-14)  # a few roundings in float64
    assert expected[False] > 5 * expected[True]


def test_bias_correction_keeps_the_first_step_at_the_rate() -> None:
    """O9 and O9b: |Δθ| = ε with the correction, ε(1 - β₁)/√(1 - β₂) = 3.16ε without it."""
    sizes = []
    for correct in (True, False):
        param = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        grad = torch.tensor([1.0, -2.0, 3e-5, 400.0], dtype=torch.float64)
        step_with(optim.Adam([param], lr=0.1, eps=0.0, bias_correction=correct), [grad])
        sizes.append(param.detach().abs())
    torch.testing.assert_close(sizes[0], torch.full((4,), 0.1, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(sizes[1], sizes[0] * (0.1 / np.sqrt(0.001)), rtol=1e-12, atol=0)


def test_penalty_and_decoupled_decay_are_one_for_sgd_and_two_for_adam() -> None:
    """O10: W ← (1 - ελ)W - εg is SGD with the penalty; Adam divides the penalty by √v as well, AdamW does not."""
    decayed = [_draw("param")]
    for grad in GRADS:
        decayed.append((1 - 0.1 * 0.05) * decayed[-1] - 0.1 * grad)
    assert _distance(_path(optim.SGD, CONSTANT, weight_decay=0.05), decayed) < SAME
    penalty = _path(optim.Adam, CONSTANT, weight_decay=0.05)
    assert _distance(penalty, _path(optim.AdamW, CONSTANT, weight_decay=0.05)) > APART
    decoupled = _path(optim.Adam, CONSTANT, weight_decay=0.05, decoupled_weight_decay=True)
    assert _distance(decoupled, _path(optim.AdamW, CONSTANT, weight_decay=0.05)) == 0


def test_adadelta_needs_no_rate_of_the_gradients_size() -> None:
    """O7: the update has the parameter's unit; without δ, gradients a thousand times larger change nothing."""
    runs = []
    for factor in (1.0, 1024.0):  # a power of two scales without rounding
        param = _draw("param").requires_grad_()
        optimizer = optim.Adadelta([param], lr=1.0, eps=0.0)
        state = optimizer.state[param]
        state.update(step=torch.zeros(()), square_avg=torch.zeros_like(param), acc_delta=torch.full_like(param, 1e-4))
        for grad in GRADS:
            step_with(optimizer, [grad * factor])
        runs.append(param.detach())
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-13, atol=0)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_oracles_go_on_from_a_state(technique: OptimizerTechnique) -> None:
    """Six gradients at once are the same as three and three: the checks of one step rely on it."""
    run = technique.oracle
    extra = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}, "ASGD": {"t0": 1}}.get(technique.name, {})
    param, grads = _draw("param").numpy(), [grad.numpy() for grad in GRADS[:6]]
    whole, whole_state = run(param, grads, lr=0.1, **extra)
    half, state = run(param, grads[:3], lr=0.1, **extra)
    rest, rest_state = run(half, grads[3:], state=state, lr=0.1, **extra)
    np.testing.assert_array_equal(rest, whole)
    assert rest_state.keys() == whole_state.keys()
    for key, value in whole_state.items():
        np.testing.assert_array_equal(rest_state[key], value)
    skipped, _ = run(param, [grads[0], None, grads[1]], lr=[0.1, 5.0, 0.1], **extra)
    np.testing.assert_array_equal(skipped, run(param, grads[:2], lr=0.1, **extra)[0])
