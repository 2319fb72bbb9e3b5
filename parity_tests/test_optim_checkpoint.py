"""State: copies, pickles, files, names, checkpoints of old versions and of other dialects, and the way to PyTorch."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reimpl.optim
from parity_tests.optim_cases import TECHNIQUES, dialect_configs, for_each, pytorch_configs
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import assert_same, reference_of
from reimpl.testing.optimizers import (
    DENSE_LAYOUTS,
    STRIDED_LAYOUTS,
    clone_params,
    construct,
    make_grads,
    make_params,
    parameters,
    step_with,
)
from reimpl.testing.tolerance import bits_equal

Optimizer = torch.optim.Optimizer
LAYOUTS = (*DENSE_LAYOUTS[:1], *DENSE_LAYOUTS[5:7], *DENSE_LAYOUTS[-2:])
EXECUTIONS: dict[str, dict[str, Any]] = {
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
executions = pytest.mark.parametrize("execution", EXECUTIONS)


@pytest.fixture(params=TECHNIQUES)
def technique(request: pytest.FixtureRequest) -> OptimizerTechnique:
    return request.param


def _steps(optimizer: Optimizer, first: int, last: int, layouts: Any = LAYOUTS) -> None:
    dtype = parameters(optimizer)[0].dtype
    for step in range(first, last):
        step_with(optimizer, make_grads(layouts, dtype, step=step))


def _trained(
    technique: OptimizerTechnique, kwargs: dict[str, Any], steps: int = 3, cls: Callable[..., Optimizer] | None = None
) -> Optimizer:
    optimizer = construct(cls or technique.ours, make_params(LAYOUTS, torch.float32), **kwargs)
    _steps(optimizer, 0, steps)
    return optimizer


def _copied(optimizer: Optimizer) -> Optimizer:
    return copy.deepcopy(optimizer)


def _pickled(optimizer: Optimizer) -> Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


def _saved(optimizer: Optimizer) -> Optimizer:
    """A new optimizer that loaded the file of a ``torch.save``, read with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    taken = inspect.signature(type(optimizer)).parameters  # AdamW's decoupled_weight_decay is no argument
    options = {key: value for key, value in optimizer.defaults.items() if key in taken}
    fresh = type(optimizer)(clone_params(parameters(optimizer)), **options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@executions
@pytest.mark.parametrize("travel", [_copied, _pickled, _saved], ids=["deepcopy", "pickle", "save"])
def test_a_copy_goes_on_to_the_same_bits(
    technique: OptimizerTechnique, execution: str, travel: Callable[[Optimizer], Optimizer]
) -> None:
    def check(config: OptimizerConfig) -> None:
        optimizer = _trained(technique, {**config.kwargs, **EXECUTIONS[execution]})
        other = travel(optimizer)
        assert type(other) is type(optimizer) and parameters(other)[0] is not parameters(optimizer)[0]
        _steps(optimizer, 3, 6)
        _steps(other, 3, 6)
        assert_same(other, optimizer, technique=technique.name, case=f"{config.desc}, {execution}", step=6)

    configs = [OptimizerConfig("default"), *technique.configs]
    takes_tensor_lr = execution != "foreach" or not technique.name.startswith("Adam")
    for_each((c for c in configs if takes_tensor_lr or not isinstance(c.kwargs.get("lr"), torch.Tensor)), check)


@pytest.mark.quick
def test_named_parameters(technique: OptimizerTechnique) -> None:
    assert technique.torch is not None
    packed = []
    for cls in (technique.ours, technique.torch):
        model = torch.nn.Linear(2, 3)
        optimizer = cls([{"params": model.named_parameters(), "lr": 0.5}])
        assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        packed.append(optimizer.state_dict()["param_groups"])
    assert packed[0] == packed[1]
    ours = technique.ours(torch.nn.Linear(2, 3).named_parameters())
    ours.load_state_dict({"state": {}, "param_groups": packed[1]})
    assert ours.param_groups[0]["lr"] == 0.5 and ours.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.quick
@pytest.mark.parametrize("kept", [("params", "lr"), None], ids=["first release", "without flags"])
def test_checkpoints_of_old_versions(technique: OptimizerTechnique, kept: tuple[str, ...] | None) -> None:
    """``step`` as a number, groups without the options that came later: ours makes of it what PyTorch makes."""
    assert technique.torch is not None
    newer = {"maximize", "foreach", "differentiable", "capturable", "fused", "amsgrad", "nesterov", "centered"}
    saved = _trained(technique, {"lr": 0.05}, cls=technique.torch).state_dict()
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"] = int(entry["step"])
        entry.update({key: float(entry[key]) for key in ("mu_product", "eta", "mu") if key in entry})
    original = {"SGD": {"momentum", "dampening", "weight_decay"}}.get(technique.name, set())
    for group in saved["param_groups"]:
        for key in [k for k in group if k in newer and not (kept is None and k in ("amsgrad", "nesterov", "centered"))]:
            del group[key]
        assert original <= group.keys()
    pair = []
    for cls in (technique.ours, technique.torch):
        optimizer = cls(make_params(LAYOUTS, torch.float32), lr=0.1)
        optimizer.load_state_dict(copy.deepcopy(saved))
        _steps(optimizer, 3, 6)
        pair.append(optimizer)
    assert_same(*pair, technique=technique.name, case="old checkpoint", step=6)
    theirs = pair[1].param_groups[0]
    assert {k: v for k, v in pair[0].param_groups[0].items() if k in theirs and k != "params"} == {
        k: v for k, v in theirs.items() if k != "params"
    }


OLD_FILES = sorted((Path(__file__).parent / "data").glob("torch-*.pt"))


@pytest.mark.quick
@executions
@pytest.mark.parametrize("path", OLD_FILES, ids=lambda path: path.stem)
def test_files_of_old_releases(path: Path, execution: str, device: torch.device) -> None:
    """What torch 1.4, 1.11 and 1.12 saved, step counts as numbers and all: ours goes on as today's PyTorch does."""

    def check(name: str) -> None:
        kind, saved = name.split(",")[0], files[name]
        pair: list[Optimizer] = []
        for module, flags in ((reimpl.optim, EXECUTIONS[execution]), (torch.optim, {"foreach": False})):
            params = [p.to(device, copy=True).requires_grad_() for p in saved["params"]]
            cls = getattr(module, kind)
            optimizer = cls([{"params": [p]} for p in params], **({} if kind == "SparseAdam" else flags))
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
            for group in optimizer.param_groups if kind != "SparseAdam" else ():
                group.update(flags)  # which the oldest files lack, and the others have as None
            for step in range(3):
                grads = [torch.sin(5 * p + step).cpu() for p in saved["params"]]
                step_with(optimizer, [(g.to_sparse() if kind == "SparseAdam" else g).to(device) for g in grads])
            pair.append(optimizer)
        ours, theirs = pair
        assert [g["lr"] for g in ours.param_groups] == [saved["options"]["lr"], saved["options"]["lr"] / 2]
        if execution == "forloop" or (execution == "foreach" and device.type == "cpu"):
            assert_same(ours, theirs, technique=name, case=path.stem, step=6)
        for p, q, old in zip(parameters(ours), parameters(theirs), saved["params"], strict=True):
            torch.testing.assert_close(p, q)  # its default rtol: three steps, each within a few ulp
            assert ours.state[p].keys() == theirs.state[q].keys()
            assert "step" not in theirs.state[q] or float(ours.state[p]["step"]) == float(theirs.state[q]["step"]) == 6
            assert not bits_equal(p.cpu(), old)

    files = torch.load(path, weights_only=True)
    assert {name.split(",")[0] for name in files} >= {"SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW"}
    for_each(files, check)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_numbers_of_the_state_keep_their_precision(name: str) -> None:
    """PyTorch loads them in the parameter's dtype; in bfloat16 that leaves ASGD's rate two digits."""
    technique = next(p.values[0] for p in TECHNIQUES if p.id == name)
    kwargs = {"lr": 0.3, "t0": 0.0} if name == "ASGD" else {}
    optimizer = construct(technique.ours, make_params(LAYOUTS, torch.bfloat16), **kwargs)
    _steps(optimizer, 0, 3)
    other = construct(technique.ours, clone_params(parameters(optimizer)), **kwargs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = optimizer.to_torch()
    for p, q, r in zip(parameters(optimizer), parameters(other), parameters(twin)):
        for key in technique.ours.scalar_state:  # type: ignore[attr-defined]
            number = optimizer.state[p][key]
            assert number.dtype == torch.float32 and number != number.bfloat16()
            for copied in (other.state[q][key], twin.state[r][key]):
                assert bits_equal(copied, number) and copied is not number
    _steps(optimizer, 3, 6)
    _steps(other, 3, 6)
    assert_same(other, optimizer, technique=name, case="loaded, bfloat16", step=6)


def _dialects(technique: OptimizerTechnique) -> list[OptimizerConfig]:
    return [config for config in dialect_configs(technique) if not set(config.kwargs) <= {"fused"}]


def _own_keys(technique: OptimizerTechnique, config: OptimizerConfig) -> list[str]:
    """The arguments of a dialect that PyTorch's class does not have."""
    assert technique.torch is not None
    known = technique.torch([torch.ones(1)]).defaults
    return [key for key in config.kwargs if key not in known]


@pytest.mark.quick
def test_a_state_dict_without_a_dialects_key_keeps_the_constructors(technique: OptimizerTechnique) -> None:
    def check(config: OptimizerConfig) -> None:
        optimizer = _trained(technique, dict(config.kwargs))
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for key in _own_keys(technique, config):
                assert group.pop(key) == config.kwargs[key], f"{config.desc}: {key} is not in the state dict"
        other = construct(technique.ours, clone_params(parameters(optimizer)), **config.kwargs)
        with pytest.warns(UserWarning, match="PyTorch's way"):
            other.load_state_dict(saved)
        for key in _own_keys(technique, config):
            assert other.param_groups[0][key] == config.kwargs[key], f"{config.desc}: {key} was lost"

    _for_each_dialect(technique, check)


@pytest.mark.quick
def test_a_state_dict_of_another_dialect_is_refused(technique: OptimizerTechnique) -> None:
    def check(config: OptimizerConfig) -> None:
        saved = _trained(technique, dict(config.kwargs)).state_dict()
        plain = construct(technique.ours, make_params(LAYOUTS, torch.float32))
        before = str(plain.state_dict())
        with pytest.raises(ValueError) as caught:
            plain.load_state_dict(saved)
        assert any(key in str(caught.value) for key in _own_keys(technique, config)), str(caught.value)
        assert str(plain.state_dict()) == before, f"{config.desc}: the refused checkpoint left traces"

    _for_each_dialect(technique, check)


def _for_each_dialect(technique: OptimizerTechnique, check: Callable[[OptimizerConfig], None]) -> None:
    if not _dialects(technique):
        pytest.skip("has no dialect")
    for_each(_dialects(technique), check)


@executions
def test_to_torch_gives_pytorchs_optimizer_with_the_same_state(technique: OptimizerTechnique, execution: str) -> None:
    assert technique.torch is not None

    def check(config: OptimizerConfig) -> None:
        optimizer = _trained(technique, {**config.kwargs, **EXECUTIONS[execution]})
        twin = optimizer.to_torch()  # type: ignore[attr-defined]
        assert type(twin) is technique.torch
        assert [p is q for p, q in zip(parameters(twin), parameters(optimizer))] == [True] * len(LAYOUTS)
        assert_same(twin, optimizer, technique=technique.name, case=f"{config.desc}, to_torch", step=3)
        _steps(twin, 3, 5)
        for p in parameters(twin):
            assert p not in optimizer.state or all(
                twin.state[p][key] is not value for key, value in optimizer.state[p].items()
            )

    configs = pytorch_configs(technique, torch.device("cpu"), torch.float32)
    takes_tensor_lr = execution != "foreach" or not technique.name.startswith("Adam")
    for_each((c for c in configs if takes_tensor_lr or not isinstance(c.kwargs.get("lr"), torch.Tensor)), check)


@pytest.mark.quick
def test_to_torch_refuses_a_dialect_by_name(technique: OptimizerTechnique) -> None:
    def check(config: OptimizerConfig) -> None:
        optimizer = _trained(technique, dict(config.kwargs))
        with pytest.raises(ValueError) as caught:
            optimizer.to_torch()  # type: ignore[attr-defined]
        assert any(key in str(caught.value) for key in _own_keys(technique, config)), str(caught.value)

    _for_each_dialect(technique, check)


def _swap_parameter_storage(optimizer: Optimizer) -> None:
    for p in parameters(optimizer):
        p.data = p.data.clone() * 2


def _replace_state(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if value is not None:
                state[key] = value.clone() + (key == "step")


def _change_options(optimizer: Optimizer) -> None:
    optimizer.param_groups[0].update({"lr": 0.5, "weight_decay": 0.25, "maximize": True})


def _clear_state(optimizer: Optimizer) -> None:
    optimizer.state.clear()


def _load_itself(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _change_strides(optimizer: Optimizer) -> None:
    for p in parameters(optimizer):
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t() if p.is_contiguous() else p.data.contiguous()


INTERFERENCES = [_swap_parameter_storage, _replace_state, _change_options, _clear_state, _load_itself, _change_strides]


@pytest.mark.parametrize("interfere", INTERFERENCES, ids=lambda f: f.__name__.strip("_"))
def test_fused_steps_notice_what_changed_between_them(
    technique: OptimizerTechnique, interfere: Callable[[Optimizer], None]
) -> None:
    """Addresses kept from the last step must not outlive a change: a fresh copy, which keeps none, is right."""
    optimizer = _trained(technique, {**technique.configs[0].kwargs, "fused": True})
    if technique.name == "Adagrad" and interfere is _clear_state:
        pytest.skip("Adagrad's state exists from the constructor on, in PyTorch too")
    interfere(optimizer)
    fresh = pickle.loads(pickle.dumps(optimizer))
    changed = [p.detach().clone() for p in parameters(optimizer)]
    _steps(optimizer, 3, 6)
    _steps(fresh, 3, 6)
    assert_same(optimizer, fresh, technique=technique.name, case=interfere.__name__, step=6)
    assert not any(bits_equal(p, q) for p, q in zip(parameters(optimizer), changed) if p.numel())


def test_fused_steps_follow_the_gradients_storage_and_strides(technique: OptimizerTechnique) -> None:
    layouts = (*LAYOUTS, *STRIDED_LAYOUTS)
    params = make_params(layouts, torch.float32)
    cls, kwargs = technique.ours, {**technique.configs[0].kwargs, "fused": True}
    fused, fresh = construct(cls, params, **kwargs), construct(cls, clone_params(params), **kwargs)
    for step in range(4):
        # in the second half every gradient is of another layout than before
        grads = make_grads(layouts, torch.float32, step=step)
        if step >= 2:
            grads = [g if g is None or g.dim() < 2 else g.transpose(0, 1).contiguous().transpose(0, 1) for g in grads]
        fresh = pickle.loads(pickle.dumps(fresh))
        step_with(fused, grads)
        step_with(fresh, grads)
    assert_same(fused, fresh, technique=technique.name, case="gradient strides", step=4)
    reference, reference_kwargs = reference_of(technique, technique.configs[0])
    plain = construct(reference, make_params(layouts, torch.float32), **reference_kwargs)
    for step in range(4):
        step_with(plain, make_grads(layouts, torch.float32, step=step))
    for p, q in zip(parameters(fused), parameters(plain)):
        torch.testing.assert_close(p, q)  # its default rtol: four steps, each within a few ulp
