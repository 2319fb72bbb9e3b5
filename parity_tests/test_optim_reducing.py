"""Drop-in behaviour of the rules that are not elementwise: SparseAdam, Adafactor and Muon."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import reimpl.optim
from parity_tests import twins
from parity_tests.declarations.optim_reducing import OPTIMIZERS
from parity_tests.oracle.optim_reducing import newton_schulz
from reimpl.optim.muon import orthogonalize
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizer_checks import assert_same
from reimpl.testing.optimizers import clone_params, parameters, sparse_rows, step_with
from reimpl.testing.samples import random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal

pytestmark = pytest.mark.quick
Optimizer = torch.optim.Optimizer
RICH: dict[str, dict[str, Any]] = {
    "SparseAdam": {"lr": 0.05, "betas": (0.8, 0.95)},
    **{name: twins.RICH[name] for name in ("Adafactor", "Muon")},
}
MATRICES = ((6, 4), (3, 7), (9, 9))


@pytest.fixture(params=[pytest.param(technique, id=technique.name) for technique in OPTIMIZERS])
def technique(request: pytest.FixtureRequest) -> OptimizerTechnique:
    return request.param


def _params(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [random_tensor(s, dtype, seeded_generator(0, "reducing", s)).requires_grad_() for s in MATRICES]


def _grads(technique: OptimizerTechnique, step: int, params: list[torch.Tensor]) -> list[torch.Tensor]:
    grads = [random_tensor(p.shape, p.dtype, seeded_generator(step, "grad", p.shape)) for p in params]
    return [sparse_rows(g, step) for g in grads] if technique.only_sparse else grads


class _Twins:
    """Ours and PyTorch's over copies of the same matrices."""

    def __init__(self, technique: OptimizerTechnique, select: Callable[[Any], Any] = list, **kwargs: Any) -> None:
        assert technique.torch is not None
        self.technique = technique
        options = {**RICH[technique.name], **kwargs}
        params = _params()
        self.pair: list[Optimizer] = [
            cls(select(clone_params(params)), **copy.deepcopy(options)) for cls in (technique.ours, technique.torch)
        ]

    def train(self, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            for optimizer in self.pair:
                step_with(optimizer, _grads(self.technique, step, parameters(optimizer)))
            assert_same(*self.pair, technique=self.technique.name, case="training", step=step + 1)


def _continue(technique: OptimizerTechnique, *optimizers: Optimizer) -> None:
    for step in range(10, 13):
        for optimizer in optimizers:
            step_with(optimizer, _grads(technique, step, parameters(optimizer)))


def test_defaults_state_dict_and_groups_are_pytorchs(technique: OptimizerTechnique) -> None:
    twins = _Twins(technique)
    assert twins.pair[0].defaults == twins.pair[1].defaults
    twins.train(2)
    ours, theirs = (optimizer.state_dict() for optimizer in twins.pair)
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert [type(v) for v in ours["state"][index].values()] == [type(v) for v in state.values()]


def test_a_closures_loss_comes_back(technique: OptimizerTechnique) -> None:
    for optimizer in _Twins(technique).pair:
        grads = _grads(technique, 0, parameters(optimizer))

        def closure(optimizer: Optimizer = optimizer, grads: list[torch.Tensor] = grads) -> str:
            assert torch.is_grad_enabled()
            for p, g in zip(parameters(optimizer), grads):
                p.grad = g
            return "loss"

        with torch.no_grad():
            assert optimizer.step(closure) == "loss"  # type: ignore[arg-type]
        assert optimizer.step() is None


def test_groups_with_options_of_their_own(technique: OptimizerTechnique) -> None:
    twins = _Twins(technique, lambda params: [{"params": params[:1], "lr": 0.3}, {"params": params[1:]}])
    twins.train(3)
    for optimizer in twins.pair:
        optimizer.add_param_group({"params": [torch.ones(4, 5, requires_grad=True)], "lr": 0.2})
    twins.train(3, first=3)
    for optimizer in twins.pair:
        optimizer.param_groups[0]["lr"] = 0.01
    twins.train(3, first=6)


def test_tensor_learning_rate_changed_in_place(technique: OptimizerTechnique) -> None:
    twins = _Twins(technique, lr=torch.tensor([0.05]))
    for step in range(4):
        twins.train(1, first=step)
        for optimizer in twins.pair:
            optimizer.param_groups[0]["lr"].mul_(0.7)


def test_schedules_hooks_and_zero_grad(technique: OptimizerTechnique) -> None:
    twins, calls = _Twins(technique), []
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) for optimizer in twins.pair]
    twins.pair[0].register_step_pre_hook(lambda *_: calls.append("pre"))
    twins.pair[0].register_step_post_hook(lambda *_: calls.append("post"))
    for step in range(4):
        twins.train(1, first=step)
        for scheduler in schedulers:
            scheduler.step()
    assert calls == ["pre", "post"] * 4
    twins.pair[0].zero_grad()
    assert all(p.grad is None for p in parameters(twins.pair[0]))


