"""Nesterov's momentum with a true look-ahead (O4): the oracle, the identity with PyTorch's form (O5), the closure."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import reimpl.optim as optim
from parity_tests.oracle.lookahead import nesterov_lookahead
from reimpl.optim import NesterovLookahead
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal, judge, to_oracle

pytestmark = pytest.mark.quick
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
STEPS = 15
CONSTANT = [0.05] * STEPS
CHANGING = [0.05] * (STEPS // 2) + [0.01] * (STEPS - STEPS // 2)
ALPHA = 0.9


def _bowl(theta: torch.Tensor) -> torch.Tensor:
    """½Σkθ², whose gradient is kθ, one rounding."""
    return (_curvature(theta) * theta * theta).sum() / 2


def _curvature(theta: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, theta.numel() + 1, dtype=theta.dtype, device=theta.device).view_as(theta)


def _start(seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    return random_tensor((5, 4), dtype, seeded_generator(seed, "lookahead"), device)


def _closure(optimizer: Any, theta: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor] = _bowl) -> Any:
    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    return evaluate


def _run(theta: torch.Tensor, rates: Sequence[float], **kwargs: Any) -> tuple[Any, list[torch.Tensor]]:
    optimizer = NesterovLookahead([theta], lr=rates[0], momentum=ALPHA, **kwargs)
    losses = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        losses.append(optimizer.step(_closure(optimizer, theta)))
    return optimizer, losses


@implementations
@pytest.mark.parametrize("rates", [CONSTANT, CHANGING], ids=["constant", "changing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_the_oracle(dtype: torch.dtype, rates: list[float], implementation: str, device: torch.device) -> None:
    for seed in SEEDS:
        theta = _start(seed, dtype, device).requires_grad_()
        start = to_oracle(theta)
        optimizer, _ = _run(theta, rates, **IMPLEMENTATIONS[implementation])
        curvature = to_oracle(_curvature(theta))
        thetas, velocities = nesterov_lookahead(start, lambda x: curvature * x, rates, ALPHA)  # noqa: B023
        # the scale: every term of every step on absolute values, θ's own path added up
        scale = np.abs(start) + sum(np.abs(v) for v in velocities)
        judge(theta, None, thetas[-1], scale).check("NesterovLookahead", implementation, "param")
        velocity = optimizer.state[theta]["momentum_buffer"]
        judge(velocity, None, velocities[-1], scale).check("NesterovLookahead", implementation, "momentum_buffer")


@implementations
def test_ahead_of_itself_it_is_pytorchs_nesterov(implementation: str, device: torch.device) -> None:
    """O5: at a constant rate φ = θ + αv is SGD(nesterov=True)'s parameter; no longer once the rate changes."""
    for rates, same in ((CONSTANT, True), (CHANGING, False)):
        for cls in (torch.optim.SGD, optim.SGD):
            theta, phi = (_start(0, torch.float64, device).requires_grad_() for _ in range(2))
            ours = NesterovLookahead([theta], lr=rates[0], momentum=ALPHA, **IMPLEMENTATIONS[implementation])
            theirs = cls([phi], lr=rates[0], momentum=ALPHA, nesterov=True)
            differences = []
            for rate in rates:
                for optimizer in (ours, theirs):
                    optimizer.param_groups[0]["lr"] = rate
                losses = ours.step(_closure(ours, theta)), theirs.step(_closure(theirs, phi))
                ahead = theta + ALPHA * ours.state[theta]["momentum_buffer"]
                differences.append(float((ahead - phi).detach().abs().max()))
                if same:
                    torch.testing.assert_close(*losses)  # both are the loss at φ
            # fifteen steps in float64 with numbers of size 1 round by 1e-16 each
            assert (max(differences) < 1e-13) is same, differences
            assert max(differences[: STEPS // 2]) < 1e-13


def test_the_closure_sees_the_point_ahead_and_leaves_the_point_behind() -> None:
    theta = _start(0, torch.float64).requires_grad_()
    optimizer = NesterovLookahead([theta], lr=0.05, momentum=ALPHA)
    seen = []
    for _ in range(3):
        before = theta.detach().clone()
        velocity = optimizer.state[theta].get("momentum_buffer", torch.zeros_like(theta)).clone()
        plain = _closure(optimizer, theta)

        def closure(plain: Any = plain) -> torch.Tensor:
            assert torch.is_grad_enabled()
            seen.append(theta.detach().clone())
            return plain()

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert bits_equal(seen[-1], before.add(velocity, alpha=ALPHA))
        assert loss.item() == _bowl(seen[-1]).item()
        expected = velocity * ALPHA - 0.05 * _curvature(theta) * seen[-1]
        torch.testing.assert_close(theta.detach(), before + expected)


def test_a_closure_that_fails_leaves_the_parameters_where_they_were() -> None:
    theta = _start(0, torch.float32).requires_grad_()
    optimizer, _ = _run(theta, CONSTANT)
    before = theta.detach().clone()

    def fails() -> torch.Tensor:
        assert not bits_equal(theta, before)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    assert bits_equal(theta, before)


def test_parameters_without_a_gradient_stay() -> None:
    """One that has none keeps its velocity and, to the bit, its place; one that never had any has no state."""
    moved, never = (torch.full((3,), 0.1, requires_grad=True) for _ in range(2))
    optimizer = NesterovLookahead([moved, never], lr=0.1)
    optimizer.step(_closure(optimizer, moved))
    before, velocity = moved.detach().clone(), optimizer.state[moved]["momentum_buffer"].clone()
    optimizer.zero_grad()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert bits_equal(moved, before) and bits_equal(optimizer.state[moved]["momentum_buffer"], velocity)
    assert never not in optimizer.state and bits_equal(never, torch.full((3,), 0.1))


def test_a_step_needs_a_closure() -> None:
    with pytest.raises(TypeError, match=r"step\(\) needs a closure"):
        NesterovLookahead([torch.ones(1, requires_grad=True)]).step()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    ],
    ids=str,
)
def test_arguments_out_of_range(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NesterovLookahead([torch.ones(1, requires_grad=True)], **kwargs)


def test_sparse_gradients_are_refused() -> None:
    weight = torch.ones(3, 2, requires_grad=True)

    def closure() -> float:
        weight.grad = torch.ones(3, 2).to_sparse()
        return 0.0

    with pytest.raises(RuntimeError, match="NesterovLookahead does not support sparse gradients"):
        NesterovLookahead([weight]).step(closure)


def test_maximize_complex_groups_and_tensor_rates() -> None:
    up, down = (_start(0, torch.float64).requires_grad_() for _ in range(2))
    climbing = NesterovLookahead([up], lr=0.05, maximize=True)
    falling = NesterovLookahead([down], lr=torch.tensor(0.05, dtype=torch.float64))
    for _ in range(5):
        climbing.step(_closure(climbing, up, lambda x: -_bowl(x)))
        falling.step(_closure(falling, down))
    torch.testing.assert_close(up, down, rtol=1e-14, atol=0)  # the sign of every term is changed, no rounding is
    z = torch.tensor([1 + 2j, -3 + 0.5j], requires_grad=True)
    pair = torch.view_as_real(z.detach().clone()).requires_grad_()
    whole = NesterovLookahead([{"params": [z], "lr": 0.1}, {"params": [pair], "lr": 0.1, "momentum": 0.9}], lr=5.0)
    for _ in range(5):

        def closure() -> torch.Tensor:
            whole.zero_grad()
            loss = (z * z.conj()).real.sum() + pair.square().sum()
            loss.backward()
            return loss

        whole.step(closure)
    torch.testing.assert_close(torch.view_as_real(z), pair)


@implementations
def test_a_copy_goes_on_to_the_same_bits(implementation: str) -> None:
    theta = _start(0, torch.float32).requires_grad_()
    optimizer, _ = _run(theta, CONSTANT, **IMPLEMENTATIONS[implementation])
    other_theta = theta.detach().clone().requires_grad_()
    loaded = NesterovLookahead([other_theta], lr=1.0)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pickled = pickle.loads(pickle.dumps(optimizer))
    (pickled_theta,) = pickled.param_groups[0]["params"]
    for _ in range(3):
        for each, param in ((optimizer, theta), (loaded, other_theta), (pickled, pickled_theta)):
            each.step(_closure(each, param))
    assert bits_equal(theta, other_theta) and bits_equal(theta, pickled_theta)
    with pytest.raises(ValueError, match="no counterpart of NesterovLookahead"):
        optimizer.to_torch()


def test_hooks_and_schedules() -> None:
    theta = _start(0, torch.float64).requires_grad_()
    optimizer, calls = NesterovLookahead([theta], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(_closure(optimizer, theta))
    scheduler.step()
    assert calls == ["pre", "post"] and optimizer.param_groups[0]["lr"] == 0.05
