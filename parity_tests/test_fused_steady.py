"""Fused steps with nothing changed between them, what ends such a row, and what hooks and profilers see of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import reimpl.optim as optim
from parity_tests.test_fused_kernels import _parameters, _steps, needs_numba
from reimpl.optim import _fused, _torch

SHAPES: list[tuple[int, ...]] = [(4, 3), (5,), ()]


def _add_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": _parameters([(2, 2)], seed=1), "lr": 0.3})


def _reorder(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _drop(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


def _new_list(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][:2]


def _new_group(optimizer: Any) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.07}


def _exchange_states(optimizer: Any) -> None:
    p, q = optimizer.param_groups[0]["params"][1::-1]
    optimizer.state[p]["step"], optimizer.state[q]["step"] = torch.tensor(9.0), torch.tensor(2.0)


def _new_state(optimizer: Any) -> None:
    optimizer.state = type(optimizer.state)(dict, {p: dict(s) for p, s in optimizer.state.items()})
    for s in optimizer.state.values():
        s["step"] = torch.tensor(1.0)


def _reload(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _tensor_rate(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.01)
    for _ in range(4):
        optimizer.step()
    rate.fill_(0.3)


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda optimizer: None,
    "rate": lambda optimizer: optimizer.param_groups[0].update(lr=0.05),
    "rate that is a tensor": _tensor_rate,
    "penalty": lambda optimizer: optimizer.param_groups[0].update(weight_decay=0.1),
    "decay rates": lambda optimizer: optimizer.param_groups[0].update(betas=(0.5, 0.6)),
    "decay rates in a list": lambda optimizer: optimizer.param_groups[0].update(betas=[0.5, 0.6]),
    "direction": lambda optimizer: optimizer.param_groups[0].update(maximize=True),
    "execution": lambda optimizer: optimizer.param_groups[0].update(fused=False, foreach=False),
    "another group": _add_group,
    "parameters in another order": _reorder,
    "a parameter less": _drop,
    "another list of parameters": _new_list,
    "another dictionary of options": _new_group,
    "step counts": _exchange_states,
    "another state": _new_state,
    "checkpoint": _reload,
}


def _is_steady(optimizer: Any) -> bool:
    return optimizer.__dict__["_fused_bundles"][0].question is not None


@needs_numba
@pytest.mark.parametrize("change", CHANGES)
def test_what_ends_a_row_of_equal_steps_is_seen(change: str) -> None:
    both = [_parameters(SHAPES), _parameters(SHAPES)]
    optimizers = [_steps("Adam", {"weight_decay": 0.01}, params, 5, fused=True) for params in both]
    assert all(map(_is_steady, optimizers))
    for optimizer, looks in zip(optimizers, (True, False), strict=True):
        CHANGES[change](optimizer)
        for _ in range(5):
            if not looks:
                optimizer.forget_plans()  # so that the step looks at everything anew
            optimizer.step()
    for p, q in zip(*both, strict=True):
        if change == "decay rates in a list":
            assert not _is_steady(optimizers[0])
        assert torch.equal(p, q)
        assert optimizers[0].state[p]["step"] == optimizers[1].state[q]["step"]


@needs_numba
@pytest.mark.quick
def test_equal_steps_ask_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = _steps("ASGD", {}, _parameters(SHAPES), 3, fused=True)

    def refuse(*args: Any) -> Any:
        raise AssertionError("the step looked at more than it has to")

    monkeypatch.setattr(_fused.Bundle, "run", refuse)
    optimizer.step()
    optimizer.param_groups[0]["note"] = "the user's own"
    with pytest.raises(AssertionError, match="more than it has to"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    monkeypatch.setattr(_fused.Bundle, "run", refuse)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(AssertionError, match="more than it has to"):
        optimizer.step()


@needs_numba
@pytest.mark.quick
def test_a_number_that_the_constructor_refuses_is_refused_late() -> None:
    optimizer = _steps("Adam", {}, _parameters(SHAPES), 5, fused=True)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.step()


@needs_numba
@pytest.mark.quick
def test_a_parameter_without_gradient_is_noticed_when_it_has_one() -> None:
    params = _parameters(SHAPES)
    late, gradient = params[1], params[1].grad
    late.grad = None
    optimizer = _steps("SGD", {"lr": 0.1}, params, 5, fused=True)
    before = late.detach().clone()
    late.grad = gradient
    optimizer.step()
    assert gradient is not None and torch.equal(late.detach(), before.add(gradient, alpha=-0.1))


# ------------------------------------------------------------------------------------ what is wrapped around a step


@pytest.mark.quick
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": False}], ids=["fused", "for-loop"])
def test_a_profiler_sees_the_step(how: dict[str, bool]) -> None:
    optimizer = _steps("SGD", {}, _parameters(SHAPES), 5, **how)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        optimizer.step()
    optimizer.step()
    assert [event.name for event in seen.events() if "Optimizer" in event.name] == ["Optimizer.step#SGD.step"]


@pytest.mark.quick
def test_a_step_can_tell_whether_it_is_profiled() -> None:
    ask = _torch._callbacks_question()
    assert not ask()
    with torch.autograd.profiler.profile():
        assert ask()
    assert not ask()


@pytest.mark.quick
def test_hooks_come_before_and_after_a_step() -> None:
    optimizer, calls = _steps("SGD", {}, _parameters(SHAPES), 5), []

    def note(name: str) -> Callable[..., None]:
        return lambda *args: calls.append(name)

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_pre_hook(note("before any")),
        register_optimizer_step_post_hook(note("after any")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["before any", "before", "after", "after any"]


@pytest.mark.quick
@pytest.mark.parametrize("recording", [True, False])
def test_a_step_leaves_autograd_as_it_was(recording: bool) -> None:
    optimizer = optim.SGD(_parameters(SHAPES))
    modes: list[bool] = []

    def closure() -> None:
        modes.append(torch.is_grad_enabled())
        raise RuntimeError("no loss")

    with torch.set_grad_enabled(recording):
        with pytest.raises(RuntimeError, match="no loss"):
            optimizer.step(closure)
        assert modes == [True] and torch.is_grad_enabled() == recording
