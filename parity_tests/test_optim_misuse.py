"""Parameters, gradients and state that do not fit: PyTorch's error, its result, or an error by name; never another."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import reimpl.optim as optim
from parity_tests.optim_cases import EVERY_TECHNIQUE, TECHNIQUES, for_each, ready, stepped
from parity_tests.twins import EXECUTIONS
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizers import IMPLEMENTATIONS, parameters
from reimpl.testing.tolerance import bits_equal

pytestmark = pytest.mark.quick
Optimizer = torch.optim.Optimizer
Build = Callable[..., Optimizer]
Case = Callable[[Build], Optimizer]
executions = pytest.mark.parametrize("execution", EXECUTIONS)


@pytest.fixture(params=TECHNIQUES)
def technique(request: pytest.FixtureRequest) -> OptimizerTechnique:
    return request.param


def _ill_fitting_parameters() -> Iterator[tuple[str, Case]]:
    def of(*params: Callable[[Tensor], Tensor]) -> Case:
        def case(build: Build) -> Optimizer:
            memory = torch.arange(1.0, 9.0)
            return stepped(build([ready(make(memory)) for make in params]))

        return case

    def twice_the_same(build: Build) -> Optimizer:
        p = ready(torch.ones(3))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            return stepped(build([p, p]))

    def with_an_empty_group(build: Build) -> Optimizer:
        return stepped(build([{"params": []}, {"params": [ready(torch.ones(3))]}]))

    yield "a number expanded", of(lambda m: m[:1].expand(3))
    yield "a row expanded", of(lambda m: m[None].expand(2, 8))
    yield "two of the same memory", of(lambda m: m, lambda m: m.view(2, 4))
    yield "two that overlap", of(lambda m: m[:6], lambda m: m[2:])
    yield "integers", of(lambda m: m.long())
    yield "truth values", of(lambda m: m > 3)
    yield "twice the same", twice_the_same
    yield "an empty group", with_an_empty_group


def _ill_fitting_gradients() -> Iterator[tuple[str, Case]]:
    def of(grad: Tensor, first: bool) -> Case:
        def case(build: Build) -> Optimizer:
            p = ready(torch.ones(5))
            optimizer = build([p])
            if not first:
                optimizer.step()
            p.grad.data = grad  # the setter of .grad itself refuses each of these
            return stepped(optimizer)

        return case

    def negative_view(build: Build) -> Optimizer:
        grad = torch.view_as_complex(torch.ones(3, 2)).conj().imag
        assert grad.is_neg()
        return stepped(build([ready(torch.ones(3), grad)]))

    def of_the_parameters_memory(build: Build) -> Optimizer:
        memory = torch.arange(1.0, 6.0)
        return stepped(build([ready(memory, memory)]))

    def pruned(build: Build) -> Optimizer:
        p = ready(torch.ones(5))
        optimizer = stepped(build([p]), 1)
        p.data, p.grad = p.data[:3], None
        p.grad = torch.ones(3)
        return stepped(optimizer)

    for first in (True, False):
        when = "at first" if first else "later"
        for shape in ((3,), (8,), (1,), (), (1, 5), (5, 1), (2, 5)):
            yield f"shape {shape} {when}", of(torch.ones(shape), first)
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64):
            yield f"{dtype} {when}", of(torch.ones(5, dtype=dtype), first)

    def at_a_shift(first: bool, *, back: int = 0, turned: bool = False) -> Case:
        def case(build: Build) -> Optimizer:
            memory = torch.arange(1.0, 21.0)
            p = memory[4:13].view(3, 3).requires_grad_()
            p.grad = torch.ones(3, 3)
            optimizer = build([ready(torch.ones(2)), p])
            if not first:
                optimizer.step()
            p.grad = p.detach().t() if turned else memory[4 - back : 13 - back].view(3, 3)
            return stepped(optimizer)

        return case

    def of_anothers_memory(build: Build) -> Optimizer:
        memory = torch.arange(1.0, 9.0)
        return stepped(build([ready(memory[:5]), ready(torch.ones(4), memory[2:6])]))

    for first in (True, False):
        when = "at first" if first else "later"
        for back in (1, 4, -1, -8):
            yield f"shifted by {back} {when}", at_a_shift(first, back=back)
        yield f"turned {when}", at_a_shift(first, turned=True)
    yield "of another's memory", of_anothers_memory
    yield "a negative view", negative_view
    yield "of the parameter's memory", of_the_parameters_memory
    yield "of a parameter that was cut", pruned


def _outcome(case: Case, build: Build) -> tuple[str, list[Tensor]]:
    try:
        optimizer = case(build)
    except Exception as error:
        return f"{type(error).__name__}: {error}", []
    return "", [p.detach() for p in parameters(optimizer)]


@executions
@pytest.mark.parametrize("cases", [_ill_fitting_parameters, _ill_fitting_gradients], ids=["parameters", "gradients"])
def test_what_does_not_fit_fares_as_in_pytorch(technique: OptimizerTechnique, cases: Any, execution: str) -> None:
    """Held to PyTorch's for-loop: no kernel that could read or write beyond a tensor's memory.

    PyTorch's foreach is the reference for parameters alone; it refuses gradients of types that its for-loop converts.
    """
    reference = "foreach" if execution == "foreach" and cases is _ill_fitting_parameters else "forloop"

    def check(named: tuple[str, Case]) -> None:
        name, case = named
        if execution == "foreach" and name == "of another's memory":
            return  # whether it is read before or after the other's step is the implementation's own affair
        theirs = functools.partial(technique.torch, lr=0.1, **IMPLEMENTATIONS[reference])  # type: ignore[arg-type]
        ours = functools.partial(technique.ours, lr=0.1, **IMPLEMENTATIONS[execution])
        (error, expected), (said, values) = _outcome(case, theirs), _outcome(case, ours)
        if name in ("integers", "truth values"):  # the words are those of whichever operator comes first
            assert error and said and (execution != "fused" or "floating point Tensors of supported devices" in said)
            return
        if error.startswith("IndexError"):
            assert said.startswith("IndexError: a gradient of shape"), said
            return
        assert said == error, f"{technique.name}, {name}: {said!r} instead of {error!r}"
        for value, theirs_value in zip(values, expected, strict=True):
            torch.testing.assert_close(value, theirs_value, msg=lambda text: f"{technique.name}, {name}: {text}")

    for_each(cases(), check)


@executions
def test_no_memory_beyond_a_gradients_end_is_read(technique: OptimizerTechnique, execution: str) -> None:
    """A gradient that became shorter: refused, and nothing of what lies behind it arrives anywhere."""
    p = ready(torch.ones(5))
    optimizer = technique.ours([p], lr=0.1, **IMPLEMENTATIONS[execution])
    stepped(optimizer)
    p.grad.data = torch.full((64,), math.nan)[:3].fill_(1.0)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="must match the size"):
        optimizer.step()
    assert torch.isfinite(p).all()


def _bad_lists() -> Iterator[tuple[str, Callable[[], Any]]]:
    def leaf() -> Tensor:
        return torch.ones(2, 3, requires_grad=True)

    shared = leaf()
    yield "empty list", list
    yield "empty generator", lambda: iter(())
    yield "a tensor", leaf
    yield "a set", lambda: {leaf()}
    yield "a set in a group", lambda: [{"params": {leaf()}}]
    yield "not a leaf", lambda: [leaf() * 2]
    yield "a number", lambda: [leaf(), 3.0]
    yield "nothing", lambda: [None]
    yield "a group without parameters", lambda: [{"lr": 0.1}]
    yield "a list in a list", lambda: [[leaf()]]
    yield "in two groups", lambda: [{"params": [shared]}, {"params": [shared]}]
    yield "twice in a group", lambda: [shared, shared]
    yield "names for some", lambda: [("a", leaf()), leaf()]
    yield "names in one group", lambda: [{"params": [("a", leaf())]}, {"params": [leaf()]}]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.filterwarnings("ignore:optimizer parameters need to be organized in ordered")
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_bad_lists_of_parameters_are_told_what_pytorch_tells(technique: OptimizerTechnique) -> None:
    errors = []

    def check(named: tuple[str, Callable[[], Any]]) -> None:
        name, make = named
        expected = _outcome(lambda build: build(make()), technique.torch)[0]  # type: ignore[arg-type]
        assert _outcome(lambda build: build(make()), technique.ours)[0] == expected, f"{technique.name}, {name}"
        errors.append(bool(expected))

    for_each(_bad_lists(), check)
    assert sum(errors) >= 11


@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_parameters_on_a_device_without_data(technique: OptimizerTechnique) -> None:
    """A meta tensor beside one on the CPU: PyTorch's for-loop steps the one and only pretends to step the other."""

    def case(build: Build) -> Optimizer:
        params = [torch.ones(3, 3, requires_grad=True), torch.ones(3, 3, device="meta", requires_grad=True)]
        for p in params:
            p.grad = torch.ones_like(p).to_sparse() if technique.only_sparse else torch.ones_like(p)
        optimizer = stepped(build(params))
        optimizer.param_groups[0]["params"] = params[:1]
        return optimizer

    (error, expected), (said, values) = (_outcome(case, cls) for cls in (technique.torch, technique.ours))  # type: ignore[arg-type]
    assert said == error and all(map(bits_equal, values, expected))
    if "fused" in technique.implementations:
        with pytest.raises(RuntimeError, match="floating point Tensors of supported devices"):
            case(functools.partial(technique.ours, fused=True))


