"""What was initialised how: one row a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reimpl.init.gain import Fans

LEFT = "left alone"


@dataclass(frozen=True)
class Initialised:
    """What happened to one parameter.

    ``rule`` is how it was filled, ``activation`` what follows its layer, ``fans`` what its scale was made from (both
    empty for biases and the like), ``std`` the standard deviation of what it holds now (NaN on the meta device).
    """

    parameter: str
    shape: tuple[int, ...]
    rule: str
    activation: str = ""
    fans: Fans | None = None
    std: float = float("nan")


@dataclass(frozen=True)
class Initialisation:
    """What :func:`apply` did, one row a parameter; ``str`` gives a table, ``[name]`` a parameter's row."""

    rows: tuple[Initialised, ...]

    @property
    def left(self) -> tuple[str, ...]:
        """Names of the parameters that were not touched: those of layers that are not known."""
        return tuple(row.parameter for row in self.rows if row.rule == LEFT)

    def __iter__(self) -> Iterator[Initialised]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, parameter: str) -> Initialised:
        for row in self.rows:
            if row.parameter == parameter:
                return row
        raise KeyError(parameter)

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("parameter", "shape", "rule", "activation", "fan in", "fan out", "std")]
        for row in self.rows:
            fans = ("", "") if row.fans is None else tuple(f"{fan:g}" for fan in row.fans)
            shape = " × ".join(map(str, row.shape)) or "scalar"
            lines.append((row.parameter, shape, row.rule, row.activation, *fans, f"{row.std:.4g}"))
        return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
