"""Holds the `@triton.jit` kernels, and nothing else: no torch, no allocation, no launch choices."""
