"""What projects do to parameters, state and groups between two steps: ours goes on where PyTorch's goes."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parity_tests.optim_cases import EVERY_TECHNIQUE, TECHNIQUES
from parity_tests.twins import EXECUTIONS, RICH, batch, plain_step, small_model
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizer_cases import flags_of
from reimpl.testing.optimizers import IMPLEMENTATIONS
from reimpl.testing.tolerance import bits_equal

Optimizer = torch.optim.Optimizer
Build = Callable[..., Optimizer]
executions = pytest.mark.parametrize("execution", EXECUTIONS)


def _train(model: nn.Module, optimizer: Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        plain_step(model, optimizer, step)


def _trained(build: Build) -> tuple[Any, Optimizer]:
    model = small_model()
    optimizer = build(model.parameters())
    _train(model, optimizer)
    return model, optimizer


def _values(*pairs: tuple[nn.Module, Optimizer]) -> list[Tensor]:
    """Parameters and state, numbers as float64, whose dtype an implementation chooses."""
    found = []
    for model, optimizer in pairs:
        found += [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            state = optimizer.state.get(p, {})
            found += [v.detach().clone() if v.dim() else v.double() for v in state.values() if v is not None]
    return found


def frozen_and_thawed(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    model[0].requires_grad_(False)
    _train(model, optimizer)
    model[0].requires_grad_(True)
    model[2].weight.requires_grad_(False)
    _train(model, optimizer)
    model[2].weight.grad = torch.ones_like(model[2].weight)  # without being asked for, it is stepped by all the same
    optimizer.step()
    return _values((model, optimizer))


def gradients_zeroed_in_place(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        model(batch(0)[0]).square().mean().backward()
        optimizer.step()
    return _values((model, optimizer))


def another_dtype(build: Build) -> list[Tensor]:
    model = small_model()
    optimizer = build(model.parameters())
    model.double()
    _train(model, optimizer)
    return _values((model, optimizer))


def another_dtype_in_the_middle(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    model.double()  # the state stays float32: most rules refuse to mix them
    _train(model, optimizer)
    return _values((model, optimizer))


def weights_exchanged_with_their_means(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    mean = copy.deepcopy(model)
    for p, q in zip(model.parameters(), mean.parameters()):
        p.data, q.data = q.data.mul(0.5), p.data
    _train(model, optimizer)
    return _values((model, optimizer)) + [p.detach() for p in mean.parameters()]


def weights_tied_in_the_middle(build: Build) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    optimizer = build(model.parameters())
    _train(model, optimizer)
    model[2].weight = model[0].weight
    _train(model, optimizer)
    return _values((model, optimizer))


def a_parameter_replaced_by_a_longer_one(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    old = model[2].bias
    new = nn.Parameter(torch.cat([old.detach(), torch.ones(2)]))
    state = optimizer.state.pop(old)
    optimizer.state[new] = {k: torch.cat([v, torch.zeros(2)]) if v.dim() else v for k, v in state.items()}
    params = optimizer.param_groups[0]["params"]
    params[[*map(id, params)].index(id(old))] = new
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    return [new.detach(), *_values((model, optimizer))]


def tensors_swapped(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    model.zero_grad()
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.full((7, 5), 0.3)))
    _train(model, optimizer)
    return _values((model, optimizer))


def assigned_from_a_state_dict(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    model.load_state_dict({key: value * 2 for key, value in model.state_dict().items()}, assign=True)
    _train(model, optimizer)  # the parameters are others now: PyTorch's optimizer goes on with those it has
    return _values((model, optimizer))


def two_that_share_the_loaded_state(build: Build) -> list[Tensor]:
    """PyTorch's ``load_state_dict`` copies no state of the right dtype: both step one momentum."""
    model, optimizer = _trained(build)
    other = copy.deepcopy(model)
    second = build(other.parameters())
    second.load_state_dict(optimizer.state_dict())
    _train(other, second)
    _train(model, optimizer)
    return _values((model, optimizer), (other, second))


def a_shallow_copy(build: Build) -> list[Tensor]:
    model, optimizer = _trained(build)
    other = copy.copy(optimizer)
    _train(model, other)
    other.param_groups[0]["lr"] = 0.02
    _train(model, optimizer)
    return _values((model, optimizer))


def layers_made_at_the_first_batch(build: Build) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(7), nn.Tanh(), nn.LazyLinear(3))
    optimizer = build(model.parameters())
    _train(model, optimizer, 3)
    return _values((model, optimizer))


