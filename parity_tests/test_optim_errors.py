"""Bad input: the same type of error with the same text as PyTorch's class, and ours by name where PyTorch has none."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import reimpl.optim
from parity_tests.optim_cases import EVERY_TECHNIQUE, TECHNIQUES, for_each
from parity_tests.versions import IS_REFERENCE
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.torch_database import OptimizerErrorCase, optimizer_error_inputs, optimizer_flags

pytestmark = pytest.mark.quick
Outcome = tuple[type[BaseException] | None, str, list[tuple[type[Warning], str]]]


def _outcome(build: Callable[[], Any]) -> Outcome:
    """Type and text of what ``build`` raises, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            build()
        except Exception as error:
            kind, text = type(error), str(error)
        else:
            kind, text = None, ""
    return kind, text, [(w.category, str(w.message)) for w in caught]


def _build_and_step(optimizer: Callable[..., Any], params: Any, kwargs: dict[str, Any]) -> Callable[[], None]:
    def build() -> None:
        built = optimizer(copy.deepcopy(params), **copy.deepcopy(kwargs))
        for group in built.param_groups:
            for p in group["params"]:
                if p.grad is None and p.is_leaf:
                    p.grad = torch.ones_like(p)
        built.step()

    return build


def _own_params(device: torch.device) -> list[torch.Tensor]:
    return [torch.ones(2, 3, device=device, requires_grad=True)]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_errors_of_pytorchs_database(technique: OptimizerTechnique, dtype: torch.dtype, device: torch.device) -> None:
    assert technique.torch is not None

    def check(case: OptimizerErrorCase) -> None:
        params = [torch.ones(2, 3, device=device, dtype=dtype)] if case.params is None else case.params
        expected = _outcome(_build_and_step(technique.torch, params, dict(case.kwargs)))  # type: ignore[arg-type]
        got = _outcome(_build_and_step(technique.ours, params, dict(case.kwargs)))
        assert got == expected, f"{technique.name} [{case.desc}]: {got} instead of {expected}"
        raised = [expected[0], *(category for category, _ in expected[2])]
        assert case.error_type in raised or dtype.is_complex, f"{case.desc}: the case raises nothing: {expected}"

    for_each(optimizer_error_inputs(technique.name, device, dtype), check)


def _bad_values(technique: OptimizerTechnique) -> Iterator[dict[str, Any]]:
    """Every numeric argument with a value out of range, and NaN."""
    names = {
        "SGD": ("lr", "momentum", "weight_decay"),
        "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        "Adadelta": ("lr", "rho", "eps", "weight_decay"),
        "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
        "Adam": ("lr", "eps", "weight_decay"),
        "AdamW": ("lr", "eps", "weight_decay"),
        "Adamax": ("lr", "eps", "weight_decay"),
        "NAdam": ("lr", "eps", "weight_decay", "momentum_decay"),
        "RAdam": ("lr", "eps", "weight_decay"),
        "ASGD": ("lr", "lambd", "alpha", "weight_decay"),
        "Rprop": ("lr",),
        "SparseAdam": ("lr", "eps"),
        "Adafactor": ("lr", "weight_decay", "d"),
        "Muon": ("lr", "momentum", "weight_decay"),
    }[technique.name]
    for name in names:
        yield {name: -1.0}
        if technique.name != "SGD":  # PyTorch's SGD compares the other way round and lets NaN through; ours does not
            yield {name: math.nan}
    if technique.name.endswith(("Adam", "AdamW", "Adamax")):
        for betas in ((-0.1, 0.9), (0.9, -0.1), (0.9, 1.0), (math.nan, 0.9), (0.9, math.nan), (1, 0.9)):
            yield {"betas": betas}
    if technique.name in ("Adam", "AdamW"):
        yield {"betas": (0, 0)}
        yield {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.9))}
        yield {"betas": (torch.tensor(0.9), torch.tensor([0.9, 0.9]))}
        yield {"lr": torch.tensor(0.1), "foreach": True}
    if technique.name == "SparseAdam":
        yield from (
            {"lr": 0.0},
            {"eps": 0.0},
            {"betas": (-0.1, 0.9)},
            {"betas": (0.9, 1.0)},
            {"betas": (math.nan, 0.9)},
        )
    if technique.name == "Adafactor":
        yield from ({"beta2_decay": 0.1}, {"beta2_decay": math.nan}, {"eps": (-1.0, 1e-3)}, {"eps": (None, -1.0)})
        yield from ({"eps": (math.nan, 1e-3)}, {"eps": (None, math.nan)}, {"d": 0.5})
    if technique.name == "Muon":
        yield from ({"adjust_lr_fn": "other"}, {"ns_steps": 100}, {"ns_coefficients": (1.0, 2.0)})
    if technique.name == "Adadelta":
        yield {"rho": 1.5}
    if technique.name == "Rprop":
        for etas in ((0.0, 1.2), (1.0, 1.2), (0.5, 1.0), (1.2, 0.5), (math.nan, 1.2), (0.5, math.nan)):
            yield {"etas": etas}
    if technique.name == "SGD":
        yield {"nesterov": True}
        yield {"nesterov": True, "momentum": 0.9, "dampening": 0.5}
    yield {"lr": torch.tensor([0.1, 0.1])}
    yield {"lr": torch.tensor(-0.1)}
    yield {"no_such_argument": 1}


