"""Averages of weights and of sequences: PyTorch's bits, state dicts and errors, and the oracle's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import reimpl.nn
from parity_tests.oracle import averaging as oracle
from reimpl.optim import ewa, swa_utils
from reimpl.testing.guard import independence_guard
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal, judge, to_oracle

pytestmark = pytest.mark.quick
torch_utils = torch.optim.swa_utils
STEPS = 8


def _model(dtype: torch.dtype = torch.float32, namespace: Any = nn) -> nn.Module:
    torch.manual_seed(3)
    layers = (namespace.Linear(4, 6), namespace.BatchNorm1d(6), namespace.ReLU(), namespace.Linear(6, 2))
    return nn.Sequential(*layers).to(dtype)


def _change(model: nn.Module, step: int) -> None:
    """New weights, and new running statistics."""
    with torch.no_grad():
        for index, value in enumerate([*model.parameters(), *model.buffers()]):
            if value.is_floating_point() or value.is_complex():
                value.copy_(random_tensor(value.shape, value.dtype, seeded_generator(step, "average", index)).abs())
            else:
                value.fill_(7 * step + 1)


def _swa_of_integers_too(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
    """PyTorch's function over lists, which fails on the count of batches, with its own for one tensor there."""
    if averaged[0].is_floating_point():
        torch_utils.get_swa_multi_avg_fn()(averaged, current, count)
    else:
        for mean, value in zip(averaged, current):
            mean.copy_(torch_utils.get_swa_avg_fn()(mean, value, count))


FUNCTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "default": lambda module: {},
    "multi swa": lambda module: {"multi_avg_fn": module.get_swa_multi_avg_fn()},
    "multi ema": lambda module: {"multi_avg_fn": module.get_ema_multi_avg_fn(0.9)},
    "swa": lambda module: {"avg_fn": module.get_swa_avg_fn()},
    "ema": lambda module: {"avg_fn": module.get_ema_avg_fn(0.9)},
    "custom": lambda module: {"avg_fn": lambda mean, value, n: 0.5 * mean + 0.5 * value / (n + 1)},
}


@pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_averaged_model_is_pytorchs(function: str, dtype: torch.dtype, use_buffers: bool, device: torch.device) -> None:
    model = _model(dtype).to(device)
    modules = (swa_utils, torch_utils)
    averages = [m.AveragedModel(model, use_buffers=use_buffers, **FUNCTIONS[function](m)) for m in modules]
    if use_buffers and function == "multi swa":
        averages[1].multi_avg_fn = _swa_of_integers_too
    for step in range(STEPS):
        _change(model, step)
        for average in averages:
            average.update_parameters(model)
        ours, theirs = (average.state_dict() for average in averages)
        assert list(ours) == list(theirs) and "n_averaged" in ours
        for key, value in theirs.items():
            assert bits_equal(ours[key], value), f"{key} after update {step + 1}"
    assert int(averages[0].n_averaged) == STEPS
    x = torch.ones(3, 4, dtype=dtype, device=device)
    assert bits_equal(averages[0].eval()(x), averages[1].eval()(x))


