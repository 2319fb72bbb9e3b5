"""``torch.optim``'s classes under ``torch.optim``'s names: change one import, ``import reimpl.optim as optim``."""

import torch.optim as _torch_optim
from torch.optim import *  # noqa: F403  (what is not reimplemented is PyTorch's own)
from torch.optim import Optimizer, lr_scheduler, swa_utils

from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam
from .adamw import AdamW
from .rmsprop import RMSprop
from .sgd import SGD

REIMPLEMENTED = ("SGD", "Adagrad", "Adadelta", "RMSprop", "Adam", "AdamW")
"""Names that are this library's own; every other public name is PyTorch's."""

__all__ = sorted({*_torch_optim.__all__, *REIMPLEMENTED, "Optimizer", "lr_scheduler", "swa_utils"})
