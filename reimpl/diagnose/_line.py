"""A loss along one entry of a parameter: its differences, their noise, and whether a kink is what bends them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_STEPS = 20  # each shorter than the last by √2
_SURE = 2.5  # standard deviations that noise is taken to stay within, for two quotients in a row


class Line:
    """E as a function of the step from where one entry of ``p`` is, to which it is put back after each look."""

    def __init__(self, p: Tensor, index: tuple[int, ...], evaluate: Callable[[], Tensor]) -> None:
        self._p, self._index, self._evaluate = p, index, evaluate
        self._seen: dict[float, tuple[float, float]] = {}
        self.unit = max(1.0, abs(float(p[index])))

    def at(self, step: float) -> tuple[float, float]:
        """The step that was made, which rounding makes other than ``step``, and E there."""
        if step not in self._seen:
            before = self._p[self._index].clone()
            try:
                self._p[self._index] = before + step
                self._seen[step] = float(self._p[self._index]) - float(before), float(self._evaluate())
            finally:
                self._p[self._index] = before
        return self._seen[step]

    def slope(self, first: float, second: float) -> tuple[float, float]:
        """The slope of the secant between two steps, and its standard deviation for noise of deviation 1."""
        (x, near), (y, far) = self.at(first), self.at(second)
        return (near - far) / (x - y), 2**0.5 / abs(x - y)

    def noise(self, h: float) -> float:
        """The standard deviation of E's rounding, from third differences (Moré and Wild, 2011) over steps far below h.

        Rounding E itself makes at least half a unit in its last place.
        """
        values = torch.tensor([self.at(i * h / 1024)[1] for i in range(9)], dtype=torch.float64)
        least = float(values[0].abs()) * torch.finfo(self._p.dtype).eps / 2
        return max(least, float((values.diff(n=3).square().mean() / 20).sqrt()))

    def is_kinked(self, h: float, derivative: float, tolerance: float) -> bool:
        """Whether a kink within ``h`` is what the difference quotient is off by, and ``derivative`` is right.

        So it is where the quotients at two successive shorter steps both give ``derivative``, taken over both sides or
        over one. A quotient counts whose noise is surely below half of what is to be explained, and agrees where it is
        within that half and the tolerance: were there no kink, all of the error would stay.
        """
        half = abs(self.slope(h, -h)[0] - derivative) / 2
        noise = _SURE * self.noise(h)
        for ahead, behind in ((1, -1), (1, 0), (0, -1)):
            before = False
            for k in range(_STEPS):
                step = h / 2 ** (k / 2)
                slope, deviation = self.slope(ahead * step, behind * step)
                if not deviation * noise <= half:
                    break
                agrees = abs(slope - derivative) <= min(
                    half, deviation * noise + tolerance * (abs(slope) + abs(derivative))
                )
                if agrees and before:
                    return True
                before = agrees
        return False
