"""``EarlyStopping``: training ends when the validation error worsens, and the best weights come back (catalogue D9)."""

from __future__ import annotations

import copy
import math
from operator import index
from typing import Any, Literal, get_args

from torch import Tensor, nn

Mode = Literal["min", "max"]


class EarlyStopping:
    """Says when to stop, and keeps the weights of the best epoch, for any training loop.

    .. code-block:: python

        stopping = EarlyStopping(patience=3)
        for epoch in range(epochs):
            train(model)
            if stopping.step(validation_error(model), model):
                break
        stopping.restore(model)

    With ``mode="min"`` a value is an improvement if it is below best - ``min_delta``, and bad if it is above; NaN is
    bad. Training stops at bad value number ``patience`` + 1 since the last improvement. ``patience=0`` is the notes'
    rule: stop as soon as the error has risen. A value that equals best - ``min_delta`` is neither: at ``min_delta=0`` a
    plateau is gone through, above 0 it is bad.

    **The value is of a validation set.** The training error, which the notes' sketch watches, falls on and stops
    nothing while the network overfits.

    Args:
        patience: bad values to bear since the last improvement.
        min_delta: by how much a value must be better to count, at least 0.
        mode: ``"min"`` for errors and losses, ``"max"`` for accuracies.

    Attributes:
        best, best_step: the best value and when it came, counted from 0; ``None`` before the first.
        steps: how many values came.
        bad: how many of them were bad since the best.
        stopped: whether to stop.

    Raises:
        ValueError: an argument out of range.
        TypeError: ``patience`` is no integer.

    Source: D9 (N0, N2 §8.1.2, N4).
    """

    def __init__(self, patience: int = 0, min_delta: float = 0.0, mode: Mode = "min") -> None:
        try:
            patience = index(patience)
        except TypeError:
            raise TypeError(f"patience must be an integer of at least 0, got {patience!r}") from None
        if patience < 0:
            raise ValueError(f"patience must be at least 0, got {patience}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta must be finite and at least 0, got {min_delta}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
        self.patience = patience
        self.min_delta = min_delta
        self.mode: Mode = mode
        self.best: float | None = None
        self.best_step: int | None = None
        self.steps = 0
        self.bad = 0
        self._weights: dict[str, Any] | None = None

    @property
    def stopped(self) -> bool:
        """Whether to stop."""
        return self.bad > self.patience

    def step(self, value: float | Tensor, model: nn.Module | None = None) -> bool:
        """Takes the value after an epoch, or after any number of steps, and returns whether to stop.

        Args:
            value: the validation error, a number or a tensor of one.
            model: what the value belongs to; its state dict is copied, on its device, where the value is the best.
                Left out, nothing is kept, and :attr:`best_step` says which checkpoint to load.
        """
        number = float(value.detach() if isinstance(value, Tensor) else value)
        better_by = self._better_by(number)
        if better_by > self.min_delta:
            self.best, self.best_step, self.bad = number, self.steps, 0
            self._weights = None if model is None else _copied(model.state_dict())
        elif better_by != self.min_delta:  # NaN differs from everything
            self.bad += 1
        self.steps += 1
        return self.stopped

    def restore(self, model: nn.Module) -> None:
        """Loads the best weights into ``model``; they are kept, so that it can be done again.

        Raises:
            RuntimeError: there are none: no value came yet, all were NaN, or ``step`` was called without a model.
        """
        if self._weights is None:
            raise RuntimeError(f"there are no weights to restore after {self.steps} steps: call step(value, model)")
        model.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """All that going on needs, the best weights included (not copied); the arguments are not in it."""
        names = ("best", "best_step", "steps", "bad")
        return {name: getattr(self, name) for name in names} | {"weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where ``state_dict`` was made; the weights are copied.

        Raises:
            KeyError: a key is missing.
        """
        state = {name: state_dict[name] for name in ("best", "best_step", "steps", "bad")}
        weights = state_dict["weights"]
        self.__dict__.update(state)
        self._weights = None if weights is None else _copied(weights)

    def _better_by(self, value: float) -> float:
        """By how much ``value`` is better than the best, negative where it is worse."""
        if self.best is None:
            return math.nan if math.isnan(value) else math.inf
        if value == self.best:  # infinity is no worse than itself
            return 0.0
        return self.best - value if self.mode == "min" else value - self.best

    def __repr__(self) -> str:
        name = f"{type(self).__name__}(patience={self.patience}, min_delta={self.min_delta}, mode={self.mode!r})"
        return name if self.best is None else f"{name}: best {self.best:.6g} at step {self.best_step} of {self.steps}"


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict that shares nothing with ``state``, the modules' version numbers (``_metadata``) included."""
    copied = copy.copy(state)
    for name, value in state.items():
        copied[name] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return copied