def state_of_inference_mode(build: Build) -> list[Tensor]:
    """Made in inference mode, it can be changed nowhere else."""
    model = small_model()
    optimizer = build(model.parameters())
    model(batch(0)[0]).square().mean().backward()
    with torch.inference_mode():
        optimizer.step()
        optimizer.step()
    inside = _values((model, optimizer))
    optimizer.step()
    return [*inside, *_values((model, optimizer))]


def parameters_of_inference_mode(build: Build) -> list[Tensor]:
    with torch.inference_mode():
        p = torch.ones(4)
        p.grad = torch.ones(4)
    optimizer = build([p])
    optimizer.step()
    return [p]


def gradients_in_the_parameters_memory(build: Build) -> list[Tensor]:
    """A for-loop that shrinks the parameter first shrinks its gradient too."""
    model, optimizer = _trained(build)
    for p in model.parameters():
        p.grad = p.detach()
    optimizer.step()
    optimizer.step()
    return _values((model, optimizer))


def steps_in_threads(build: Build) -> list[Tensor]:
    pairs = [_trained(build) for _ in range(3)]
    threads = [threading.Thread(target=_train, args=(*pair, 8)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _values(*pairs)


SURGERY = [
    frozen_and_thawed, gradients_zeroed_in_place, another_dtype, another_dtype_in_the_middle,
    weights_exchanged_with_their_means, weights_tied_in_the_middle, a_parameter_replaced_by_a_longer_one,
    tensors_swapped, assigned_from_a_state_dict, two_that_share_the_loaded_state, a_shallow_copy,
    layers_made_at_the_first_batch, state_of_inference_mode, parameters_of_inference_mode,
    gradients_in_the_parameters_memory, steps_in_threads,
]  # fmt: skip


def _outcome(case: Callable[[Build], list[Tensor]], build: Build) -> tuple[str, list[Tensor]]:
    try:
        return "", case(build)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:60]}", []


@executions
@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("case", SURGERY, ids=lambda case: case.__name__)
def test_ours_goes_on_where_pytorchs_goes(
    case: Callable[[Build], list[Tensor]], technique: OptimizerTechnique, execution: str
) -> None:
    """To the for-loop's bits, or to the same error; fused within a few ulp a step, or to the error of either way."""
    assert technique.torch is not None
    options = RICH[technique.name]
    theirs = functools.partial(technique.torch, **options, foreach=execution == "foreach")
    error, expected = _outcome(case, theirs)
    if execution == "foreach" and not error:  # whose arithmetic is the for-loop's in ours
        _, expected = _outcome(case, functools.partial(technique.torch, **options, foreach=False))
    said, values = _outcome(case, functools.partial(technique.ours, **options, **IMPLEMENTATIONS[execution]))
    if execution == "fused" and error != said:
        assert said == _outcome(case, functools.partial(technique.torch, **options, foreach=True))[0]
        return
    assert said == error
    for value, other in zip(values, expected, strict=True):
        if execution == "fused":
            torch.testing.assert_close(value, other)  # its default rtol and atol: ten steps, each within a few ulp
        else:
            assert bits_equal(value, other)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_fake_tensors_are_stepped_where_pytorch_steps_them(technique: OptimizerTechnique, kind: str) -> None:
    """As those who estimate a training's memory do, without a GPU too."""

    def fares(cls: Any, **flags: Any) -> bool:
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                params = [torch.ones(4, 6, device=kind, requires_grad=True) for _ in range(2)]
                optimizer = cls(params, **flags)
                for _ in range(2):
                    for p in params:
                        p.grad = torch.ones_like(p)
                    optimizer.step()
        except torch._subclasses.fake_tensor.DataDependentOutputException:
            return False
        return bool(optimizer.state) or technique.name == "SGD"

    if technique.only_sparse:
        pytest.skip("there are no sparse fake tensors")
    ways = [flags_of(technique, way) for way in technique.implementations if way in ("default", "forloop", "foreach")]
    ways += [{"capturable": True, "foreach": foreach} for foreach in (True, False) if technique.supports_capturable]
    for flags in ways:
        if kind == "cuda" or not flags.get("capturable"):
            assert fares(technique.ours, **flags) == fares(technique.torch, **flags), flags
    if "fused" in technique.implementations:
        assert fares(technique.ours, fused=True) or (technique.name == "ASGD" and kind == "cpu")
