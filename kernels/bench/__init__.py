"""Kernels against each other and the memory."""
