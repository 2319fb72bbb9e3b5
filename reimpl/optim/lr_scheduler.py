"""``torch.optim.lr_scheduler``: PyTorch's schedules, which drive this library's optimizers as they are."""

from torch.optim.lr_scheduler import *  # noqa: F403
from torch.optim.lr_scheduler import __all__ as __all__
