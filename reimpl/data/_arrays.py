"""The images and labels of a CIFAR-10-like data set, checked when they are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Images = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class CIFAR10Arrays:
    """A data set of 32x32 colour images.

    Args:
        train_images: uint8 (N, 3, 32, 32), channels red, green, blue, 0 to 255.
        train_labels: int64 (N,), each below ``len(classes)``.
        test_images: uint8 (M, 3, 32, 32).
        test_labels: int64 (M,).
        classes: a name for each label.

    Raises:
        ValueError: a shape, a count or a label is wrong; the text names the field, what came and what was expected.
        TypeError: a dtype is wrong.
    """

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            self._check(split, getattr(self, f"{split}_images"), getattr(self, f"{split}_labels"))

    def _check(self, split: str, images: Images, labels: Labels) -> None:
        for field, array, dtype in (("images", images, np.uint8), ("labels", labels, np.int64)):
            if array.dtype != dtype:
                raise TypeError(f"{split}_{field} must be {np.dtype(dtype)}, got {array.dtype}")
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise ValueError(f"{split}_images must have shape (N, 3, 32, 32), got {images.shape}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{split}_labels must have shape {images.shape[:1]}, one an image, got {labels.shape}")
        if not len(labels):
            raise ValueError(f"{split}_images must hold at least one image, got none")
        if labels.min() < 0 or labels.max() >= len(self.classes):
            low, high = labels.min(), labels.max()
            raise ValueError(f"{split}_labels must lie in 0..{len(self.classes) - 1}, got {low}..{high}")
