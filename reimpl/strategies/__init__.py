"""Ways to train: stopping early."""

from reimpl.strategies.early_stopping import EarlyStopping

__all__ = ["EarlyStopping"]
