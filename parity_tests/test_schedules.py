"""The decays of the learning rate: PyTorch's rates to the last bit, and the closed forms of the oracle."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import reimpl.optim
from parity_tests.oracle import schedules as oracle
from reimpl.optim import lr_scheduler

pytestmark = pytest.mark.quick
torch_schedulers = torch.optim.lr_scheduler
EPOCHS = 25
SHARED: list[tuple[str, dict[str, Any], Callable[..., Any]]] = [
    ("StepLR", {"step_size": 4}, oracle.step),
    ("StepLR", {"step_size": 1, "gamma": 0.7}, oracle.step),
    ("LinearLR", {}, oracle.linear),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 10}, oracle.linear),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.03, "total_iters": 17}, oracle.linear),
    ("LinearLR", {"start_factor": 0.01, "end_factor": 0.5, "total_iters": 40}, oracle.linear),
    ("ExponentialLR", {"gamma": 0.9}, oracle.exponential),
    ("ExponentialLR", {"gamma": 1.07}, oracle.exponential),
]
OWN: list[tuple[str, dict[str, Any], Callable[..., Any]]] = [
    ("LinearToConstantLR", {"tau": 10, "final_lr": 0.001}, oracle.linear_to_constant),
    ("LinearToConstantLR", {"tau": 7, "final_lr": 2.0}, oracle.linear_to_constant),
    ("InverseTimeLR", {"decay": 0.5}, oracle.inverse_time),
    ("InverseTimeLR", {"decay": 0.0}, oracle.inverse_time),
    ("InverseSqrtLR", {}, oracle.inverse_sqrt),
    ("InverseSqrtLR", {"k": 0.3}, oracle.inverse_sqrt),
]
shared = pytest.mark.parametrize(("name", "kwargs", "closed_form"), SHARED, ids=str)
every = pytest.mark.parametrize(("name", "kwargs", "closed_form"), [*SHARED, *OWN], ids=str)
RATES = (0.1, 0.35)


def _optimizer(tensors: bool = False, cls: Any = reimpl.optim.SGD) -> torch.optim.Optimizer:
    rates = [torch.tensor(rate, dtype=torch.float64) if tensors else rate for rate in RATES]
    return cls([{"params": [torch.ones(1, requires_grad=True)], "lr": rate} for rate in rates])


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _next(scheduler: Any) -> list[float]:
    scheduler.optimizer.step()
    scheduler.step()
    return _rates(scheduler.optimizer)


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@shared
def test_rates_and_state_are_pytorchs(
    name: str, kwargs: Mapping[str, Any], closed_form: Callable[..., Any], tensors: bool
) -> None:
    ours = getattr(lr_scheduler, name)(_optimizer(tensors), **kwargs)
    theirs = getattr(torch_schedulers, name)(_optimizer(tensors), **kwargs)
    assert type(ours) is not type(theirs) and isinstance(ours, torch_schedulers.LRScheduler)
    assert not isinstance(ours, type(theirs))
    for _ in range(EPOCHS):
        assert _rates(ours.optimizer) == _rates(theirs.optimizer)
        assert ours.get_last_lr() == theirs.get_last_lr()
        assert ours.state_dict() == theirs.state_dict()
        _next(ours)
        _next(theirs)
    assert _rates(ours.optimizer) != list(RATES)


@shared
def test_epochs_jumped_to_are_pytorchs(name: str, kwargs: Mapping[str, Any], closed_form: Callable[..., Any]) -> None:
    """``step(epoch)``, deprecated by PyTorch, takes the closed form."""
    pair = [getattr(module, name)(_optimizer(), **kwargs) for module in (lr_scheduler, torch_schedulers)]
    for epoch in (3, 20, 1, 0):
        for scheduler in pair:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                scheduler.step(epoch)
        assert _rates(pair[0].optimizer) == _rates(pair[1].optimizer)


@shared
def test_state_goes_to_pytorch_and_back(name: str, kwargs: Mapping[str, Any], closed_form: Callable[..., Any]) -> None:
    for first, second in ((lr_scheduler, torch_schedulers), (torch_schedulers, lr_scheduler)):
        whole = getattr(first, name)(_optimizer(), **kwargs)
        for _ in range(5):
            _next(whole)
        other = getattr(second, name)(_optimizer(), **kwargs)
        other.load_state_dict(copy.deepcopy(whole.state_dict()))
        other.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        assert [_next(whole) for _ in range(8)] == [_next(other) for _ in range(8)]


@every
def test_rates_are_the_closed_form(name: str, kwargs: Mapping[str, Any], closed_form: Callable[..., Any]) -> None:
    scheduler = getattr(lr_scheduler, name)(_optimizer(), **kwargs)
    for epoch in range(EPOCHS):
        exact = [float(closed_form(rate, epoch, **kwargs)) for rate in RATES]
        # three roundings a step, each of half an ulp of numbers no larger than the first and last rate
        scale = np.finfo(float).eps * max(RATES + tuple(exact) + (kwargs.get("final_lr", 0.0),))
        np.testing.assert_allclose(_rates(scheduler.optimizer), exact, rtol=0, atol=2 * (epoch + 1) * scale)
        _next(scheduler)


@every
def test_a_run_that_is_interrupted_goes_on(
    name: str, kwargs: Mapping[str, Any], closed_form: Callable[..., Any]
) -> None:
    whole = getattr(lr_scheduler, name)(_optimizer(), **kwargs)
    for _ in range(6):
        _next(whole)
    loaded = getattr(lr_scheduler, name)(_optimizer(), **kwargs)
    loaded.load_state_dict(pickle.loads(pickle.dumps(whole.state_dict())))
    loaded.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    assert [_next(loaded) for _ in range(6)] == [_next(whole) for _ in range(6)]


@every
def test_resuming_by_last_epoch(name: str, kwargs: Mapping[str, Any], closed_form: Callable[..., Any]) -> None:
    """As PyTorch's class does it; those that PyTorch lacks take the rate of that epoch from the initial one."""
    runs = []
    for module in (lr_scheduler, torch_schedulers if hasattr(torch_schedulers, name) else None):
        optimizer = _optimizer()
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if module is not None:
            scheduler = getattr(module, name)(optimizer, **kwargs, last_epoch=5)
            runs.append([_rates(optimizer), *(_next(scheduler) for _ in range(6))])
    exact = [[float(closed_form(rate, 6 + k, **kwargs)) for rate in RATES] for k in range(7)]
    if len(runs) == 2:
        assert runs[0] == runs[1]
    else:
        np.testing.assert_allclose(runs[0], exact, rtol=1e-15)  # two roundings
    with pytest.raises(KeyError, match="initial_lr"):
        getattr(lr_scheduler, name)(_optimizer(), **kwargs, last_epoch=5)


