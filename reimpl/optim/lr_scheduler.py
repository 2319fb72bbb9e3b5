"""``torch.optim.lr_scheduler``: the decays of the notes as own classes, and PyTorch's other schedules as they are.

Every class is a ``torch.optim.lr_scheduler.LRScheduler``: it drives PyTorch's optimizers and this library's, goes into
``SequentialLR`` and ``ChainedScheduler``, and its ``state_dict`` is loaded by PyTorch's class of the same name.
Epochs count from 0; ``step()`` begins the next one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch.optim.lr_scheduler as _torch_schedulers
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from reimpl._handed_on import handed_on

from ._torch import Optimizer

REIMPLEMENTED = ("StepLR", "LinearLR", "ExponentialLR")

__all__ = ["ExponentialLR", "InverseSqrtLR", "InverseTimeLR", "LRScheduler", "LinearLR", "LinearToConstantLR", "StepLR"]
__all__ += [name for name in _torch_schedulers.__all__ if name not in __all__]

Rates = list[float | Tensor]


class _Decay(LRScheduler):
    """A schedule given by ``_factor_of_last``, what the rates are multiplied by when an epoch begins."""

    def get_lr(self) -> Rates:
        """The rates of ``last_epoch``, from those of the epoch before; called by ``step()``."""
        if not self._get_lr_called_within_step:
            warnings.warn(
                "To get the last learning rate computed by the scheduler, please use `get_last_lr()`.",
                UserWarning,
                stacklevel=2,
            )
        factor = self._factor_of_last()
        rates = (group["lr"] for group in self.optimizer.param_groups)
        if factor is None:
            return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
        return [rate * factor for rate in rates]

    def _factor_of_last(self) -> float | None:
        """``None`` where the rates stay."""
        raise NotImplementedError


class StepLR(_Decay):
    r"""The staircase: γ times lower every ``step_size`` epochs (O12).

    .. math:: \varepsilon_k = \varepsilon_0 \, \gamma^{\lfloor k / s \rfloor}

    Args:
        optimizer: whose groups' ``lr`` are set.
        step_size: s, in epochs.
        gamma: γ.
        last_epoch: k to go on from; -1 to begin.

    Source: O12 (N4, "several kinds"); ``torch.optim.lr_scheduler.StepLR``.
    """

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor_of_last(self) -> float | None:
        return None if self.last_epoch == 0 or self.last_epoch % self.step_size != 0 else self.gamma

    def _get_closed_form_lr(self) -> Rates:
        return [base * self.gamma ** (self.last_epoch // self.step_size) for base in self.base_lrs]


class LinearLR(_Decay):
    r"""From one share of the rate to another along a straight line, and constant from there (O11).

    .. math:: \varepsilon_k = \varepsilon_0 \left(s + (e - s) \, \frac{\min(k, \tau)}{\tau}\right)

    The notes' decay to ε_τ is s = 1, e = ε_τ/ε₀; :class:`LinearToConstantLR` takes ε_τ itself.

    Args:
        optimizer: whose groups' ``lr`` are set.
        start_factor: s, in (0, 1].
        end_factor: e, in [0, 1].
        total_iters: τ, in epochs.
        last_epoch: k to go on from; -1 to begin.

    Raises:
        ValueError: a factor outside its range.

    Source: O11 (N2 §8.3.1); ``torch.optim.lr_scheduler.LinearLR``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < start_factor <= 1.0:
            raise ValueError("Starting multiplicative factor expected to be greater than 0 and less or equal to 1.")
        if not 0 <= end_factor <= 1.0:
            raise ValueError("Ending multiplicative factor expected to be between 0 and 1.")
        self.start_factor = start_factor
        self.end_factor = end_factor
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def _factor_of_last(self) -> float | None:
        if self.last_epoch == 0:
            return self.start_factor
        if self._is_initial or self.last_epoch > self.total_iters:
            return None
        rise = self.end_factor - self.start_factor
        return 1.0 + rise / (self.total_iters * self.start_factor + (self.last_epoch - 1) * rise)

    def _get_closed_form_lr(self) -> Rates:
        rise = self.end_factor - self.start_factor
        elapsed = min(self.total_iters, self.last_epoch)
        return [base * (self.start_factor + rise * elapsed / self.total_iters) for base in self.base_lrs]


