"""Layers and losses together: on average, our errors against the oracle are no larger than PyTorch's."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from parity_tests.declarations import FUNCTIONS
from parity_tests.functional_cases import verdicts
from reimpl.testing import REAL_DTYPES, SEEDS, seeded_generator

# What the project promises: a tenth more than PyTorch's, at most.
LIMIT = 1.1


@pytest.mark.parity
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_geometric_mean_of_the_errors(dtype: torch.dtype, device: torch.device) -> None:
    """Over all declared cases in which the two differ; where they agree to the last bit there is nothing to compare."""
    logarithms: dict[str, list[float]] = defaultdict(list)
    for row in FUNCTIONS:
        assert row.samples is not None
        for seed in SEEDS if row.torch is not None else ():
            for sample in row.samples(device, dtype, seeded_generator(seed, row.name)):
                for _, verdict in verdicts(row, sample, seed):
                    if not verdict.bitwise and verdict.torch_ulp and verdict.ours_ulp:
                        logarithms[row.name].append(math.log(verdict.ours_ulp / verdict.torch_ulp))
    every = [number for numbers in logarithms.values() for number in numbers]
    assert len(every) > 200
    largest = max(logarithms, key=lambda name: sum(logarithms[name]) / len(logarithms[name]))
    mean = math.exp(sum(every) / len(every))
    assert mean <= LIMIT, f"{mean:.3f} over {len(every)} cases; largest of {largest}"
