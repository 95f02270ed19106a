from collections.abc import Callable

import pytest
import torch

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.nf4 import NF4, block_scales

Make = Callable[..., QTensor]


@pytest.mark.parametrize("weight", [NF4(), NF4(double_quant=True)], ids=lambda weight: weight.name)
@pytest.mark.parametrize("shape", [(1, 1), (7, 11), (3, 64), (257, 64), (63, 65)])
def test_layout_is_what_random_makes(generator: torch.Generator, weight: NF4, shape: tuple[int, int]) -> None:
    q = QTensor.of(Scheme(weight), shape, weight.random(shape, generator))
    q.check()
    assert weight.fitted(shape) == weight
    assert weight.elements(shape, dict(q.tensors())) is None


@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_rows(make_qtensor: Make, name: str) -> None:
    q = make_qtensor(name, 300, 128)  # of which scales of 256 blocks share one of theirs
    ids = torch.tensor([299, 0, 299, 131])
    assert torch.equal(q.rows(ids).dequantize(), q.dequantize()[ids])
    with pytest.raises(ValueError, match="blocks would run across rows"):
        make_qtensor(name, 3, 96).rows(ids[1:2])


def test_double_quantization_is_undone(make_qtensor: Make) -> None:
    q = make_qtensor("nf4-dq", 300, 128)
    scales = block_scales(dict(q.tensors()))
    block = 599
    unit = q.extra["nested.codebook"][int(q.scales[block])]
    expected = unit * q.extra["nested.absmax"][block // 256] + q.extra["nested.offset"]
    assert scales.shape == (600,)
    assert scales[block] == expected
