"""What the report says about parity: the record's rows summed up by technique, execution, device and dtype."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

KIND_TITLES: Mapping[str, str] = {"optimizer": "Optimizers", "function": "Layers and losses", "init": "Initialisation"}
#: Kind of the rows in which PyTorch's foreach or fused stands in the place of ours.
PYTORCH = "pytorch"
_DTYPE_ORDER = ("float64", "float32", "bfloat16", "float16", "complex128", "complex64")
_EXECUTIONS = {"forloop": "for-loop"}


@dataclass(frozen=True)
class Comparison:
    """One row of the record: one quantity of one case, ours and PyTorch's, held against the oracle."""

    kind: str
    technique: str
    case: str
    quantity: str
    execution: str
    device: str
    dtype: str
    ours_abs: float
    ours_ulp: float
    torch_abs: float | None
    torch_ulp: float | None
    limit_ulp: float
    bitwise: bool | None
    ok: bool

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Comparison:
        """Read a row as the recorder wrote it, infinite errors as the string ``"inf"``."""

        def optional(value: Any) -> float | None:
            return None if value is None else float(value)

        return cls(
            kind=row["kind"],
            technique=row["technique"],
            case=row["case"],
            quantity=row["quantity"],
            execution=_EXECUTIONS.get(row["implementation"], row["implementation"]),
            device=row["device"],
            dtype=row["dtype"],
            ours_abs=float(row["ours_abs"]),
            ours_ulp=float(row["ours_ulp"]),
            torch_abs=optional(row["torch_abs"]),
            torch_ulp=optional(row["torch_ulp"]),
            limit_ulp=float(row["limit_ulp"]),
            bitwise=row["bitwise"],
            ok=row["ok"],
        )

    @property
    def closer(self) -> bool:
        """Whether ours is strictly nearer to the oracle than PyTorch's."""
        return self.torch_ulp is not None and self.ours_ulp < self.torch_ulp


