"""``fuse`` and ``unfuse``: PyTorch's optimizer becomes ours in the middle of training, and PyTorch's again."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import reimpl.optim
from parity_tests.optim_cases import TECHNIQUES, dialect_configs
from reimpl.optim import fuse, unfuse
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import assert_same
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
Optimizer = torch.optim.Optimizer
LAYOUTS = (DENSE_LAYOUTS[0], *DENSE_LAYOUTS[5:7], *DENSE_LAYOUTS[-2:])


@pytest.fixture(params=TECHNIQUES)
def technique(request: pytest.FixtureRequest) -> OptimizerTechnique:
    return request.param


def _steps(optimizer: Optimizer, first: int, last: int) -> None:
    device = parameters(optimizer)[0].device
    for step in range(first, last):
        step_with(optimizer, make_grads(LAYOUTS, torch.float32, device, step=step))


def _torchs(technique: OptimizerTechnique, device: torch.device, steps: int = 3, **kwargs: Any) -> Optimizer:
    """PyTorch's, in the middle of training, with all that the technique's first shared configuration asks for."""
    assert technique.torch is not None
    shared = next(c.torch_kwargs for c in technique.configs if c.torch_kwargs is not None)
    params = make_params(LAYOUTS, torch.float32, device)
    optimizer = construct(technique.torch, params, **{**shared, "foreach": False, **kwargs})
    _steps(optimizer, 0, steps)
    return optimizer


def _loaded(cls: Any, source: Optimizer, **kwargs: Any) -> Optimizer:
    """An optimizer of the class over copies of the parameters, which loaded the state dict of ``source``."""
    other = cls(clone_params(parameters(source)), **kwargs)
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        group.update(kwargs)
    other.load_state_dict(saved)
    return other


def test_there_and_back(technique: OptimizerTechnique, device: torch.device) -> None:
    """As bits go, fused steps are those of a checkpoint loaded by ours, and the steps after are PyTorch's own."""
    optimizer = _torchs(technique, device)
    kept = {id(v) for state in optimizer.state.values() for k, v in state.items() if k != "step"}
    never_swapped = copy.deepcopy(optimizer)
    expected = _loaded(technique.ours, optimizer, fused=True)
    assert fuse(optimizer) is optimizer and type(optimizer) is technique.ours
    assert kept <= {id(v) for state in optimizer.state.values() for v in state.values()}, "the state was copied"
    _steps(optimizer, 3, 6)
    _steps(expected, 3, 6)
    assert_same(optimizer, expected, technique=technique.name, case="fused in the middle", step=6)
    assert "_fused_bundles" in vars(optimizer), "the steps were not fused"

    expected = _loaded(technique.torch, optimizer, foreach=False, **_off(technique))
    assert unfuse(optimizer) is optimizer and type(optimizer) is technique.torch
    _steps(optimizer, 6, 9)
    _steps(expected, 6, 9)
    assert_same(optimizer, expected, technique=technique.name, case="and back", step=9)

    _steps(never_swapped, 3, 9)
    for p, q in zip(parameters(optimizer), parameters(never_swapped), strict=True):
        torch.testing.assert_close(p, q)  # its default rtol: three fused steps, each within a few ulp


def _off(technique: OptimizerTechnique) -> dict[str, Any]:
    return {"fused": None} if technique.torch_fused else {}


def test_nothing_is_lost_on_the_way(technique: OptimizerTechnique, device: torch.device) -> None:
    """Without a step between, there and back leaves the options, the state and the next bits what they were."""
    optimizer = _torchs(technique, device)
    other = copy.deepcopy(optimizer)
    defaults, attributes = dict(optimizer.defaults), set(vars(optimizer))
    fuse(optimizer)
    assert optimizer.defaults.keys() == technique.ours([torch.ones(1)]).defaults.keys()
    assert all(group.keys() >= optimizer.defaults.keys() and group["fused"] for group in optimizer.param_groups)
    unfuse(optimizer)
    assert optimizer.defaults == defaults and set(vars(optimizer)) == attributes
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    _steps(optimizer, 3, 6)
    _steps(other, 3, 6)
    assert_same(optimizer, other, technique=technique.name, case="there and back", step=6)


