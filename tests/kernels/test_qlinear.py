"""QLinear's own promises; what it computes is tested with the kernels."""

import pytest
import torch

from bitpress.kernels.packing import pack
from bitpress.kernels.qlinear import QLinear
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme


def layer() -> QLinear:
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    qtensor = QTensor(Scheme.parse("int4-g32"), (32, 64), pack(codes, 4), torch.full((32, 2), 0.1, dtype=torch.float16))
    return QLinear(qtensor, torch.zeros(32), torch.float32, "reference")


@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_another_dtype_is_refused_rather_than_half_done(move: str) -> None:
    with pytest.raises(ValueError, match="load the model again"):
        getattr(layer(), move)()


def test_a_move_that_moves_nothing_is_fine() -> None:
    module = torch.nn.Sequential(layer())
    assert module.to("cpu", torch.float32) is module
    assert module.float()[0].prepared.scales.dtype == torch.float16
