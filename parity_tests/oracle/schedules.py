"""Oracles of the learning-rate schedules: the rate of an epoch, counted from 0, by its closed form in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

Number = Any
_W = np.longdouble


def step(lr: float, epoch: int, *, step_size: int, gamma: float = 0.1) -> Number:
    """The staircase of O12."""
    return _W(lr) * _W(gamma) ** (epoch // step_size)


def linear(
    lr: float, epoch: int, *, start_factor: float = 1 / 3, end_factor: float = 1.0, total_iters: int = 5
) -> Number:
    """O11 in shares of the rate."""
    a = _W(min(epoch, total_iters)) / total_iters
    return _W(lr) * ((1 - a) * _W(start_factor) + a * _W(end_factor))


def exponential(lr: float, epoch: int, *, gamma: float) -> Number:
    """ε₀rᵉᵖᵒᶜʰ of O12."""
    return _W(lr) * _W(gamma) ** epoch


def linear_to_constant(lr: float, epoch: int, *, tau: int, final_lr: float) -> Number:
    """O11: (1 - a)ε₀ + aε_τ."""
    a = min(_W(epoch) / tau, _W(1))
    return (1 - a) * _W(lr) + a * _W(final_lr)


def inverse_time(lr: float, epoch: int, *, decay: float) -> Number:
    """ε₀/(1 + d·epoch) of O12."""
    return _W(lr) / (1 + _W(decay) * epoch)


def inverse_sqrt(lr: float, epoch: int, *, k: float = 1.0) -> Number:
    """ε₀k/√epoch of O12, where the notes' epoch counts from 1."""
    return _W(lr) * _W(k) / np.sqrt(_W(epoch + 1))
