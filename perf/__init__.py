"""Measures how fast the kernels are, against torch, other libraries and the machine's limit."""