def test_state_goes_to_pytorch_and_back() -> None:
    for first, second in ((swa_utils, torch_utils), (torch_utils, swa_utils)):
        model = _model()
        whole = first.AveragedModel(model)
        other = second.AveragedModel(_model())
        for step in range(2 * STEPS):
            if step == STEPS:
                other.load_state_dict(copy.deepcopy(whole.state_dict()))
            _change(model, step)
            whole.update_parameters(model)
            if step >= STEPS:
                other.update_parameters(model)
        assert all(bits_equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", ["default", "multi swa", "multi ema", "swa", "ema"])
def test_three_way_parity(function: str, dtype: torch.dtype, device: torch.device) -> None:
    for seed in SEEDS:
        shape, generator = (11, 3), seeded_generator(seed, "path")
        path = [random_tensor(shape, dtype, generator, device) for _ in range(STEPS)]
        results = []
        for module in (swa_utils, torch_utils):
            model = nn.ParameterList([torch.zeros(shape, dtype=dtype, device=device)])
            average = module.AveragedModel(model, **FUNCTIONS[function](module))
            for value in path:
                model[0].data.copy_(value)
                average.update_parameters(model)
            results.append(average.module[0].detach())
        arrays = [to_oracle(value) for value in path]
        exact, scale = (
            oracle.moving_average(a, 0.9) if "ema" in function else oracle.polyak(a)
            for a in (arrays, [np.abs(array) for array in arrays])
        )
        judge(*results, exact, scale).check("AveragedModel", f"{function}, {dtype}", "average")


def test_polyaks_average_is_the_mean_and_the_copy_is_its_own() -> None:
    model = _model(torch.float64)
    average = swa_utils.AveragedModel(model)
    seen = []
    for step in range(STEPS):
        _change(model, step)
        average.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    for index, p in enumerate(average.module.parameters()):
        torch.testing.assert_close(p.detach(), torch.stack([row[index] for row in seen]).mean(0))
        assert p.data_ptr() != list(model.parameters())[index].data_ptr()


@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_swa_multi_avg_fn"])
@pytest.mark.parametrize("count", [4, torch.tensor(4)], ids=["number", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64], ids=str)
def test_functions_over_lists_are_pytorchs(name: str, count: Any, dtype: torch.dtype) -> None:
    before = [torch.arange(5).to(dtype), torch.ones(2, 3).to(dtype)]
    current = [x * 7000 + 2000 for x in before]
    ours, theirs = ([x.clone() for x in before] for _ in range(2))
    getattr(swa_utils, name)()(ours, current, count)
    if name == "get_swa_multi_avg_fn" and dtype == torch.int64:
        with pytest.raises(RuntimeError):  # PyTorch's divides integers in place
            getattr(torch_utils, name)()(theirs, current, count)
        theirs = [x.copy_(torch_utils.get_swa_avg_fn()(x, y, count)) for x, y in zip(before, current)]
    else:
        getattr(torch_utils, name)()(theirs, current, count)
    assert all(map(bits_equal, ours, theirs)) and not bits_equal(ours[0], torch.arange(5).to(dtype))


@pytest.mark.parametrize("name", ["get_ema_multi_avg_fn", "get_ema_avg_fn"])
@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_decays_out_of_range_are_refused_in_pytorchs_words(name: str, decay: float) -> None:
    texts = []
    for module in (swa_utils, torch_utils):
        with pytest.raises(ValueError) as caught:
            getattr(module, name)(decay)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_bad_models_are_refused() -> None:
    functions = {"avg_fn": swa_utils.get_swa_avg_fn(), "multi_avg_fn": swa_utils.get_swa_multi_avg_fn()}
    with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn should be provided"):
        swa_utils.AveragedModel(_model(), **functions)
    with pytest.raises(ValueError, match="expected a model of 6 tensors to average, got one of 2"):
        swa_utils.AveragedModel(_model()).update_parameters(nn.Linear(4, 6))
    with pytest.raises(ValueError, match="Invalid decay value nan"):
        swa_utils.get_ema_avg_fn(float("nan"))


@pytest.mark.parametrize("as_pairs", [False, True], ids=["tensors", "pairs"])
@pytest.mark.parametrize("training", [False, True])
def test_update_bn_is_pytorchs(as_pairs: bool, training: bool, device: torch.device) -> None:
    batches: list[Any] = [random_tensor((n, 4), torch.float32, seeded_generator(n, "bn")) for n in (5, 9, 2)]
    batches = [(batch, 0) for batch in batches] if as_pairs else batches
    models = [_model().to(device).train(training) for _ in range(2)]
    for module, model in zip((swa_utils, torch_utils), models):
        model[1].momentum = 0.3
        module.update_bn(batches, model, device=device)
        assert model[1].momentum == 0.3 and model.training is model[1].training is training
    ours, theirs = (model.state_dict() for model in models)
    assert all(bits_equal(ours[key], value) for key, value in theirs.items())
    assert int(ours["1.num_batches_tracked"]) == 3
    assert not bits_equal(ours["1.running_mean"], torch.zeros(6))


def test_update_bn_finds_our_layers_too() -> None:
    batches = [random_tensor((n, 4), torch.float64, seeded_generator(n, "bn")) for n in (5, 9, 2)]
    models = [_model(torch.float64, namespace) for namespace in (nn, reimpl.nn)]
    for model in models:
        swa_utils.update_bn(iter(batches), model)
    # at most nine numbers below 4 added up, then three of those sums: some 16 roundings on either side
    limit = 4 * 16 * torch.finfo(torch.float64).eps
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[key], value, rtol=0, atol=limit)


