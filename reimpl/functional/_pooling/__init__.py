"""Pooling's parts: windows, few passes over tensors, and kernels."""
