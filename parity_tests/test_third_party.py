"""Other libraries' optimizers and schedules beside ours, under the arguments that docs/dialects.md gives for each."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import reimpl.optim as optim
from parity_tests.dialects_page import Row, rows
from parity_tests.oracle import optim_reducing as oracle
from reimpl.testing.optimizers import step_with
from reimpl.testing.samples import random_tensor, seeded_generator

Array = np.ndarray[Any, np.dtype[np.float64]]
Path = list[list[Array]]
"""The parameters after each step."""

STEPS = 20
LR = 0.0625
#: Each step's rate over the first one's: a buffer that has the rate inside shows it.
FACTORS = [(1.0, 0.5, 2.0, 0.25)[step * 4 // STEPS] for step in range(STEPS)]

# The same formula in float64 in another order of operations: about ten roundings of 1.1e-16 a step, twenty steps.
SAME = 10 * STEPS * 1.1e-16
#: By section, or by what theirs is called: what else parts two right implementations.
TOLERANCES = {
    # 1 - βᵗ for β₂ = 0.999 begins with a thousandth, so that an ulp of the power counts a thousandfold
    **dict.fromkeys(("Adam", "AdamW", "NAdam"), 1000 * SAME),
    # ρ_t is a difference of two numbers of size 2000, of which the second has the same thousandfold ulp
    "RAdam": 2000 * 1000 * SAME,
    # both compute 1 - t⁻⁰·⁸ in float32, which is off by up to 6e-8 in each step
    "optax.adafactor": STEPS * 6e-8,
    "keras.optimizers.Adafactor": STEPS * 6e-8,
    # both add their ε (1e-7, 1e-8) to the norm instead of bounding it; five iterations stretch that 3.44⁵-fold at most
    "keras.optimizers.Muon": 3.4445**5 * 1e-7,
    "optax.contrib.muon": 3.4445**5 * 1e-7,
}
#: An argument that is needed in float32 alone, whose machine epsilon is PyTorch's ε₁.
NEEDED_IN_FLOAT32 = {("Adafactor", "eps")}


def _library(name: str) -> ModuleType:
    """The library, or a skip that says what to install."""
    if name == "keras":
        os.environ["KERAS_BACKEND"] = "torch"
    extra = "test" if name == "timm" else "third-party"
    module: ModuleType = pytest.importorskip(name, reason=f"{name} is not installed (pip install 'reimpl[{extra}]')")
    if name == "keras":
        module.config.set_floatx("float64")  # the dtype by way of which it casts
    for part in {"timm": ["optim"], "optax": ["contrib"]}.get(name, []):
        importlib.import_module(f"{name}.{part}")
    return module


def _draw(section: str, label: str) -> list[Array]:
    """Numbers of every size from 1 down to 1e-5, so that it shows where an ε stands; matrices alone for Muon."""
    shapes = ((6, 4), (4, 6)) if section == "Muon" else ((6, 4), (9,), ())
    drawn = []
    for index, shape in enumerate(shapes):
        values = random_tensor(shape, torch.float64, seeded_generator(0, "third party", label, index)).numpy()
        drawn.append(values * 10.0 ** -(np.arange(values.size) % 6).reshape(shape))
    return drawn


def _gradients(section: str) -> list[list[Array]]:
    return [_draw(section, f"gradient {step}") for step in range(STEPS)]


def _rates(base: float) -> list[float]:
    return [base * factor for factor in FACTORS]


def _run_torch(build: Callable[..., torch.optim.Optimizer], section: str, device: torch.device) -> tuple[float, Path]:
    """The rate that the optimizer starts with, and its path; for ours, PyTorch's and timm's."""
    torch.set_default_dtype(torch.float64)  # that of the numbers that NAdam keeps in its state
    params = [torch.tensor(value, device=device, requires_grad=True) for value in _draw(section, "parameter")]
    optimizer = build(params)
    base = optimizer.defaults["lr"]
    path: Path = []
    for rate, grads in zip(_rates(base), _gradients(section)):
        optimizer.param_groups[0]["lr"] = rate
        step_with(optimizer, [torch.tensor(grad, device=device) for grad in grads])
        path.append([p.detach().cpu().numpy().copy() for p in params])
    return base, path


def _run_ours(call: str, section: str, device: torch.device) -> tuple[float, Path]:
    if section == "Muon":
        return _run_oracle(call, section)

    def build(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        classes = {name: partial(getattr(optim, name), params) for name in optim.REIMPLEMENTED}
        built: torch.optim.Optimizer = eval(call, {**classes, "lr": LR})
        return built

    return _run_torch(build, section, device)


def _run_oracle(call: str, section: str) -> tuple[float, Path]:
    """Muon in float64: ours iterates in bfloat16 as PyTorch's does, and is held to this oracle elsewhere."""
    base, kwargs = eval(call, {"Muon": lambda lr=1e-3, **kwargs: (lr, kwargs), "lr": LR})
    path: Path = [[] for _ in range(STEPS)]
    for index, value in enumerate(_draw(section, "parameter")):
        state = None
        for step, (rate, grads) in enumerate(zip(_rates(base), _gradients(section))):
            value, state = oracle.muon(value, [grads[index]], lr=rate, state=state, **kwargs)
            path[step].append(value)
    return base, path