class ExponentialLR(_Decay):
    r"""γ times lower every epoch (O12).

    .. math:: \varepsilon_k = \varepsilon_0 \, \gamma^k

    Args:
        optimizer: whose groups' ``lr`` are set.
        gamma: γ, the notes' r.
        last_epoch: k to go on from; -1 to begin.

    Source: O12 (N4, "several kinds"); ``torch.optim.lr_scheduler.ExponentialLR``.
    """

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _factor_of_last(self) -> float | None:
        return None if self._is_initial else self.gamma

    def _get_closed_form_lr(self) -> Rates:
        return [base * self.gamma**self.last_epoch for base in self.base_lrs]


class _ClosedForm(LRScheduler):
    """A schedule that PyTorch lacks: computed anew from the initial rates each epoch, so that nothing adds up."""

    def get_lr(self) -> Rates:
        """The rates of ``last_epoch``."""
        return self._get_closed_form_lr()

    def _get_closed_form_lr(self) -> Rates:
        raise NotImplementedError


class LinearToConstantLR(_ClosedForm):
    r"""Linear decay to a rate of its own in τ epochs, and that rate from there (O11).

    .. math:: \varepsilon_k = (1 - a)\,\varepsilon_0 + a\,\varepsilon_\tau, \qquad a = \min(k/\tau, 1)

    The same as ``LinearLR(optimizer, 1, final_lr / lr, tau)`` up to rounding, for groups of any rates, and for
    ε_τ above ε₀ too.

    Args:
        optimizer: whose groups' ``lr`` are set.
        tau: τ, in epochs, above 0.
        final_lr: ε_τ, at least 0; one for all groups, or one for each.
        last_epoch: k to go on from; -1 to begin.

    Raises:
        ValueError: an argument outside its range; not one ``final_lr`` a group.

    Source: O11 (N2 §8.3.1, eq. 8.14 of the book).
    """

    def __init__(self, optimizer: Optimizer, tau: int, final_lr: float | Sequence[float], last_epoch: int = -1) -> None:
        if not tau > 0:
            raise ValueError(f"tau must be greater than 0, got {tau}")
        groups = len(optimizer.param_groups)
        final_lrs = list(final_lr) if isinstance(final_lr, Sequence) else [final_lr] * groups
        if len(final_lrs) != groups:
            raise ValueError(f"final_lr has {len(final_lrs)} values, but the optimizer has {groups} parameter groups")
        for value in final_lrs:
            _require_at_least_zero("final_lr", value)
        self.tau = tau
        self.final_lrs = final_lrs
        super().__init__(optimizer, last_epoch)

    def _get_closed_form_lr(self) -> Rates:
        a = min(self.last_epoch / self.tau, 1.0)
        return [(1 - a) * base + a * final for base, final in zip(self.base_lrs, self.final_lrs, strict=True)]


class InverseTimeLR(_ClosedForm):
    r"""Decay with the inverse of time (O12).

    .. math:: \varepsilon_k = \frac{\varepsilon_0}{1 + d k}

    Args:
        optimizer: whose groups' ``lr`` are set.
        decay: d, at least 0, per epoch: the rate has halved after 1/d epochs.
        last_epoch: k to go on from; -1 to begin.

    Raises:
        ValueError: ``decay`` below 0.

    Source: O12 (N4, "several kinds").
    """

    def __init__(self, optimizer: Optimizer, decay: float, last_epoch: int = -1) -> None:
        _require_at_least_zero("decay", decay)
        self.decay = decay
        super().__init__(optimizer, last_epoch)

    def _get_closed_form_lr(self) -> Rates:
        return [base / (1 + self.decay * self.last_epoch) for base in self.base_lrs]


class InverseSqrtLR(_ClosedForm):
    r"""Decay with the inverse root of time (O12).

    .. math:: \varepsilon_k = \frac{\varepsilon_0 \, c}{\sqrt{k + 1}}

    The notes' epoch, whose root divides, counts from 1; hence k + 1.

    Args:
        optimizer: whose groups' ``lr`` are set.
        k: c, the notes' k, at least 0: the first epoch's rate is ``k * lr``.
        last_epoch: k to go on from; -1 to begin.

    Raises:
        ValueError: ``k`` below 0.

    Source: O12 (N4, "several kinds").
    """

    def __init__(self, optimizer: Optimizer, k: float = 1.0, last_epoch: int = -1) -> None:
        _require_at_least_zero("k", k)
        self.k = k
        super().__init__(optimizer, last_epoch)

    def _get_closed_form_lr(self) -> Rates:
        return [base * self.k / (self.last_epoch + 1) ** 0.5 for base in self.base_lrs]


def _require_at_least_zero(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


__getattr__, __dir__ = handed_on(__name__, _torch_schedulers)
