"""The fused step's machinery: tracing, code generation for both compilers, the kernel cache, threads and processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reimpl.optim as optim
from reimpl.optim import _fused, _kernel_cache, _trace, _watch

RULES: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adagrad": {"lr_decay": 0.1},
    "Adadelta": {"weight_decay": 0.01},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"maximize": True},
    "Adamax": {"weight_decay": 0.01},
    "NAdam": {"weight_decay": 0.01, "decoupled_weight_decay": True},
    "RAdam": {"betas": (0.5, 0.9)},
    "ASGD": {"t0": 1.0, "lambd": 0.1},
    "Rprop": {},
}

HOW: list[dict[str, bool]] = [{"fused": True}, {"foreach": False}]

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def _parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return params


def _steps(name: str, kwargs: dict[str, Any], params: list[torch.Tensor], count: int = 3, **how: Any) -> Any:
    optimizer = getattr(optim, name)(params, **kwargs, **how)
    for _ in range(count):
        optimizer.step()
    return optimizer


def _bound(a: torch.Tensor, b: torch.Tensor, before: torch.Tensor, steps: int) -> torch.Tensor:
    """2 eps of the largest operand for each step, the design's bound for a fused step."""
    largest = torch.stack([a.abs(), b.abs(), before.abs(), (b - before).abs()]).amax(0)
    return 2 * steps * torch.finfo(a.dtype).eps * largest


@pytest.mark.quick
def test_trace_of_adam_is_its_formula() -> None:
    optimizer = optim.Adam(_parameters([(3,)]))
    options = {key: optimizer.defaults[key] for key in optimizer.defaults}
    program = _trace.trace(optim.Adam, options, ("exp_avg", "exp_avg_sq"))
    assert program.inputs == ("p", "g", "exp_avg", "exp_avg_sq")
    assert set(program.stores) == {"p", "exp_avg", "exp_avg_sq"}
    assert [operation[1] for operation in program.operations].count("sqrt") == 1
    assert any("power(o[1], t)" in scalar for scalar in program.scalars)


@pytest.mark.quick
def test_numbers_of_the_state_are_scalars_and_a_condition_selects() -> None:
    params = _parameters([(3,)])
    nadam = _trace.trace(optim.NAdam, optim.NAdam(params).defaults, ("mu_product", "exp_avg", "exp_avg_sq"))
    assert nadam.inputs == ("p", "g", "exp_avg", "exp_avg_sq") and nadam.kept == ("mu_product",)
    assert nadam.scalars[nadam.updates["mu_product"]].startswith("single(k0 * single(")
    radam = _trace.trace(optim.RAdam, optim.RAdam(params).defaults, ("exp_avg", "exp_avg_sq"))
    assert not radam.kept and not radam.updates
    assert [operation[1] for operation in radam.operations].count("select") == 1


@pytest.mark.quick
def test_what_is_left_of_a_rule_where_its_choice_is_known() -> None:
    program = _trace.trace(optim.ASGD, optim.ASGD(_parameters([(3,)])).defaults, ("eta", "mu", "ax"))
    assert program.choice is not None and program.read == {"p", "g", "ax"}
    late, early = (program.assuming(program.choice[0], holds) for holds in (True, False))
    assert late.read == {"p", "g", "ax"} and not late.written_blindly
    assert early.read == {"p", "g"} and early.written_blindly == ["ax"] and early.stores["ax"] == early.stores["p"]
    assert len(early.operations) < len(late.operations) < len(program.operations)
    assert _trace.trace(optim.SGD, optim.SGD(_parameters([(3,)])).defaults, ()).choice is None


@pytest.mark.quick
def test_a_rule_may_not_branch_on_an_expression() -> None:
    class Branching(optim.SGD):
        @staticmethod
        def update(p: Any, g: Any, s: Any, h: Any, c: Any) -> None:
            if 1 - h.lr > 0:
                p.add_(g)

    with pytest.raises(TypeError, match="may branch on an option but not on the expression"):
        _trace.trace(Branching, optim.SGD(_parameters([(3,)])).defaults, ())


