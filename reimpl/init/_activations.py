"""Which activation follows each layer of a model, as the modules' order or a batch's way through it tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from reimpl.init._kinds import AFFINE, ATTENTION, EMBEDDINGS, NORMS, RECURRENT, is_a
from reimpl.init._modules import buffers_restored, call, hooked, leaves
from reimpl.init.gain import calculate_gain

Function = Callable[[Tensor], Tensor]
Named = str | Function


@dataclass(frozen=True)
class Activation:
    """A function after a layer: PyTorch's name for it and its slope, or none and a gain that was computed."""

    name: str
    gain: float
    nonlinearity: str | None = None
    slope: float = 0.0


def named(nonlinearity: str, slope: float = 0.01) -> Activation:
    """One that :func:`calculate_gain` knows.

    Raises:
        ValueError: it does not.
    """
    leaky = nonlinearity == "leaky_relu"
    name = f"leaky_relu({slope:g})" if leaky else nonlinearity
    return Activation(name, calculate_gain(nonlinearity, slope), nonlinearity, slope if leaky else 0.0)


LINEAR = named("linear")


def measured(function: Function, name: str | None = None) -> Activation:
    r"""An elementwise function, with the gain :math:`E[f(z)^2]^{-1/2}` for normal :math:`z`.

    For ReLU that is :func:`calculate_gain`'s :math:`\sqrt 2`. The integral is a sum over 4,001 points of [-8, 8].

    Raises:
        ValueError: the function is not elementwise, or that mean is 0 or not finite.
    """
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    with torch.no_grad():
        value = function(z.clone())  # it may work in place
    name = name or str(getattr(function, "__name__", type(function).__name__))
    if getattr(value, "shape", None) != z.shape:
        raise ValueError(f"activation {name} must be elementwise; pass a name that calculate_gain knows instead")
    square = float((value.double().square() * torch.exp(-z * z / 2)).sum() * (16 / 4000) / sqrt(2 * pi))
    if not 0 < square < inf:
        raise ValueError(f"activation {name} has mean square {square} on normal numbers, which no gain makes up for")
    return Activation(name, 1 / sqrt(square))


def as_activation(given: Named) -> Activation:
    """From a name that :func:`calculate_gain` knows, or a function of tensors.

    Raises:
        ValueError: another name, or a function without a gain.
        TypeError: neither.
    """
    expected = "a function, such as torch.nn.functional.gelu, or one of linear, sigmoid, tanh, relu, leaky_relu, selu"
    if isinstance(given, str):
        try:
            return named(given)
        except ValueError as error:
            raise ValueError(f"{error}: activation must be {expected}") from None
    if not callable(given):
        raise TypeError(f"activation must be {expected}, got {given!r}")
    return measured(given)


