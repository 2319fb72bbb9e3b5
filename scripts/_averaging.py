"""Averages of a network's weights along its path: a moving average beside it, or lookahead, which leads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["off", "ema", "lookahead"]


class WeightAverage:
    """a ← d a + (1 - d) θ over every floating-point entry of the state dict, running statistics included.

    ``"ema"``: every step, d = min(0.99, (1 + t) / (10 + t)), θ left alone. ``"lookahead"``: every fifth step,
    d = 0.95⁵ (t/T)³ after T steps in all, then θ ← a: steps early on pass nearly unhindered, late ones are averaged.
    ``"off"``: nothing is kept. Source: N2, 8.7.3 (O14); M. Zhang et al., *Lookahead Optimizer*, 2019, with the
    schedule of K. Jordan's *airbench94*.
    """

    def __init__(self, kind: Kind, model: nn.Module, total_steps: int) -> None:
        self.kind = kind
        self.total_steps = total_steps
        self.every = 5 if kind == "lookahead" else 1
        self._live = [v for v in model.state_dict().values() if v.is_floating_point()] if kind != "off" else []
        self._average = [v.clone() for v in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights in after ``step`` steps."""
        if not self._live or step % self.every:
            return
        if self.kind == "ema":
            decay = min(0.99, (1 + step) / (10 + step))
        else:
            decay = 0.95**5 * (step / self.total_steps) ** 3
        torch._foreach_lerp_(self._average, self._live, 1 - decay)
        if self.kind == "lookahead":
            torch._foreach_copy_(self._live, self._average)

    @torch.no_grad()
    def finish(self) -> None:
        """Makes the average the network's weights, for good."""
        if self._live:
            torch._foreach_copy_(self._live, self._average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network carries the average inside the ``with`` block."""
        saved = [v.clone() for v in self._live]
        self.finish()
        try:
            yield
        finally:
            if saved:
                with torch.no_grad():
                    torch._foreach_copy_(self._live, saved)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["kind"] != self.kind or len(state["average"]) != len(self._average):
            raise ValueError(f"average must be of kind {self.kind!r} over {len(self._average)} tensors")
        for ours, theirs in zip(self._average, state["average"]):
            ours.copy_(theirs)