@every
def test_schedules_go_into_pytorchs_containers(
    name: str, kwargs: Mapping[str, Any], closed_form: Callable[..., Any]
) -> None:
    optimizer = _optimizer()
    first = torch_schedulers.ConstantLR(optimizer, factor=0.5, total_iters=2)
    second = getattr(lr_scheduler, name)(optimizer, **kwargs)
    scheduler = torch_schedulers.SequentialLR(optimizer, [first, second], milestones=[3])
    seen = []
    for _ in range(8):
        optimizer.step()
        scheduler.step()
        seen.append(_rates(optimizer)[0])
    expected = [float(closed_form(RATES[0], epoch, **kwargs)) for epoch in range(6)]
    np.testing.assert_allclose(seen[2:], expected, rtol=1e-14, atol=1e-16)  # a few roundings


@pytest.mark.parametrize("name", ["StepLR", "LinearLR", "ExponentialLR"])
def test_shared_schedules_chain(name: str) -> None:
    """Two at once multiply, as PyTorch's do."""
    kwargs = next(row[1] for row in SHARED if row[0] == name)
    rates = []
    for module in (lr_scheduler, torch_schedulers):
        optimizer = _optimizer()
        parts = [getattr(module, name)(optimizer, **kwargs), module.ExponentialLR(optimizer, 0.8)]
        chain = torch_schedulers.ChainedScheduler(parts)
        rates.append([_next(chain) for _ in range(7)])
    assert rates[0] == rates[1]


