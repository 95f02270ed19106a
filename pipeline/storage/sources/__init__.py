"""Codings that models are published in, small floats and scales: one file each, which registers itself by PLUGINS.

Everyone else sees such a checkpoint as one of plain tensors: Checkpoint dequantizes them as they are read.
"""
