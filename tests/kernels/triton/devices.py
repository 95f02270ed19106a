"""Where the Triton programs of these tests run: on a GPU, in Triton's interpreter on any CPU, or nowhere."""

import os

import pytest
import torch

from bitpress.kernels.triton import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = not INTERPRETED and launch.unsupported_device(torch.device("cuda")) is None
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")

runs = pytest.mark.skipif(
    not (INTERPRETED or ON_CUDA), reason="here it runs in test_in_the_interpreter only, if at all"
)
needs_triton = pytest.mark.skipif(
    launch.triton is None or INTERPRETED, reason="Triton is not installed; there is none but on Linux"
)