def test_linear_to_constant_is_linear_by_shares() -> None:
    """O11 both ways, at two rates by one scheduler a rate."""
    for rate, final in ((0.1, 0.001), (0.35, 0.0)):
        pair = []
        for build in (
            lambda o, rate=rate, final=final: lr_scheduler.LinearLR(o, 1.0, final / rate, 12),
            lambda o, final=final: lr_scheduler.LinearToConstantLR(o, 12, final),
        ):
            optimizer = reimpl.optim.SGD([torch.ones(1, requires_grad=True)], lr=rate)
            scheduler = build(optimizer)
            pair.append([_next(scheduler)[0] for _ in range(20)])
        np.testing.assert_allclose(*pair, rtol=1e-13, atol=1e-15)  # LinearLR multiplies twelve factors
        assert pair[1][11:] == [final] * 9, "the rate is not constant after tau"


def test_linear_to_constant_takes_a_rate_for_each_group() -> None:
    scheduler = lr_scheduler.LinearToConstantLR(_optimizer(), 2, [0.2, 0.05])
    assert [_next(scheduler) for _ in range(3)] == [pytest.approx([0.15, 0.2]), [0.2, 0.05], [0.2, 0.05]]


def test_inverse_time_halves_after_the_inverse_of_its_decay() -> None:
    scheduler = lr_scheduler.InverseTimeLR(_optimizer(), decay=0.25)
    rates = [_next(scheduler) for _ in range(4)][-1]
    assert rates == [rate / 2 for rate in RATES]


@pytest.mark.parametrize("tensors", [False, True])
def test_returned_rates_are_not_the_groups_own(tensors: bool) -> None:
    for name, kwargs, _ in [*SHARED, *OWN]:
        scheduler = getattr(lr_scheduler, name)(_optimizer(tensors), **kwargs)
        _next(scheduler)
        before = _rates(scheduler.optimizer)
        for rate in scheduler.get_last_lr():
            if tensors:
                rate.zero_()
        assert _rates(scheduler.optimizer) == before, name


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LinearLR", {"start_factor": 0.0}),
        ("LinearLR", {"start_factor": 1.5}),
        ("LinearLR", {"end_factor": -0.1}),
        ("LinearLR", {"end_factor": 1.1}),
    ],
    ids=str,
)
def test_errors_are_pytorchs(name: str, kwargs: dict[str, float]) -> None:
    texts = []
    for module in (lr_scheduler, torch_schedulers):
        with pytest.raises(ValueError) as caught:
            getattr(module, name)(_optimizer(), **kwargs)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        lr_scheduler.StepLR(3, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("LinearToConstantLR", {"tau": 0, "final_lr": 0.1}, "tau must be greater than 0, got 0"),
        ("LinearToConstantLR", {"tau": 3, "final_lr": -0.1}, "final_lr must be at least 0, got -0.1"),
        ("LinearToConstantLR", {"tau": 3, "final_lr": [0.1]}, "final_lr has 1 values, but the optimizer has 2"),
        ("InverseTimeLR", {"decay": -1.0}, "decay must be at least 0, got -1.0"),
        ("InverseTimeLR", {"decay": float("nan")}, "decay must be at least 0, got nan"),
        ("InverseSqrtLR", {"k": -1.0}, "k must be at least 0, got -1.0"),
    ],
)
def test_errors_name_the_argument(name: str, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        getattr(lr_scheduler, name)(_optimizer(), **kwargs)


def test_a_rate_asked_for_outside_a_step_warns() -> None:
    scheduler = lr_scheduler.ExponentialLR(_optimizer(), 0.5)
    with pytest.warns(UserWarning, match=r"please use `get_last_lr\(\)`"):
        scheduler.get_lr()


def test_every_other_schedule_is_pytorchs() -> None:
    for name in torch_schedulers.__all__:
        ours = getattr(lr_scheduler, name)
        assert (ours is not getattr(torch_schedulers, name)) == (name in lr_scheduler.REIMPLEMENTED), name
    with pytest.raises(AttributeError, match="no_such_schedule"):
        lr_scheduler.no_such_schedule  # noqa: B018


@pytest.mark.parametrize("cls", [torch.optim.Adam, reimpl.optim.NesterovLookahead])
def test_any_optimizer_is_driven(cls: Any) -> None:
    scheduler = lr_scheduler.StepLR(_optimizer(cls=cls), 1, 0.5)
    scheduler.optimizer.step(lambda: torch.tensor(0.0))
    scheduler.step()
    assert _rates(scheduler.optimizer) == [rate / 2 for rate in RATES]
