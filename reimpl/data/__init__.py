"""Data sets: CIFAR-10 in its published layout and a generated one like it."""

from reimpl.data import cifar10
from reimpl.data._arrays import CIFAR10Arrays
from reimpl.data._pickle import load_plain
from reimpl.data._synthetic import SYNTHETIC_CLASSES, synthetic

__all__ = ["SYNTHETIC_CLASSES", "CIFAR10Arrays", "cifar10", "load_plain", "synthetic"]