def test_parameters_without_gradients_stay(technique: OptimizerTechnique) -> None:
    twins = _Twins(technique)
    for optimizer in twins.pair:
        grads = _grads(technique, 0, parameters(optimizer))
        step_with(optimizer, [grads[0], None, grads[2]])
        step_with(optimizer, [None, grads[1], grads[2]])
        step_with(optimizer, [None, None, None])
    assert_same(*twins.pair, technique=technique.name, case="skipped", step=3)


@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
def test_gradient_scaling_with_an_overflow(foreach: bool) -> None:
    pair = []
    for cls, flag in ((reimpl.optim.Adafactor, foreach), (torch.optim.Adafactor, False)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        optimizer = cls(model.parameters(), **RICH["Adafactor"], foreach=flag)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(5):
            optimizer.zero_grad()
            loss = (model(torch.ones(2, 5) * step) - 1).square().mean()
            scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 128.0
        pair.append(optimizer)
    assert_same(*pair, technique="Adafactor", case="scaled", step=4)


def _copied(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer)


def _pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def _saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = type(optimizer)(clone_params(parameters(optimizer)))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def _as_torch(optimizer: Any) -> Any:
    twin = optimizer.to_torch()
    assert type(twin).__module__.startswith("torch.") and parameters(twin)[0] is parameters(optimizer)[0]
    return copy.deepcopy(twin)


@pytest.mark.parametrize("travel", [_copied, _pickled, _saved, _as_torch], ids=lambda f: f.__name__.strip("_"))
def test_a_copy_goes_on_to_the_same_bits(technique: OptimizerTechnique, travel: Callable[[Any], Any]) -> None:
    twins = _Twins(technique)
    twins.train(3)
    other = travel(twins.pair[0])
    _continue(technique, twins.pair[0], other)
    assert_same(twins.pair[0], other, technique=technique.name, case=travel.__name__, step=6)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_checkpoints_of_old_versions(technique: OptimizerTechnique, as_tensor: bool) -> None:
    """``step`` as a number or as a tensor, whichever is not today's, and groups without the later options."""
    twins = _Twins(technique)
    twins.train(3)
    saved = copy.deepcopy(twins.pair[1].state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = torch.tensor(float(state["step"])) if as_tensor else int(state["step"])
    for group in saved["param_groups"]:
        for key in ("foreach", "maximize"):
            group.pop(key, None)
    fresh = technique.ours(clone_params(parameters(twins.pair[0])))
    fresh.load_state_dict(saved)
    _continue(technique, fresh, twins.pair[1])
    assert_same(fresh, twins.pair[1], technique=technique.name, case="old checkpoint", step=6)


def _first_error(cls: Any, param: torch.Tensor, grad: torch.Tensor | None) -> tuple[type, str]:
    param = param.detach().clone().requires_grad_()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        optimizer = cls([param])
        param.grad = grad
        optimizer.step()
    return caught.type, str(caught.value)


def test_parameters_and_gradients_of_the_wrong_kind(technique: OptimizerTechnique) -> None:
    dense, cplx = torch.ones(3, 2), torch.ones(3, 2, dtype=torch.complex64)
    cases = [(cplx, cplx), (dense, dense if technique.only_sparse else dense.to_sparse())]
    if technique.name == "SparseAdam":
        cases.append((dense.to_sparse(), dense.to_sparse()))
    if technique.name == "Muon":
        cases += [(torch.ones(3), torch.ones(3)), (torch.ones(2, 2, 2), torch.ones(2, 2, 2))]
    for param, grad in cases:
        assert _first_error(technique.ours, param, grad) == _first_error(technique.torch, param, grad)


def test_sparse_gradients_of_an_embedding() -> None:
    pair = []
    for cls in (reimpl.optim.SparseAdam, torch.optim.SparseAdam):
        torch.manual_seed(2)
        embedding = nn.Embedding(10, 4, sparse=True)
        optimizer = cls(embedding.parameters(), lr=0.1)
        untouched = embedding.weight.detach()[[0, 9]].clone()
        for step in range(1, 5):
            optimizer.zero_grad()
            embedding(torch.tensor([step, 3, 3, 7])).square().sum().backward()
            assert not embedding.weight.grad.is_coalesced()
            optimizer.step()
        optimizer.zero_grad()
        (embedding(torch.tensor([], dtype=torch.int64)).sum() * 0).backward()
        optimizer.step()  # no row at all: the step is counted, nothing moves
        assert bits_equal(embedding.weight[[0, 9]], untouched)
        pair.append(optimizer)
    assert_same(*pair, technique="SparseAdam", case="embedding", step=5)


def test_adafactor_takes_each_parameters_own_machine_epsilon() -> None:
    """PyTorch's takes the first parameter's for the whole group, so that the order of parameters changes the result."""

    def run(cls: Any, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        params = [torch.ones(4, dtype=dtype, requires_grad=True) for dtype in dtypes]
        optimizer = cls(params, lr=0.1)
        step_with(optimizer, [torch.full((4,), 1e-3, dtype=dtype) for dtype in dtypes])
        return next(p.detach() for p in params if p.dtype == torch.bfloat16)

    alone = run(torch.optim.Adafactor, (torch.bfloat16,))
    assert bits_equal(run(reimpl.optim.Adafactor, (torch.float64, torch.bfloat16)), alone)
    assert not bits_equal(run(torch.optim.Adafactor, (torch.float64, torch.bfloat16)), alone)


@pytest.mark.parametrize("foreach", [False, True], ids=["forloop", "foreach"])
def test_adafactor_leaves_empty_parameters_alone(foreach: bool) -> None:
    params = [torch.ones(shape, requires_grad=True) for shape in ((0,), (3,), (0, 4), (4, 0), (2, 3))]
    optimizer = reimpl.optim.Adafactor(params, foreach=foreach)
    step_with(optimizer, [torch.ones_like(p) for p in params])
    assert [bool((p != 1).any()) for p in params] == [False, True, False, False, True]
    assert all(torch.isfinite(p).all() for p in params)


def test_adafactors_state_is_a_row_and_a_column() -> None:
    p = torch.ones(3, 50, 70, requires_grad=True)
    optimizer = reimpl.optim.Adafactor([p])
    step_with(optimizer, [torch.ones_like(p)])
    assert sum(value.numel() for value in optimizer.state[p].values()) == 1 + 3 * (50 + 70)


def test_muons_direction_is_nearly_orthogonal() -> None:
    for shape in ((8, 8), (5, 16), (16, 5), (1, 4), (64, 32)):
        g = random_tensor(shape, torch.float64, seeded_generator(0, "muon", shape))
        got = orthogonalize(g, (3.4445, -4.775, 2.0315), 5, 1e-7)
        exact = newton_schulz(g.numpy(), (3.4445, -4.775, 2.0315), 5, 1e-7)
        assert got.dtype == torch.bfloat16 and got.shape == g.shape
        # bfloat16 rounds by 2⁻⁸; five iterations whose slope at 1 is about -1.2 and at 0 is 3.4 carry the errors of
        # small singular values, hence 32 roundings
        np.testing.assert_allclose(got.double().numpy(), exact, rtol=0, atol=32 * 2**-8)
        values = torch.linalg.svdvals(got.double())
        assert values.max() < 1.25 and values.max() > 0.65


def test_muon_steps_by_the_rate_whatever_the_gradients_size() -> None:
    sizes = []
    for factor in (1.0, 1024.0):
        p = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
        grad = random_tensor((6, 4), torch.float64, seeded_generator(0, "muon")) * factor
        step_with(reimpl.optim.Muon([p], lr=0.1), [grad])
        sizes.append(p.detach())
    assert bits_equal(*sizes)


def test_compiled_steps_are_the_eager_ones(technique: OptimizerTechnique) -> None:
    torch._dynamo.reset()
    pair = [technique.ours(_params(), **RICH[technique.name]) for _ in range(2)]
    compiled = torch.compile(pair[0].step)
    for step in range(3):
        grads = _grads(technique, step, parameters(pair[0]))
        for p, g in zip(parameters(pair[0]), grads):
            p.grad = g
        compiled()
        step_with(pair[1], grads)
    assert_same(*pair, technique=technique.name, case="compiled", step=3)
