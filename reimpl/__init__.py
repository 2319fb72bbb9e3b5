"""Techniques of deep learning reimplemented as PyTorch citizens, each held against PyTorch and a NumPy oracle."""

__version__ = "0.1.0"