def test_names_groups_and_hooks_are_kept(technique: OptimizerTechnique) -> None:
    assert technique.torch is not None
    model, calls = torch.nn.Linear(2, 3), []
    groups: list[Any] = [
        {"params": [("weight", model.weight)], "lr": 0.5, "weight_decay": 0.0, "mine": "kept"},
        {"params": [("bias", model.bias)]},
    ]
    optimizer = technique.torch(groups)
    handle = optimizer.register_step_post_hook(lambda opt, *_: calls.append(opt))
    before = optimizer.state_dict()["param_groups"]
    fuse(optimizer)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    assert calls == [optimizer]
    handle.remove()
    optimizer.step()
    assert len(calls) == 1
    optimizer.add_param_group({"params": [("extra", torch.ones(1, requires_grad=True))]})
    assert optimizer.param_groups[2].keys() == optimizer.param_groups[1].keys()
    unfuse(optimizer)
    after = optimizer.state_dict()["param_groups"]
    assert after[:2] == before and after[2]["param_names"] == ["extra"]


@pytest.mark.parametrize("stepped", [False, True], ids=["begin", "middle"])
def test_schedulers_go_on(technique: OptimizerTechnique, stepped: bool) -> None:
    """A scheduler made before goes on setting the rates, loading a checkpoint included, and has nothing to warn of."""
    optimizer, other = (_torchs(technique, torch.device("cpu"), 0, lr=0.5) for _ in range(2))
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, other)]

    def train(first: int) -> None:
        for step in range(first, first + 2):
            for o, scheduler in zip((optimizer, other), schedulers, strict=True):
                _steps(o, step, step + 1)
                scheduler.step()
            assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if stepped:
            train(0)
        fuse(optimizer)
        train(2)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(4)
        unfuse(optimizer)
        train(6)
    assert optimizer.param_groups[0]["lr"] == 0.5 ** (9 if stepped else 7)


def test_a_step_bound_or_wrapped_before_goes_on(technique: OptimizerTechnique) -> None:
    """What held PyTorch's ``step`` calls ours after ``fuse``, and what held ours PyTorch's after ``unfuse``."""
    optimizer, other = (_torchs(technique, torch.device("cpu")) for _ in range(2))
    calls: list[str] = []
    for o in (optimizer, other):
        second = torch.ones(2, 3, requires_grad=True)
        second.grad = torch.ones(2, 3)
        o.add_param_group({"params": [second], "lr": 0.25})
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def both(held: Any, wrapped: Any, first: int, case: str) -> None:
        for step, call in enumerate((held, wrapped), first):
            for o in (optimizer, other):
                for p, g in zip(
                    o.param_groups[0]["params"], make_grads(LAYOUTS, torch.float32, step=step), strict=True
                ):
                    p.grad = g
            calls.clear()
            assert call(lambda: calls.append("closure") or "loss") == "loss"
            assert calls == ["pre", "closure", "post"]
            other.step()
            assert_same(optimizer, other, technique=technique.name, case=case, step=step)

    def wrap(step: Any) -> Any:
        return lambda *args: step(*args)

    held, wrapped = optimizer.step, wrap(optimizer.step)
    fuse(optimizer)
    optimizer.step = wrapped  # type: ignore[method-assign]
    fuse(other)
    both(held, optimizer.step, 3, "ours")
    assert "_fused_bundles" in vars(optimizer), "the steps were not fused"
    del optimizer.step
    held, wrapped = optimizer.step, wrap(optimizer.step)
    unfuse(optimizer)
    unfuse(other)
    both(held, wrapped, 5, "PyTorch's")


@pytest.mark.slow
def test_a_step_compiled_before_says_so() -> None:
    """It would do one step while it is compiled, and none after."""
    torch._dynamo.reset()
    (optimizer,) = (torch.optim.Adam([p]) for p in [torch.ones(3, requires_grad=True)])
    (p,) = parameters(optimizer)
    p.grad = torch.ones(3)
    compiled = torch.compile(optimizer.step, backend="eager")
    compiled()
    fuse(optimizer)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="this step was compiled before"):
        compiled()
    assert torch.equal(p, before)
    compiled = torch.compile(optimizer.step, backend="eager")
    compiled()
    assert not torch.equal(p, before)
    unfuse(optimizer)
    before = p.detach().clone()
    compiled()
    compiled()
    assert not torch.equal(p, before)


def test_a_scheduler_that_comes_first_is_still_told_off() -> None:
    optimizer = torch.optim.Adam([torch.ones(1, requires_grad=True)])
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    fuse(optimizer)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_a_gradient_scaler_goes_on_over_an_overflow(technique: OptimizerTechnique) -> None:
    optimizers = [_torchs(technique, torch.device("cpu")) for _ in range(2)]
    for optimizer in optimizers:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            if step == 1 and optimizer is optimizers[0]:
                fuse(optimizer)
            if step == 3 and optimizer is optimizers[0]:
                unfuse(optimizer)
            grads = make_grads(LAYOUTS, torch.float32, step=step)
            loss = sum((p * g).sum() for p, g in zip(parameters(optimizer), grads) if g is not None)
            optimizer.zero_grad()
            scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()  # type: ignore[operator]
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0
    for p, q in zip(*map(parameters, optimizers), strict=True):
        torch.testing.assert_close(p, q)  # one fused step of three
        assert optimizers[0].state[p].get("step") == optimizers[1].state[q].get("step")


