"""Convolution's parts: arguments, blocks of windows and products, plans, and kernels."""
