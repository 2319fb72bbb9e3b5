"""``torch.optim``'s classes under ``torch.optim``'s names: change one import, ``import reimpl.optim as optim``.

``REIMPLEMENTED`` names the classes that are this library's own. Every other public name is PyTorch's, so that nothing
is missed after the change.
"""

from typing import Any

import torch.optim as _torch_optim

from . import lr_scheduler, swa_utils
from ._torch import Optimizer
from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .asgd import ASGD
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD

REIMPLEMENTED = (
    "SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop",
)  # fmt: skip

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "Optimizer", "RAdam", "RMSprop", "Rprop",
    "lr_scheduler", "swa_utils",
]  # fmt: skip
__all__ += [name for name in _torch_optim.__all__ if name not in __all__]


def __getattr__(name: str) -> Any:
    """PyTorch's own, for what is not reimplemented."""
    try:
        return getattr(_torch_optim, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