@executions
def test_the_state_of_another_parameter_is_refused_by_name(technique: OptimizerTechnique, execution: str) -> None:
    """PyTorch loads it, and fails in the middle of the next step."""
    kwargs = {**IMPLEMENTATIONS[execution], **({"momentum": 0.9} if technique.name == "SGD" else {})}
    other = stepped(technique.ours([ready(torch.ones(2)), ready(torch.ones(4, 3))], **kwargs))
    optimizer = stepped(technique.ours([ready(torch.ones(2)), ready(torch.ones(3, 4))], **kwargs))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of shape \(4, 3\) for a parameter of shape \(3, 4\) \(parameter group 0\)"):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == str(before), "the refused state dict left traces"
    optimizer.register_load_state_dict_pre_hook(lambda _, packed: before)
    optimizer.load_state_dict(other.state_dict())  # which the hook puts right
    stepped(optimizer)


@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_state_dicts_of_other_groups_are_told_what_pytorch_tells(technique: OptimizerTechnique) -> None:
    def errors(cls: Build) -> list[str]:
        def fresh(*sizes: int) -> Optimizer:
            return cls([{"params": [torch.ones(2, 2, requires_grad=True) for _ in range(size)]} for size in sizes])

        texts = []
        for sizes in ((1,), (1, 1, 1), (2, 1), (1, 2)):
            with pytest.raises(ValueError) as caught:
                fresh(1, 1).load_state_dict(fresh(*sizes).state_dict())
            texts.append(str(caught.value))
        with pytest.raises(KeyError) as missing:
            fresh(1).load_state_dict({"state": {}})
        return [*texts, str(missing.value)]

    assert errors(technique.ours) == errors(technique.torch)  # type: ignore[arg-type]


def test_fuse_refuses_sparse_gradients() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optim.fuse(optimizer)
    assert type(optimizer) is torch.optim.SGD
