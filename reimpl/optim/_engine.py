"""``RuleOptimizer``: everything that an optimizer needs besides its rule, and the rule's every way of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import _checkpoints, _checks, _fused
from ._tensorlist import TensorList, equal_rows, increment
from ._torch import (
    Namespace,
    Optimizer,
    ParamsT,
    StateDict,
    check_fused_support,
    defaults_to_foreach,
    grad_mode_of_step,
    has_accelerator,
    hook_step,
    is_being_compiled,
    require_capturable_devices,
    step_dtype,
    step_value,
    to_scalar,
)

State = dict[str, Any]
Group = dict[str, Any]


class RuleOptimizer(Optimizer):
    """An optimizer given by one rule, which runs over a tensor, over a list of tensors, or fused into one kernel.

    A subclass writes its rule once:

    - ``init_state(p, group)`` returns the state that a parameter starts with;
    - ``prologue(h, t)`` computes the scalars that depend on the step count ``t`` (bias corrections, schedules of the
      rule's own) from the hyperparameters ``h``, a namespace of the parameter group; the numbers of the state that
      ``scalar_state`` names come as further arguments, 0-d tensors that it reads by ``_ops.number`` and changes in
      place;
    - ``update(p, g, s, h, c)`` changes the parameter ``p`` and the state ``s`` in place, given the gradient ``g`` and
      the prologue's result ``c``, in the in-place methods of ``torch.Tensor``.

    The engine knows the rest: closures, groups, ``maximize``, complex and sparse gradients, ``capturable``,
    ``differentiable``, gradient scaling, and checkpoints that go to PyTorch's class of the same name and back.
    """

    dialects: ClassVar[Mapping[str, Any]] = {}
    """Options that PyTorch's class lacks, each with the value that is PyTorch's way."""
    torch_class: ClassVar[Callable[..., Optimizer] | None] = None
    """PyTorch's class of the same name."""
    sparse_error: ClassVar[str | None] = None
    """What a sparse gradient is told, or ``None`` where the rule takes one."""
    complex_error: ClassVar[str | None] = None
    """What a complex parameter is told, or ``None`` where the rule takes one."""
    dense_error: ClassVar[str | None] = None
    """What a dense gradient is told, or ``None`` where the rule takes one."""
    fused_sparse_error: ClassVar[str] = ""
    lazy_state: ClassVar[tuple[str, ...]] = ()
    """State that the rule itself makes at a parameter's first step."""
    zero_state: ClassVar[tuple[str, ...]] = ()
    """State that starts as zeros of the parameter's form, with a step count before it."""
    scalar_state: ClassVar[tuple[str, ...]] = ()
    """State of one number a parameter, beside the step count."""
    differentiates_step: ClassVar[bool] = False
    """Whether the step count stays a tensor where the step is differentiated, as where it is captured."""
    for_loop_captured: ClassVar[str] = "params and state_steps"
    """What ``capturable`` wants on the device, in the words of PyTorch's error."""
    foreach_captured: ClassVar[str] = "params and state_steps"
    for_loop_captures_xla: ClassVar[bool] = True
    foreach_captures_xla: ClassVar[bool] = True
    decays: ClassVar[tuple[str, ...]] = ()
    """Options that are the rate of a running mean, in [0, 1]; PyTorch lets RMSprop's above 1, and comes to NaN."""
    late_options: ClassVar[Mapping[str, Any]] = {}
    """What an old checkpoint means by leaving an option out, where that is not ``LATE_OPTIONS``'s value."""
    foreach_refuses_autograd: ClassVar[bool] = True
    foreach_takes_tensor_lr: ClassVar[bool] = True
    """Whether foreach may be chosen unasked for a learning-rate tensor that is not captured."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.check_dialects(defaults)
        if defaults.get("fused"):
            if defaults.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            if defaults.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        super().__init__(params, defaults)
        _checks.look(self)
        if defaults.get("fused"):
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: Group) -> None:
        """PyTorch's ``add_param_group``; options are checked as the constructor's are."""
        if isinstance(param_group, dict):
            _checks.group(self, param_group, len(self.param_groups))
            self.check_dialects({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @classmethod
    def check_dialects(cls, options: Mapping[str, Any]) -> None:
        """Raise where a dialect has a value that it cannot have, in the constructor's arguments or a group's options.

        Raises:
            TypeError, ValueError: names the option and what came.
        """
        _checks.flags(**{key: options[key] for key, default in cls.dialects.items() if isinstance(default, bool)})

    # ---------------------------------------------------------------- what a subclass writes

    def init_state(self, p: Tensor, group: Group) -> State:
        """The state of ``p`` before its first step."""
        return {"step": self.new_step(p, group), **{key: self.like(p) for key in self.zero_state}}

    def is_stateful(self, group: Group) -> bool:
        """Whether parameters of ``group`` have state at all."""
        return True

    def check_group(self, group: Group) -> None:
        """Raise what PyTorch raises at ``step`` for options that do not go together."""

    @staticmethod
    def prologue(h: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        """Scalars of step ``t``."""
        return None

    @staticmethod
    def update(p: Any, g: Any, s: State, h: Any, c: Any) -> None:
        """The rule."""
        raise NotImplementedError("a subclass of RuleOptimizer must define update()")

    # ---------------------------------------------------------------- state

    def new_step(self, p: Tensor, group: Group) -> Tensor:
        """A step count of 0 where PyTorch keeps it: beside the parameter if captured or fused, else on the CPU."""
        fused = group.get("fused")
        if (group.get("capturable") or fused) and not p.is_cpu:
            return torch.zeros((), dtype=step_dtype(is_fused=fused), device=p.device)
        return torch.tensor(0.0, dtype=step_dtype(is_fused=fused), device="cpu")

    @staticmethod
    def like(p: Tensor) -> Tensor:
        """Zeros of the parameter's shape, dtype and strides."""
        return torch.zeros_like(p, memory_format=torch.preserve_format)

    def _collect(self, group: Group) -> tuple[list[Tensor], list[Tensor], list[State]]:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[State] = []
        stateful, fused, sparse_error = self.is_stateful(group), group.get("fused"), self.sparse_error
        others_refused = self.complex_error is not None or self.dense_error is not None
        self.check_group(group)
        for p in group["params"]:
            g = p.grad
            if g is None:
                continue
            if others_refused:
                self._refuse_kind(p, g)
            if sparse_error is not None and g.is_sparse:
                raise RuntimeError(sparse_error)
            state: State = self.state[p] if stateful else {}
            if not state:
                if fused:
                    check_fused_support(p)
                if stateful:
                    state.update(self.init_state(p, group))
            params.append(p)
            grads.append(g)
            states.append(state)
        return params, grads, states

    def _refuse_kind(self, p: Tensor, g: Tensor) -> None:
        if self.complex_error is not None and p.is_complex():
            raise RuntimeError(self.complex_error)
        if self.dense_error is not None and not g.is_sparse:
            raise RuntimeError(self.dense_error)

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], *columns: list[Tensor | None], own: bool = False
    ) -> tuple[bool, bool]:
        """Fill the lists, one column for each key of the state; the form that ``torch.compile`` runs eagerly.

        PyTorch's ``step`` asks for it, too, if it was bound before ``fuse``: the group is stepped here then, and over
        lists that stay empty PyTorch's does nothing.
        """
        if not own and is_being_compiled():
            raise RuntimeError("this step was compiled before fuse() or unfuse(); compile optimizer.step anew")
        if not own:
            self._step_group([*map(id, self.param_groups)].index(id(group)), group)
            return False, False  # as where no tensor is sparse or complex; some of PyTorch's take two answers
        found, found_grads, states = self._collect(group)
        params.extend(found)
        grads.extend(found_grads)
        for key, column in zip(self._state_keys(group), columns, strict=True):
            column.extend(state.get(key) for state in states)
        return False, False

    def _state_keys(self, group: Group) -> list[str]:
        """The keys of a parameter's state, in order, with the lazy ones last."""
        if not self.is_stateful(group):
            return []
        probe = torch.empty((), device="meta")
        keys = list(self.init_state(probe, {**group, "capturable": False, "fused": False}))
        return keys + [key for key in self.lazy_state if key not in keys]

    # ---------------------------------------------------------------- the step

    profile_hook_step = staticmethod(hook_step)

    @grad_mode_of_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        cls: Any = type(self)
        if not issubclass(cls, RuleOptimizer):  # bound before unfuse()
            return cls.step.__wrapped__(self, closure)  # without the hooks, which have been called
        return self._step_all(closure)

    def _step_all(self, closure: Callable[[], Any] | None) -> Any:
        if "capturable" in self.defaults and not torch.compiler.is_compiling() and has_accelerator():
            self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: Group) -> None:
        if torch.compiler.is_compiling():
            _checks.written(self, group, index)  # while it is traced: Dynamo guards what it has looked at
            self._compiled_group(group)
            return
        fused = group.get("fused")
        if fused and _fused.run_unchanged(self, index, group):
            return  # options that are what they were have been looked at
        _checks.written(self, group, index)
        if fused and _fused.run_plan(self, index, group):
            return
        params, grads, states = self._collect(group)
        if not params:
            return
        h = _hyperparameters(group, self.differentiates_step)
        if fused:
            if any(g.is_sparse for g in grads):
                raise RuntimeError(self.fused_sparse_error)
            _fused.step(self, index, group, h, params, grads, states)
            return
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise AssertionError("Expected grad_scale and found_inf to be None")
        foreach = group.get("foreach")
        if foreach is None and fused is None:
            foreach = self._chooses_foreach(h, params)
        if h.capturable and self._has_steps(states):
            xla = self.foreach_captures_xla if foreach else self.for_loop_captures_xla
            names = self.foreach_captured if foreach else self.for_loop_captured
            numbers = [[s[key] for key in ("step", *self.scalar_state)] for s in states]
            require_capturable_devices(params, numbers, names, supports_xla=xla)
        (self._foreach if foreach else self._for_loop)(h, params, grads, states)

    def _chooses_foreach(self, h: Any, params: list[Tensor]) -> bool:
        if isinstance(h.lr, Tensor) and not h.capturable and not self.foreach_takes_tensor_lr:
            return False
        return defaults_to_foreach(params, h.differentiable)

    @staticmethod
    def _has_steps(states: Sequence[State]) -> bool:
        return "step" in states[0]

    def _for_loop(self, h: Any, params: list[Tensor], grads: list[Tensor], states: list[State]) -> None:
        prologue, update, on_device, kept = self.prologue, self.update, h.on_device, self.scalar_state
        counts = prologue is not RuleOptimizer.prologue  # else nobody asks for the step count
        c = prologue(h, None) if not self._has_steps(states) else None
        last = None
        traced = torch.compiler.is_compiling()
        for p, g, s in zip(params, grads, states, strict=True):
            if h.maximize:
                g = -g
            if "step" in s:
                step = s["step"]
                step += 1
                s["step"] = step
                if counts:
                    # step_value says the same, in three more calls a tensor
                    t = step if on_device else step.item() if type(step) is Tensor and not traced else step_value(step)
                    if on_device or t != last or kept:
                        c, last = prologue(h, t, *[s[key] for key in kept]), t
            update(p, g, s, h, c)

    def _foreach(self, h: Any, params: list[Tensor], grads: list[Tensor], states: list[State]) -> None:
        if h.differentiable and self.foreach_refuses_autograd:
            raise AssertionError("_foreach ops don't support autograd")
        for indices in self._partition(h, params, grads, states):
            part = [states[i] for i in indices]
            p, g = TensorList([params[i] for i in indices]), TensorList([grads[i] for i in indices])
            if any(grad.is_sparse for grad in g):
                self._for_loop(h, list(p), list(g), part)  # foreach functions take no sparse tensors
                continue
            if "step" in part[0]:
                increment([state["step"] for state in part])
            s = {key: TensorList([state[key] for state in part]) for key in part[0] if part[0][key] is not None}
            t: Any = None
            if "step" in s:
                t = s["step"] if h.on_device else step_value(part[0]["step"])
            keys = set(s)
            c = self.prologue(h, t, *(s[key] for key in self.scalar_state))
            self.update(p, g.neg() if h.maximize else g, s, h, c)
            for key in s.keys() - keys:
                for state, value in zip(part, s[key], strict=True):
                    state[key] = value

    def _partition(self, h: Any, params: list[Tensor], grads: list[Tensor], states: list[State]) -> Iterator[list[int]]:
        """Indices of tensors that go together: one device, dtype and layout, the same keys and numbers in state."""
        if torch.compiler.is_compiling():
            yield list(range(len(params)))
            return
        columns: list[list[Any]] = [[p.device for p in params], [p.dtype for p in params], list(map(tuple, states))]
        columns += [g.dtype for g in grads], [g.layout for g in grads]
        if self.lazy_state:
            columns.append([tuple(key for key in self.lazy_state if s.get(key) is None) for s in states])
        if self._has_steps(states) and not h.on_device:
            columns += ([s[key].item() for s in states] for key in ("step", *self.scalar_state))
        yield from equal_rows(columns)

    def _compiled_group(self, group: Group) -> None:
        """The step as ``torch.compile`` traces it: state in lists that stay the same objects."""
        keys = self._state_keys(group)
        params: list[Tensor] = []
        grads: list[Tensor] = []
        columns: list[list[Tensor | None]] = [[] for _ in keys]
        self._init_group(group, params, grads, *columns, own=True)
        if not params:
            return
        h = _hyperparameters(group, self.differentiates_step)
        states: list[State] = [
            {key: column[i] for key, column in zip(keys, columns, strict=True) if column[i] is not None}
            for i in range(len(params))
        ]
        foreach = group.get("foreach")
        if foreach is None:
            foreach = self._chooses_foreach(h, params)
        whole = all(("step" in s) == ("step" in states[0]) and len(s) == len(states[0]) for s in states)
        (self._foreach if (foreach or group.get("fused")) and whole else self._for_loop)(h, params, grads, states)
        for p, s in zip(params, states, strict=True):
            for key in self.lazy_state:
                if key in s:
                    self.state[p][key] = s[key]

    # ---------------------------------------------------------------- checkpoints

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        _checks.look(self)
        self.forget_plans()
        _checkpoints.complete(self)

    def forget_plans(self) -> None:
        """Let the next fused step look at all tensors anew."""
        self.__dict__.pop("_fused_bundles", None)

    def state_dict(self) -> StateDict:
        """PyTorch's ``state_dict``; dialects are in it only where they are not PyTorch's way."""
        return _checkpoints.without_torch_ways(self, super().state_dict())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a checkpoint of this class or of PyTorch's class of the same name.

        A dialect that the checkpoint does not name keeps the value it has here, with a warning: the checkpoint was
        written under PyTorch's way, whose state may mean something else (a velocity is not PyTorch's buffer). All else
        is the checkpoint's, as in PyTorch: ``fused`` of SGD, Adagrad, Adam and AdamW too; ``fuse`` sets it again.

        Raises:
            ValueError: the checkpoint is of another dialect, class or shape.
        """
        with _checkpoints.checked(self):
            super().load_state_dict(state_dict)

    def to_torch(self) -> Optimizer:
        """PyTorch's optimizer of the same name over the same parameters, with a copy of the state.

        Raises:
            ValueError: a dialect is in use that PyTorch's class cannot express.
        """
        return _checkpoints.torch_twin(self)


def _hyperparameters(group: Group, differentiates_step: bool) -> Any:
    """The group's options as attributes, one-element tensors as 0-d ones."""
    h = Namespace(**{key: value for key, value in group.items() if key not in ("params", "param_names")})
    h.lr = to_scalar(h.lr)
    h.capturable = group.get("capturable", False)
    h.maximize = group.get("maximize", False)
    h.differentiable = group.get("differentiable", False)
    # PyTorch keeps the step count a tensor where a graph, or autograd, is to follow it
    h.on_device = h.capturable or (differentiates_step and h.differentiable)
    return h
