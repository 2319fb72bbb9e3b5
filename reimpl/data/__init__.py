"""Data: CIFAR-10 and a generated set like it, standardising and whitening, splits, batch sizes, synthesis."""

from reimpl.data import cifar10
from reimpl.data._arrays import CIFAR10Arrays
from reimpl.data._pickle import load_plain
from reimpl.data._synthetic import SYNTHETIC_CLASSES, synthetic
from reimpl.data.standardize import Standardize
from reimpl.data.whiten import Whiten

__all__ = ["SYNTHETIC_CLASSES", "CIFAR10Arrays", "Standardize", "Whiten", "cifar10", "load_plain", "synthetic"]
