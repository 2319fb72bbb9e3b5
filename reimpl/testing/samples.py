"""Deterministic random inputs: generators and tensors that depend on a seed and a label, not on the order of tests."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

#: Errors are the largest over at least five seeds.
SEEDS: tuple[int, ...] = (0, 1, 2, 3, 4)


def seeded_generator(seed: int, *labels: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream depends on ``seed`` and ``labels`` alone, the same in every process."""
    digest = zlib.crc32("/".join(str(label) for label in (seed, *labels)).encode())
    return torch.Generator(device).manual_seed(digest)


def random_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Normal numbers drawn on the CPU in float64 and rounded to ``dtype``: the same on every device and dtype."""
    real = torch.float64
    if dtype.is_complex:
        drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.complex128)
    else:
        drawn = torch.randn(tuple(shape), generator=generator, dtype=real)
    return drawn.to(dtype).to(device)
