"""A generated stand-in for CIFAR-10: ten classes of striped shapes on 32x32 colour images, the same on any machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from reimpl.data._arrays import CIFAR10Arrays

_SHAPES = ("disc", "square", "diamond", "cross", "ring")
_STRIPES = ("horizontal", "vertical")
SYNTHETIC_CLASSES: tuple[str, ...] = tuple(f"{stripes} {shape}" for shape in _SHAPES for stripes in _STRIPES)

_CHUNK = 500  # images drawn at a time, to bound memory

Int = np.ndarray[Any, np.dtype[np.int32]]


def synthetic(train: int = 10_000, test: int = 2_000, *, seed: int = 0) -> CIFAR10Arrays:
    """Generates a data set in CIFAR-10's layout, for where there is no network.

    A class is a shape (disc, square, diamond, cross, ring) with horizontal or vertical stripes. Position, size,
    colours, stripe width, phase and tilt, background and noise are random, so no pixel's mean tells the class: a
    linear model stays near chance, and a small convolutional network learns it. Only integer arithmetic is
    used, so that the same seed gives the same bytes everywhere; the test images do not depend on ``train``.

    Args:
        train: number of training images, at least 10.
        test: number of test images, at least 10.
        seed: seed of the generator, at least 0.

    Raises:
        ValueError: a count is below 10, or the seed is negative.
    """
    for name, count in (("train", train), ("test", test)):
        if count < len(SYNTHETIC_CLASSES):
            raise ValueError(f"{name} must be at least {len(SYNTHETIC_CLASSES)}, one image a class, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    train_images, train_labels = _split(train, np.random.Generator(np.random.PCG64([seed, 0])))
    test_images, test_labels = _split(test, np.random.Generator(np.random.PCG64([seed, 1])))
    return CIFAR10Arrays(train_images, train_labels, test_images, test_labels, SYNTHETIC_CLASSES)


def _split(count: int, rng: np.random.Generator) -> tuple[Any, Any]:
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(SYNTHETIC_CLASSES))
    chunks = [_images(labels[start : start + _CHUNK], rng) for start in range(0, count, _CHUNK)]
    return np.concatenate(chunks), labels


def _images(labels: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    n = len(labels)

    def draw(low: int, high: int, *shape: int) -> Int:
        return rng.integers(low, high + 1, size=(n, *shape), dtype=np.int32)

    y, x = np.indices((32, 32), dtype=np.int32)
    dy, dx = y - draw(11, 20, 1, 1), x - draw(11, 20, 1, 1)
    shape, vertical = np.divmod(labels, len(_STRIPES))
    inside = _inside(shape[:, None, None], dy, dx, draw(8, 11, 1, 1))

    across = np.where(vertical[:, None, None] == 1, dx, dy)
    along = np.where(vertical[:, None, None] == 1, dy, dx)
    width = draw(2, 4, 1, 1)  # of one stripe, in pixels
    tilt = draw(-1, 1, 1, 1)  # in quarters: at most 14 degrees either way
    bright = (4 * across + tilt * along + draw(0, 31, 1, 1)) % (8 * width) < 4 * width

    first = draw(0, 255, 3, 1, 1)
    second = (first + draw(72, 184, 3, 1, 1)) % 256  # at least 72 levels from the first in every channel
    slope_y, slope_x = draw(-3, 3, 3, 1, 1), draw(-3, 3, 3, 1, 1)
    background = draw(0, 255, 3, 1, 1) + slope_y * (y - 16) + slope_x * (x - 16)
    striped = np.where(bright[:, None], first, second)
    noise = draw(-128, 127, 3, 32, 32) * draw(8, 48, 1, 1, 1) // 128
    image = np.where(inside[:, None], striped, background) + noise
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.clip(image, 0, 255).astype(np.uint8)
    return pixels


def _inside(shape: np.ndarray[Any, Any], dy: Int, dx: Int, r: Int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pixels of an image lie in its shape of radius ``r``, all shapes of about the same area."""
    near, far = np.minimum(abs(dy), abs(dx)), np.maximum(abs(dy), abs(dx))
    square_distance = dy * dy + dx * dx
    disc = square_distance <= r * r
    masks = {
        "disc": disc,
        "square": 8 * far <= 7 * r,
        "diamond": 4 * (near + far) <= 5 * r,
        "cross": (5 * near <= 2 * r) & (6 * far <= 7 * r),
        "ring": disc & (3 * square_distance >= r * r),
    }
    return np.choose(shape, [masks[name] for name in _SHAPES]).astype(np.bool_)
