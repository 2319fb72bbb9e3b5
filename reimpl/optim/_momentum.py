"""The dialects of momentum that several rules take: which form, and the velocity that holds the rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import _checks

_FORMS_WITH = {"dampening": ("torch",), "nesterov": ("torch", "velocity"), "bias_correction": ("ewa",)}
"""Options that go with some forms of momentum only."""


def check_form(options: Mapping[str, Any], forms: tuple[str, ...]) -> None:
    """Raise unless ``momentum_form`` is one of ``forms``, and goes with the other options.

    Raises:
        ValueError: names the option and what came.
    """
    form = options["momentum_form"]
    _checks.one_of("momentum_form", form, forms)
    if options.get("bias_correction") and options["momentum"] >= 1:
        raise ValueError(f"bias_correction=True needs momentum below 1, but it is {options['momentum']}")
    for name, allowed in _FORMS_WITH.items():
        _checks.needs(name, options.get(name), "momentum_form", form, allowed)


def velocity_step_(p: Any, buf: Any, h: Any, descend: Callable[[Any], Any]) -> None:
    """b ← μb − γd and p ← p + b, or p + μb − γd with ``nesterov``, in place; ``descend(x)`` is x ← x − γd."""
    descend(buf.mul_(h.momentum))
    if h.nesterov:
        descend(p.add_(buf, alpha=h.momentum))
    else:
        p.add_(buf)
