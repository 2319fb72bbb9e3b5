"""What happens to an optimizer in real use, written once and walked by the subject, the reference and the truth.

A :class:`Scenario` is a script of steps and events: a checkpoint, a changed rate, a missing gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reimpl.testing.optimizers import DENSE_LAYOUTS, STRIDED_LAYOUTS, Layout, OptimizerClass
from reimpl.testing.walks import Conditions, Failure, Trace, Walk

#: Steps of a scenario: enough for averages, bias corrections and a checkpoint between the third and the fourth.
STEPS = 6


@dataclass(frozen=True)
class Scenario:
    """A script, and the tensors it is walked with.

    Args:
        name: a few words.
        about: what it tries, and what an optimizer must do.
        script: calls the walk's methods.
        layouts: the tensors; ``None`` stands for every usual shape that both classes step on.
        arguments: keyword arguments of the subject that the scenario is about. A plain walk goes without them.
        negated: the plain walk's gradients have the other sign.
        low_precision: whether it is also walked in bfloat16 and float16.
        complex: whether it is also walked in complex numbers.
    """

    name: str
    about: str
    script: Callable[[Walk], None]
    layouts: tuple[Layout, ...] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    negated: bool = False
    low_precision: bool = False
    complex: bool = False


def walk(
    scenario: Scenario,
    optimizer: OptimizerClass,
    kwargs: Mapping[str, Any],
    layouts: Sequence[Layout],
    conditions: Conditions,
) -> Trace:
    """Carry ``optimizer(params, **kwargs)`` through the scenario; what it raises ends the trace and is kept there."""
    going: Walk | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            going = Walk(optimizer, kwargs, layouts, conditions)
            scenario.script(going)
    except Exception as error:
        trace = going.trace if going is not None else Trace()
        phase = going.phase if going is not None else "construction"
        trace.failure = Failure(phase, type(error).__name__, " ".join(str(error).split()))
        return trace
    return going.trace


def _steps(walk: Walk) -> None:
    for _ in range(STEPS):
        walk.step()


def _zero_gradients(walk: Walk) -> None:
    for scale in (0.0, 0.0, 1.0, 0.0, 1.0, 0.0):
        walk.step(scale)


def _tiny_gradients(walk: Walk) -> None:
    for scale in (1e-6, 1e-8, 1e-12, 1.0, 1e-6, 1e-8):
        walk.step(scale)


def _some_missing(walk: Walk) -> None:
    for step in range(STEPS):
        walk.step(skip=lambda index, step=step: index % 3 == 1 and step % 3 == 1)  # type: ignore[misc]


def _all_missing(walk: Walk) -> None:
    for step in range(STEPS):
        walk.step(skip=lambda _, step=step: step in (0, 3))  # type: ignore[misc]


def _changing_rates(walk: Walk) -> None:
    for factor in (1.0, 0.1, 3.0, 0.0, 0.5, 1.0):
        walk.set_rates(factor)
        walk.step()


def _groups(walk: Walk) -> None:
    walk.add_group((Layout("second group", (4, 6)),), 0.25)
    walk.add_group((Layout("third group", (19, 3)),), 2.0)
    _steps(walk)


def _group_in_the_middle(walk: Walk) -> None:
    for step in range(STEPS):
        if step == STEPS // 2:
            walk.add_group((Layout("late group", (4, 6)),), 0.25)
        walk.step()


def _interrupted(event: Callable[[Walk], None]) -> Callable[[Walk], None]:
    def script(walk: Walk) -> None:
        for step in range(STEPS):
            if step == STEPS // 2:
                event(walk)
            walk.step()

    return script


def _fresh_state_dict(walk: Walk) -> None:
    walk.reload()
    _steps(walk)


def _closure(walk: Walk) -> None:
    for _ in range(STEPS):
        walk.step_with_closure()


def _reused(walk: Walk) -> None:
    for _ in range(STEPS):
        walk.step(reuse=True)


def _kept(walk: Walk) -> None:
    for _ in range(STEPS):
        walk.step(keep=True)


def _views(walk: Walk) -> None:
    walk.hold_views()
    _steps(walk)


def _sparse(walk: Walk) -> None:
    for _ in range(STEPS):
        walk.step(sparse=True)


def _named(name: str) -> Layout:
    return next(layout for layout in (*DENSE_LAYOUTS, *STRIDED_LAYOUTS) if layout.name == name)


#: Shapes that everyone uses, with lengths below, at and beyond the widths of vector units, and odd rests.
USUAL_LAYOUTS = (
    *(Layout(f"vector {n}", (n,)) for n in (1, 3, 8, 17, 33, 67)),
    Layout("matrix", (5, 13)),
    Layout("images", (4, 3, 2, 5)),
    Layout("long", (1025,)),
)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("sizes", "usual shapes, sizes around the vector width", _steps, low_precision=True, complex=True),
    Scenario("0-d", "a tensor without dimensions", _steps, (Layout("0-d", ()),), complex=True),
    Scenario("empty", "a tensor without elements", _steps, (Layout("empty", (0,)), Layout("empty matrix", (3, 0)))),
    *(
        Scenario(name, about, _steps, (_named(layout),), low_precision=True, complex=True)
        for name, about, layout in (
            ("gaps", "a parameter and a gradient that are every other element of a larger tensor", "strided"),
            ("channels_last", "parameter and gradient in channels_last", "channels_last"),
            ("transposed", "parameter and gradient transposed", "transposed"),
            ("transposed, contiguous gradient", "strides of a gradient that are not its parameter's",
             "transposed, contiguous gradient"),
            ("contiguous, transposed gradient", "strides of a gradient that are not its parameter's",
             "contiguous, transposed gradient"),
            ("channels_last, contiguous gradient", "strides of a gradient that are not its parameter's",
             "channels_last, contiguous gradient"),
            ("gradient with gaps", "a gradient that is every other element", "contiguous, strided gradient"),
            ("expanded gradient", "a gradient of one row, expanded", "contiguous, expanded gradient"),
        )
    ),
    Scenario("zero gradients", "gradients of zero, at first and between others: no NaN", _zero_gradients),
    Scenario("tiny gradients", "gradients of 1e-6 to 1e-12, where ε rules, and one of 1", _tiny_gradients),
    Scenario("missing gradients", "every third parameter misses every third gradient", _some_missing),
    Scenario("no gradients at all", "the first and the fourth step find no gradient", _all_missing),
    Scenario("changing rates", "group['lr'] changes between steps, to 0 as well", _changing_rates, low_precision=True),
    Scenario("groups", "three groups with rates of their own", _groups),
    Scenario("group added", "add_param_group after the third step", _group_in_the_middle),
    Scenario("closure", "step(closure): the loss comes back, autograd is on inside", _closure),
    Scenario("maximize", "maximize=True is a descent along negated gradients", _steps, arguments={"maximize": True},
             negated=True, complex=True),
    Scenario("state dict", "a new optimizer loads the state dict and goes on as if nothing had happened",
             _interrupted(Walk.reload), low_precision=True, complex=True),
    Scenario("state dict of a file", "the same through torch.save and torch.load(weights_only=True)",
             _interrupted(lambda walk: walk.reload(through_a_file=True))),
    Scenario("state dict before the first step", "a new optimizer loads a state dict without state", _fresh_state_dict),
    Scenario("deep copy", "copy.deepcopy of the optimizer goes on", _interrupted(Walk.deep_copy)),
    Scenario("gradients in place", "each gradient is written into the last one's tensor", _reused),
    Scenario("gradients untouched", "the step leaves the gradients as they are", _kept),
    Scenario("views", "the parameter is changed in place: a view of it sees every step", _views),
    Scenario("sparse", "sparse gradients, with a row in two halves", _sparse, (Layout("table", (9, 4)),)),
)  # fmt: skip
