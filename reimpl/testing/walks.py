"""Carries one optimizer through steps and events, with their hazards or plainly, and keeps what it saw.

A *plain* walk has the same gradients and none of the hazards: contiguous tensors, no interruption, fresh gradients,
real pairs for complex numbers. Both must arrive at the same place.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reimpl.testing.optimizers import Layout, OptimizerClass, clone_params, construct, parameters, sparse_rows
from reimpl.testing.samples import random_tensor, seeded_generator

Key = tuple[str, str]  # the tensor's name, and "param" or the path of a state entry

#: Entries that are no state: the parameter, and a view of it that was taken before the first step.
PARAM = "param"
VIEW = "a view of it taken before"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Failure:
    """What was raised, and during what."""

    during: str
    type: str
    message: str

    def __str__(self) -> str:
        return f"raises {self.type} at {self.during}: {self.message}"


@dataclass
class Trace:
    """What a walk saw: values at the start and after each step, and how it ended if it did not get to the end.

    ``seen[0]`` holds the parameters as they were given, ``seen[n]`` parameters and state after step ``n``.
    """

    seen: list[dict[Key, torch.Tensor]] = field(default_factory=list)
    others: list[dict[Key, Any]] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def steps(self) -> int:
        """Steps that were taken to the end."""
        return max(len(self.seen) - 1, 0)


@dataclass(frozen=True)
class Conditions:
    """Under which an optimizer walks.

    Args:
        dtype: of the parameters and gradients; their values are drawn in it.
        device: where they live.
        seed: of all draws.
        param_scale: factor on the initial parameters.
        plain: leave the hazards out.
        wide: compute in float64 from the same values; a plain walk only.
        perturbed: move each initial value and gradient by up to one ulp of ``dtype``; a plain walk only.
        negated: gradients with the other sign.
        detached: parameters that do not require a gradient, as ``differentiable`` wants them.
        sparse: every gradient is sparse.
        generator_seed: of the global generator before the first step.
    """

    dtype: torch.dtype = torch.float64
    device: torch.device = _CPU
    seed: int = 0
    param_scale: float = 1.0
    plain: bool = False
    wide: bool = False
    perturbed: bool = False
    negated: bool = False
    detached: bool = False
    sparse: bool = False
    generator_seed: int = 0

    @property
    def as_pairs(self) -> bool:
        """Whether complex numbers are walked as pairs of reals."""
        return self.plain and self.dtype.is_complex


class Walk:
    """One optimizer on its way; the methods are what a scenario's script says."""

    def __init__(
        self, optimizer: OptimizerClass, kwargs: Mapping[str, Any], layouts: Sequence[Layout], conditions: Conditions
    ) -> None:
        self.trace = Trace()
        self.conditions = conditions
        self._make = optimizer
        self._kwargs = dict(kwargs)
        self._layouts = list(layouts)
        self.phase = "construction"
        self._views: list[torch.Tensor] = []
        self._rates: list[Any] = []
        self.optimizer = construct(optimizer, [self._parameter(layout) for layout in layouts], **self._kwargs)
        self._note_rates()
        self._look({})

    # -- what a script says ------------------------------------------------------------------------------------------

    def step(
        self,
        scale: float = 1.0,
        skip: Callable[[int], bool] | None = None,
        *,
        sparse: bool = False,
        reuse: bool = False,
        keep: bool = False,
    ) -> None:
        """Set the gradients (times ``scale``, ``None`` where ``skip(index)``), and step.

        ``reuse`` writes them into the tensors of the last step, ``keep`` looks afterwards whether they are unchanged.
        """
        self._begin()
        grads = self._gradients(scale, skip, sparse)
        for param, grad in zip(self._parameters(), grads):
            if reuse and not self.conditions.plain and grad is not None and param.grad is not None:
                param.grad.copy_(grad)
            else:
                param.grad = grad
        given = {self._name(i): g.clone() for i, g in enumerate(grads) if g is not None} if keep else {}
        self.optimizer.step()
        facts: dict[Key, torch.Tensor] = {}
        for index, param in enumerate(self._parameters()):
            if self._name(index) in given:
                after = given[self._name(index)] if self.conditions.plain or param.grad is None else param.grad
                facts[self._name(index), "gradient after the step"] = after.detach().clone()
        self._look(facts)

    def step_with_closure(self) -> None:
        """Step with a closure that sets the gradients; its loss must come back, and autograd be on inside it."""
        self._begin()
        grads, modes = self._gradients(1.0, None, False), []
        loss = torch.tensor(float(self.trace.steps + 1), device=self.conditions.device)

        def closure() -> torch.Tensor:
            modes.append(torch.is_grad_enabled())
            for param, grad in zip(self._parameters(), grads):
                param.grad = grad
            return loss

        returned: Any = loss
        if self.conditions.plain:
            closure()
            self.optimizer.step()
            modes = [True]
        else:
            returned = self.optimizer.step(closure)  # type: ignore[arg-type]
        others = {
            ("closure", "loss returned by step"): None if returned is None else float(returned),
            ("closure", "autograd on inside it, call by call"): list(modes),
        }
        self._look({}, others)

    def set_rates(self, factor: float) -> None:
        """``group["lr"]`` becomes ``factor`` times what it was at construction; a rate of its own choice is left."""
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            if rate is not None:
                group["lr"] = rate * factor

    def reload(self, *, through_a_file: bool = False) -> None:
        """Go on with a new optimizer over copies of the parameters that loads the state dict of this one."""
        if self.conditions.plain:
            return
        self.phase = "state_dict"
        saved = copy.deepcopy(self.optimizer.state_dict())
        if through_a_file:
            file = io.BytesIO()
            self.phase = "torch.save of the state dict"
            torch.save(saved, file)
            file.seek(0)
            self.phase = "torch.load of the state dict with weights_only=True"
            saved = torch.load(file, weights_only=True)
        self.phase = "construction"
        copies = iter(clone_params(self._parameters()))
        groups = [
            {"params": [next(copies) for _ in group["params"]], **({} if rate is None else {"lr": rate})}
            for group, rate in zip(self.optimizer.param_groups, self._rates)
        ]
        fresh = self._make(groups, **copy.deepcopy(self._kwargs))
        self.phase = "load_state_dict"
        fresh.load_state_dict(saved)
        self.optimizer = fresh

    def deep_copy(self) -> None:
        """Go on with a deep copy of the optimizer."""
        if not self.conditions.plain:
            self.phase = "copy.deepcopy"
            self.optimizer = copy.deepcopy(self.optimizer)

    def add_group(self, layouts: Sequence[Layout], rate_factor: float = 1.0) -> None:
        """``add_param_group`` with a rate of its own."""
        self.phase = "add_param_group"
        params = [self._parameter(layout) for layout in layouts]
        rate = None if self._rates[0] is None else self._rates[0] * rate_factor
        self.optimizer.add_param_group({"params": params, **({} if rate is None else {"lr": rate})})
        self._layouts += layouts
        self._rates.append(rate)
        names = [self._name(len(self._layouts) - len(layouts) + i) for i in range(len(layouts))]
        start = self.trace.seen[-1]
        start.update({(name, PARAM): self._comparable(p, p) for name, p in zip(names, params)})

    def hold_views(self) -> None:
        """Keep a view of each parameter, as tied weights and flat buffers do; the steps must show in it."""
        self._views = [p.detach() for p in self._parameters()]

    # -- how it is done ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.phase = f"step {self.trace.steps + 1}"
        # An optimizer that draws random numbers draws the same ones in every walk.
        torch.manual_seed(self.conditions.generator_seed + self.trace.steps)

    def _note_rates(self) -> None:
        self._rates = [copy.deepcopy(group.get("lr")) for group in self.optimizer.param_groups]

    def _parameters(self) -> list[torch.Tensor]:
        return parameters(self.optimizer)

    def _name(self, index: int) -> str:
        layout = self._layouts[index]
        return f"{layout.name} {tuple(layout.shape)}"

    def _parameter(self, layout: Layout) -> torch.Tensor:
        values = self._draw(layout, layout.arrange, self.conditions.param_scale, "param")
        return values.detach().requires_grad_(not self.conditions.detached)

    def _gradients(self, scale: float, skip: Callable[[int], bool] | None, sparse: bool) -> list[torch.Tensor | None]:
        step, grads = self.trace.steps, list[torch.Tensor | None]()
        for index, layout in enumerate(self._layouts):
            if skip is not None and skip(index):
                grads.append(None)
                continue
            arrange = layout.arrange_grad or layout.arrange
            values = self._draw(layout, arrange, -scale if self.conditions.negated else scale, "grad", step)
            grads.append(sparse_rows(values, step) if values.dim() and (sparse or self.conditions.sparse) else values)
        return grads

    def _draw(
        self, layout: Layout, arrange: Callable[[torch.Tensor], torch.Tensor], scale: float, *labels: object
    ) -> torch.Tensor:
        c = self.conditions
        values = random_tensor(layout.shape, c.dtype, seeded_generator(c.seed, *labels, layout.name)) * scale
        values = arrange(values.to(c.device))
        if not c.plain:
            return values
        values = values.contiguous()
        values = torch.view_as_real(values) if c.as_pairs else values
        values = values.double() if c.wide else values
        if c.perturbed:
            noise = random_tensor(
                values.shape, torch.float64, seeded_generator(c.seed, "perturb", *labels, layout.name)
            )
            factor = 1 + torch.finfo(c.dtype).eps * noise.clamp(-1, 1).to(c.device)
            values = (values.double() * factor).to(values.dtype)
        return values

    def _look(self, facts: dict[Key, torch.Tensor], others: dict[Key, Any] | None = None) -> None:
        """Keep a copy of everything that can be compared."""
        seen, rest = dict(facts), dict(others or {})
        for index, param in enumerate(self._parameters()):
            name = self._name(index)
            seen[name, PARAM] = self._comparable(param, param)
            if self._views:
                view = param if self.conditions.plain else self._views[index]
                seen[name, VIEW] = self._comparable(view, param)
            state = self.optimizer.state
            for path, value in _leaves(state.get(param, {})):
                if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
                    seen[name, path] = self._comparable(value, param)
                elif isinstance(value, (bool, int, float)) or (isinstance(value, torch.Tensor) and value.dim() == 0):
                    seen[name, path] = torch.tensor(float(value), dtype=torch.float64)
        self.trace.seen.append(seen)
        self.trace.others.append(rest)

    def _comparable(self, value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        value = value.detach()
        value = (value.to_dense() if value.layout is not torch.strided else value).clone()
        pairs = self.conditions.as_pairs and value.shape == param.shape and value.is_floating_point()
        return torch.view_as_complex(value.contiguous()) if pairs else value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything inside nested dicts, lists and tuples, with its path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
