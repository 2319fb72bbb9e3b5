r"""How near is near enough where nobody has an oracle: the reference itself, one precision up, is the truth.

The rule, for each kind of number (the parameter, each state entry) of one scenario in one dtype. Errors are in ulp of
the path: :math:`\varepsilon` times the largest that the number and its change have been, element by element.

* **Truth.** The reference walks the same way in float64, from the same values. Where there is no next precision
  (float64) or the reference does not walk in it, its own plain walk stands for the truth.
* **Its error.** How far the reference is from the truth, the largest over elements, tensors and steps.
* **The inputs' error.** How far the truth moves when every initial value and gradient is off by up to an ulp: no
  implementation can be blamed for that much. In float64 this walk holds the reference's own roundings too.
* **Limit.** The subject may be 4 ulp from the truth, or twice either error, whichever is largest. A scenario with a
  single small tensor takes the errors of the usual shapes too: a few dozen numbers do not show the largest.

A number that is the reference's own to the last bit is right, and where the reference overflowed and the truth did not,
there is nothing to hold the subject against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reimpl.testing.declarations import Array
from reimpl.testing.tolerance import FACTOR_OVER_TORCH, FLOOR_ULP, bits_equal, locate_error, real_parts, to_oracle
from reimpl.testing.walks import PARAM, Key, Trace


@dataclass(frozen=True)
class Divergence:
    """The first step at which two walks part, and the worst number there.

    Args:
        step: counted from 1.
        tensor: name and shape of the parameter.
        entry: ``"param"``, the path of a state entry, or what else was looked at.
        index: of the element that is farthest off.
        subject: the number there.
        reference: the reference's.
        abs: largest difference of the tensor.
        ulp: largest distance from the truth, in ulp of the path.
        limit_ulp: what was allowed.
        reference_ulp: how far the reference is from the truth, at most.
        elements: how many elements are beyond the limit, and of how many.
        also: other entries and tensors that are beyond the limit at this step.
    """

    step: int
    tensor: str
    entry: str
    index: tuple[int, ...]
    subject: str
    reference: str
    abs: float
    ulp: float
    limit_ulp: float
    reference_ulp: float
    elements: tuple[int, int]
    also: tuple[str, ...] = ()

    @property
    def excess(self) -> float:
        """How many times the limit it is."""
        return self.ulp / self.limit_ulp if np.isfinite(self.limit_ulp) else float("inf")

    def __str__(self) -> str:
        where = f"{self.entry} of {self.tensor}"
        if not np.isfinite(self.limit_ulp):  # a fact, not a number that may be rounded
            return f"step {self.step}, {where}: {self.subject}, expected {self.reference}"
        wrong, total = self.elements
        return (
            f"step {self.step}, {where}: {wrong} of {total} elements off by up to {self.abs:.3g}, {self.ulp:.3g} ulp "
            f"(limit {self.limit_ulp:.3g}); at {list(self.index)} {self.subject}, expected {self.reference}"
        )


@dataclass(frozen=True)
class Agreement:
    """How near two walks stayed: ``ulp`` the largest distance from the truth, over ``entries`` compared."""

    bitwise: bool
    ulp: float
    entries: tuple[str, ...]
    divergence: Divergence | None = None


class Yardstick:
    """A reference's plain walk with the limits that follow from its error and that of its inputs.

    Args:
        reference: the plain walk.
        truth: the same in float64, or ``None``.
        perturbed: the walk of ``truth`` (of ``reference`` where there is none) from inputs off by an ulp, or ``None``.
        dtype: whose ulp counts.
        bitwise: allow no difference at all.
    """

    def __init__(
        self, reference: Trace, truth: Trace | None, perturbed: Trace | None, dtype: torch.dtype, *, bitwise: bool
    ) -> None:
        self.reference = reference
        self.dtype = dtype
        self.bitwise = bitwise
        usable = truth is not None and truth.failure is None and truth.steps == reference.steps
        self.exact = truth if usable and truth is not None else reference
        self._arrays = [
            {key: to_oracle(_of(exact, key, value)) for key, value in seen.items()}
            for exact, seen in zip(self.exact.seen, reference.seen)
        ]
        self._scales = _path_scales(self._arrays)
        self.reference_ulp = self._errors(reference) if usable else {}
        input_ulp = self._errors(perturbed) if perturbed is not None and perturbed.failure is None else {}
        entries = {entry for arrays in self._arrays for _, entry in arrays}
        self.limits = {
            entry: max(
                FLOOR_ULP,
                FACTOR_OVER_TORCH * self.reference_ulp.get(entry, 0.0),
                FACTOR_OVER_TORCH * input_ulp.get(entry, 0.0),
            )
            for entry in entries
        }

    def widen(self, limits: Mapping[str, float]) -> None:
        """Take larger limits of the same kinds of numbers over: those of a walk with more tensors."""
        self.limits = {entry: max(limit, limits.get(entry, 0.0)) for entry, limit in self.limits.items()}

    def _errors(self, trace: Trace) -> dict[str, float]:
        """The largest finite error of each kind of number along a walk."""
        errors: dict[str, float] = {}
        for step, seen in enumerate(trace.seen[: len(self._arrays)]):
            for key, value in seen.items():
                exact = self._arrays[step].get(key)
                if exact is not None and exact.shape == tuple(value.shape) and _alike(exact, value):
                    ulp = locate_error(value, exact, self._scales[step][key], _coarser(self.dtype, value.dtype)).ulp
                    if np.isfinite(ulp):
                        errors[key[1]] = max(errors.get(key[1], 0.0), ulp)
        return errors

    def compare(self, subject: Trace, *, state: str = "shared") -> Agreement:
        """Hold a walk against the reference's; the first step where it is beyond a limit ends the comparison."""
        bitwise, worst, entries = True, 0.0, set[str]()
        for step in range(1, min(subject.steps, self.reference.steps) + 1):
            beyond: list[Divergence] = _other_facts(step, subject.others[step], self.reference.others[step])
            beyond += self._missing(step, subject.seen[step]) if state == "exact" else []
            for key, expected in self.reference.seen[step].items():
                value = subject.seen[step].get(key)
                if value is None or value.shape != expected.shape or (state == "ignored" and _is_state(key)):
                    continue
                if key not in self.exact.seen[step] and not self.bitwise:
                    continue  # such as a compensation that only low precision keeps: there is no truth of it
                entries.add(key[1])
                if expected.numel() == 0 or bits_equal(value, expected):
                    continue
                bitwise = bitwise and _equal_numbers(value, expected)
                found = self._judge(step, key, value, expected)
                worst = max(worst, found.ulp)
                if self._is_beyond(found):
                    beyond.append(found)
            if beyond:
                return Agreement(False, worst, tuple(sorted(entries)), _worst_of(beyond))
        return Agreement(bitwise, worst, tuple(sorted(entries)))

    def _is_beyond(self, found: Divergence) -> bool:
        return found.abs > 0 if self.bitwise else not found.ulp <= found.limit_ulp

    def _missing(self, step: int, seen: Mapping[Key, torch.Tensor]) -> list[Divergence]:
        """State entries that one has and the other has not, or that have another shape."""
        wanted = self.reference.seen[step]
        odd = [k for k in {**wanted, **seen} if k not in seen or k not in wanted or seen[k].shape != wanted[k].shape]
        return [
            _fact(step, *key, *(str(tuple(side[key].shape)) if key in side else "absent" for side in (seen, wanted)))
            for key in odd
        ]

    def _judge(self, step: int, key: Key, value: torch.Tensor, expected: torch.Tensor) -> Divergence:
        dtype = _coarser(_coarser(self.dtype, value.dtype), expected.dtype)
        arrays = [to_oracle(value), to_oracle(expected), self._arrays[step][key], self._scales[step][key]]
        if any(np.iscomplexobj(array) for array in arrays):  # a real state beside a complex one is a difference, too
            arrays = [array + 0j for array in arrays]
        mine, theirs, exact, scale = map(real_parts, arrays)
        apart = locate_error(mine, theirs, scale, dtype)
        # The reference's own number is right by definition, and where it overflowed on its own it is no measure.
        excused = (mine == theirs) | (np.isnan(mine) & np.isnan(theirs)) | (~np.isfinite(theirs) & np.isfinite(exact))
        judged = np.where(excused, exact, mine)
        error, limit = locate_error(judged, exact, scale, dtype), self.limits[key[1]]
        index = apart.index if self.bitwise else error.index
        return Divergence(
            step=step, tensor=key[0], entry=key[1], index=index,
            subject=_number(mine, index), reference=_number(theirs, index),
            abs=apart.abs, ulp=error.ulp, limit_ulp=limit, reference_ulp=self.reference_ulp.get(key[1], 0.0),
            elements=(_count_beyond(judged, exact, scale, dtype, 0.0 if self.bitwise else limit), mine.size),
        )  # fmt: skip


