"""The harness, for anyone's optimizer or kernel: declarations, derived tolerances, recorder and independence guard."""

from reimpl.testing.comparison import assert_optimizers_agree, compare_optimizers
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
from reimpl.testing.optimizer_names import load_optimizer
from reimpl.testing.outcomes import OptimizerComparison, Outcome
from reimpl.testing.recorder import Recorder, read_record
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator
from reimpl.testing.scenarios import SCENARIOS, Scenario
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
from reimpl.testing.yardstick import Divergence

__all__ = [
    "COMPLEX_DTYPES",
    "REAL_DTYPES",
    "SCENARIOS",
    "SEEDS",
    "Divergence",
    "Error",
    "FunctionTechnique",
    "IndependenceError",
    "InitTechnique",
    "OptimizerComparison",
    "OptimizerConfig",
    "OptimizerTechnique",
    "Outcome",
    "Recorder",
    "Sample",
    "Scenario",
    "Technique",
    "Verdict",
    "assert_bitwise",
    "assert_optimizers_agree",
    "assert_parity",
    "bits_equal",
    "check_bitwise",
    "check_checkpoint_exchange",
    "check_classes",
    "check_fused_step",
    "combine",
    "compare_optimizers",
    "compare_with_oracle",
    "independence_guard",
    "judge",
    "load_optimizer",
    "names_used",
    "operand_ulp",
    "oracle_dtype",
    "random_tensor",
    "read_record",
    "seeded_generator",
    "to_oracle",
    "ulp_error",
]
