"""docs/dialects.md says what is there: every class, every dialect, no argument that does not exist; each has a case."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch

import reimpl.optim as optim
from parity_tests.declarations import OPTIMIZERS
from parity_tests.dialects_page import PAGE, rows, sections
from parity_tests.optim_cases import dialect_configs
from reimpl.optim import _engine
from reimpl.optim._engine import RuleOptimizer
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizers import (
    DENSE_LAYOUTS,
    clone_params,
    construct,
    make_grads,
    make_params,
    parameters,
    step_with,
)

pytestmark = pytest.mark.quick
NAMES = (*optim.REIMPLEMENTED, "NesterovLookahead")
CALLS = sorted(set(re.findall(rf"`((?:{'|'.join(NAMES)})\([^`]*\))`", PAGE.read_text(encoding="utf-8"))))


def _dialects(name: str) -> set[str]:
    """The arguments of a class that say what it computes and that PyTorch's class lacks."""
    cls: type[RuleOptimizer] = getattr(optim, name)
    return set(cls.dialects) - {"fused"}


@pytest.mark.parametrize("name", NAMES)
def test_every_class_has_its_row_and_its_section(name: str) -> None:
    overview = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    assert re.search(rf"^\| {name} \|", overview, flags=re.MULTILINE), f"{name} has no row in the first table"
    assert name in sections(), f"{name} has no section"
    missing = {key for key in _dialects(name) if key not in sections()[name]}
    assert not missing, f"the section of {name} does not name {sorted(missing)}"


def test_sections_and_tables_are_found() -> None:
    assert set(sections()) == {*NAMES, "Schedules"}
    found = list(rows())
    assert len({row.section for row in found}) >= 13 and len(found) > 50
    assert all(row.library in {"torch", "keras", "optax", "timm"} for row in found)


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_ours_can_be_made(call: str) -> None:
    name, _, arguments = call.partition("(")
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = eval(f"{name}([weight], {arguments}", {name: getattr(optim, name), "weight": weight, "lr": 0.1})
    accepted = inspect.signature(getattr(optim, name)).parameters
    assert set(re.findall(r"(\w+)=", arguments)) <= set(accepted)
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("name", optim.REIMPLEMENTED)
def test_every_dialect_has_a_parity_case(name: str) -> None:
    (technique,) = (technique for technique in OPTIMIZERS if technique.name == name)
    default = {key: p.default for key, p in inspect.signature(technique.ours).parameters.items()}
    configs = dialect_configs(technique)
    asked = {key for config in configs for key, value in config.kwargs.items() if value != default[key]}
    assert _dialects(name) <= asked


CAPTURED = [
    pytest.param(technique, config, id=f"{technique.name}, {config.desc}")
    for technique in OPTIMIZERS
    for config in technique.configs
    if technique.supports_capturable
]


@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
@pytest.mark.parametrize(("technique", "config"), CAPTURED)
def test_a_captured_steps_arithmetic(
    technique: OptimizerTechnique,
    config: OptimizerConfig,
    foreach: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the step count a tensor; on the CPU too, where the class itself would refuse for want of a graph."""
    monkeypatch.setattr(_engine, "require_capturable_devices", lambda *_, **__: None)
    params = make_params(DENSE_LAYOUTS, torch.float64, device)
    plain = construct(technique.ours, clone_params(params), **config.kwargs, foreach=False)
    captured = construct(technique.ours, clone_params(params), **config.kwargs, foreach=foreach, capturable=True)
    for step in range(4):
        for optimizer in (plain, captured):
            step_with(optimizer, make_grads(DENSE_LAYOUTS, torch.float64, device, step=step))
    options = plain.param_groups[0]
    # powers and roots of the step count are taken in float32, the dtype that it has: of 1 - 0.999, from whose root a
    # step's size comes, that leaves 2^-24 / 0.001, of the root half of it, and a step is about lr
    atol = 4 * options["lr"] * 3e-5 if "betas" in options else 1e-6
    for p, q in zip(parameters(captured), parameters(plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=atol)


def _algorithm_8_6(theta: float, rates: Sequence[float], rho: float, alpha: float) -> list[float]:
    """The book's RMSProp with Nesterov momentum on the loss θ⁴/4: the points θ + αv at which it takes gradients."""
    v = r = 0.0
    points = []
    for rate in rates:
        g = (theta + alpha * v) ** 3
        r = rho * r + (1 - rho) * g * g
        v = alpha * v - rate / np.sqrt(r) * g
        theta = theta + v
        points.append(theta + alpha * v)
    return points


def test_the_books_rmsprop_with_nesterovs_momentum_at_the_point_ahead() -> None:
    """Algorithm 8.6: what ours keeps as the parameter is θ + αv, at rates that change too."""
    rates = [0.1, 0.1, 0.02, 0.2, 0.05, 0.05]
    phi = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    optimizer = optim.RMSprop([phi], lr=0.1, alpha=0.9, eps=0, momentum=0.8, momentum_form="velocity", nesterov=True)
    ours = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        step_with(optimizer, [phi.detach() ** 3])
        ours.append(phi.item())
    # six steps of a dozen roundings in float64, of numbers of size 1
    np.testing.assert_allclose(ours, _algorithm_8_6(1.5, rates, 0.9, 0.8), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("form", "same"), [("velocity", True), ("torch", False)])
def test_nesterovs_point_ahead_at_changing_rates(form: str, same: bool) -> None:
    """Algorithm 8.3 against its rewriting: the same points with the rate inside the buffer, others with it outside."""
    theta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    phi = theta.detach().clone().requires_grad_()
    look = optim.NesterovLookahead([theta], lr=0.1, momentum=0.8)
    rewritten = optim.SGD([phi], lr=0.1, momentum=0.8, nesterov=True, momentum_form=form)

    def closure() -> torch.Tensor:
        theta.grad = theta.detach() ** 3
        return theta.detach() ** 4 / 4

    distance = 0.0
    for rate in (0.1, 0.1, 0.02, 0.1, 0.05):
        look.param_groups[0]["lr"] = rewritten.param_groups[0]["lr"] = rate
        look.step(closure)
        step_with(rewritten, [phi.detach() ** 3])
        ahead = theta.detach() + 0.8 * look.state[theta]["momentum_buffer"]
        distance = max(distance, abs(ahead.item() - phi.item()))
    # five steps of roundings of 1e-16, or a step at the wrong one of two rates
    assert distance < 1e-14 if same else distance > 1e-3
