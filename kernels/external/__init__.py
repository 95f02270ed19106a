"""Kernels that other libraries bring."""
