"""Three-way parity: ours and PyTorch's for-loop against the NumPy oracle in the next precision up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from parity_tests.optim_cases import (
    EVERY_TECHNIQUE,
    TECHNIQUES,
    all_configs,
    dtype_id,
    for_each,
    is_refused,
    pytorch_configs,
    skip_unless_it_runs,
)
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import compare_with_oracle
from reimpl.testing.samples import SEEDS
from reimpl.testing.tolerance import Verdict

CASES = [
    *(
        pytest.param(implementation, dtype)
        for implementation in ("forloop", "foreach", "fused")
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ),
    pytest.param("forloop", torch.complex64),
    pytest.param("foreach", torch.complex64),
]


@pytest.mark.parity
@pytest.mark.parametrize(("implementation", "dtype"), CASES, ids=dtype_id)
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_three_way_parity(
    technique: OptimizerTechnique,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
    record: Callable[..., Verdict],
) -> None:
    skip_unless_it_runs(technique, implementation, dtype)

    def check(config: OptimizerConfig) -> None:
        if is_refused(technique, config, implementation, technique.ours):
            return
        run = {"implementation": implementation, "dtype": dtype, "device": device}
        row = {**run, "case": config.desc, "technique": technique.name, "seeds": len(SEEDS)}
        row["ids"] = (config.id,) if config.id else technique.ids
        verdicts = compare_with_oracle(technique, config, **run)  # type: ignore[arg-type]
        for quantity, verdict in verdicts.items():
            record(verdict, kind="optimizer", quantity=quantity, **row)
        if _pytorch_has(technique, config, implementation):
            theirs = dataclasses.replace(technique, ours=technique.torch)  # type: ignore[arg-type]
            for quantity, verdict in compare_with_oracle(theirs, config, **run).items():  # type: ignore[arg-type]
                record(verdict, kind="pytorch", quantity=quantity, **row)
        for quantity, verdict in verdicts.items():
            verdict.check(technique.name, f"{config.desc}, {implementation}, {dtype}", quantity)

    for_each(all_configs(technique, device, dtype), check)


def _pytorch_has(technique: OptimizerTechnique, config: OptimizerConfig, implementation: str) -> bool:
    """Whether PyTorch's own foreach or fused path is recorded beside ours; nothing is required of it."""
    return config.torch_kwargs is not None and (
        implementation == "foreach" or (implementation == "fused" and technique.torch_fused)
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_float16_fused(technique: OptimizerTechnique, device: torch.device) -> None:
    """Few configurations: the kernels are bfloat16's but for the conversions at their ends."""

    def check(config: OptimizerConfig) -> None:
        run = {"implementation": "fused", "dtype": torch.float16, "device": device}
        for quantity, verdict in compare_with_oracle(technique, config, **run).items():  # type: ignore[arg-type]
            verdict.check(technique.name, f"{config.desc}, fused, float16", quantity)

    for_each([*pytorch_configs(technique, device, torch.float16)[:1], *technique.configs[:1]], check)
