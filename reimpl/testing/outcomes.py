"""What a comparison of two optimizers showed, case by case, as data and in words."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from reimpl.testing.walks import PARAM, VIEW
from reimpl.testing.yardstick import Divergence

Status = Literal["agrees", "both refuse", "both leave", "parts", "raises"]

#: Of a message that is shown; the data keep all of it.
LONGEST_TEXT = 200


def shortened(text: str) -> str:
    """``text`` on one line; the sentences, or else the words, that fit into 200 characters, and ``…`` for the rest."""
    text = " ".join(text.split())
    if len(text) <= LONGEST_TEXT:
        return text
    kept = text[: LONGEST_TEXT - 2]
    sentences = re.match(r".*[.!?](?= )", kept)
    return f"{sentences.group() if sentences else kept.rpartition(' ')[0] or kept} …"


@dataclass(frozen=True)
class Outcome:
    """What one case showed.

    Args:
        scenario: its name.
        dtype: of parameters and gradients, e.g. ``"float32"``.
        implementation: a key of :data:`VARIANTS`.
        status: ``"agrees"``; ``"both refuse"``: both raise; ``"both leave"``: equal to each other, but not to the
            reference's plain walk; ``"parts"``: other numbers; ``"raises"``: one raises, the other steps.
        steps: how many steps were compared.
        bitwise: whether all that was compared is equal to the last bit.
        ulp: largest distance from the truth, in ulp of the path.
        entries: what was compared: ``"param"`` and the state entries that both have.
        divergence: where the two part, for ``"parts"`` and ``"both leave"``.
        subject: what it does, in words.
        reference: what the reference does, in words.
    """

    scenario: str
    dtype: str
    implementation: str
    status: Status
    steps: int
    bitwise: bool
    ulp: float
    entries: tuple[str, ...]
    divergence: Divergence | None
    subject: str
    reference: str

    @property
    def ok(self) -> bool:
        """Whether the two do the same."""
        return self.status in ("agrees", "both refuse", "both leave")

    def __str__(self) -> str:
        case = f"[{self.scenario}, {self.dtype}, {self.implementation}]"
        if self.divergence:
            return f"{case} {self.divergence}"
        return f"{case} {shortened(self.subject)}; reference: {shortened(self.reference)}"


@dataclass(frozen=True)
class Parting:
    """Cases that part in the same way: the same number is off, or the same is raised.

    Args:
        implementations: how the subject ran.
        scenarios: in which it parts.
        dtypes: of any of them.
        outcomes: the cases; the first stands for all.
    """

    implementations: tuple[str, ...]
    scenarios: tuple[str, ...]
    dtypes: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    def described(self, most: int = 8) -> str:
        """Implementations, scenarios (a count, where they are more than ``most``) and dtypes in one line."""
        few = len(self.scenarios) <= most
        scenarios = "; ".join(self.scenarios) if few else f"{self.scenarios[0]} and {len(self.scenarios) - 1} others"
        return f"{', '.join(self.implementations)} · {scenarios} · {', '.join(self.dtypes)}"


@dataclass(frozen=True)
class Skipped:
    """What was not run, and why."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"skipped {self.what}: {shortened(self.why)}"


@dataclass
class OptimizerComparison:
    """Everything that one comparison showed; ``ok`` where something was compared and nothing parts."""

    subject: str
    reference: str
    subject_arguments: dict[str, str]
    reference_arguments: dict[str, str]
    device: str
    torch: str = torch.__version__
    outcomes: list[Outcome] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    random: bool = False

    @property
    def partings(self) -> list[Outcome]:
        """The cases in which the two do not do the same."""
        return [outcome for outcome in self.outcomes if not outcome.ok]

    def kinds(self) -> list[Parting]:
        """The partings, with those of a kind together."""
        ways: dict[tuple[str, str, str], list[Outcome]] = {}
        for outcome in self.partings:
            # The same message about another dtype or shape is the same refusal.
            raised = re.sub(r"\W*\d[\W\d]*", " ", f"{outcome.subject}, {outcome.reference}".replace(outcome.dtype, ""))
            what = outcome.divergence.entry.removeprefix(VIEW) or PARAM if outcome.divergence else raised
            ways.setdefault((outcome.implementation, outcome.status, what), []).append(outcome)
        kinds: dict[tuple[object, ...], list[Outcome]] = {}
        for (_, status, what), outcomes in ways.items():
            cases = tuple((outcome.scenario, outcome.dtype) for outcome in outcomes)
            kinds.setdefault((status, what, cases), []).extend(outcomes)
        return [
            Parting(
                tuple(dict.fromkeys(outcome.implementation for outcome in outcomes)),
                tuple(dict.fromkeys(outcome.scenario for outcome in outcomes)),
                tuple(dict.fromkeys(outcome.dtype for outcome in outcomes)),
                tuple(outcomes),
            )
            for outcomes in kinds.values()
        ]

    @property
    def compared(self) -> int:
        """Cases in which numbers were compared."""
        return sum(outcome.steps > 0 and bool(outcome.entries) for outcome in self.outcomes)

    @property
    def ok(self) -> bool:
        """Whether something was compared, and nothing parts."""
        return self.compared > 0 and not self.partings

    def headline(self) -> str:
        """The result in one sentence."""
        if not self.compared:
            return f"nothing could be compared: {self._why_nothing()}"
        bitwise = sum(outcome.status == "agrees" and outcome.bitwise for outcome in self.outcomes)
        said = f"{len(self.outcomes)} cases, {bitwise} equal to the last bit"
        return f"{said}, {len(self.partings)} part" if self.partings else f"{said}, none part"

    def _why_nothing(self) -> str:
        if not self.outcomes:
            reasons: dict[str, list[str]] = {}
            for skipped in self.skipped:
                reasons.setdefault(skipped.why, []).append(skipped.what)
            return "; ".join(str(Skipped(", ".join(what), why)) for why, what in reasons.items())
        if all(outcome.status == "both refuse" for outcome in self.outcomes):
            return "both refuse every case"
        return f"{len(self.partings)} of {len(self.outcomes)} cases part before there are numbers"

    def summary(self) -> str:
        """The headline, and one case of each kind of parting in words."""
        lines = [f"{self.subject} against {self.reference}: {self.headline()}"]
        for kind in self.kinds():
            lines.append(f"  {kind.outcomes[0]}")
            if len(kind.outcomes) > 1:
                lines.append(f"    and so {len(kind.outcomes) - 1} more: {kind.described()}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; numbers that are not finite become strings."""
        raw = {**dataclasses.asdict(self), "ok": self.ok, "compared": self.compared, "headline": self.headline()}
        plain: dict[str, Any] = _jsonable(raw)
        return plain


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
