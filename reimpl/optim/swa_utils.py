"""``torch.optim.swa_utils``: PyTorch's averaging of weights."""

from torch.optim.swa_utils import *  # noqa: F403
from torch.optim.swa_utils import __all__ as __all__