def test_update_bn_leaves_everything_as_it_was_when_a_batch_fails() -> None:
    model = _model().eval()
    with pytest.raises(RuntimeError):
        swa_utils.update_bn([torch.ones(3, 4), torch.ones(3, 5)], model)
    assert model[1].momentum == 0.1 and not model.training
    plain = nn.Linear(2, 2)
    swa_utils.update_bn([torch.ones(0)], plain)  # nothing to update: no batch is run


def test_nothing_of_pytorchs_is_called() -> None:
    model = _model()
    with independence_guard(["torch.optim.swa_utils.*"]) as seen:
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
        for _ in range(2):
            average.update_parameters(model)
        swa_utils.update_bn([torch.ones(3, 4)], average)
    assert any(name.startswith("aten::") for name in seen), "the guard slept"
    assert not isinstance(average, torch_utils.AveragedModel)
    for name in torch_utils.__all__:
        assert (getattr(swa_utils, name) is not getattr(torch_utils, name)) == (name in swa_utils.REIMPLEMENTED), name


# Sequences (O15)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ewa_against_the_oracle(dtype: torch.dtype, beta: float, bias_correction: bool, device: torch.device) -> None:
    for seed in SEEDS:
        for n in (1, 2, 3, 31, 32, 33):
            x = random_tensor((n, 3, 2), dtype, seeded_generator(seed, "ewa", n), device)
            got = ewa(x, beta, bias_correction)
            exact, scale = (oracle.ewa(a, beta, bias_correction) for a in (to_oracle(x), np.abs(to_oracle(x))))
            judge(got, None, exact, scale).check("ewa", f"beta={beta}, n={n}, {dtype}", "average")


def test_ewa_by_hand() -> None:
    assert ewa([1.0, 3.0], 0.5, bias_correction=False).tolist() == [0.5, 1.75]
    assert ewa([1, 3], 0.5).tolist() == pytest.approx([1.0, 7 / 3])
    assert ewa([torch.ones(2), torch.zeros(2)], 0.5, False).tolist() == [[0.5, 0.5], [0.25, 0.25]]
    assert ewa(torch.tensor([2, 2, 2]), 0.9).tolist() == pytest.approx([2.0] * 3)
    assert ewa([], 0.9).shape == (0,) and ewa(torch.empty(0, 3), 0.9).shape == (0, 3)
    assert ewa(torch.tensor([1 + 2j, 1 + 2j]), 0.5).tolist() == [1 + 2j, 1 + 2j]


def test_ewa_spans_about_the_inverse_of_one_minus_beta() -> None:
    """N4: after 1/(1 - β) steps a number's weight has fallen to about 1/e, and without correction it begins low."""
    for beta in (0.9, 0.98, 0.995):
        window = round(1 / (1 - beta))
        impulse = torch.zeros(10 * window, dtype=torch.float64)
        impulse[0] = 1
        weights = ewa(impulse, beta, bias_correction=False)
        # βʷ against 1/e: log β = -(1 - β) - (1 - β)²/2 - ..., so that the ratio is off by half of 1 - β
        assert weights[window] / weights[0] == pytest.approx(np.exp(-1), rel=0.6 * (1 - beta))
        constant = torch.ones(5, dtype=torch.float64)
        assert ewa(constant, beta, bias_correction=False)[0] == pytest.approx(1 - beta)
        torch.testing.assert_close(ewa(constant, beta), constant)


def test_ewa_is_differentiable() -> None:
    x = random_tensor((7, 2), torch.float64, seeded_generator(0, "ewa")).requires_grad_()
    for bias_correction in (True, False):
        assert torch.autograd.gradcheck(lambda x, b=bias_correction: ewa(x, 0.7, b), x)
        assert torch.autograd.gradgradcheck(lambda x, b=bias_correction: ewa(x.sin(), 0.7, b), x)


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_ewa_refuses_other_betas(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\), got"):
        ewa(torch.ones(3), beta)


def test_ewa_refuses_a_scalar() -> None:
    with pytest.raises(ValueError, match="x must have a first dimension"):
        ewa(torch.tensor(1.0), 0.9)
