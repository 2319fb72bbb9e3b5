"""PyTorch's old names, without the underscore: each warns and does what the new one does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec

from torch import Tensor

from reimpl.init.scaled import kaiming_normal_, kaiming_uniform_, xavier_normal_, xavier_uniform_
from reimpl.init.simple import constant_, normal_, uniform_
from reimpl.init.structured import dirac_, eye_, orthogonal_, sparse_

P = ParamSpec("P")


def _deprecated(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    new = function.__name__
    old = new.removesuffix("_")

    @functools.wraps(function)
    def alias(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        warnings.warn(f"`nn.init.{old}` is now deprecated in favor of `nn.init.{new}`.", FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    alias.__name__ = alias.__qualname__ = old
    alias.__module__ = __name__
    alias.__doc__ = f"Deprecated name of :func:`{new}`."
    return alias


uniform = _deprecated(uniform_)
normal = _deprecated(normal_)
constant = _deprecated(constant_)
eye = _deprecated(eye_)
dirac = _deprecated(dirac_)
xavier_uniform = _deprecated(xavier_uniform_)
xavier_normal = _deprecated(xavier_normal_)
kaiming_uniform = _deprecated(kaiming_uniform_)
kaiming_normal = _deprecated(kaiming_normal_)
orthogonal = _deprecated(orthogonal_)
sparse = _deprecated(sparse_)
