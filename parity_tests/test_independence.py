"""No implementation calls what it reimplements; and the guard that says so sees operators, functions and names."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parity_tests.optim_cases import EVERY_TECHNIQUE, TECHNIQUES, all_configs, skip_unless_it_runs
from reimpl.optim import REIMPLEMENTED
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.guard import IndependenceError, independence_guard, names_used
from reimpl.testing.optimizer_cases import flags_of, grads_of, layouts_of
from reimpl.testing.optimizers import DENSE_LAYOUTS, construct, make_params, step_with

quick = pytest.mark.quick
MODULES = (
    *(name.lower() for name in REIMPLEMENTED),
    "_functional",
    "_multi_tensor",
    "sparse_adam",
    "_adafactor",
    "_muon",
)
FORBIDDEN = ("aten::_fused_*", "torch._fused_*", *(f"torch.optim.{module}.*" for module in MODULES))


@pytest.mark.parametrize("implementation", [pytest.param("forloop", marks=quick), "foreach", "fused"])
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_no_step_calls_pytorchs(technique: OptimizerTechnique, implementation: str, device: torch.device) -> None:
    skip_unless_it_runs(technique, implementation)
    layouts = layouts_of(technique, DENSE_LAYOUTS)
    for config in all_configs(technique, device, torch.float32):
        kwargs = {**config.kwargs, **flags_of(technique, implementation)}
        if implementation == "foreach" and technique.name.startswith("Adam") and "lr" in kwargs:
            kwargs["lr"] = 0.01  # foreach takes no tensor here
        with independence_guard(FORBIDDEN) as seen:
            optimizer = construct(technique.ours, make_params(layouts, torch.float32, device), **kwargs)
            for step in range(2):
                step_with(optimizer, grads_of(technique, layouts, torch.float32, device, step=step))
        assert any(name.startswith("aten::") for name in seen), "the guard slept"


@quick
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_the_source_names_no_kernel_of_pytorchs(technique: OptimizerTechnique) -> None:
    names = names_used(technique.ours)
    functional = f"torch.optim.{technique.name.lower()}.{technique.name.lower()}"
    kernels = fnmatch.filter(names, "*_fused_*_") + fnmatch.filter(names, f"{functional}*")
    assert not kernels
    assert len(names) > 50, "the source was not read"


@quick
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_the_class_is_an_optimizer_but_not_pytorchs(technique: OptimizerTechnique) -> None:
    assert isinstance(technique.torch, type) and isinstance(technique.ours, type)
    assert issubclass(technique.ours, torch.optim.Optimizer)
    reimplemented = {getattr(torch.optim, p.id) for p in EVERY_TECHNIQUE}
    assert not reimplemented & set(technique.ours.__mro__)


@quick
@pytest.mark.parametrize("technique", [p for p in TECHNIQUES if p.values[0].torch_fused])
def test_the_guard_catches_pytorchs_fused_kernel(technique: OptimizerTechnique) -> None:
    assert technique.torch is not None
    optimizer = technique.torch([torch.ones(3, requires_grad=True)], fused=True)
    with pytest.raises(IndependenceError, match="aten::_fused_"), independence_guard(["aten::_fused_*"]):
        step_with(optimizer, [torch.ones(3)])


def _softmax_by_a_detour(x: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(x, -1).exp()


def _swallows(x: torch.Tensor) -> torch.Tensor:
    try:
        return torch.relu(x)
    except AssertionError:
        return x.clamp(min=0)


@quick
@pytest.mark.parametrize(
    "pattern",
    ["aten::_log_softmax", "torch.nn.functional.log_softmax", "torch.Tensor.exp", "aten::exp*"],
)
def test_the_guard_catches_operators_functions_and_methods(pattern: str) -> None:
    with pytest.raises(IndependenceError, match="forbidden"), independence_guard([pattern]):
        _softmax_by_a_detour(torch.ones(3))
    with independence_guard(["aten::_softmax"]) as seen:
        _softmax_by_a_detour(torch.ones(3))
    assert fnmatch.filter(seen, pattern)


@quick
def test_the_guard_catches_calls_in_the_backward_pass() -> None:
    x = torch.ones(3, requires_grad=True)
    y = _softmax_by_a_detour(x).sum()
    with pytest.raises(IndependenceError), independence_guard(["aten::_log_softmax_backward*"]):
        y.backward()


@quick
def test_the_guard_is_not_deceived_by_code_that_swallows_its_error() -> None:
    with pytest.raises(IndependenceError, match="aten::relu"), independence_guard(["aten::relu"]):
        _swallows(torch.ones(3))


@quick
def test_names_are_resolved_whatever_the_import_calls_them() -> None:
    def inner(x: torch.Tensor) -> Any:
        import torch.nn.functional as other
        from torch import special

        return other.gelu(x) + special.expit(x) + _softmax_by_a_detour(x).softmax(-1)

    names = names_used(inner)
    assert {"torch.nn.functional.log_softmax", "torch.nn.functional.gelu", ".softmax"} <= names
    assert any("expit" in name for name in names)
