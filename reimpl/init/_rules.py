"""The rules by name, and how a rule is called: with what it takes of the facts about a layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Generator, Tensor

from reimpl.init._activations import Activation
from reimpl.init.gain import Fans
from reimpl.init.scaled import (
    kaiming_normal_,
    kaiming_uniform_,
    lecun_normal_,
    lecun_uniform_,
    xavier_normal_,
    xavier_uniform_,
)
from reimpl.init.simple import constant_, normal_, ones_, uniform_, zeros_
from reimpl.init.structured import dirac_, eye_, orthogonal_, sparse_
from reimpl.init.truncated import trunc_normal_
from reimpl.init.walk import NONLINEARITIES, random_walk_

RULES: Mapping[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        constant_, dirac_, eye_, kaiming_normal_, kaiming_uniform_, lecun_normal_, lecun_uniform_, normal_, ones_,
        orthogonal_, random_walk_, sparse_, trunc_normal_, uniform_, xavier_normal_, xavier_uniform_, zeros_,
    )
}  # fmt: skip
Rule = str | float | Callable[..., Any]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_GIVEN = frozenset(("fans", "groups", "generator", "gain", "nonlinearity", "a"))


def as_function(argument: str, rule: Rule) -> Callable[..., Any]:
    """The function that a rule stands for.

    Raises:
        ValueError: an unknown name, or a function that needs more than what it will be given.
        TypeError: neither name, number nor function.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"{argument} must be a function, a number or one of {', '.join(RULES)}, got {rule!r}")
        function = RULES[rule]
    elif isinstance(rule, (int, float)):
        return functools.partial(constant_, val=float(rule))
    elif callable(rule):
        function = rule
    else:
        raise TypeError(f"{argument} must be a name, a number or a function, got {type(rule).__name__}")
    required = [
        parameter.name
        for parameter in list(_open_parameters(function).values())[1:]
        if parameter.default is parameter.empty and parameter.kind not in _VARIADIC and parameter.name not in _GIVEN
    ]
    if required:
        name = getattr(function, "__name__", repr(function))
        raise ValueError(f"{argument} {name} needs {required[0]}: pass functools.partial({name}, {required[0]}=...)")
    return function


def takes(function: Callable[..., Any]) -> Set[str]:
    """Names of the arguments that a function can be given."""
    return _open_parameters(function).keys()


def _open_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function that no ``partial`` has bound; none where they cannot be known."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return {name: parameter for name, parameter in parameters.items() if name not in bound}


def needs_activation(function: Callable[..., Any]) -> bool:
    """Whether its numbers depend on the activation after the layer."""
    names = takes(function)
    return "gain" in names or ("nonlinearity" in names and "a" in names)


def draw(
    function: Callable[..., Any],
    parameter: str,
    tensor: Tensor,
    generator: Generator | None,
    activation: Activation,
    fans: Fans | None,
    groups: int,
) -> None:
    """Call a rule with what it takes of the facts about the layer; ``parameter`` is the tensor's name for errors."""
    names = takes(function)
    kwargs: dict[str, Any] = {}
    scale = 1.0
    if "nonlinearity" in names and "a" in names:
        kwargs |= {"nonlinearity": activation.nonlinearity or "linear", "a": activation.slope}
        scale = 1.0 if activation.nonlinearity else activation.gain
        if _innermost(function) is random_walk_ and activation.nonlinearity not in NONLINEARITIES:
            raise ValueError(
                f"Unsupported nonlinearity {activation.name}: {parameter}'s layer is followed by it, and random_walk_ "
                f"knows {', '.join(NONLINEARITIES)}; give another rule, or activation="
            )
    elif "gain" in names:
        kwargs["gain"] = activation.gain
    if fans is not None and min(fans) <= 0:
        fans = None  # a layer without units: the rule sees from the shape that there is nothing to draw
    facts = {"fans": fans, "groups": groups, "generator": generator}
    kwargs |= {name: fact for name, fact in facts.items() if name in names and fact is not None}
    function(tensor, **kwargs)
    if scale != 1:
        tensor.mul_(scale)


def _innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.func if isinstance(function, functools.partial) else function


def label(function: Callable[..., Any]) -> str:
    """How a table names a rule."""
    if not isinstance(function, functools.partial):
        return getattr(function, "__name__", type(function).__name__)
    if function.func is constant_:
        return f"{function.keywords['val']:g}"
    given = [*map(str, function.args), *(f"{name}={value}" for name, value in function.keywords.items())]
    return f"{label(function.func)}({', '.join(given)})"
