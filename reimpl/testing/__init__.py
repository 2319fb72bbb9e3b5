"""The harness, for anyone's optimizer or kernel: declarations, derived tolerances, recorder and independence guard."""

from reimpl.testing.declarations import (
    COMPLEX_DTYPES,
    REAL_DTYPES,
    FunctionTechnique,
    InitTechnique,
    OptimizerConfig,
    OptimizerTechnique,
    Sample,
    Technique,
)
from reimpl.testing.guard import IndependenceError, independence_guard, names_used
from reimpl.testing.optimizer_checks import (
    check_bitwise,
    check_checkpoint_exchange,
    check_classes,
    check_fused_step,
    compare_with_oracle,
)
from reimpl.testing.recorder import Recorder, read_record
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator
from reimpl.testing.tolerance import (
    Error,
    Verdict,
    assert_bitwise,
    assert_parity,
    bits_equal,
    combine,
    judge,
    operand_ulp,
    oracle_dtype,
    to_oracle,
    ulp_error,
)

__all__ = [
    "COMPLEX_DTYPES",
    "REAL_DTYPES",
    "SEEDS",
    "Error",
    "FunctionTechnique",
    "IndependenceError",
    "InitTechnique",
    "OptimizerConfig",
    "OptimizerTechnique",
    "Recorder",
    "Sample",
    "Technique",
    "Verdict",
    "assert_bitwise",
    "assert_parity",
    "bits_equal",
    "check_bitwise",
    "check_checkpoint_exchange",
    "check_classes",
    "check_fused_step",
    "combine",
    "compare_with_oracle",
    "independence_guard",
    "judge",
    "names_used",
    "operand_ulp",
    "oracle_dtype",
    "random_tensor",
    "read_record",
    "seeded_generator",
    "to_oracle",
    "ulp_error",
]