_NAMES = {"ReLU": "relu", "ReLU6": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid", "SELU": "selu"}
_MEASURED = frozenset((
    "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LogSigmoid", "Mish", "SiLU",
    "Softplus", "Softshrink", "Softsign", "Tanhshrink", "Threshold",
))  # fmt: skip
# The same as functions, and the beginnings of the names of those that a layer's output passes through on its way.
_FUNCTIONS = {module.lower(): nonlinearity for module, nonlinearity in _NAMES.items()}
_MEASURED_FUNCTIONS = frozenset(map(str.lower, _MEASURED))
_PASSED = (
    "adaptive_", "alpha_dropout", "avg_pool", "batch_norm", "contiguous", "dropout", "feature_", "flatten",
    "group_norm", "instance_norm", "interpolate", "layer_norm", "max_pool", "mean", "pad", "permute", "reshape",
    "rms_norm", "squeeze", "transpose", "unflatten", "unsqueeze", "view",
)  # fmt: skip
_BARRIERS = AFFINE | RECURRENT | ATTENTION | EMBEDDINGS


def of_module(module: Module) -> Activation | None:
    """The activation that a module is, if it is one."""
    for name, nonlinearity in _NAMES.items():
        if is_a(module, (name,)):
            return named(nonlinearity)
    if is_a(module, ("LeakyReLU",)):
        return named("leaky_relu", float(_attribute(module, "negative_slope")))
    if is_a(module, ("PReLU",)):
        return named("leaky_relu", PRELU_SLOPE)
    if is_a(module, ("RReLU",)):
        return named("leaky_relu", (_attribute(module, "lower") + _attribute(module, "upper")) / 2)
    return measured(module.forward, type(module).__name__.lower()) if is_a(module, _MEASURED) else None


PRELU_SLOPE = 0.25  # where PReLU starts


def _attribute(module: Module, name: str) -> float:
    value = getattr(module, name)
    assert isinstance(value, (int, float))
    return value


def by_order(model: Module) -> dict[str, Activation]:
    """For each affine layer the next module that is an activation, if no other layer with weights comes before it."""
    found: dict[str, Activation] = {}
    waiting: str | None = None
    for name, leaf in leaves(model):
        activation = of_module(leaf)
        if activation is not None:
            if waiting is not None:
                found[waiting] = activation
            waiting = None
        elif is_a(leaf, _BARRIERS):
            waiting = name if is_a(leaf, AFFINE) else None
        elif not is_a(leaf, NORMS) and any(True for _ in leaf.parameters(recurse=False)):
            waiting = None
    return found


def by_batch(model: Module, batch: Any) -> dict[str, Activation]:
    """For each affine layer the first activation, module or function, that its output meets on a batch's way.

    Norms, pooling, dropout and changes of shape are passed through; a sum or product ends the search. Buffers are put
    back afterwards.
    """
    watch = _Watch()
    hooks = (leaf.register_forward_hook(watch.hook(name)) for name, leaf in leaves(model))
    with hooked(hooks), buffers_restored(model), torch.no_grad(), watch:
        call(model, batch)
    return watch.found


class _Watch(TorchFunctionMode):
    """Remembers which tensors are a layer's output, and which activation each output meets first."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Activation] = {}
        self.layer_of = WeakTensorKeyDictionary()

    def hook(self, name: str) -> Callable[[Module, tuple[Any, ...], Any], None]:
        """What is called after a leaf of that name: a layer's output is followed from here on."""

        def after(module: Module, args: tuple[Any, ...], output: Any) -> None:
            if is_a(module, AFFINE) and isinstance(output, Tensor):
                self.layer_of[output] = name
            else:
                weighted = any(True for _ in module.parameters(recurse=False))
                self._meet(args, output, of_module(module), passes=is_a(module, NORMS) or not weighted)

        return after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if args and isinstance(args[0], Tensor) and args[0] in self.layer_of:
            full = getattr(func, "__name__", "")
            name = full.strip("_")
            activation = _of_function(func, name, args, kwargs)
            if output is args[0] and full.endswith("_") and activation is None and not name.startswith(_PASSED):
                del self.layer_of[output]  # add_, __iadd__, ...: this tensor is the layer's output no more
            else:
                self._meet(args, output, activation, passes=name.startswith(_PASSED))
        return output

    def _meet(self, args: tuple[Any, ...], output: Any, activation: Activation | None, *, passes: bool) -> None:
        layer = self.layer_of.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if layer is None or not isinstance(output, Tensor):
            return
        if activation is not None:
            self.found.setdefault(layer, activation)
        elif passes:
            self.layer_of[output] = layer


def _of_function(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Activation | None:
    if name in _FUNCTIONS:
        return named(_FUNCTIONS[name])
    if name == "leaky_relu":
        return named("leaky_relu", float(kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01)))
    if name in _MEASURED_FUNCTIONS:
        return measured(lambda z: func(z, *args[1:], **kwargs), name)
    return None


def chosen(model: Module, given: Named | Mapping[str, Named] | None, batch: Any) -> dict[str, Activation]:
    """What follows each affine layer: as given for its name, else as the batch or the order tells, else nothing.

    Raises:
        ValueError: a pattern that no layer's name matches.
    """
    names = [name for name, leaf in leaves(model) if is_a(leaf, AFFINE)]
    if given is not None and not isinstance(given, Mapping):
        return dict.fromkeys(names, as_activation(given))
    found = dict.fromkeys(names, LINEAR)
    found.update(by_order(model) if batch is None else by_batch(model, batch))
    patterns = {pattern: as_activation(named) for pattern, named in (given or {}).items()}
    unused = set(patterns)
    for name in names:
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        unused.difference_update(matching)
        if matching:
            found[name] = patterns[matching[0]]
    if unused:
        raise ValueError(f"activation has the pattern {sorted(unused)[0]!r}, which matches none of the layers {names}")
    return found