def _run_theirs_in_torch(call: str, section: str) -> tuple[float, Path]:
    names = {"torch": torch, "timm": _library("timm") if call.startswith("timm") else None}
    head, _, arguments = call.partition("(")
    return _run_torch(lambda p: eval(f"{head}(p, {arguments}", {**names, "p": p}), section, torch.device("cpu"))


def _run_keras(call: str, section: str) -> tuple[float, Path]:
    keras = _library("keras")
    optimizer = eval(call, {"keras": keras})
    base = float(optimizer.learning_rate)
    variables = [keras.Variable(value, dtype="float64") for value in _draw(section, "parameter")]
    path: Path = []
    for rate, grads in zip(_rates(base), _gradients(section)):
        optimizer.learning_rate = rate
        optimizer.apply([keras.ops.convert_to_tensor(grad, dtype="float64") for grad in grads], variables)
        path.append([variable.value.detach().cpu().numpy().copy() for variable in variables])
    return base, path


def _run_optax(call: str, section: str) -> tuple[float, Path]:
    rates = _rates(LR)
    return LR, _optax_path(call, section, lambda step: rates[int(step)])


def _optax_path(call: str, section: str, lr: Any) -> Path:
    optax, jax = _library("optax"), _library("jax")
    path: Path = []
    with jax.enable_x64(True):
        optimizer = eval(call, {"optax": optax, "lr": lr})
        params = [jax.numpy.asarray(value) for value in _draw(section, "parameter")]
        state = optimizer.init(params)
        for grads in _gradients(section):
            updates, state = optimizer.update([jax.numpy.asarray(grad) for grad in grads], state, params)
            params = optax.apply_updates(params, updates)
            path.append([np.asarray(p) for p in params])
    return path


RUNNERS = {"torch": _run_theirs_in_torch, "timm": _run_theirs_in_torch, "keras": _run_keras, "optax": _run_optax}


def _distance(left: Path, right: Path, section: str) -> float:
    """The largest difference over the length of the way that the element went, the way from 0 to its start included."""
    worst = 0.0
    for index, before in enumerate(_draw(section, "parameter")):
        length = np.abs(before)
        for ours, theirs in zip(left, right, strict=True):
            length, before = length + np.abs(theirs[index] - before), theirs[index]
            worst = max(worst, float(np.max(np.abs(ours[index] - theirs[index]) / length)))
    return worst


def _tolerance(row: Row) -> float:
    return TOLERANCES.get(row.theirs.partition("(")[0], TOLERANCES.get(row.section, SAME))


