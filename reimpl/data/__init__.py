"""Data: CIFAR-10 and a generated set like it, standardising and whitening, splits, batch sizes, synthesis."""

from reimpl.data import cifar10
from reimpl.data._arrays import CIFAR10Arrays
from reimpl.data._pickle import load_plain
from reimpl.data._synthetic import SYNTHETIC_CLASSES, synthetic
from reimpl.data.mix import Mix
from reimpl.data.splits import Split, split, suggest_batch_size
from reimpl.data.standardize import Standardize
from reimpl.data.whiten import Whiten

__all__ = [
    "SYNTHETIC_CLASSES",
    "CIFAR10Arrays",
    "Mix",
    "Split",
    "Standardize",
    "Whiten",
    "cifar10",
    "load_plain",
    "split",
    "suggest_batch_size",
    "synthetic",
]
