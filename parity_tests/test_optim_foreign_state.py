"""State dicts of other classes: refused by name, unless they mean the same; what users keep in theirs is loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from parity_tests.optim_cases import EVERY_TECHNIQUE, for_each
from parity_tests.twins import RICH
from reimpl.optim import Adam, NesterovLookahead
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizer_checks import assert_same
from reimpl.testing.optimizers import parameters

pytestmark = pytest.mark.quick
Optimizer = torch.optim.Optimizer
ALL: list[OptimizerTechnique] = [param.values[0] for param in EVERY_TECHNIQUE]
#: Of one rule and one state, but for where the weight decay goes, which a group says.
OF_ONE_RULE = ({"Adam", "AdamW"},)
#: Of the same options, which is all that a state dict holds before the first step.
OF_THE_SAME_OPTIONS = ({"Adamax", "RAdam"},)


def _name_of(value: object) -> str | None:
    return value.name if isinstance(value, OptimizerTechnique) else None


def _made(cls: Callable[..., Optimizer], name: str) -> Optimizer:
    """An optimizer with one matrix, which has the gradient that it takes."""
    p = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
    p.grad = torch.ones(3, 4).to_sparse() if name == "SparseAdam" else torch.ones(3, 4)
    return cls([p], **RICH[name])


def _written(technique: OptimizerTechnique) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """What ours and PyTorch's class wrote, before the first step and after the second."""
    for whose, cls in (("ours", technique.ours), ("PyTorch's", technique.torch)):
        for steps in (0, 2):
            optimizer = _made(cls, technique.name)  # type: ignore[arg-type]
            for _ in range(steps):
                optimizer.step()
            yield whose, steps, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("writer", ALL, ids=_name_of)
@pytest.mark.parametrize("reader", ALL, ids=_name_of)
def test_a_state_dict_of_another_class(reader: OptimizerTechnique, writer: OptimizerTechnique) -> None:
    """PyTorch loads it, to fail in the next step or to go another way; ours refuses it and stays as it was."""

    def check(written: tuple[str, int, dict[str, Any]]) -> None:
        whose, steps, saved = written
        pair = {reader.name, writer.name}
        ours = _made(reader.ours, reader.name)
        before = str(ours.state_dict())
        if len(pair) == 1 or pair in OF_ONE_RULE or (steps == 0 and pair in OF_THE_SAME_OPTIONS):
            theirs = _made(reader.torch, reader.name)  # type: ignore[arg-type]
            for optimizer in (ours, theirs):
                optimizer.load_state_dict(copy.deepcopy(saved))
                optimizer.step()
            assert_same(ours, theirs, technique=reader.name, case=f"state of {whose} {writer.name}", step=steps + 1)
            return
        with pytest.raises(ValueError, match=rf"^loaded state dict has .*: it is not one of {reader.name}$"):
            ours.load_state_dict(saved)
        assert str(ours.state_dict()) == before, "the refused state dict left traces"
        ours.register_load_state_dict_pre_hook(lambda optimizer, _: copy.deepcopy(optimizer.state_dict()))
        ours.load_state_dict(saved)  # the hook makes it right

    for_each(_written(writer), check)


@pytest.mark.parametrize("technique", ALL, ids=_name_of)
def test_the_look_ahead_reads_and_is_read_by_itself_alone(technique: OptimizerTechnique) -> None:
    other = NesterovLookahead([torch.ones(3, 4, requires_grad=True)])
    with pytest.raises(ValueError, match=f"it is not one of {technique.name}"):
        _made(technique.ours, technique.name).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="it is not one of NesterovLookahead"):
        other.load_state_dict(_made(technique.ours, technique.name).state_dict())
    other.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", ["Adamax", "NAdam", "RAdam"])
def test_what_tells_the_relatives_of_adam_apart(name: str) -> None:
    """Which have its options but ``amsgrad``, and, before the flags came, no fewer: then their state tells."""
    technique = next(t for t in ALL if t.name == name)
    optimizer = _made(technique.ours, name)
    optimizer.step()
    saved = optimizer.state_dict()
    adam = Adam([torch.ones(3, 4, requires_grad=True)])
    with pytest.raises(ValueError, match="has no amsgrad in parameter group 0: it is not one of Adam"):
        adam.load_state_dict(saved)
    if name == "NAdam":
        saved["param_groups"][0]["amsgrad"] = False
        with pytest.raises(ValueError, match="has momentum_decay, an option of NAdam, in parameter group 0"):
            adam.load_state_dict(saved)
        return
    for flag in ("maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(flag, None)
    if name == "RAdam":  # whose averages are Adam's
        adam.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match="has no exp_avg_sq in the state of a parameter of group 0"):
        adam.load_state_dict(saved)


@pytest.mark.parametrize("technique", ALL, ids=_name_of)
def test_what_users_keep_in_groups_and_state_is_loaded(technique: OptimizerTechnique) -> None:
    """A scheduler's notes, flags that the class has not got, another class's option in both, state of their own."""
    notes: dict[str, Any] = {"initial_lr": 0.5, "note": "kept", "foreach": None, "capturable": False}
    both = {"rho": 0.25} if technique.name != "Adadelta" else {"lambd": 0.25}
    loaded = []
    for cls in (technique.ours, technique.torch):
        optimizer = _made(cls, technique.name)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.param_groups[0].update(notes | both)
        optimizer.state[parameters(optimizer)[0]]["note"] = 7
        other = _made(cls, technique.name)  # type: ignore[arg-type]
        other.param_groups[0].update(both)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        group, state = other.param_groups[0], other.state[parameters(other)[0]]
        assert {key: group[key] for key in notes | both} == notes | both and state["note"] == 7
        loaded.append({key: value for key, value in group.items() if key != "params"})
    assert loaded[1].items() <= loaded[0].items()
    strange = _made(technique.ours, technique.name)
    saved = strange.state_dict()
    saved["param_groups"][0].update(both)
    with pytest.raises(ValueError, match=f"has {next(iter(both))}, an option of A.*, in parameter group 0"):
        strange.load_state_dict(saved)


def test_state_that_the_options_ask_for_must_be_there() -> None:
    """PyTorch fails in the next step, with the bare key."""
    optimizer = Adam([torch.ones(2, requires_grad=True)])
    parameters(optimizer)[0].grad = torch.ones(2)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="has no max_exp_avg_sq in the state of a parameter of group 0"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["max_exp_avg_sq"] = torch.ones(2)
    optimizer.load_state_dict(saved)
    optimizer.step()