@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_arguments_out_of_range(technique: OptimizerTechnique, device: torch.device) -> None:
    def check(kwargs: dict[str, Any]) -> None:
        kind, text, _ = _outcome(_build_and_step(technique.torch, _own_params(device), kwargs))  # type: ignore[arg-type]
        ours, ours_text, _ = _outcome(_build_and_step(technique.ours, _own_params(device), kwargs))
        subject = f"{technique.name}({kwargs})"
        if kind is None and not IS_REFERENCE:  # ASGD checks lambd and alpha since 2.15
            assert ours is ValueError, f"{subject}: {ours} {ours_text!r}"
            return
        assert kind is not None, f"{subject}: the case is no error in PyTorch"
        assert (ours, ours_text) == (kind, text), f"{subject}: {ours} {ours_text!r} instead of {kind} {text!r}"

    for_each(_bad_values(technique), check)


@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan)], ids=str)
def test_a_learning_rate_that_is_no_number_is_refused(technique: OptimizerTechnique, value: Any) -> None:
    # PyTorch lets inf through everywhere, and NaN through SGD; either turns every parameter into NaN at the first step.
    with pytest.raises(ValueError, match=r"Invalid learning rate: |Learning rate should be"):
        technique.ours([torch.ones(2, 1, requires_grad=True)], lr=value)


