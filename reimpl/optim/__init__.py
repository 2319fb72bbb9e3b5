"""``torch.optim``'s classes under ``torch.optim``'s names: change one import, ``import reimpl.optim as optim``.

``REIMPLEMENTED`` names PyTorch's classes that are this library's own here; ``NesterovLookahead`` is one that PyTorch
lacks. Every other public name is PyTorch's, so that nothing is missed after the change.

Options that choose how a step runs, and not what it computes, mean the same in every class that takes them:

- ``foreach``: run over all tensors at once; ``None`` takes PyTorch's choice.
- ``fused``: one kernel for the whole step. Every elementwise class has it, where PyTorch has it on four. With
  ``foreach`` or ``differentiable``, or for complex parameters, it raises a ``RuntimeError``.
  A checkpoint's options win, as in PyTorch, so one that was written unfused turns it off on PyTorch's four (SGD,
  Adagrad, Adam, AdamW); :func:`fuse` after loading turns it on again.
- ``capturable``: keep the step count and other numbers of the state on the device, so that a CUDA graph can hold the
  step.
- ``differentiable``: let autograd through the step.

``maximize`` ascends. A constructor raises a ``ValueError`` for an argument outside its range, ``step`` a
``RuntimeError`` for a sparse gradient where the rule takes none. Arguments that PyTorch's class lacks are dialects:
keyword-only, and PyTorch's way by default.
"""

import torch.optim as _torch_optim

from reimpl._handed_on import handed_on as _handed_on

from . import lr_scheduler, swa_utils
from ._fuse import fuse, unfuse
from ._torch import Optimizer
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam
from .adamax import Adamax
from .adamw import AdamW
from .asgd import ASGD
from .averaging import ewa
from .muon import Muon
from .nadam import NAdam
from .nesterov_lookahead import NesterovLookahead
from .radam import RAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sgd import SGD
from .sparse_adam import SparseAdam

REIMPLEMENTED = (
    "SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop",
    "SparseAdam", "Adafactor", "Muon",
)  # fmt: skip

__all__ = [
    "ASGD", "SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "Optimizer", "RAdam",
    "RMSprop", "Rprop", "SparseAdam",
]  # fmt: skip
__all__ += ["NesterovLookahead", "ewa", "fuse", "lr_scheduler", "swa_utils", "unfuse"]
__all__ += [name for name in _torch_optim.__all__ if name not in __all__]

__getattr__, __dir__ = _handed_on(__name__, _torch_optim, ("optimizer",))
