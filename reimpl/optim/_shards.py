"""Parameters that are cut up between processes: the parts of ``DTensor``s that lie in this one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter


def is_cut_up(t: Tensor) -> bool:
    """Whether ``t`` is a ``DTensor``; there is none unless somebody has imported its module, which takes a second."""
    kind = type(t)
    if kind is Tensor or kind is Parameter:
        return False
    return kind is getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def local(t: Any) -> Tensor:
    """The part of a ``DTensor`` that lies in this process; any other tensor is all here."""
    part: Tensor = t._local_tensor if is_cut_up(t) else t
    return part


def whole(t: Any) -> Tensor:
    """What the parts of a ``DTensor`` in all processes make together; ``item()`` of one gives its part here."""
    value: Tensor = t.full_tensor() if is_cut_up(t) else t
    return value


def is_cut_alike(t: Any, p: Any) -> bool:
    """Whether the elements of two ``DTensor``s that belong together lie in the same places of the same processes."""
    there, here = t._spec, p._spec
    return there is here or (there.placements == here.placements and there.mesh == here.mesh)


def local_parts(p: Any, others: Sequence[Tensor]) -> list[Tensor] | None:
    """The parts of ``p`` and of ``others`` that an elementwise rule can work on in this process, each by itself.

    ``None`` where there are none: a ``DTensor`` whose value is the sum of the processes' parts, or that is cut in
    another way than ``p``.
    """
    if not is_cut_up(p):
        return [p, *others]
    if any(placement.is_partial() for placement in p.placements):
        return None
    if not all(is_cut_up(t) and is_cut_alike(t, p) for t in others):
        return None
    return list(map(local, (p, *others)))
