"""``torch.compile`` of a training step that ends in ``optimizer.step()``."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from parity_tests.optim_cases import TECHNIQUES, ready
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizers import DENSE_LAYOUTS, construct, make_grads, make_params, parameters, step_with
from reimpl.testing.tolerance import bits_equal

LAYOUTS = DENSE_LAYOUTS[3:6]
FULL: dict[str, dict[str, object]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05, "weight_decay": 0.1},
    "Adadelta": {"lr": 0.5, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "betas": (0.5, 0.75)},
    "ASGD": {"lr": 0.05, "lambd": 0.1, "t0": 1.0},
    "Rprop": {"lr": 0.01},
}


def _configs(technique: OptimizerTechnique) -> list[OptimizerConfig]:
    dialect = next((c for c in technique.configs if c.torch_kwargs is None), None)
    return [OptimizerConfig("full", FULL[technique.name]), *([dialect] if dialect else [])]


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_compiled_steps_follow_eager_ones(technique: OptimizerTechnique, device: torch.device) -> None:
    for config in _configs(technique):
        torch._dynamo.reset()
        pair = [
            construct(technique.ours, make_params(LAYOUTS, torch.float64, device), **config.kwargs, foreach=foreach)
            for foreach in (True, False)
        ]
        compiled = torch.compile(pair[0].step)
        for step in range(4):
            grads = make_grads(LAYOUTS, torch.float64, device, step=step)
            for param, grad in zip(parameters(pair[0]), grads):
                param.grad = grad
            compiled()
            step_with(pair[1], grads)
        for p, q in zip(parameters(pair[0]), parameters(pair[1])):
            # Inductor computes bias corrections in tensors of the step's dtype, float32, hence not float64's tolerance
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert pair[0].state[p].keys() == pair[1].state[q].keys()
        assert not torch.equal(parameters(pair[0])[0], make_params(LAYOUTS, torch.float64, device)[0])


@pytest.mark.slow
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_numbers_written_into_a_group_are_checked_in_a_compiled_step(technique: OptimizerTechnique) -> None:
    """While it is traced: what is allowed costs no graph, no break and no warning that PyTorch's own step does not."""
    graphs = []
    for cls in (technique.torch, technique.ours):
        torch._dynamo.reset()
        p, counter = ready(torch.ones(3)), CompileCounter()
        optimizer = cls([p], **FULL[technique.name])  # type: ignore[misc]
        group, step = optimizer.param_groups[0], torch.compile(optimizer.step, backend=counter)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # what torch 2.11 imports by itself
            for group["lr"] in (0.1, 0.2, 0.2, 0.3):
                before = p.detach().clone()
                step()
                assert not bits_equal(p.detach(), before)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0]
    bad = {"lr": (math.nan, math.inf, -1.0), "weight_decay": (-1.0,), "betas": ((0.5, 1.0),), "etas": ((1.5, 2.0),)}
    before = p.detach().clone()
    for key in bad.keys() & group.keys():
        for value in bad[key]:
            old, group[key] = group[key], value
            with pytest.raises(
                ValueError, match=rf"^Invalid {key.removesuffix('s') if key != 'lr' else 'learning rate'}"
            ):
                step()
            group[key] = old
    assert bits_equal(p.detach(), before) and counter.frame_count == graphs[1], "a refused step was compiled"
    step()
    assert not bits_equal(p.detach(), before)
    if technique.ours.dialects.get("momentum_form"):  # type: ignore[attr-defined]
        group["momentum_form"] = "heavy"
        with pytest.raises(ValueError, match="Invalid momentum_form: 'heavy'"):
            step()
