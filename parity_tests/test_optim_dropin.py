"""Drop-in behaviour in training: closures, groups, sparse gradients, schedulers, scaling, hooks, differentiation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import reimpl.optim
from parity_tests.optim_cases import EVERY_TECHNIQUE, TECHNIQUES
from parity_tests.twins import RICH, Twins, loss_of, plain_step
from parity_tests.versions import IS_REFERENCE
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizer_checks import assert_same
from reimpl.testing.optimizers import clone_params, parameters, step_with
from reimpl.testing.samples import random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal

Optimizer = torch.optim.Optimizer


@pytest.fixture(params=TECHNIQUES)
def technique(request: pytest.FixtureRequest) -> OptimizerTechnique:
    return request.param


@pytest.mark.quick
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_constructor_begins_as_pytorchs(technique: OptimizerTechnique) -> None:
    assert technique.torch is not None
    ours = list(inspect.signature(technique.ours).parameters.values())
    theirs = list(inspect.signature(technique.torch).parameters.values())
    shared = [p for p in ours if p.name in {q.name for q in theirs}]
    strip = lambda ps: [(p.name, p.kind, p.default) for p in ps]  # noqa: E731
    assert strip(shared) == strip(theirs)
    extra = [p for p in ours if p not in shared]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY and p.default in (None, False, True, "torch") for p in extra)


@pytest.mark.quick
def test_the_namespace_holds_all_of_pytorchs() -> None:
    assert set(torch.optim.__all__) <= set(reimpl.optim.__all__) <= set(dir(reimpl.optim))
    assert set(lr_scheduler.__all__) <= set(dir(reimpl.optim.lr_scheduler))
    assert reimpl.optim.Optimizer is Optimizer
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and name in torch.optim.__all__:
            assert (getattr(reimpl.optim, name) is not cls) == (name in {p.id for p in EVERY_TECHNIQUE})


@pytest.mark.quick
def test_defaults_and_state_dict_are_pytorchs(technique: OptimizerTechnique) -> None:
    twins = Twins(technique)
    twins.train(2)
    ours, theirs = (optimizer.state_dict() for optimizer in twins.optimizers)
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours.keys() == theirs.keys() and ours["state"].keys() == theirs["state"].keys()
    missing = {k: v for k, v in twins.optimizers[1].defaults.items() if twins.optimizers[0].defaults.get(k, "") != v}
    assert not missing


@pytest.mark.quick
def test_closure_runs_with_gradients_and_its_loss_comes_back(technique: OptimizerTechnique) -> None:
    twins = Twins(technique)

    def use(model: nn.Module, optimizer: Optimizer, step: int) -> None:
        seen: list[torch.Tensor] = []

        def closure() -> torch.Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            seen.append(loss)
            return loss

        with torch.no_grad():
            result = optimizer.step(closure)
        assert len(seen) == 1 and result is seen[0]

    twins.train(3, use=use)
    assert [optimizer.step() for optimizer in twins.optimizers] == [None, None]


def _two_groups(model: nn.Module) -> list[dict[str, Any]]:
    first, last = model[0], model[2]  # type: ignore[index]
    return [{"params": first.parameters(), "lr": 0.2, "weight_decay": 0.0}, {"params": last.parameters()}]


@pytest.mark.parametrize("flags", [{"foreach": False}, {"foreach": True}], ids=["forloop", "foreach"])
def test_groups_with_options_of_their_own(technique: OptimizerTechnique, flags: dict[str, bool]) -> None:
    if technique.name == "Adagrad" and not IS_REFERENCE:
        pytest.skip("before torch 2.15 PyTorch's Adagrad cannot step a group that was added")
    twins = Twins(technique, _two_groups, **flags)
    twins.train(3)
    extra = [nn.Parameter(torch.full((3,), 0.5)) for _ in twins.optimizers]
    for optimizer, param in zip(twins.optimizers, extra):
        optimizer.add_param_group({"params": [param], "lr": 0.3, "maximize": True})
        param.grad = torch.tensor([0.1, -0.2, 0.3])

    def use(model: nn.Module, optimizer: Optimizer, step: int) -> None:
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()

    twins.train(3, first=3, use=use)
    assert bits_equal(*extra) and not bits_equal(extra[0], torch.full((3,), 0.5))


def test_a_group_may_change_in_the_middle(technique: OptimizerTechnique) -> None:
    twins = Twins(technique)
    twins.train(2)
    for changes in ({"lr": 0.003}, {"weight_decay": 0.0}, {"maximize": True}, {"foreach": True}):
        for optimizer in twins.optimizers[: 1 if "foreach" in changes else 2]:
            optimizer.param_groups[0].update(changes)
        twins.train(2, first=2)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
@pytest.mark.parametrize("technique", [p for p in TECHNIQUES if p.values[0].supports_sparse])
def test_sparse_gradients(technique: OptimizerTechnique, momentum: float, foreach: bool) -> None:
    assert technique.torch is not None
    kwargs = {"lr": 0.1, "foreach": foreach, **({"momentum": momentum} if technique.name == "SGD" else {})}
    weights, optimizers = [], []
    for cls in (technique.ours, technique.torch):
        torch.manual_seed(2)
        embedding, dense = nn.Embedding(10, 4, sparse=True), nn.Parameter(torch.ones(4))
        optimizers.append(cls([embedding.weight, dense], **kwargs))
        weights.append((embedding, dense))
    for step in range(4):
        for (embedding, dense), optimizer in zip(weights, optimizers):
            optimizer.zero_grad()
            index = torch.tensor([step, 3, 3, 7])  # 3 twice: the gradient is not coalesced
            (embedding(index) * dense).square().sum().backward()
            assert embedding.weight.grad.is_sparse and not embedding.weight.grad.is_coalesced()
            optimizer.step()
        assert_same(*optimizers, technique=technique.name, case="sparse", step=step + 1)


def test_tensor_learning_rate_changed_in_place(technique: OptimizerTechnique) -> None:
    twins = Twins(technique, lr=torch.tensor(0.05))
    for step in range(4):
        twins.train(1, first=step)
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["lr"].mul_(0.7)
    assert float(twins.optimizers[0].param_groups[0]["lr"]) == float(twins.optimizers[1].param_groups[0]["lr"])


@contextmanager
def _registered(optimizer: Optimizer, calls: list[str]) -> Iterator[None]:
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("step pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("step post")),
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict pre")),
        optimizer.register_state_dict_post_hook(lambda *_: calls.append("state_dict post")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre")),
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load post")),
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.quick
def test_hooks(technique: OptimizerTechnique) -> None:
    twins = Twins(technique)
    logs: list[list[str]] = []
    for model, optimizer in zip(twins.models, twins.optimizers):
        calls: list[str] = []
        with _registered(optimizer, calls):
            plain_step(model, optimizer, 0)
            optimizer.load_state_dict(optimizer.state_dict())
        plain_step(model, optimizer, 1)
        logs.append(calls)
    assert logs[0] == logs[1]
    assert logs[0] == ["step pre", "step post", "state_dict pre", "state_dict post", "load pre", "load post"]


def test_a_state_dict_post_hook_may_replace_the_result(technique: OptimizerTechnique) -> None:
    results = []
    for optimizer in Twins(technique).optimizers:
        optimizer.register_state_dict_post_hook(lambda _, packed: {**packed, "note": "kept"})
        results.append(optimizer.state_dict()["note"])
    assert results == ["kept", "kept"]


def _through_step(cls: Callable[..., Optimizer], name: str, differentiate_lr: bool) -> list[torch.Tensor]:
    """Gradients of a function of the third step, in the parameter, the gradient, the state and the learning rate."""
    generator = seeded_generator(0, "differentiable")
    start, grad, *past = (random_tensor((6,), torch.float64, generator).requires_grad_() for _ in range(4))
    before = cls([start.detach().clone()], **{**RICH[name], "foreach": False})
    for old in past:
        step_with(before, [old.detach()])
    state = {key: value.detach().clone() for key, value in before.state[parameters(before)[0]].items()}
    for key, value in state.items():
        value.requires_grad_(key != "step")
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=differentiate_lr)
    param = start.clone()
    param.grad = grad
    optimizer = cls([param], **{**RICH[name], "lr": lr if differentiate_lr else 0.05, "differentiable": True})
    optimizer.state[param].update({key: value.clone() for key, value in state.items()})
    optimizer.step()
    inputs = [start, grad, *(value for value in state.values() if value.requires_grad), *([lr] * differentiate_lr)]
    output = param.square().sum() + sum(v.square().sum() for v in optimizer.state[param].values() if v.requires_grad)
    return list(torch.autograd.grad(output, inputs))


@pytest.mark.parametrize("differentiate_lr", [False, True], ids=["number", "lr"])
def test_differentiates_through_the_step(technique: OptimizerTechnique, differentiate_lr: bool) -> None:
    assert technique.torch is not None
    try:
        theirs = _through_step(technique.torch, technique.name, differentiate_lr)
    except (RuntimeError, TypeError) as refusal:
        pytest.skip(f"PyTorch's own class cannot: {refusal}")
    ours = _through_step(technique.ours, technique.name, differentiate_lr)
    for got, expected in zip(ours, theirs, strict=True):
        # both are sums over one short graph, in an order that need not be the same; NAdam's mu_product is a float32
        rtol, atol = (1e-12, 1e-14) if got.dtype == torch.float64 else (1e-6, 1e-8)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    assert all(gradient.abs().max() > 0 for gradient in theirs[:2])


def test_float64_default_dtype(technique: OptimizerTechnique) -> None:
    torch.set_default_dtype(torch.float64)
    twins = Twins(technique)
    twins.train(3)
    state = twins.optimizers[0].state[parameters(twins.optimizers[0])[0]]
    assert technique.name == "SGD" or state["step"].dtype == torch.float64


@pytest.mark.parametrize("implementation", ["forloop", "foreach", "fused"])
def test_parameters_without_gradients_stay(technique: OptimizerTechnique, implementation: str) -> None:
    flags = {"forloop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[implementation]
    moving, still = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = technique.ours([moving, still], **{**RICH[technique.name], **flags})
    step_with(optimizer, [torch.ones(3), None])
    assert bits_equal(still, torch.ones(3)) and not bits_equal(moving, torch.ones(3))
    if technique.name != "Adagrad":  # whose state exists from the start, as PyTorch's does
        assert not optimizer.state.get(still)
    step_with(optimizer, [None, None])


def test_mixed_dtypes_in_one_group(technique: OptimizerTechnique) -> None:
    assert technique.torch is not None
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    params = [random_tensor((7,), dtype, seeded_generator(0, dtype)).requires_grad_() for dtype in dtypes]
    for foreach in (False, True):
        # in bfloat16 foreach rounds otherwise than the for-loop
        chosen = params if not foreach else [p for p in params if p.dtype != torch.bfloat16]
        pair = [
            technique.ours(clone_params(chosen), **RICH[technique.name], foreach=foreach),
            technique.torch(clone_params(chosen), **RICH[technique.name], foreach=False),
        ]
        for step in range(3):
            grads = [random_tensor((7,), p.dtype, seeded_generator(step, "g", p.dtype)) for p in chosen]
            for optimizer in pair:
                step_with(optimizer, grads)
        assert_same(*pair, technique=technique.name, case="mixed dtypes", step=3)
