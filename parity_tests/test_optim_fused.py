"""One fused step from the same state stays within two ulp of the for-loop's largest operand, whatever the strides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parity_tests.optim_cases import TECHNIQUES, all_configs, dialect_configs, dtype_id, for_each
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import check_fused_step
from reimpl.testing.optimizers import LONG_LAYOUT, clone_params, construct, parameters, skip_some, step_with
from reimpl.testing.samples import random_tensor, seeded_generator


def _is_judged_by_operands(config: OptimizerConfig) -> bool:
    # Centred RMSprop subtracts the squared mean under the root: what a contraction changes there is no ulp of an
    # operand of the step. The oracle judges it, as it does bfloat16 (test_optim_oracle).
    return not config.kwargs.get("centered", False)


@pytest.mark.quick
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_default_and_one_dialect(technique: OptimizerTechnique, device: torch.device) -> None:
    """The part of the next test that compiles two kernels only."""
    dialects = [config for config in dialect_configs(technique)[:1] if _is_judged_by_operands(config)]
    for_each(
        [OptimizerConfig("default", torch_kwargs={}), *dialects],
        lambda config: check_fused_step(technique, config, dtype=torch.float32, device=device),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_one_step_from_the_same_state(technique: OptimizerTechnique, dtype: torch.dtype, device: torch.device) -> None:
    configs = [c for c in all_configs(technique, device, dtype) if _is_judged_by_operands(c)]
    for_each(configs, lambda config: check_fused_step(technique, config, dtype=dtype, device=device))


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_parameters_that_skip_gradients(technique: OptimizerTechnique, device: torch.device) -> None:
    configs = [c for c in all_configs(technique, device, torch.float64) if _is_judged_by_operands(c)]
    for_each(
        configs, lambda config: check_fused_step(technique, config, dtype=torch.float64, device=device, skip=skip_some)
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_tensor_of_several_chunks(technique: OptimizerTechnique, device: torch.device) -> None:
    configs = [c for c in all_configs(technique, device, torch.float32) if _is_judged_by_operands(c)]
    for_each(
        configs,
        lambda config: check_fused_step(
            technique, config, dtype=torch.float32, device=device, layouts=[LONG_LAYOUT], steps=3
        ),
    )


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-40, 1e-20, 3e38, -3e38, 1.0]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_special_values_go_where_they_go_in_the_for_loop(technique: OptimizerTechnique, device: torch.device) -> None:
    """NaN, infinities, signed zeros and subnormal numbers, in gradients and then in parameters and state."""

    def check(config: OptimizerConfig) -> None:
        param = torch.tensor(SPECIAL * 3, device=device).requires_grad_()
        pair = [
            construct(technique.ours, clone_params([param]), **{**config.kwargs, **flags})
            for flags in ({"fused": True}, {"foreach": False})
        ]
        for step in range(3):
            grad = torch.tensor(SPECIAL[step:] + SPECIAL * 2 + SPECIAL[:step], device=device)
            for optimizer in pair:
                step_with(optimizer, [grad])
        (p, q) = (parameters(optimizer)[0] for optimizer in pair)
        for key, value in {"param": q, **pair[1].state[q]}.items():
            got = p if key == "param" else pair[0].state[p][key]
            # NaN for NaN, and inf for inf, to a few ulp over three steps; subnormal numbers are rounded coarsely
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-38, equal_nan=True, msg=f"{config.desc}: {key}")

    configs = [c for c in all_configs(technique, device, torch.float32) if _is_judged_by_operands(c)]
    for_each(configs, check)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_groups_dtypes_and_many_tensors(technique: OptimizerTechnique, device: torch.device) -> None:
    """Groups with rates of their own, one added later, two dtypes in one group, and hundreds of tensors."""
    config = next(c for c in technique.configs if c.torch_kwargs is not None)
    optimizers = []
    for flags in ({"fused": True}, {"foreach": False}):
        groups = [
            {"params": [_tensor(i, torch.float32 if i % 2 else torch.float64, device) for i in range(300)]},
            {"params": [_tensor(i, torch.float64, device) for i in range(300, 310)], "lr": 0.3},
        ]
        optimizers.append(construct(technique.ours, groups, **{**config.kwargs, **flags}))  # type: ignore[arg-type]
    for step in range(4):
        if step == 2:
            for optimizer in optimizers:
                group = {"params": [_tensor(i, torch.float64, device) for i in range(310, 315)], "maximize": True}
                optimizer.add_param_group(group)
        grads = [_tensor(7000 * step + i, p.dtype, device) for i, p in enumerate(parameters(optimizers[0]))]
        for optimizer in optimizers:
            step_with(optimizer, [grad.detach() for grad in grads])
    for p, q in zip(*(parameters(optimizer) for optimizer in optimizers), strict=True):
        torch.testing.assert_close(p, q)  # four steps, each within a few ulp


def _tensor(label: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return random_tensor((label % 7 + 1,), dtype, seeded_generator(0, label), device).requires_grad_()


THREADS_AND_FORKS = """
import copy, multiprocessing, os, sys, threading
import torch
from parity_tests.declarations import OPTIMIZERS

def train(optimizer, steps):
    params = optimizer.param_groups[0]["params"]
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, 0.1 * (step + 1) * (-1) ** i)
        optimizer.step()
    return [p.detach().clone() for p in params]

def build():
    technique = next(t for t in OPTIMIZERS if t.name == "RMSprop")
    return technique.ours([torch.ones(n, requires_grad=True) for n in (3, 70_001, 16)], momentum=0.9, fused=True)

expected = train(build(), 20)
results = {}
def work(name):
    results[name] = train(build(), 20)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(results) == 4
for result in results.values():
    assert all(torch.equal(a, b) for a, b in zip(result, expected)), "threads disturb each other"
child = os.fork()
if child == 0:
    same = all(torch.equal(a, b) for a, b in zip(train(build(), 20), expected))
    os._exit(0 if same else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a forked child differs"
print("fine")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")
def test_threads_and_forked_children_step_at_once() -> None:
    """Two Python threads inside a kernel at once, and a kernel in a forked child: neither aborts nor changes a bit."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", THREADS_AND_FORKS]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip() == "fine", result.stdout + result.stderr
