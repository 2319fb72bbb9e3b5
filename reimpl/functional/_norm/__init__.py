"""Batch normalisation's parts: the chain of derivatives, few passes over tensors, and kernels."""
