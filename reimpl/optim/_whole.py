"""``WholeTensorRule``: what the rules share that look at a tensor as a whole, by reductions or by sparse rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ._engine import Group, RuleOptimizer
from ._shards import is_cut_up, whole
from ._tensorlist import TensorList
from ._torch import runs_eagerly


class WholeTensorRule(RuleOptimizer):
    """A rule that is not elementwise: it runs tensor by tensor unless ``foreach`` is asked for, and is never fused.

    ``torch.compile`` calls it instead of tracing it, so that a compiled training step gives the eager step's bits.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        return self._step_all(closure)

    def _step_group(self, index: int, group: Group) -> None:
        if torch.compiler.is_compiling():
            self._step_group_eagerly(index, group)
        else:
            super()._step_group(index, group)

    @runs_eagerly
    def _step_group_eagerly(self, index: int, group: Group) -> None:
        super()._step_group(index, group)

    def _chooses_foreach(self, h: Any, params: list[Tensor]) -> bool:
        return False


def each(function: Callable[..., Tensor], *operands: Any) -> Any:
    """``function`` of tensors, or, where the operands are lists, of each row of them."""
    if isinstance(operands[0], Tensor):
        return function(*operands)
    return TensorList([function(*row) for row in zip(*operands, strict=True)])


def root_mean_squares(tensors: list[Tensor], divisor: float = 1.0) -> list[float]:
    """‖x‖/(√n · divisor) of each tensor, read from the device at once; 0 of an empty one."""
    if is_cut_up(tensors[0]):
        norms = [whole(vector_norm(x)).item() for x in tensors]
    elif len(tensors) == 1:
        return [vector_norm(tensors[0]).item() / ((max(1, tensors[0].numel()) ** 0.5) * divisor)]
    else:
        norms = torch.stack(list(torch._foreach_norm(tensors))).tolist()
    return [norm / ((max(1, x.numel()) ** 0.5) * divisor) for norm, x in zip(norms, tensors, strict=True)]
