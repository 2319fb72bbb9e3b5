"""Where ours does the same arithmetic in the same order, parameters and state are PyTorch's to the last bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from parity_tests.optim_cases import (
    EVERY_TECHNIQUE,
    TECHNIQUES,
    all_configs,
    dialect_configs,
    dtype_id,
    for_each,
    is_refused,
    pytorch_configs,
    skip_unless_it_runs,
)
from reimpl.testing.declarations import OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_checks import check_bitwise, check_checkpoint_exchange, reference_of
from reimpl.testing.optimizers import DENSE_LAYOUTS, STRIDED_LAYOUTS, skip_some

quick = pytest.mark.quick
FOR_LOOP = [
    pytest.param("default", torch.float32),
    pytest.param("forloop", torch.float64),
    pytest.param("forloop", torch.float32, marks=quick),
    pytest.param("forloop", torch.bfloat16),
    pytest.param("forloop", torch.float16),
    pytest.param("forloop", torch.complex64),
    pytest.param("differentiable", torch.float64),
]
# On CUDA PyTorch's own foreach kernels contract differently from its for-loop; the oracle judges them there.
FOREACH = [
    pytest.param("foreach", torch.float64),
    pytest.param("foreach", torch.float32, marks=quick),
    pytest.param("foreach", torch.complex128),
    pytest.param("foreach", torch.complex64),
]
EVERY_LAYOUT = (*DENSE_LAYOUTS, *STRIDED_LAYOUTS)
# A gradient of this size makes sqrt(v) as small as the default eps of 1e-8 or 1e-10, so that an ulp of eps is seen.
TINY = 1e-9


def _skip_foreach_on_cuda(implementation: str, device: torch.device) -> None:
    if implementation == "foreach" and device.type == "cuda":
        pytest.skip("bitwise equality of foreach is required on the CPU; on CUDA the oracle judges")


@pytest.mark.parametrize(("implementation", "dtype"), FOR_LOOP + FOREACH, ids=dtype_id)
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_every_configuration(
    technique: OptimizerTechnique, implementation: str, dtype: torch.dtype, device: torch.device
) -> None:
    skip_unless_it_runs(technique, implementation, dtype)
    _skip_foreach_on_cuda(implementation, device)

    def check(config: OptimizerConfig) -> None:
        if is_refused(technique, config, implementation, reference_of(technique, config)[0]):
            return
        check_bitwise(
            technique, config, implementation=implementation, dtype=dtype, device=device, layouts=EVERY_LAYOUT
        )

    # what PyTorch lacks is held to our own for-loop
    dialects = dialect_configs(technique) if implementation in ("foreach", "differentiable") else []
    for_each([*pytorch_configs(technique, device, dtype), *dialects], check)


#: Those whose foreach does in PyTorch what their for-loop does, so that only foreach's own roundings are left.
SAME_ORDER = [
    param for param in TECHNIQUES if param.id in ("SGD", "Adadelta", "RMSprop", "Adam", "AdamW", "Adamax", "Rprop")
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("technique", SAME_ORDER)
def test_foreach_in_half_precision_is_pytorchs_foreach(technique: OptimizerTechnique, dtype: torch.dtype) -> None:
    """There it rounds otherwise than a for-loop, in PyTorch and here alike; the oracle judges the other classes."""
    theirs = technique.torch
    assert theirs is not None
    foreach = dataclasses.replace(technique, torch=lambda params, **kw: theirs(params, **{**kw, "foreach": True}))

    def check(config: OptimizerConfig) -> None:
        if not is_refused(technique, config, "foreach", theirs):
            check_bitwise(foreach, config, implementation="foreach", dtype=dtype, layouts=EVERY_LAYOUT)

    for_each(pytorch_configs(technique, torch.device("cpu"), dtype), check)


@pytest.mark.parametrize("implementation", ["forloop", "foreach"])
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_gradients_so_small_that_eps_counts(
    technique: OptimizerTechnique, implementation: str, device: torch.device
) -> None:
    skip_unless_it_runs(technique, implementation)
    _skip_foreach_on_cuda(implementation, device)

    def check(config: OptimizerConfig) -> None:
        if not is_refused(technique, config, implementation, reference_of(technique, config)[0]):
            check_bitwise(technique, config, implementation=implementation, device=device, scale=TINY)

    for_each(pytorch_configs(technique, device, torch.float64), check)


@pytest.mark.parametrize("implementation", ["forloop", "foreach"])
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_parameters_that_skip_gradients_keep_their_own_step_count(
    technique: OptimizerTechnique, implementation: str, device: torch.device
) -> None:
    skip_unless_it_runs(technique, implementation)
    _skip_foreach_on_cuda(implementation, device)

    def check(config: OptimizerConfig) -> None:
        if not is_refused(technique, config, implementation, reference_of(technique, config)[0]):
            check_bitwise(technique, config, implementation=implementation, device=device, skip=skip_some)

    for_each(all_configs(technique, device, torch.float64), check)


@pytest.mark.parametrize("to_ours", [True, False], ids=["to ours", "to torch"])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("forloop", torch.float64), ("foreach", torch.float64), ("forloop", torch.float32)],
    ids=dtype_id,
)
@pytest.mark.parametrize("technique", EVERY_TECHNIQUE)
def test_checkpoints_go_on_to_the_same_bits(
    technique: OptimizerTechnique, implementation: str, dtype: torch.dtype, to_ours: bool, device: torch.device
) -> None:
    skip_unless_it_runs(technique, implementation, dtype)
    _skip_foreach_on_cuda(implementation, device)

    def check(config: OptimizerConfig) -> None:
        if not is_refused(technique, config, implementation, reference_of(technique, config)[0]):
            check_checkpoint_exchange(
                technique, config, implementation=implementation, to_ours=to_ours, dtype=dtype, device=device
            )

    for_each(pytorch_configs(technique, device, dtype), check)
