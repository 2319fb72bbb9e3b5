"""Around the step, as real projects have it: schedulers, loss scaling, accumulation, hooks, stepping in backward."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from parity_tests.optim_cases import TECHNIQUES, for_each
from parity_tests.twins import EXECUTIONS, RICH, Optimizer, Twins, batch, loss_of, plain_step, small_model, values_of
from parity_tests.versions import IS_REFERENCE
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizers import IMPLEMENTATIONS, parameters, step_with
from reimpl.testing.tolerance import bits_equal

executions = pytest.mark.parametrize("execution", EXECUTIONS)
Snapshot = list[dict[str, torch.Tensor]]


@pytest.fixture(params=TECHNIQUES)
def technique(request: pytest.FixtureRequest) -> OptimizerTechnique:
    return request.param


def _two_groups(model: nn.Module) -> list[dict[str, Any]]:
    first, last = model[0], model[2]  # type: ignore[index]
    return [{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.2}]


def _has_momentum(optimizer: Optimizer) -> bool:
    return any(key in optimizer.defaults for key in ("momentum", "betas"))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=_has_momentum(o)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=_has_momentum(o)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=3),
}


@pytest.mark.quick
def test_every_scheduler_is_tried() -> None:
    classes = {name for name, value in vars(lr_scheduler).items() if inspect.isclass(value) and name in dir(value)}
    public = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))} | classes
    assert public - {"LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


@executions
def test_schedulers(technique: OptimizerTechnique, execution: str) -> None:
    """The rates, and what some set beside them (momentum, β₁), reach both optimizers alike in every step."""

    def check(name: str) -> None:
        twins = Twins(technique, _two_groups, implementation=execution)
        schedulers = [SCHEDULERS[name](optimizer) for optimizer in twins.optimizers]
        seen = set()
        for step in range(6):
            twins.train(1, first=step)
            for scheduler in schedulers:
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in twins.optimizers]
            assert rates[0] == rates[1] == schedulers[1].get_last_lr()
            seen.add(tuple(rates[0]))
        assert len(seen) > 1, f"{name} changes nothing"

    for_each(SCHEDULERS, check)


@pytest.mark.parametrize("execution", ["forloop", "fused"])
def test_a_scheduler_fills_a_rate_that_is_a_tensor(technique: OptimizerTechnique, execution: str) -> None:
    twins = Twins(technique, implementation=execution, lr=torch.tensor(0.05))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in twins.optimizers]
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in twins.optimizers]
    for step in range(4):
        twins.train(1, first=step)
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] is twins.optimizers[0].param_groups[0]["lr"] and bits_equal(*rates) and rates[0] < 0.004


def _snapshot(optimizer: Optimizer) -> Snapshot:
    return [values_of(optimizer, p) for p in parameters(optimizer)]


def _same_snapshots(before: Snapshot, after: Snapshot) -> bool:
    return all(
        old.keys() == new.keys() and all(bits_equal(new[key], value) for key, value in old.items())
        for old, new in zip(before, after, strict=True)
    )


@executions
def test_gradient_scaling_with_an_overflow(technique: OptimizerTechnique, execution: str) -> None:
    """The step with an infinite gradient changes neither parameters nor state, not even the step count."""
    twins = Twins(technique, implementation=execution)
    scalers = {id(o): torch.amp.GradScaler("cpu", init_scale=256.0) for o in twins.optimizers}

    def use(model: nn.Module, optimizer: Optimizer, step: int) -> None:
        optimizer.zero_grad()
        scaler, before = scalers[id(optimizer)], _snapshot(optimizer)
        scaler.scale(loss_of(model, step) * (float("inf") if step == 2 else 1.0)).backward()
        if step == 3:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        assert _same_snapshots(before, _snapshot(optimizer)) == (step == 2)

    twins.train(5, use=use)
    assert [scaler.get_scale() for scaler in scalers.values()] == [128.0, 128.0]
    assert all(torch.isfinite(p).all() for p in parameters(twins.optimizers[0]))


@pytest.mark.parametrize("momentum_form", ["torch", "velocity", "ewa"])
def test_fused_gradient_scaling_of_lazy_state(momentum_form: str) -> None:
    """An overflow in the very first step must leave no buffer made of infinities."""
    technique = next(p.values[0] for p in TECHNIQUES if p.id == "SGD")
    param = torch.ones(5, requires_grad=True)
    optimizer = technique.ours([param], lr=0.1, momentum=0.9, momentum_form=momentum_form, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (float("inf"), 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    plain = torch.ones(5, requires_grad=True)
    expected = technique.ours([plain], lr=0.1, momentum=0.9, momentum_form=momentum_form, foreach=False)
    for _ in range(2):
        step_with(expected, [torch.ones(5)])
    torch.testing.assert_close(param, plain)


@executions
def test_gradient_accumulation(technique: OptimizerTechnique, execution: str) -> None:
    """Four batches a step, whose gradients are added up in place; the gradients are zeroed in place as well."""

    def use(model: nn.Module, optimizer: Optimizer, step: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        places = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
        for part in range(4):
            (loss_of(model, 4 * step + part) / 4).backward()
        assert not places or places == [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
        optimizer.step()

    twins = Twins(technique, implementation=execution)
    twins.train(4, use=use)
    for optimizer in twins.optimizers:
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters(optimizer))


@executions
def test_a_group_is_added_when_layers_thaw(technique: OptimizerTechnique, execution: str) -> None:
    """The last layer first; then the first layer as a group with a rate of its own, and a scheduler that knows both."""
    if technique.name == "Adagrad" and not IS_REFERENCE:
        pytest.skip("before torch 2.15 PyTorch's Adagrad cannot step a group that was added")
    twins = Twins(technique, lambda model: model[2].parameters(), implementation=execution)  # type: ignore[index]
    twins.train(3)
    for model, optimizer in zip(twins.models, twins.optimizers):
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.3, "maximize": True})  # type: ignore[index]
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in twins.optimizers]
    start = parameters(twins.optimizers[0])[2].detach().clone()
    for step in range(3, 6):
        twins.train(1, first=step)
        for scheduler in schedulers:
            scheduler.step()
    assert not bits_equal(parameters(twins.optimizers[0])[2], start)


@executions
def test_hooks_on_every_optimizer_and_hooks_that_change_the_call(technique: OptimizerTechnique, execution: str) -> None:
    twins = Twins(technique, implementation=execution)
    calls: dict[int, list[str]] = {id(optimizer): [] for optimizer in twins.optimizers}
    handles = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: calls[id(optimizer)].append("every, pre")),
        register_optimizer_step_post_hook(lambda optimizer, *_: calls[id(optimizer)].append("every, post")),
    ]

    def use(model: nn.Module, optimizer: Optimizer, step: int) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        def supply(*_: Any) -> Any:
            calls[id(optimizer)].append("own, pre")
            return (optimizer, closure), {}

        handle = optimizer.register_step_pre_hook(supply)
        assert torch.is_tensor(optimizer.step())
        handle.remove()

    try:
        twins.train(2, use=use)
    finally:
        for handle in handles:
            handle.remove()
    plain_step(twins.models[0], twins.optimizers[0], 2)
    ours, theirs = calls.values()
    assert ours == theirs == ["every, pre", "own, pre", "every, post"] * 2


@executions
def test_an_optimizer_a_parameter_steps_inside_backward(technique: OptimizerTechnique, execution: str) -> None:
    """The gradient of each parameter is used and freed as soon as it is there."""
    assert technique.torch is not None
    models = [small_model() for _ in range(2)]
    stepped = itertools.count()
    for model, cls, flags in zip(models, (technique.ours, technique.torch), (execution, "forloop"), strict=True):
        kwargs = {**RICH[technique.name], **IMPLEMENTATIONS[flags]}
        each = {p: cls([p], **kwargs) for p in model.parameters()}

        def step(p: torch.Tensor, each: dict[torch.Tensor, Optimizer] = each) -> None:
            each[p].step()
            each[p].zero_grad()
            next(stepped)

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
    for step_number in range(4):
        for model in models:
            loss_of(model, step_number).backward()
            assert all(p.grad is None for p in model.parameters())
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            if execution == "fused":
                torch.testing.assert_close(p, q)  # its default rtol: up to four steps, each within a few ulp
            else:
                assert bits_equal(p, q)
    assert next(stepped) == 2 * 4 * 4


#: One without a step count, one with a product kept in the state, one that chooses, and PyTorch's two most used.
COMPILED = [p for p in TECHNIQUES if p.id in ("SGD", "AdamW", "RMSprop", "NAdam", "ASGD")]


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["forloop", "fused"])
@pytest.mark.parametrize("technique", COMPILED)
def test_a_whole_training_step_compiled(technique: OptimizerTechnique, execution: str) -> None:
    """``torch.compile`` of forward, backward and step together, ours and PyTorch's alike."""
    twins = Twins(technique)
    if execution == "fused":
        twins.optimizers[0].param_groups[0].update(fused=True)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", dynamic=False)
    def train(model: nn.Module, optimizer: Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

    for step in range(4):
        for model, optimizer in zip(twins.models, twins.optimizers):
            train(model, optimizer, *batch(step))
        for p, q in zip(*map(parameters, twins.optimizers), strict=True):
            # compiled, fused is foreach, whose bias corrections are of tensors; other releases trace other expressions
            bitwise = execution == "forloop" and IS_REFERENCE
            torch.testing.assert_close(p, q, **({"rtol": 0, "atol": 0} if bitwise else {}))


FORKED_WORKERS = """
import multiprocessing, torch
from torch.utils.data import DataLoader, TensorDataset
import reimpl.optim
from parity_tests.twins import batch, small_model

torch.set_num_threads(2)
rows = [torch.cat(column) for column in zip(*(batch(step) for step in range(8)))]

def train(workers):
    model = small_model()
    big = torch.ones(100_000, requires_grad=True)  # enough for two threads to share
    optimizer = reimpl.optim.RMSprop([*model.parameters(), big], lr=0.01, fused=True)
    how = {"multiprocessing_context": "fork", "persistent_workers": False} if workers else {}
    for epoch in range(2):
        for x, y in DataLoader(TensorDataset(*rows), batch_size=4, num_workers=workers, **how):
            optimizer.zero_grad()
            ((model(x) - y).square().mean() + big.square().sum()).backward()
            optimizer.step()
    return [p.detach().clone() for p in [*model.parameters(), big]]

def in_a_worker(_):
    return [p.double().sum().item() for p in train(0)]

expected = train(0)
assert all(map(torch.equal, train(2), expected)), "workers change the weights"
# PyTorch's own operators hang in a forked child on more than one thread; a DataLoader's workers have one as well
with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
    sums = pool.map(in_a_worker, range(3))
assert sums == [in_a_worker(0)] * 3, "a forked worker trains otherwise"
print("fine")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_workers_are_forked_between_fused_steps() -> None:
    """Data loaders fork while the step's threads are there, and a pool's children step themselves."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-W", "ignore", "-c", FORKED_WORKERS]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip() == "fine", result.stdout + result.stderr