OPTIMIZERS = [pytest.param(row, id=row.theirs) for row in rows() if row.section != "Schedules"]
SCHEDULES = [pytest.param(row, id=row.theirs) for row in rows() if row.section == "Schedules"]


@pytest.mark.parametrize("row", OPTIMIZERS)
def test_the_arguments_reproduce_the_other_library(row: Row, device: torch.device) -> None:
    """Both are built as the page says, defaults and all, and take gradients and rates that change."""
    base, theirs = RUNNERS[row.library](row.theirs, row.section)
    own_base, ours = _run_ours(row.ours, row.section, device)
    assert own_base == pytest.approx(base, rel=1e-15), "the default rates differ"
    distance = _distance(ours, theirs, row.section)
    assert distance <= _tolerance(row), f"{row.ours} parts from {row.theirs} by {distance:.2g}"


@cache
def _own_path(call: str, section: str) -> Path:
    return _run_ours(call, section, torch.device("cpu"))[1]


def _without(call: str, keyword: str) -> str:
    tree = ast.parse(call, mode="eval")
    assert isinstance(tree.body, ast.Call)
    tree.body.keywords = [k for k in tree.body.keywords if k.arg != keyword]
    return ast.unparse(tree)


def _keywords(row: Row) -> list[str]:
    call = ast.parse(row.ours, mode="eval").body
    assert isinstance(call, ast.Call)
    names = [str(k.arg) for k in call.keywords if k.arg != "lr"]
    return [name for name in names if (row.section, name) not in NEEDED_IN_FLOAT32]


@pytest.mark.parametrize("row", [param for param in OPTIMIZERS if _keywords(param.values[0])])
def test_every_argument_is_needed(row: Row) -> None:
    """The page names no argument too many, and the test above sees each: without it the paths part."""
    for keyword in _keywords(row):
        try:
            path = _own_path(_without(row.ours, keyword), row.section)
        except ValueError:
            continue  # another argument asks for it
        distance = _distance(path, _own_path(row.ours, row.section), row.section)
        assert distance > 10 * _tolerance(row), f"{row.ours} is the same without {keyword}: {distance:.2g}"


def test_optax_applies_rprops_steps_one_call_late(device: torch.device) -> None:
    """Its first update is 0 and its last is never applied; where a sign turns it drops the step before as well."""
    theirs = _optax_path("optax.rprop(lr, min_step_size=1e-6, max_step_size=50.0)", "Rprop", LR)
    start = _draw("Rprop", "parameter")
    assert all(np.array_equal(a, b) for a, b in zip(theirs[0], start, strict=True))
    signs = [[np.sign(g) for g in grads] for grads in _gradients("Rprop")]
    for index, before in enumerate(start):
        kept = signs[0][index] == signs[1][index]
        moved = before - LR * signs[0][index]  # the first gradient's step, after the second gradient
        np.testing.assert_allclose(theirs[1][index], np.where(kept, moved, before), rtol=1e-15)


@pytest.mark.parametrize("row", SCHEDULES)
def test_the_schedules_are_the_other_librarys(row: Row) -> None:
    library = _library(row.library)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    names = {name: getattr(optim.lr_scheduler, name) for name in optim.lr_scheduler.__all__}
    scheduler = eval(row.ours, {**names, "optimizer": optimizer, "lr": LR})
    schedule = eval(row.theirs, {row.library: library, "lr": LR})
    jax = _library("jax") if row.library == "optax" else None
    for step in range(25):
        if jax is None:
            theirs = float(schedule(step))
        else:
            with jax.enable_x64(True):
                theirs = float(schedule(step))
        # a schedule in steps multiplies its factors one by one: an ulp a step
        assert scheduler.get_last_lr()[0] == pytest.approx(theirs, rel=25 * 1.1e-16 * 2), step
        optimizer.step()
        scheduler.step()