def _is_state(key: Key) -> bool:
    return key[1] != PARAM and " " not in key[1]  # what a scenario looks at besides is named in words


def _of(exact: Mapping[Key, torch.Tensor], key: Key, value: torch.Tensor) -> torch.Tensor:
    """The truth's number, where it is of the reference's shape."""
    found = exact.get(key)
    return value if found is None or found.shape != value.shape else found


def _alike(exact: Array, value: torch.Tensor) -> bool:
    """Whether both are complex or both are real."""
    return np.iscomplexobj(exact) == value.is_complex()


def _path_scales(path: list[dict[Key, Array]]) -> list[dict[Key, Array]]:
    """Element by element, the largest that each number and its change have been so far."""
    scales: list[dict[Key, Array]] = []
    for step, arrays in enumerate(path):
        now: dict[Key, Array] = {}
        for key, value in arrays.items():
            before = path[step - 1].get(key) if step else None
            same = before is not None and before.shape == value.shape
            with np.errstate(invalid="ignore"):  # inf - inf
                change = value - before if same and before is not None else value
            largest = _larger(value, change)
            earlier = scales[step - 1].get(key) if step else None
            now[key] = _larger(largest, earlier) if earlier is not None and earlier.shape == value.shape else largest
        scales.append(now)
    return scales


