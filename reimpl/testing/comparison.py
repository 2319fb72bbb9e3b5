"""Runs any optimizer class beside a reference over the cases that break real ones, and says where the two part.

    >>> result = compare_optimizers(MyAdam, torch.optim.Adam, kwargs={"lr": 0.1})
    >>> print(result.summary())
    >>> assert_optimizers_agree(MyAdam, torch.optim.Adam, kwargs={"lr": 0.1})   # in a test

The scenarios are :data:`~reimpl.testing.scenarios.SCENARIOS`, the tolerance is that of
:mod:`~reimpl.testing.yardstick`. The reference always walks the plain way, as a for-loop over contiguous tensors that
nothing interrupts, so that a class can also be held against itself: its checkpoints, strides, copies and fused kernels
against its own plain walk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from reimpl.testing.optimizer_names import described, settings_of, takes
from reimpl.testing.optimizers import EXECUTION_KEYS, IMPLEMENTATIONS, Layout, OptimizerClass
from reimpl.testing.outcomes import OptimizerComparison, Outcome, Skipped, Status, shortened
from reimpl.testing.scenarios import SCENARIOS, USUAL_LAYOUTS, Scenario, walk
from reimpl.testing.walks import PARAM, Conditions, Failure, Trace
from reimpl.testing.yardstick import Agreement, Yardstick

NOTHING_IN_COMMON = "there is no usual parameter that both step on: "
FULL_DTYPES = (torch.float64, torch.float32)
LOW_DTYPES = (torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex128, torch.complex64)
ALL_DTYPES = (*FULL_DTYPES, *LOW_DTYPES, *COMPLEX_DTYPES)
#: How the subject runs, where it takes the argument. The reference runs as a for-loop.
VARIANTS: Mapping[str, Mapping[str, Any]] = {**IMPLEMENTATIONS, "capturable": {"capturable": True}}


def compare_optimizers(
    subject: OptimizerClass,
    reference: OptimizerClass | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    subject_kwargs: Mapping[str, Any] | None = None,
    reference_kwargs: Mapping[str, Any] | None = None,
    scenarios: Iterable[str] | None = None,
    implementations: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype | str] = ALL_DTYPES,
    device: str | torch.device = "cpu",
    state: Literal["shared", "exact", "ignored"] = "shared",
    bitwise: bool = False,
    seed: int = 0,
) -> OptimizerComparison:
    """Run ``subject`` beside ``reference`` over every scenario, dtype and implementation that applies.

    Args:
        subject: an optimizer class, or a function of parameters and keyword arguments that makes one.
        reference: what it is held against; ``None`` holds the subject against its own plain for-loop.
        kwargs: keyword arguments of both.
        subject_kwargs: keyword arguments of the subject alone.
        reference_kwargs: keyword arguments of the reference alone.
        scenarios: names from :data:`~reimpl.testing.scenarios.SCENARIOS` (default: all).
        implementations: keys of :data:`VARIANTS` (default: all); those whose argument the subject does not take are
            skipped and listed.
        dtypes: of parameters and gradients, some of :data:`ALL_DTYPES` or their names, such as ``"float32"``.
        device: where they live; ``capturable`` is tried beside the CPU alone.
        state: compare the state entries that both have (``"shared"``), require the same entries (``"exact"``), or look
            at parameters alone (``"ignored"``).
        bitwise: allow no difference, where the derived tolerance is too wide.
        seed: of parameters and gradients.

    Returns:
        every case with its outcome; nothing is raised where the two part.

    Raises:
        TypeError: an argument that a class does not take, a class that makes no optimizer, or one name where several
            are expected.
        ValueError: an unknown scenario, implementation, dtype or device, none at all, or arguments that the class
            itself refuses.
    """
    if state not in ("shared", "exact", "ignored"):
        raise ValueError(f"state must be 'shared', 'exact' or 'ignored', got {state!r}")
    chosen = _choose(scenarios, {s.name: s for s in SCENARIOS}, "scenario")
    wanted = _choose(implementations, VARIANTS, "implementation")
    kinds = _choose(_names(dtypes), {_name(dtype): dtype for dtype in ALL_DTYPES}, "dtype")
    mine = settings_of(subject, {**(kwargs or {}), **(subject_kwargs or {})}, "subject")
    itself = reference is None or (reference is subject and not reference_kwargs)
    if reference is None:
        reference = subject
    own = {key: value for key, value in mine.items() if key not in EXECUTION_KEYS} if itself else kwargs or {}
    theirs = settings_of(reference, {**own, **(reference_kwargs or {})}, "reference")
    result = OptimizerComparison(
        described(subject), described(reference), _texts(mine), _texts(theirs), str(torch.device(device))
    )
    # A fault that two classes share is no difference between them; held against itself, a class has no such excuse.
    forgiving = reference is not subject
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices):  # each step is seeded; the caller's generator stays where it is
        bench = _Bench(subject, reference, mine, theirs, torch.device(device), seed, state, bitwise, forgiving)
        variants = bench.variants(wanted, result)
        result.random = bench.is_random()
        result.outcomes += bench.refusals(result)
        for scenario in chosen.values() if variants else ():
            missing = [name for name in scenario.arguments if not takes(subject, name)]
            if missing:
                why = f"{described(subject)} takes no argument {missing[0]}"
                result.skipped.append(Skipped(scenario.name, why))
                continue
            fitting = _dtypes_of(scenario, kinds.values())
            if not fitting:
                result.skipped.append(Skipped(scenario.name, f"it is not run in {', '.join(kinds)}"))
            for dtype in fitting:
                result.outcomes += bench.run(scenario, dtype, variants)
    return result


def assert_optimizers_agree(
    subject: OptimizerClass, reference: OptimizerClass | None = None, **options: Any
) -> OptimizerComparison:
    """:func:`compare_optimizers` for a test.

    Raises:
        AssertionError: they part, or nothing could be compared; says in which case, at which step, in which tensor and
            by how much.
    """
    result = compare_optimizers(subject, reference, **options)
    if not result.ok:
        raise AssertionError(result.summary())
    return result


def _texts(kwargs: Mapping[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in kwargs.items()}


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Iterable[Any]) -> Iterable[str]:
    """The names of dtypes; what is no sequence of them is left to :func:`_choose`."""
    if isinstance(dtypes, str) or not isinstance(dtypes, Iterable):
        return dtypes
    return [_name(dtype) if isinstance(dtype, torch.dtype | str) else dtype for dtype in dtypes]


def _choose(names: Iterable[str] | None, known: Mapping[str, Any], what: str) -> dict[str, Any]:
    if isinstance(names, str) or not isinstance(names, Iterable | None):
        raise TypeError(f"{what}s must be a sequence, as in [{next(iter(known))!r}], got {names!r}")
    wanted = list(known) if names is None else list(names)
    if not wanted:
        raise ValueError(f"{what}s is empty; known: {_listed(known)}")
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known: {_listed(known)}")
    return {name: known[name] for name in wanted}


def _listed(names: Iterable[str]) -> str:
    """The names, in quotes where they hold a comma themselves."""
    return ", ".join(repr(name) if "," in name else name for name in names)


def _dtypes_of(scenario: Scenario, dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    fitting = set(FULL_DTYPES)
    fitting |= set(LOW_DTYPES) if scenario.low_precision else set()
    fitting |= set(COMPLEX_DTYPES) if scenario.complex else set()
    return [dtype for dtype in dtypes if dtype in fitting]


class _Bench:
    """Walks both optimizers through a scenario, the reference in every way that the yardstick needs."""

    def __init__(
        self,
        subject: OptimizerClass,
        reference: OptimizerClass,
        subject_kwargs: Mapping[str, Any],
        reference_kwargs: Mapping[str, Any],
        device: torch.device,
        seed: int,
        state: str,
        bitwise: bool,
        forgiving: bool,
    ) -> None:
        self.subject, self.reference = subject, reference
        self.subject_kwargs = dict(subject_kwargs)
        loop = (
            {"foreach": False} if takes(reference, "foreach") and not EXECUTION_KEYS & reference_kwargs.keys() else {}
        )
        self.reference_kwargs = {**reference_kwargs, **loop}
        self.device, self.seed, self.state, self.bitwise, self.forgiving = device, seed, state, bitwise, forgiving
        self._usual_limits: dict[torch.dtype, dict[str, float]] = {}
        self.sparse = False
        try:
            self.layouts = self._common_layouts()
        except ValueError as dense:
            self.sparse = True
            try:
                self.layouts = self._common_layouts()
            except ValueError:
                raise dense from None
        self.param_scale = self._param_scale()

    def _conditions(self, **conditions: Any) -> Conditions:
        return Conditions(device=self.device, seed=self.seed, sparse=self.sparse, **conditions)

    def variants(self, wanted: Mapping[str, Mapping[str, Any]], result: OptimizerComparison) -> dict[str, Any]:
        """The implementations that the subject takes; what is left out is noted in ``result``."""
        kept: dict[str, Any] = {}
        for name, flags in wanted.items():
            flag = next(iter(flags), None)
            fixed = EXECUTION_KEYS & self.subject_kwargs.keys()
            if flag is not None and fixed:
                why = f"the arguments fix {', '.join(sorted(fixed))} already"
            elif flag is not None and not takes(self.subject, flag):
                why = f"{described(self.subject)} takes no argument {flag}"
            elif flag == "capturable" and self.device.type == "cpu":
                why = "capturable needs an accelerator, the device is the CPU"
            else:
                kept[name] = flags
                continue
            result.skipped.append(Skipped(name, why))
        return kept

    def run(self, scenario: Scenario, dtype: torch.dtype, variants: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
        """One outcome for each implementation."""
        layouts = self.layouts if scenario.layouts is None else scenario.layouts
        scale = self.param_scale if dtype in LOW_DTYPES else 1.0
        hazards = self._conditions(dtype=dtype, param_scale=scale)
        plain = dataclasses.replace(hazards, plain=True, negated=scenario.negated)
        yardstick = self._widened(scenario, layouts, plain)
        outcomes = []
        for name, flags in variants.items():
            conditions = dataclasses.replace(hazards, detached=name == "differentiable")
            kwargs = {**self.subject_kwargs, **scenario.arguments, **flags}
            trace = walk(scenario, self.subject, kwargs, layouts, conditions)
            outcomes.append(self._judge(scenario, layouts, name, hazards, trace, yardstick))
        return outcomes

    def _yardstick(self, scenario: Scenario, layouts: Sequence[Layout], plain: Conditions) -> Yardstick:
        reference = self._walk(scenario, layouts, plain)
        truth, perturbed = None, dataclasses.replace(plain, perturbed=True)
        if torch.finfo(plain.dtype).bits < 64:
            truth = self._walk(scenario, layouts, dataclasses.replace(plain, wide=True))
            if truth.failure is None:
                perturbed = dataclasses.replace(perturbed, wide=True)
        moved = self._walk(scenario, layouts, perturbed) if reference.failure is None else None
        return Yardstick(reference, truth, moved, plain.dtype, bitwise=self.bitwise)

    def _widened(self, scenario: Scenario, layouts: Sequence[Layout], plain: Conditions) -> Yardstick:
        """The scenario's yardstick with the limits of the first one, which has tensors enough for the largest error."""
        yardstick = self._yardstick(scenario, layouts, plain)
        if plain.dtype not in self._usual_limits:
            usual = self._yardstick(SCENARIOS[0], self.layouts, dataclasses.replace(plain, negated=False))
            self._usual_limits[plain.dtype] = usual.limits
        yardstick.widen(self._usual_limits[plain.dtype])
        return yardstick

    def _walk(self, scenario: Scenario, layouts: Sequence[Layout], conditions: Conditions) -> Trace:
        arguments = {} if conditions.plain else scenario.arguments
        return walk(scenario, self.reference, {**self.reference_kwargs, **arguments}, layouts, conditions)

    def _judge(
        self, scenario: Scenario, layouts: Sequence[Layout], name: str, hazards: Conditions, trace: Trace,
        yardstick: Yardstick,
    ) -> Outcome:  # fmt: skip
        plain = yardstick.reference
        agreement = yardstick.compare(trace, state=self.state)
        status: Status = "parts" if agreement.divergence else "agrees"
        expected = plain.failure
        if status == "parts" and self.forgiving:
            if self._same_way(scenario, layouts, hazards, trace, yardstick):
                status = "both leave"
        elif status == "agrees" and (trace.failure or plain.failure):
            # A refusal is shared where the reference also refuses when it walks the same way, hazards and all. Held
            # against itself, a class may refuse complex numbers, but not a checkpoint.
            expected = plain.failure
            if expected is None and (self.forgiving or hazards.dtype.is_complex):
                expected = self._walk(scenario, layouts, hazards).failure
            status = "both refuse" if trace.failure and expected else "raises"
        return _outcome(scenario, hazards.dtype, name, status, agreement, trace, expected)

    def _same_way(
        self, scenario: Scenario, layouts: Sequence[Layout], hazards: Conditions, trace: Trace, yardstick: Yardstick
    ) -> bool:
        """Whether the reference, hazards and all, leaves its plain walk just so."""
        if not all(takes(self.reference, argument) for argument in scenario.arguments):
            return False
        same_way = self._walk(scenario, layouts, hazards)
        if (same_way.failure is None) != (trace.failure is None):
            return False
        beside = Yardstick(same_way, None, None, hazards.dtype, bitwise=self.bitwise)
        beside.widen(yardstick.limits)
        return beside.compare(trace, state=self.state).divergence is None

    def refusals(self, result: OptimizerComparison) -> list[Outcome]:
        """One outcome for each usual shape that only one of the two steps on; what both refuse is noted as skipped."""
        outcomes = []
        for layout, mine, theirs in self._refused:
            if mine.failure and theirs.failure:
                result.skipped.append(Skipped(f"{layout.name} {layout.shape}", f"both refuse: {mine.failure}"))
            else:
                scenario = dataclasses.replace(_ONE_STEP, name=f"one step of {layout.name} {layout.shape}")
                nothing = Agreement(True, 0.0, ())
                outcomes.append(_outcome(scenario, torch.float64, "default", "raises", nothing, mine, theirs.failure))
        return outcomes

    def _common_layouts(self) -> tuple[Layout, ...]:
        """The usual shapes that both step on; the others are kept with what was raised.

        Raises:
            ValueError: there is none, because the arguments are refused or for what the classes raise.
        """
        kept: list[Layout] = []
        self._refused: list[tuple[Layout, Trace, Trace]] = []
        for layout in USUAL_LAYOUTS:
            mine = walk(_ONE_STEP, self.subject, self.subject_kwargs, [layout], self._conditions())
            theirs = walk(_ONE_STEP, self.reference, self.reference_kwargs, [layout], self._conditions())
            if mine.failure or theirs.failure:
                self._refused.append((layout, mine, theirs))
            else:
                kept.append(layout)
        if not kept:
            _, mine, theirs = self._refused[0]
            who, failure = (self.subject, mine.failure) if mine.failure else (self.reference, theirs.failure)
            raise ValueError(f"{NOTHING_IN_COMMON}{described(who)} {shortened(str(failure))}")
        return tuple(kept)

    def _param_scale(self) -> float:
        """A power of two that makes parameters as large as a few steps, which low precision would round away."""
        conditions = self._conditions(plain=True)
        seen = self._walk(_ONE_STEP, self.layouts, conditions).seen
        moves = [(seen[-1][key] - value).abs().flatten() for key, value in seen[0].items() if key[1] == PARAM]
        typical = float(np.median(torch.cat(moves).cpu().numpy()))
        usable = math.isfinite(typical) and typical > 0
        return 2.0 ** min(0, max(-10, round(math.log2(8 * typical)))) if usable else 1.0

    def is_random(self) -> bool:
        """Whether the subject's way depends on the global generator."""
        layouts, ways = self.layouts, []
        for seed in (0, 1):
            draws = self._conditions(generator_seed=seed)
            ways.append(walk(SCENARIOS[0], self.subject, self.subject_kwargs, layouts, draws))
        pairs = [zip(a.items(), b.values()) for a, b in zip(ways[0].seen, ways[1].seen)]
        return any(not torch.equal(x, y) for pair in pairs for (key, x), y in pair if key[1] == PARAM)


_ONE_STEP = Scenario("one step", "", lambda walk: walk.step())


def _outcome(
    scenario: Scenario, dtype: torch.dtype, name: str, status: Status, agreement: Agreement, trace: Trace,
    expected: Failure | None,
) -> Outcome:  # fmt: skip
    return Outcome(
        scenario=scenario.name,
        dtype=_name(dtype),
        implementation=name,
        status=status,
        steps=agreement.divergence.step if agreement.divergence else trace.steps,
        bitwise=agreement.bitwise,
        ulp=agreement.ulp,
        entries=agreement.entries,
        divergence=agreement.divergence,
        subject=str(trace.failure or "steps"),
        reference=str(expected or "steps"),
    )
