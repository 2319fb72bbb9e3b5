"""One fused step from the same state stays within two ulp of the for-loop's largest operand, whatever the strides."""

from __future__ import annotations

import pytest
import torch

from parity_tests.optim_cases import TECHNIQUES, all_configs, dtype_id, for_each
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import check_fused_step
from reimpl.testing.optimizers import LONG_LAYOUT, skip_some


def _is_judged_by_operands(config: OptimizerConfig) -> bool:
    # Centred RMSprop subtracts the squared mean under the root: what a contraction changes there is no ulp of an
    # operand of the step. The oracle judges it, as it does bfloat16 (test_optim_oracle).
    return not config.kwargs.get("centered", False)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.quick)], ids=dtype_id)
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
