"""Warnings that name the user's line, however deep in here and in PyTorch they come up."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """``warnings.warn`` as of the first frame outside of this library and PyTorch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("reimpl", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
