"""What bitpress's side of all programs shares."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """No network, for the programs that are started too. They see no GPU, on which other kernels would run. They have
    one thread: on a busy machine the threads of a tiny model's products wait for each other longer than they work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)
