"""The numbers of parameter groups: checked in the constructor, in a group, in a checkpoint, and written later."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import reimpl.optim as optim
from parity_tests.optim_cases import EVERY_TECHNIQUE, TECHNIQUES, ready, stepped
from parity_tests.twins import EXECUTIONS
from reimpl.optim._checks import MAGNITUDES
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizers import IMPLEMENTATIONS, parameters, step_with
from reimpl.testing.tolerance import bits_equal

executions = pytest.mark.parametrize("execution", EXECUTIONS)


@pytest.fixture(params=TECHNIQUES)
def technique(request: pytest.FixtureRequest) -> OptimizerTechnique:
    return request.param


@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, torch.tensor(math.nan)], ids=str)
def test_a_groups_own_numbers_are_checked(technique: OptimizerTechnique, value: Any) -> None:
    """PyTorch checks the constructor's alone: a group's rate may be NaN there, and an added group's as well."""
    known = technique.ours([torch.ones(2, 2)]).defaults
    for key in ("lr", "weight_decay", "eps", "momentum", "lr_decay", "lambd", "momentum_decay"):
        if key not in known or isinstance(known[key], tuple):
            continue
        first, second = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
        named = "Invalid learning rate: " if key == "lr" else f"Invalid {key} value: "
        with pytest.raises(ValueError, match=rf"{named}.* \(parameter group 0\)"):
            technique.ours([{"params": [first], key: value}])
        optimizer = technique.ours([first])
        with pytest.raises(ValueError, match=rf"{named}.* \(parameter group 1\)"):
            optimizer.add_param_group({"params": [second], key: value})
        assert len(optimizer.param_groups) == 1
    if "betas" in known:
        with pytest.raises(ValueError, match="Invalid beta parameter at index 1"):
            technique.ours([{"params": [torch.ones(2, 2)], "betas": (0.5, 1.0)}])


@executions
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, -1], ids=str)
def test_numbers_written_into_a_group_are_checked(technique: OptimizerTechnique, execution: str, value: float) -> None:
    """PyTorch steps by them, silently."""
    p = ready(torch.ones(3))
    optimizer = stepped(technique.ours([ready(torch.ones(2)), p], **IMPLEMENTATIONS[execution]))
    group = optimizer.param_groups[0]
    before = p.detach().clone()
    keys = [key for key in MAGNITUDES if isinstance(group.get(key), float | int)]
    assert "lr" in keys
    for key in keys:
        named = "learning rate" if key == "lr" else f"{key} value"
        old, group[key] = group[key], value
        with pytest.raises(ValueError, match=rf"Invalid {named}: {value} \(parameter group 0\)"):
            optimizer.step()
        group[key] = old
    if "betas" in group:
        old, group["betas"] = group["betas"], (0.5, value)
        with pytest.raises(ValueError, match=f"Invalid beta parameter at index 1: {value}"):
            optimizer.step()
        group["betas"] = old
    assert bits_equal(p.detach(), before), "a refused step left traces"
    optimizer.step()
    assert not bits_equal(p.detach(), before)


@executions
@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("RMSprop", "alpha", 1.5, r"Invalid alpha value: 1.5 \(parameter group 0\)"),
        ("Adadelta", "rho", 1.5, r"Invalid rho value: 1.5 \(parameter group 0\)"),
        ("Rprop", "etas", (0.5, 0.9), "Invalid eta values: 0.5, 0.9"),
        ("Rprop", "etas", [1.2, 1.5], "Invalid eta values: 1.2, 1.5"),
        ("Rprop", "step_sizes", (1.0, 0.5), "Invalid step sizes: 1.0, 0.5"),
        ("Rprop", "step_sizes", (-1.0, math.nan), "Invalid step sizes: -1.0, nan"),
    ],
)
def test_a_range_that_ends_is_checked_in_groups(name: str, key: str, value: Any, words: str, execution: str) -> None:
    """In a group of the constructor, in an added one, in a loaded one, and written into one: PyTorch takes it there."""
    cls, flags = getattr(optim, name), IMPLEMENTATIONS[execution]
    p, q = ready(torch.ones(3)), ready(torch.ones(3))
    optimizer = stepped(cls([p], **flags))
    before, saved = p.detach().clone(), optimizer.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=words):
        cls([{"params": [p], key: value}], **flags)
    with pytest.raises(ValueError, match=words.replace("0\\", "1\\")):
        optimizer.add_param_group({"params": [q], key: value})
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    old, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert bits_equal(p.detach(), before), "a refused step left traces"
    optimizer.param_groups[0][key] = old
    optimizer.step()


def test_an_average_that_grows_is_refused() -> None:
    """PyTorch's RMSprop takes it, and has a negative mean of squares, hence NaN, at once."""
    p = ready(torch.ones(3))
    stepped(torch.optim.RMSprop([p], alpha=1.5))
    assert p.isnan().all()
    with pytest.raises(ValueError, match=r"Invalid alpha value: 1\.5"):
        optim.RMSprop([p], alpha=1.5)
    stepped(optim.ASGD([ready(torch.ones(3))], alpha=1.5))  # there it is an exponent