@needs_numba
@pytest.mark.quick
def test_kernels_do_not_grow_with_tensors_shapes_or_rates() -> None:
    _steps("Adam", {}, _parameters([(3,)]), fused=True)
    before = set(_fused._KERNELS)
    _steps("Adam", {"lr": 0.5, "eps": 1e-3}, _parameters([(i, 2) for i in range(40)]), fused=True)
    _steps("Adam", {"lr": np.float32(0.25)}, _parameters([(100_000,), ()]), fused=True)
    assert set(_fused._KERNELS) == before


@needs_numba
def test_an_update_is_seen_by_autograd() -> None:
    (p,) = _parameters([(5,)])
    loss = (p * p).sum()
    _steps("Adam", {}, [p], 1, fused=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_numba
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", RULES)
def test_threads_share_the_work(name: str, threads: int) -> None:
    shapes = [(257, 513), (3,), (70_001,), (0,), ()]
    before = [p.detach().clone() for p in _parameters(shapes)]
    ours, reference = _parameters(shapes), _parameters(shapes)
    present = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        _steps(name, RULES[name], ours, fused=True)
    finally:
        torch.set_num_threads(present)
    _steps(name, RULES[name], reference, foreach=False)
    for a, b, start in zip(ours, reference, before, strict=True):
        a, b = a.detach(), b.detach()
        assert ((a - b).abs() <= _bound(a, b, start, 3) + 1e-7 * (name == "RMSprop")).all()


@needs_numba
def test_two_python_threads_step_at_once() -> None:
    sets = [_parameters([(90_000,), (17,)], seed=i) for i in range(2)]
    expected = [_parameters([(90_000,), (17,)], seed=i) for i in range(2)]
    workers = [threading.Thread(target=_steps, args=("Adam", {}, s, 10), kwargs={"fused": True}) for s in sets]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for got, params in zip(sets, expected, strict=True):
        _steps("Adam", {}, params, 10, fused=True)
        assert all(torch.equal(a, b) for a, b in zip(got, params, strict=True))


@needs_numba
def test_parameters_that_share_memory_are_stepped_in_turn() -> None:
    def shared() -> list[torch.Tensor]:
        whole = torch.arange(8.0)
        views = [whole[:6].requires_grad_(), whole[2:].requires_grad_()]
        for v in views:
            v.grad = torch.ones_like(v)
        return views

    ours, reference = shared(), shared()
    decayed = {"lr": 0.5, "weight_decay": 0.1}  # makes a step depend on what the other parameter's left
    _steps("SGD", decayed, ours, fused=True)
    _steps("SGD", decayed, reference, foreach=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def _swap(first: torch.Tensor) -> None:
    other = torch.zeros_like(first).requires_grad_()
    other.grad = torch.ones_like(first)
    torch.utils.swap_tensors(first, other)


CHANGES: dict[str, Callable[[torch.Tensor, dict[str, Any]], object]] = {
    "other memory for state": lambda p, state: setattr(state["exp_avg"], "data", torch.zeros_like(p)),
    "other state": lambda p, state: state.update(exp_avg=torch.zeros_like(p)),
    "state in another order": lambda p, state: state.update(exp_avg=state.pop("exp_avg")),
    "state gone": lambda p, state: state.clear(),
    "other memory for the parameter": lambda p, state: setattr(p, "data", p.detach().clone()),
    "other strides for the parameter": lambda p, state: setattr(p, "data", p.detach().t().contiguous().t()),
    "parameter swapped": lambda p, state: _swap(p),
    "parameter frozen": lambda p, state: p.requires_grad_(False),
    "gradient in other strides": lambda p, state: setattr(p, "grad", torch.ones_like(p.t()).contiguous().t()),
    "gradient gone": lambda p, state: setattr(p, "grad", None),
    "gradient new": lambda p, state: setattr(p, "grad", torch.ones_like(p)),
    "gradient negated lazily": lambda p, state: setattr(p, "grad", torch.ones_like(p)._neg_view()),
}


@needs_numba
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("steps", [2, 6], ids=["early", "late"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled loops", "Python"])
def test_changes_between_steps_are_seen(
    compiled: bool, steps: int, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(_watch, "walker", lambda: None)
        monkeypatch.setattr(_fused, "walker", lambda: None)
    both = [_parameters([(4, 3), (3, 5), (2, 2)]) for _ in range(2)]
    optimizers = [_steps("Adam", {}, params, steps, **how) for params, how in zip(both, HOW, strict=True)]
    for optimizer, params in zip(optimizers, both, strict=True):
        CHANGES[change](params[1], optimizer.state[params[1]])
        optimizer.step()
        optimizer.step()
    for p, q, before in zip(*both, _parameters([(4, 3), (3, 5), (2, 2)]), strict=True):
        assert (abs(p - q) <= _bound(p, q, before, steps=steps + 2)).all()


@needs_numba
@pytest.mark.parametrize("dimensions", [3, 5, 6, 8])
def test_a_gradient_turned_in_place_is_read_anew(dimensions: int) -> None:
    shape = (2,) * dimensions
    both = [_parameters([shape, (4,)]) for _ in range(2)]
    for params in both:
        # neither before nor after is it contiguous, which a tensor keeps apart from its strides
        turned, grad = params[0].detach().mT.requires_grad_(), params[0].grad
        assert grad is not None
        turned.grad, params[0] = grad.mT, turned
    optimizers = [_steps("SGD", {"lr": 0.1}, params, **how) for params, how in zip(both, HOW, strict=True)]
    for optimizer, params in zip(optimizers, both, strict=True):
        assert params[0].grad is not None
        for k in range(1, dimensions - 1):
            params[0].grad.transpose_(0, k)
            optimizer.step()
    for p, q in zip(*both, strict=True):
        assert torch.equal(p, q)


@needs_numba
def test_compiled_loops_know_this_pytorch() -> None:
    assert _watch.walker() is not None


@needs_numba
@pytest.mark.parametrize("cleared", [slice(None), slice(-1, None), slice(0, 1)], ids=["all", "last", "first"])
def test_state_that_was_cleared_starts_anew(cleared: slice) -> None:
    ours, reference = _parameters([(4,), (3,), (5,)]), _parameters([(4,), (3,), (5,)])
    optimizers = [_steps("Adam", {}, ours, fused=True), _steps("Adam", {}, reference, foreach=False)]
    for optimizer, params in zip(optimizers, (ours, reference), strict=True):
        for p in params[cleared]:
            optimizer.state[p].clear()
        optimizer.step()
    for p, q in zip(ours, reference, strict=True):
        assert optimizers[0].state[p]["step"] == optimizers[1].state[q]["step"]
        assert ((p - q).abs() <= 8 * torch.finfo(p.dtype).eps * (1 + q.abs())).all()  # four steps of the bound of 2


@needs_numba
def test_state_moved_to_shared_memory_is_followed() -> None:
    ours, reference = _parameters([(4,), (3,)]), _parameters([(4,), (3,)])
    optimizer = _steps("Adagrad", {}, ours, 2, fused=True)
    optimizer.share_memory()
    for _ in range(2):
        optimizer.step()
    _steps("Adagrad", {}, reference, 4, fused=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


@needs_numba
def test_options_of_the_users_own_do_no_harm() -> None:
    params = _parameters([(4,)])
    optimizer = optim.Adam([{"params": params, "layers": ["conv", "bn"], "initial_lr": 0.1}], fused=True)
    optimizer.step()
    optimizer.step()
    assert torch.isfinite(params[0]).all()


def test_without_a_compiler_foreach_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fused, "COMPILERS", {"cpu": "a_compiler_that_is_not_there"})
    _fused._backend.cache_clear()
    _fused._warn_missing.cache_clear()
    ours, reference = _parameters([(5,), (2, 3)]), _parameters([(5,), (2, 3)])
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _steps("Adam", {}, ours, fused=True)
    finally:
        _fused._backend.cache_clear()
        _fused._warn_missing.cache_clear()
    said = [str(w.message) for w in caught if "fused=True on cpu" in str(w.message)]
    assert len(said) == 1 and "pip install" in said[0]
    assert {w.filename for w in caught if "fused=True on cpu" in str(w.message)} == {__file__}
    _steps("Adam", {}, reference, foreach=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


# ------------------------------------------------------------------------------------------------- the cache

_STEP = """
import os, sys, torch, reimpl.optim as optim
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
optim.Adam([p], fused=True).step()
print(p.tolist())
"""


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_numba
@pytest.mark.slow
def test_cache_is_shared_by_processes_and_heals(tmp_path: Path) -> None:
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", _STEP],
            env={**os.environ, "REIMPL_CACHE_DIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in starts]
    assert all(process.returncode == 0 for process in starts) and len(set(outputs)) == 1
    good = {path: path.read_text() for path in tmp_path.glob("*.py")}
    assert good
    for path in good:
        path.write_text("raise SystemExit('stale')")
    for compiled in (tmp_path / "__pycache__").glob("*.nbc"):
        compiled.write_bytes(b"not machine code")
    again = _run(_STEP, REIMPL_CACHE_DIR=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert again.stdout == outputs[0] and {path: path.read_text() for path in good} == good
    assert not list(tmp_path.glob("*.tmp"))


@needs_numba
@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    result = _run(_STEP, REIMPL_CACHE_DIR=str(blocker / "below"))
    assert result.returncode == 0, result.stderr
    assert blocker.read_text() == ""


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REIMPL_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _kernel_cache.folder() == tmp_path / "reimpl"
    monkeypatch.setenv("REIMPL_CACHE_DIR", str(tmp_path / "mine"))
    assert _kernel_cache.folder() == tmp_path / "mine"


@needs_numba
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_a_forked_child_steps_too() -> None:
    result = _run(
        """
        import os, torch, reimpl.optim as optim
        torch.set_num_threads(2)
        p = torch.ones(200_000, requires_grad=True)
        p.grad = torch.ones(200_000)
        optimizer = optim.Adam([p], fused=True)
        optimizer.step()
        child = os.fork()
        optimizer.step()
        if child == 0:
            os._exit(0 if abs(p[0].item() - 0.998) < 1e-6 else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert result.stdout.strip() == "0", result.stderr


# ------------------------------------------------------------------------------------------------- Triton

_INTERPRETED = """
import torch
import reimpl.optim as optim
from reimpl.optim import _fused
from parity_tests.test_fused_kernels import RULES, _bound, _parameters, _steps
_fused.COMPILERS = {"cpu": "triton"}
shapes = [(3,), (4, 5), (8_200,), (8_192,), (0,), ()]
for name, kwargs in RULES.items():
    for dtype in (torch.float32, torch.float64):
        before = [p.detach().clone() for p in _parameters(shapes, dtype)]
        ours, reference = _parameters(shapes, dtype), _parameters(shapes, dtype)
        _steps(name, kwargs, ours, 2, fused=True)
        _steps(name, kwargs, reference, 2, foreach=False)
        for a, b, start in zip(ours, reference, before):
            a, b = a.detach(), b.detach()
            # the interpreter's power differs from the C library's by some ulps of a double, and sqrt(v - m*m) magnifies
            slack = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
            assert ((a - b).abs() <= _bound(a, b, start, 2) + slack).all(), (name, dtype, a.shape)
        print(name, dtype)
"""


@needs_triton
@pytest.mark.slow
def test_triton_kernels_compute_the_rule() -> None:
    result = _run(_INTERPRETED, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2 * len(RULES)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_triton_kernels_compile_for_a_gpu_that_is_not_here(name: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from reimpl.optim import _triton

    optimizer = getattr(optim, name)(_parameters([(3,)]), **RULES[name])
    keys = [key for key in optimizer._state_keys(optimizer.param_groups[0]) if key != "step"]
    program = _trace.trace(type(optimizer), optimizer.defaults, tuple(keys))
    types = {"addresses": "*i64", "chunks": "*i64", "o": "*fp64", "found_inf": "*fp32", "n_tensors": "i32"}
    constants = {"HAS_FOUND_INF": True, "ALIGNED": True, "CHUNK": _triton.CHUNK, "BLOCK": _triton.BLOCK}
    for dtype in sorted(_triton.SUPPORTED_DTYPES, key=str):
        kernel = _triton.Kernel(program, dtype, name)
        signature = {**types, **dict.fromkeys(constants, "constexpr")}
        compiled = triton.compile(
            ASTSource(fn=kernel._run, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"enable_fp_fusion": False},
        )
        if kernel._update is not None:
            shared = {key: types[key] for key in ("addresses", "o", "found_inf", "n_tensors")}
            source = ASTSource(
                fn=kernel._update,
                signature={**shared, "HAS_FOUND_INF": "constexpr"},
                constexprs={"HAS_FOUND_INF": True},
            )
            rest = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
            assert rest.asm["ptx"].count("st.global") == len(program.updates)
        assert ".v4.b32" in compiled.asm["ptx"] or ".v2.b64" in compiled.asm["ptx"], "16-byte loads were expected"