def _larger(left: Array, right: Array) -> Array:
    """The larger absolute value; of complex numbers, part by part."""
    if np.iscomplexobj(left):
        return _larger(left.real, right.real) + 1j * _larger(left.imag, right.imag)
    with np.errstate(invalid="ignore"):
        return np.fmax(np.abs(left), np.abs(right))


def _coarser(left: torch.dtype, right: torch.dtype) -> torch.dtype:
    """The one with the larger eps; what is no floating-point type does not count."""
    if not (right.is_floating_point or right.is_complex):
        return left
    return max(left, right, key=lambda dtype: torch.finfo(dtype).eps)


def _equal_numbers(left: torch.Tensor, right: torch.Tensor) -> bool:
    """A step count is the same as a number and as a tensor."""
    return left.dim() == 0 and not left.is_complex() and bool(left.double() == right.double())


def _count_beyond(judged: Array, exact: Array, scale: Array, dtype: torch.dtype, limit: float) -> int:
    """Elements farther from the truth than the limit; the parts of complex numbers each by itself."""
    info = torch.finfo(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = limit * info.eps * np.maximum(np.maximum(scale, np.abs(exact)), info.tiny)
        near = (np.abs(judged - exact) <= allowed) | (judged == exact) | (np.isnan(judged) & np.isnan(exact))
    return int(np.count_nonzero(~near))


def _number(values: Array, index: tuple[int, ...]) -> str:
    return f"{float(values[index]):.9g}"


def _fact(step: int, tensor: str, entry: str, subject: str, reference: str) -> Divergence:
    """A difference that is none of rounding."""
    infinite = float("inf")
    return Divergence(step, tensor, entry, (), subject, reference, infinite, infinite, infinite, 0.0, (1, 1))


def _other_facts(step: int, subject: Mapping[Key, Any], reference: Mapping[Key, Any]) -> list[Divergence]:
    return [
        _fact(step, *key, str(subject.get(key)), str(value))
        for key, value in reference.items()
        if subject.get(key) != value
    ]


def _worst_of(beyond: list[Divergence]) -> Divergence:
    """The farthest beyond its limit, which names the others."""
    first = max(beyond, key=lambda divergence: divergence.excess)
    also = dict.fromkeys(f"{d.entry} of {d.tensor}" for d in beyond if d is not first)
    return Divergence(**{**vars(first), "also": tuple(also)})