def _execution_cases(technique: OptimizerTechnique, device: torch.device) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Flags that exclude each other and parameters or gradients that an implementation does not take."""
    plain, cplx = torch.ones(3, device=device), torch.ones(3, device=device, dtype=torch.complex64)
    integer = torch.ones(3, device=device, dtype=torch.int64)
    sparse = torch.zeros(3, device=device, requires_grad=True)
    sparse.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), device=device, check_invariants=True)
    flags = optimizer_flags(technique.name)
    if technique.torch_fused:
        yield "foreach and fused", plain, {"foreach": True, "fused": True}
        yield "fused and differentiable", plain, {"fused": True, "differentiable": True}
        yield "complex and fused", cplx, {"fused": True}
        yield "integers and fused", integer, {"fused": True}
    if flags.has_capturable_arg and device.type == "cpu":
        yield "capturable on the CPU", plain, {"capturable": True, "foreach": False}
        yield "capturable on the CPU, foreach", plain, {"capturable": True, "foreach": True}
    if not flags.supports_sparse:
        yield "sparse gradient", sparse, {}
        yield "sparse gradient, foreach", sparse, {"foreach": True}
    if flags.supports_sparse and technique.torch_fused:
        yield "sparse gradient, fused", sparse, {"fused": True}
    if technique.name == "Adagrad":
        yield "sparse gradient and weight_decay", sparse, {"weight_decay": 0.1}
    yield "foreach and differentiable", plain, {"foreach": True, "differentiable": True}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_implementations_that_exclude_each_other(technique: OptimizerTechnique, device: torch.device) -> None:
    def check(case: tuple[str, Any, dict[str, Any]]) -> None:
        desc, param, kwargs = case
        expected = _outcome(_build_and_step(technique.torch, [param], kwargs))  # type: ignore[arg-type]
        got = _outcome(_build_and_step(technique.ours, [param], kwargs))
        is_error = expected[0] is not None
        # Only SGD takes both: it has no scalar that the step count would have to carry gradients through.
        assert is_error or (technique.name, desc) == ("SGD", "foreach and differentiable"), f"{desc} is no error"
        told = 2 if IS_REFERENCE else 1
        assert got[:told] == expected[:told], f"{technique.name} [{desc}]: {got[:2]} instead of {expected[:2]}"

    for_each(_execution_cases(technique, device), check)


@pytest.mark.parametrize("technique", [p for p in TECHNIQUES if not p.values[0].torch_fused])
def test_fused_where_pytorch_has_none(technique: OptimizerTechnique, device: torch.device) -> None:
    def build(param: torch.Tensor, **kwargs: Any) -> Outcome:
        return _outcome(_build_and_step(technique.ours, [param], {"fused": True, **kwargs}))

    plain = torch.ones(3, device=device)
    assert build(plain)[0] is None
    assert build(plain, foreach=True)[:2] == (RuntimeError, "`fused` and `foreach` cannot be `True` together.")
    assert build(plain, differentiable=True)[:2] == (RuntimeError, "`fused` does not support `differentiable`")
    kind, text, _ = build(torch.ones(3, dtype=torch.complex64, device=device))
    assert kind is RuntimeError and "floating point Tensors" in text


DIALECT_ERRORS = [
    ("SGD", {"momentum": 0.9, "momentum_form": "heavy"}, "momentum_form"),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "momentum_form": "velocity"}, "dampening"),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "momentum_form": "ewa"}, "dampening"),
    ("SGD", {"momentum": 0.9, "nesterov": True, "momentum_form": "ewa"}, "nesterov"),
    ("SGD", {"momentum": 0.9, "bias_correction": True}, "bias_correction"),
    ("SGD", {"momentum": 0.9, "bias_correction": True, "momentum_form": "velocity"}, "bias_correction"),
    ("RMSprop", {"momentum": 0.9, "momentum_form": "ewa"}, "momentum_form"),
    ("RMSprop", {"nesterov": True}, "Nesterov momentum requires a momentum"),
]


@pytest.mark.parametrize(("name", "kwargs", "named"), DIALECT_ERRORS, ids=str)
def test_dialects_that_exclude_each_other(name: str, kwargs: dict[str, Any], named: str) -> None:
    (technique,) = (p.values[0] for p in TECHNIQUES if p.id == name)
    with pytest.raises(ValueError, match=named):
        technique.ours([torch.ones(2, requires_grad=True)], **kwargs)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("RMSprop", {"eps_inside_sqrt": "no"}),
        ("RMSprop", {"momentum": 0.9, "nesterov": "false"}),
        ("Adagrad", {"eps_inside_sqrt": None}),
        ("Adam", {"bias_correction": None}),
        ("Adam", {"eps_inside_sqrt": 1}),
        ("AdamW", {"eps_hat": "yes"}),
        ("RAdam", {"eps_hat": None}),
        ("Adamax", {"eps_inside_max": 0}),
        *((name, {"decoupled_weight_decay": 1}) for name in ("SGD", "Adagrad", "Adadelta", "RMSprop", "Adamax")),
        ("SGD", {"momentum": 0.9, "momentum_form": "ewa", "bias_correction": 1}),
    ],
)
def test_a_dialects_flag_is_true_or_false(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be True or False, but got"):
        getattr(reimpl.optim, name)([torch.ones(1, requires_grad=True)], **kwargs)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_an_average_of_squares_starts_from_0_or_above(value: float) -> None:
    with pytest.raises(ValueError, match="Invalid initial_accumulator_value value"):
        reimpl.optim.RMSprop([torch.ones(1)], initial_accumulator_value=value)


def test_an_average_that_forgets_nothing_cannot_be_corrected() -> None:
    with pytest.raises(ValueError, match="needs momentum below 1"):
        reimpl.optim.SGD([torch.ones(1)], momentum=1.0, momentum_form="ewa", bias_correction=True)


def test_state_of_another_class_is_refused_before_the_step_that_pytorch_fails_in() -> None:
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    saved = torch.optim.Adam([p]).state_dict()
    theirs = torch.optim.SGD([p], lr=0.1)
    theirs.load_state_dict(saved)
    with pytest.raises(KeyError, match="momentum"):
        theirs.step()
    with pytest.raises(ValueError, match="no momentum, dampening, nesterov in parameter group 0: it is not one of SGD"):
        reimpl.optim.SGD([p], lr=0.1).load_state_dict(saved)
