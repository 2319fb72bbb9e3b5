"""The PyTorch that texts and bits are those of, and what is asked of older ones."""

from __future__ import annotations

import pytest
import torch

REFERENCE = (2, 15)
IS_REFERENCE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= REFERENCE

reference_only = pytest.mark.skipif(
    not IS_REFERENCE, reason=f"the wording is that of torch {'.'.join(map(str, REFERENCE))}"
)