@executions
def test_a_rate_that_a_schedule_rounds_to_below_0_is_stepped(technique: OptimizerTechnique, execution: str) -> None:
    """PyTorch's ``LinearLR`` from a third down to 0 ends at -4.7e-18, and checkpoints are written there."""
    optimizers = []
    for cls, how in ((technique.ours, execution), (technique.torch, "forloop")):
        optimizer = cls([ready(torch.ones(3))], lr=0.1, **IMPLEMENTATIONS[how])  # type: ignore[misc]
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, 100)
        for _ in range(101):
            optimizer.step()
            scheduler.step()
        assert -1e-17 < optimizer.param_groups[0]["lr"] < 0, "the schedule was to end below 0"
        optimizers.append(stepped(optimizer))
    for mine, theirs in zip(*map(parameters, optimizers), strict=True):
        # a hundred steps of the fused bound of 2 ulp, on numbers that come near 0
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    optimizers[0].load_state_dict(optimizers[0].state_dict())


@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_infinite_numbers_are_refused(technique: OptimizerTechnique) -> None:
    """PyTorch lets them through; an infinite decay or ε makes NaN of every parameter, or leaves it where it is."""
    known = technique.ours([torch.ones(2, 2)]).defaults
    tried = 0
    for key in ("weight_decay", "eps", "momentum", "lr_decay", "initial_accumulator_value", "lambd", "momentum_decay"):
        if key in known:
            tried += 1
            value = (math.inf, math.inf) if isinstance(known[key], tuple) else math.inf
            with pytest.raises(ValueError, match="inf"):
                technique.ours([torch.ones(2, 2)], **{key: value})
    if technique.name == "Rprop":
        tried += 1
        for sizes in ((math.nan, 1.0), (0.1, math.nan), (-1.0, 50.0), (1.0, 0.5)):
            with pytest.raises(ValueError, match="Invalid step sizes: "):
                technique.ours([torch.ones(1)], step_sizes=sizes)
    if technique.name == "ASGD":
        with pytest.raises(ValueError, match="Invalid t0: nan"):
            technique.ours([torch.ones(1)], t0=math.nan)
    assert tried


@pytest.mark.parametrize(
    ("name", "constructed", "own", "error", "words"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9}, {"momentum_form": "Ewa"}, ValueError, "momentum_form: 'Ewa'"),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"momentum_form": "ewa"}, ValueError, "nesterov"),
        ("RMSprop", {}, {"eps_inside_sqrt": "no"}, TypeError, "eps_inside_sqrt must be True or False, but got 'no'"),
        ("RMSprop", {}, {"momentum_form": "ewa"}, ValueError, "Invalid momentum_form: 'ewa'"),
        ("SGD", {"momentum": 0.9, "momentum_form": "velocity"}, {"dampening": 0.5}, ValueError, "dampening=0.5 needs"),
        ("RMSprop", {"momentum": 0.9}, {"nesterov": True, "momentum": 0}, ValueError, "Nesterov momentum requires"),
        ("Adam", {}, {"eps_hat": 1}, TypeError, "eps_hat must be True or False"),
        ("RAdam", {}, {"eps_hat": None}, TypeError, "eps_hat must be True or False"),
        ("Adadelta", {}, {"decoupled_weight_decay": 1}, TypeError, "decoupled_weight_decay must be True or False"),
    ],
)  # fmt: skip
def test_a_groups_own_dialect_is_checked(
    name: str, constructed: dict[str, Any], own: dict[str, Any], error: type[Exception], words: str
) -> None:
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    with pytest.raises(error, match=words):
        getattr(optim, name)([{"params": [p], **own}], **constructed)
    optimizer = getattr(optim, name)([p], **constructed)
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": [q], **own})
    assert len(optimizer.param_groups) == 1
    step_with(optimizer, [torch.ones(2)])
    before = p.detach().clone()
    optimizer.param_groups[0].update(own)
    for _ in range(2):
        with pytest.raises(error, match=words):
            optimizer.step()
    assert bits_equal(p.detach(), before), "a refused step left traces"
    optimizer.param_groups[0].update({key: optimizer.defaults[key] for key in own})
    optimizer.step()
    assert not bits_equal(p.detach(), before)


@executions
def test_a_dialect_written_into_a_group_is_refused_after_one_that_was_taken(execution: str) -> None:
    """The groups of one class share what was found right before; 1 is no ``True``, and no group goes by another's."""
    params = [ready(torch.ones(3)) for _ in range(2)]
    groups = [{"params": params[:1], "momentum_form": "ewa", "bias_correction": True}, {"params": params[1:]}]
    optimizer = stepped(optim.SGD(groups, lr=0.1, momentum=0.9, **IMPLEMENTATIONS[execution]))
    optimizer.param_groups[0]["bias_correction"] = 1
    with pytest.raises(TypeError, match="bias_correction must be True or False, but got 1"):
        optimizer.step()
    optimizer.param_groups[0]["bias_correction"] = True
    optimizer.param_groups[1]["bias_correction"] = True
    with pytest.raises(ValueError, match="bias_correction=True needs momentum_form='ewa', but it is 'torch'"):
        optimizer.step()
    optimizer.param_groups[1]["bias_correction"] = False
    optimizer.param_groups[0]["momentum"] = 1.0
    with pytest.raises(ValueError, match="needs momentum below 1"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("lr", math.nan, "Invalid learning rate: nan"),
        ("lr", -1.0, "learning rate: -1.0"),
        ("betas", (2, 3), "index 0: 2"),
    ],
)
def test_a_checkpoints_numbers_are_checked(key: str, value: Any, words: str) -> None:
    p = torch.zeros(2, requires_grad=True)
    optimizer = optim.Adam([p], lr=0.5)
    saved = optimizer.state_dict()
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