class Comparisons:
    """Several comparisons seen as one: counts, and the largest error of each side."""

    def __init__(self, rows: Iterable[Comparison]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def failed(self) -> tuple[Comparison, ...]:
        """Those beyond their limit, the worst first."""
        return tuple(sorted((r for r in self.rows if not r.ok), key=lambda r: -r.ours_ulp / max(r.limit_ulp, 1e-300)))

    @cached_property
    def paired(self) -> tuple[Comparison, ...]:
        """Those that PyTorch has a counterpart of."""
        return tuple(r for r in self.rows if r.torch_ulp is not None)

    @cached_property
    def shared(self) -> Comparisons:
        """Those that PyTorch has a counterpart of; where it has none of any, all of them."""
        return Comparisons(self.paired or self.rows)

    @cached_property
    def dialects(self) -> Comparisons:
        """Those that PyTorch has no counterpart of."""
        return Comparisons(r for r in self.rows if r.torch_ulp is None)

    @property
    def ok(self) -> bool:
        """Whether every comparison keeps its limit."""
        return not self.failed

    @property
    def same(self) -> bool:
        """Whether all that PyTorch has a counterpart of equal its results to the last bit."""
        return bool(self.paired) and self.bitwise == len(self.paired)

    @property
    def bitwise(self) -> int:
        """How many equal PyTorch's to the last bit."""
        return sum(r.bitwise is True for r in self.rows)

    @property
    def closer(self) -> int:
        """How many lie strictly nearer to the oracle than PyTorch's."""
        return sum(r.closer for r in self.paired)

    @property
    def level(self) -> int:
        """How many lie as far from the oracle as PyTorch's."""
        return sum(r.ours_ulp == r.torch_ulp for r in self.paired)

    @property
    def farther(self) -> int:
        """How many lie farther from the oracle than PyTorch's, within their limit or not."""
        return len(self.paired) - self.closer - self.level

    @property
    def ours_ulp(self) -> float | None:
        """Largest error of ours, in ulp."""
        return max((r.ours_ulp for r in self.rows), default=None)

    @cached_property
    def worst(self) -> Comparison:
        """The comparison with the largest error of ours, in ulp."""
        return max(self.rows, key=lambda r: r.ours_ulp)

    @cached_property
    def median_ulp(self) -> float:
        """Median error of ours, in ulp."""
        return statistics.median(r.ours_ulp for r in self.rows)

    @property
    def ours_abs(self) -> float:
        """Largest absolute error of ours."""
        return max(r.ours_abs for r in self.rows)

    @property
    def torch_abs(self) -> float | None:
        """Largest absolute error of PyTorch's."""
        return max((r.torch_abs for r in self.paired if r.torch_abs is not None), default=None)

    @property
    def torch_ulp(self) -> float | None:
        """Largest error of PyTorch's, in ulp."""
        return max((r.torch_ulp for r in self.paired if r.torch_ulp is not None), default=None)


@dataclass(frozen=True)
class Line:
    """One line of a technique's table: an execution on a device in a dtype."""

    execution: str
    device: str
    dtype: str
    all: Comparisons


@dataclass(frozen=True)
class Card:
    """A technique with its declaration and its comparisons.

    ``beside`` holds PyTorch's own other executions against its for-loop: recorded for comparison, held to nothing.
    """

    declaration: Mapping[str, Any]
    all: Comparisons
    lines: tuple[Line, ...]
    beside: tuple[Line, ...] = ()

    @property
    def name(self) -> str:
        """The technique's public name."""
        return str(self.declaration["name"])


def make_cards(techniques: Sequence[Mapping[str, Any]], rows: Iterable[Comparison]) -> list[Card]:
    """A card for each declared technique that was measured, in the order of the declarations."""
    by_technique: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    beside: dict[str, list[Comparison]] = defaultdict(list)
    for row in rows:
        if row.kind == PYTORCH:
            beside[row.technique].append(row)
        else:
            by_technique[row.kind, row.technique].append(row)
    declared = {(t["kind"], t["name"]): t for t in techniques}
    for kind, name in by_technique:
        declared.setdefault((kind, name), _undeclared(kind, name))
    return [
        Card(
            declaration,
            Comparisons(by_technique[key]),
            _lines(by_technique[key]),
            _lines(beside[key[1]] if key[0] == "optimizer" else ()),
        )
        for key, declaration in declared.items()
        if key in by_technique
    ]


def unmeasured(techniques: Sequence[Mapping[str, Any]], cards: Iterable[Card]) -> list[str]:
    """Names of declared techniques that the record says nothing about."""
    measured = {(card.declaration["kind"], card.name) for card in cards}
    return [t["name"] for t in techniques if (t["kind"], t["name"]) not in measured]


def _undeclared(kind: str, name: str) -> dict[str, Any]:
    """A card's head for rows whose technique has no declaration under that name."""
    return {
        "kind": kind, "name": name, "ids": [], "source": "", "formula": "", "ours": name, "torch": None, "dialects": [],
    }  # fmt: skip


def dtype_rank(dtype: str) -> tuple[int, str]:
    """Sorts the widest real type first, complex ones and strangers last."""
    return (_DTYPE_ORDER.index(dtype) if dtype in _DTYPE_ORDER else len(_DTYPE_ORDER)), dtype


def _execution_rank(execution: str) -> tuple[int, str]:
    known = ("for-loop", "foreach", "fused", "forward", "backward")
    return (known.index(execution) if execution in known else len(known)), execution


def _lines(rows: Sequence[Comparison]) -> tuple[Line, ...]:
    groups: dict[tuple[str, str, str], list[Comparison]] = defaultdict(list)
    for row in rows:
        groups[row.execution, row.device, row.dtype].append(row)

    def order(key: tuple[str, str, str]) -> tuple[str, tuple[int, str], tuple[int, str]]:
        execution, device, dtype = key
        return device, _execution_rank(execution), dtype_rank(dtype)

    return tuple(Line(*key, Comparisons(groups[key])) for key in sorted(groups, key=order))
