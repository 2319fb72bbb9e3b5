"""Holds an optimizer to a reference and an oracle: to the last bit, by operands of one step, in ulp of the truth.

Nothing here knows an optimizer by name. Declare a class, its reference and its oracle as an
:class:`~reimpl.testing.declarations.OptimizerTechnique`, and the checks say at which step, in which tensor and at which
element they part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from reimpl.testing.declarations import Array, OptimizerConfig, OptimizerTechnique
from reimpl.testing.optimizer_cases import flags_of, grads_of, layouts_of, oracle_hyper, reference_of
from reimpl.testing.optimizers import (
    DENSE_LAYOUTS,
    EXECUTION_KEYS,
    STRIDED_LAYOUTS,
    Layout,
    OptimizerClass,
    clone_params,
    construct,
    make_grads,
    make_params,
    parameters,
    step_with,
    synchronise,
)
from reimpl.testing.samples import SEEDS
from reimpl.testing.tolerance import Verdict, assert_bitwise, combine, judge, operand_ulp, to_oracle

Skip = Callable[[int, int], bool]
#: One fused step may differ from the for-loop by this many ulp of its largest operand: a few contractions to FMA.
FUSED_ULP = 2.0
#: Steps of a comparison with the oracle: enough for averages, bias corrections and rates to change.
ORACLE_STEPS = 6
ORACLE_LAYOUTS = tuple(x for x in DENSE_LAYOUTS if x.name in ("scalar", "empty", "vector9", "vector67", "transposed"))


def magnitude(
    technique: OptimizerTechnique,
    param: Array,
    grads: Sequence[Array | None],
    *,
    state: Mapping[str, Array] | None = None,
    **hyper: Any,
) -> tuple[Array, dict[str, Array]]:
    """The sum of the absolute values of what is added up on the way to each element of the oracle's result.

    The oracle itself runs on ``|param|``, ``|grads|`` and ``|state|``, with ``lr`` negated so that ``θ - ε...`` becomes
    an addition, and without ``maximize``. Denominators stay what they are: sums of squares already. A technique
    for which that is not the scale brings its own ``magnitude``.
    """
    if technique.magnitude is not None:
        own: tuple[Array, dict[str, Array]] = technique.magnitude(param, grads, state=state, **hyper)
        return own
    hyper.pop("maximize", None)
    hyper["lr"] = -hyper["lr"]
    result: tuple[Array, dict[str, Array]] = technique.oracle(
        _absolute(param),
        [None if grad is None else _absolute(grad) for grad in grads],
        state=None if state is None else {key: _absolute(value) for key, value in state.items()},
        **hyper,
    )
    return result


def _absolute(array: Array) -> Array:
    return np.abs(array.real) + 1j * np.abs(array.imag) if np.iscomplexobj(array) else np.abs(array)


def assert_same(
    ours: torch.optim.Optimizer, reference: torch.optim.Optimizer, *, technique: str, case: str, step: int
) -> None:
    """Require equal parameters, equal state keys and equal state, to the last bit."""
    for index, (mine, theirs) in enumerate(zip(parameters(ours), parameters(reference), strict=True)):
        where = f"after step {step}, parameter {index} of shape {tuple(theirs.shape)}"
        assert_bitwise(mine, theirs, technique=technique, case=case, quantity=where)
        state, expected = ours.state.get(mine, {}), reference.state.get(theirs, {})
        if state.keys() != expected.keys():
            raise AssertionError(
                f"{technique} [{case}] {where}: state has the keys {sorted(state)}, expected {sorted(expected)}"
            )
        for key, value in expected.items():
            if not isinstance(value, torch.Tensor):
                same = state[key] == value
            else:
                assert_bitwise(state[key], value, technique=technique, case=case, quantity=f"{where}: {key}")
                same = state[key].device == value.device
            if not same:
                raise AssertionError(f"{technique} [{case}] {where}: {key} is {state[key]!r}, expected {value!r}")


def check_bitwise(
    technique: OptimizerTechnique,
    config: OptimizerConfig,
    *,
    implementation: str = "forloop",
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    layouts: Sequence[Layout] = DENSE_LAYOUTS,
    steps: int = 20,
    seed: int = 0,
    scale: float = 1.0,
    skip: Skip | None = None,
) -> None:
    """Run both side by side; parameters and every state must equal the reference's for-loop to the last bit.

    Args:
        technique: whose ``ours`` is held against its ``torch`` (against our for-loop where PyTorch lacks the dialect).
        config: the configuration.
        implementation: a key of :data:`~reimpl.testing.optimizers.IMPLEMENTATIONS`.
        dtype: of parameters and gradients.
        device: where they live.
        layouts: shapes and strides of the parameters, all in one group.
        steps: how many gradients.
        seed: of parameters and gradients.
        scale: factor on the gradients; a small one makes ``eps`` count.
        skip: which parameters miss which gradients.

    Raises:
        AssertionError: they part; says at which step and where.
    """
    reference, reference_kwargs = reference_of(technique, config)
    flags = flags_of(technique, implementation)
    layouts = layouts_of(technique, layouts)
    params = make_params(layouts, dtype, device, seed=seed)
    if implementation == "differentiable":
        params = [p.detach() for p in params]  # autograd refuses an in-place step on a leaf that requires a gradient
        reference_kwargs = {**reference_kwargs, "foreach": None, **flags}
    mine = construct(technique.ours, clone_params(params), **{**config.kwargs, **flags})
    theirs = construct(reference, clone_params(params), **reference_kwargs)
    case = f"{config.desc}, {implementation}, {dtype}"
    for step in range(steps):
        grads = grads_of(technique, layouts, dtype, device, seed=seed, step=step, scale=scale, skip=skip)
        step_with(mine, grads)
        step_with(theirs, grads)
        if _is_looked_at(step):
            assert_same(mine, theirs, technique=technique.name, case=case, step=step + 1)


def check_classes(ours: OptimizerClass, reference: OptimizerClass, *, name: str = "", **kwargs: Any) -> None:
    """Hold one optimizer class to another with the same arguments: :func:`check_bitwise` without a declaration.

    ``check_classes(MyAdam, torch.optim.Adam, lr=0.1, amsgrad=True)`` returns, or says at which step, in which tensor
    and at which element the two part.

    Raises:
        AssertionError: they part.
    """
    title = name or getattr(ours, "__name__", repr(ours))
    technique = OptimizerTechnique(title, (), "", "", ours=ours, torch=reference, oracle=_no_oracle)
    desc = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "default"
    check_bitwise(technique, OptimizerConfig(desc, kwargs, torch_kwargs=kwargs))


def _no_oracle(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("a comparison of two classes has no oracle")


def _is_looked_at(step: int) -> bool:
    """The first three steps and every fifth: what differs stays different, and comparing costs more than stepping."""
    return step < 3 or step % 5 == 4


def check_checkpoint_exchange(
    technique: OptimizerTechnique,
    config: OptimizerConfig,
    *,
    implementation: str = "forloop",
    to_ours: bool = True,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    layouts: Sequence[Layout] = DENSE_LAYOUTS,
    steps: int = 20,
) -> None:
    """Train half the way with one, load its state dict into the other, go on: the uninterrupted reference's bits.

    ``to_ours`` says whether the second half is ours or the reference's. The execution flags in a state dict rule the
    optimizer that loads it, so they are set to the second's own first.

    Raises:
        AssertionError: the path is not the uninterrupted one.
    """
    reference, reference_kwargs = reference_of(technique, config)
    ours_kwargs = {**config.kwargs, **flags_of(technique, implementation)}
    layouts = layouts_of(technique, layouts)
    halves = [(reference, reference_kwargs), (technique.ours, ours_kwargs)]
    (first, first_kwargs), (second, second_kwargs) = halves if to_ours else halves[::-1]
    params = make_params(layouts, dtype, device)
    whole = construct(reference, clone_params(params), **reference_kwargs)
    running = construct(first, clone_params(params), **first_kwargs)
    case = f"{config.desc}, {implementation}, {dtype}, checkpoint to {'ours' if to_ours else 'the reference'}"
    for step in range(steps):
        if step == steps // 2:
            saved = copy.deepcopy(running.state_dict())
            running = construct(second, clone_params(parameters(running)), **second_kwargs)
            for group, own in zip(saved["param_groups"], running.param_groups):
                group.update({key: own[key] for key in EXECUTION_KEYS & own.keys()})
            running.load_state_dict(saved)
            if not to_ours:
                # PyTorch loads ASGD's and NAdam's numbers in the parameter's dtype, and goes on in that one
                whole.load_state_dict(copy.deepcopy(whole.state_dict()))
        grads = grads_of(technique, layouts, dtype, device, step=step)
        step_with(running, grads)
        step_with(whole, grads)
        if _is_looked_at(step):
            assert_same(running, whole, technique=technique.name, case=case, step=step + 1)


def check_fused_step(
    technique: OptimizerTechnique,
    config: OptimizerConfig,
    *,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    layouts: Sequence[Layout] = (*DENSE_LAYOUTS, *STRIDED_LAYOUTS),
    steps: int = 20,
    seed: int = 0,
    skip: Skip | None = None,
) -> dict[str, float]:
    """One fused step from the same state, again and again: both are set back to the for-loop's path after each.

    The parameter may differ by ``2 eps max(|p|, |p'|, |update|)``, a state by as much of its largest operand: its value
    before, its value after, or the sum of the absolute values of the terms that made it (gradient and penalty may
    cancel, and a contracted multiply-add then differs by an ulp of either).

    Where the difference is larger the oracle decides, after the same step in the next precision up and by the rule of
    :func:`~reimpl.testing.tolerance.judge`: PyTorch's square root on the CPU, MKL's, is itself wrong in the last bit
    for up to a fifth of all float32 numbers, and quotients, squares and cancelling sums of roots carry that further.

    Returns:
        the largest difference of each quantity in units of ``eps`` times the operand.

    Raises:
        AssertionError: neither the for-loop nor the oracle is near.
    """
    reference, reference_kwargs = reference_of(technique, config)
    params = make_params(layouts, dtype, device, seed=seed)
    mine = construct(technique.ours, clone_params(params), **config.kwargs, fused=True)
    theirs = construct(reference, clone_params(params), **reference_kwargs)
    worst: dict[str, float] = {}
    for step in range(steps):
        grads = make_grads(layouts, dtype, device, seed=seed, step=step, skip=skip)
        before = [_snapshot(theirs, q) for q in parameters(theirs)]
        step_with(mine, grads)
        step_with(theirs, grads)
        for index, (p, q) in enumerate(zip(parameters(mine), parameters(theirs))):
            seen = fused_differences(
                technique, config, before[index], grads[index], _values(mine, p), _values(theirs, q)
            )
            for key, (ulp, verdict) in seen.items():
                worst[key] = max(worst.get(key, 0.0), ulp)
                if verdict is not None:
                    case = f"{config.desc}, fused, {dtype}, {ulp:.3g} ulp of the largest operand from the for-loop"
                    verdict.check(technique.name, case, f"{key} of parameter {index}, step {step + 1}")
        synchronise(mine, theirs)
    return worst


def _values(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"param": param.detach(), **optimizer.state.get(param, {})}


def _snapshot(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> dict[str, Array]:
    return {key: to_oracle(value) for key, value in _values(optimizer, param).items()}


def fused_differences(
    technique: OptimizerTechnique,
    config: OptimizerConfig,
    before: dict[str, Array],
    grad: torch.Tensor | None,
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
) -> dict[str, tuple[float, Verdict | None]]:
    """Each quantity's difference by its operands, and where that is too large the oracle's verdict."""
    result: dict[str, tuple[float, Verdict | None]] = {}
    for key, value in theirs.items():
        old = before.get(key, np.zeros_like(to_oracle(value)))
        ulp = operand_ulp(ours[key], value, old, to_oracle(value) - old)
        verdict = None
        if not ulp <= FUSED_ULP:
            (param, state), arrays = _split(before), [None if grad is None else to_oracle(grad)]
            hyper = oracle_hyper(technique, config, value.dtype)
            exact, scale = (
                {"param": new, **new_state}
                for new, new_state in (
                    technique.oracle(param, arrays, state=state, **hyper),
                    magnitude(technique, param, arrays, state=state, **hyper),
                )
            )
            if key != "param":
                ulp = operand_ulp(ours[key], value, old, scale[key])
            if not ulp <= FUSED_ULP:
                verdict = judge(ours[key], value, exact[key], scale[key])
        result[key] = ulp, verdict
    return result


def _split(values: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    return values["param"], {key: value for key, value in values.items() if key != "param"}


def compare_with_oracle(
    technique: OptimizerTechnique,
    config: OptimizerConfig,
    *,
    implementation: str = "forloop",
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    layouts: Sequence[Layout] = ORACLE_LAYOUTS,
    steps: int = ORACLE_STEPS,
    seeds: Sequence[int] = SEEDS,
    skip: Skip | None = None,
) -> dict[str, Verdict]:
    """Ours, PyTorch's for-loop and the oracle over ``steps`` gradients: one verdict for ``"param"`` and each state.

    Errors are the largest over all layouts and seeds.

    Raises:
        AssertionError: a state is missing or not expected, or a step count is wrong.
    """
    verdicts: dict[str, list[Verdict]] = {}
    for seed in seeds:
        for key, verdict in _compare_seed(technique, config, implementation, dtype, device, layouts, steps, seed, skip):
            verdicts.setdefault(key, []).append(verdict)
    return {key: combine(rows) for key, rows in verdicts.items()}


def _compare_seed(
    technique: OptimizerTechnique,
    config: OptimizerConfig,
    implementation: str,
    dtype: torch.dtype,
    device: str | torch.device,
    layouts: Sequence[Layout],
    steps: int,
    seed: int,
    skip: Skip | None,
) -> list[tuple[str, Verdict]]:
    layouts = layouts_of(technique, layouts)
    params = make_params(layouts, dtype, device, seed=seed)
    history = [grads_of(technique, layouts, dtype, device, seed=seed, step=step, skip=skip) for step in range(steps)]
    mine = construct(technique.ours, clone_params(params), **{**config.kwargs, **flags_of(technique, implementation)})
    reference, reference_kwargs = reference_of(technique, config)
    theirs = None
    if reference is technique.torch:
        theirs = construct(reference, clone_params(params), **reference_kwargs)
    for grads in history:
        for optimizer in (mine, theirs):
            if optimizer is not None:
                step_with(optimizer, grads)
    hyper = oracle_hyper(technique, config, dtype)
    rows: list[tuple[str, Verdict]] = []
    for index, p in enumerate(parameters(mine)):
        arrays = [None if grad is None else to_oracle(grad) for grad in (grads[index] for grads in history)]
        exact, exact_state = technique.oracle(to_oracle(params[index]), arrays, **hyper)
        scale, scale_state = magnitude(technique, to_oracle(params[index]), arrays, **hyper)
        q = None if theirs is None else parameters(theirs)[index]
        rows.append(("param", judge(p, q, exact, scale)))
        state = mine.state.get(p, {})
        if state.keys() != exact_state.keys():
            raise AssertionError(
                f"{technique.name} [{config.desc}, {implementation}] state has the keys {sorted(state)}, "
                f"the oracle has {sorted(exact_state)}"
            )
        for key, value in state.items():
            if key == "step":
                if float(value) != float(exact_state[key]):
                    raise AssertionError(f"{technique.name} [{config.desc}]: step is {value}, not {exact_state[key]}")
                continue
            other = None if theirs is None or q is None else theirs.state[q][key]
            rows.append((key, judge(value, other, exact_state[key], scale_state[key])))
    return rows
