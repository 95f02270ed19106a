"""NaN and infinite values are found in every piece of a tensor, counted, and named by their place."""

import pytest
import torch

from bitpress.pipeline.errors import NumericsError
from bitpress.pipeline.storage import finite
from bitpress.pipeline.storage.finite import check_finite, count_not_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_counted_in_every_piece(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_PIECE", 7)
    tensor = torch.ones(5, 6, dtype=dtype)
    assert count_not_finite(tensor) == 0
    tensor[0, 0], tensor[1, 2], tensor[4, 5] = torch.nan, torch.inf, -torch.inf
    assert count_not_finite(tensor) == 3
    with pytest.raises(NumericsError, match=r"w: 3 of 30 values are NaN or infinite, the first at \[0, 0\]"):
        check_finite("w", tensor)


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.int32), torch.empty(0), torch.tensor(2.0)])
def test_nothing_to_find(tensor: torch.Tensor) -> None:
    check_finite("w", tensor)
    assert count_not_finite(tensor) == 0