class _Decayed(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    "make",
    [
        _Decayed,
        torch.optim.LBFGS,
        torch.optim.SparseAdam,
        torch.optim.Adafactor,
        reimpl.optim.Muon,
        lambda params: torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1)),
    ],
    ids=["subclass", "LBFGS", "SparseAdam", "Adafactor", "ours", "model"],
)
def test_other_classes_are_refused_by_name(make: Any) -> None:
    optimizer = make([torch.ones(2, 2, requires_grad=True)])
    with pytest.raises(TypeError) as caught:
        fuse(optimizer)
    cls = type(optimizer)
    assert f"{cls.__module__}.{cls.__qualname__}" in str(caught.value) and "SGD, Adagrad" in str(caught.value)
    with pytest.raises(TypeError, match="unfuse"):
        unfuse(optimizer)
        assert type(optimizer) is cls


def test_what_cannot_be_fused_is_refused_and_left_alone() -> None:
    whole, number = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.complex64, requires_grad=True)
    differentiable = torch.optim.Adam([{"params": [whole]}, {"params": [number], "differentiable": True}])
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        fuse(differentiable)
    complex_one = torch.optim.RMSprop([whole, number])
    with pytest.raises(RuntimeError, match="floating point Tensors"):
        fuse(complex_one)
    for optimizer in (differentiable, complex_one):
        assert type(optimizer).__module__.startswith("torch.optim")
        assert not any(group.get("fused") for group in (optimizer.defaults, *optimizer.param_groups))


def _dialects(technique: OptimizerTechnique) -> list[OptimizerConfig]:
    return [config for config in dialect_configs(technique) if not set(config.kwargs) <= {"fused"}]


@pytest.mark.parametrize("technique", [p for p in TECHNIQUES if _dialects(p.values[0])])
def test_dialects_have_no_way_back(technique: OptimizerTechnique) -> None:
    for config in _dialects(technique):
        optimizer = construct(technique.ours, make_params(LAYOUTS, torch.float32), **{**config.kwargs, "fused": True})
        _steps(optimizer, 0, 2)
        with pytest.raises(ValueError, match=f"torch.optim.{technique.name} has no equivalent of"):
            unfuse(optimizer)
        assert type(optimizer) is technique.ours and optimizer.param_groups[0]["fused"]


def test_what_is_ours_already_is_fused(technique: OptimizerTechnique, device: torch.device) -> None:
    """A second call changes nothing, and neither ours of before nor its state is another object."""
    shared = next(c.kwargs for c in technique.configs if c.torch_kwargs is not None)
    optimizer = construct(technique.ours, make_params(LAYOUTS, torch.float32, device), **{**shared, "foreach": False})
    _steps(optimizer, 0, 2)
    expected = _loaded(technique.ours, optimizer, fused=True, foreach=None)
    assert fuse(fuse(optimizer)) is optimizer and type(optimizer) is technique.ours
    assert all(group["fused"] is True for group in (optimizer.defaults, *optimizer.param_groups))
    _steps(optimizer, 2, 4)
    _steps(expected, 2, 4)
    assert "_fused_bundles" in vars(optimizer), "the steps were not fused"
    assert_same(optimizer, expected, technique=technique.name, case="ours, fused", step=4)


def test_a_dialect_is_kept_by_fuse() -> None:
    optimizer = fuse(reimpl.optim.RMSprop([torch.ones(3, requires_grad=True)], eps_inside_sqrt=True))
    assert optimizer.param_groups[0]["eps_inside_sqrt"] is True and optimizer.param_groups[0]["fused"] is True


@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_makes_way_for_fused_and_comes_back(technique: OptimizerTechnique, foreach: bool | None) -> None:
    assert technique.torch is not None
    groups: list[Any] = [{"params": [torch.ones(2, requires_grad=True)]} for _ in range(2)]
    groups[1]["foreach"] = not foreach
    optimizer = technique.torch(groups, foreach=foreach)
    fuse(fuse(optimizer))
    assert [options["foreach"] for options in (optimizer.defaults, *optimizer.param_groups)] == [None] * 3
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    unfuse(optimizer)
    given = [foreach, foreach, not foreach, None]
    assert [options["foreach"] for options in (optimizer.defaults, *optimizer.param_groups)] == given
