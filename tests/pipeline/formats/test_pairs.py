"""From each format to each other, of every scheme that both hold: the same weights to the bit, whoever wrote them."""

from dataclasses import replace

import pytest
import torch

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme, examples
from bitpress.pipeline.formats import registry
from bitpress.pipeline.formats.base import Format

SHAPE = (32, 256)
FORMATS = [format for format in registry().values() if format.convertible]
SCHEMES = list(dict.fromkeys([*examples(), *(f"int{b}-{g}-asym" for b in (2, 3, 4, 8) for g in ("g32", "channel"))]))


def through(format: Format, qtensor: QTensor) -> QTensor:
    """What a format has of a weight, with scales in the format's dtype where that is exact, as `convert` has them."""
    scales = qtensor.scales.to(format.scale_dtype(qtensor.scheme, torch.bfloat16))
    exact = torch.equal(scales.float(), qtensor.scales.float())
    assert exact or not format.exact_scales
    stored = format.write(replace(qtensor, scales=scales) if exact else qtensor, torch.bfloat16)
    again = format.read(qtensor.scheme, {name: tensor.clone() for name, tensor in stored.items()})
    again.check()
    return again


@pytest.mark.parametrize("name", SCHEMES)
def test_every_pair_holds_the_same_weights(name: str) -> None:
    scheme = Scheme.parse(name)
    qtensor = QTensor.of(scheme, SHAPE, scheme.random(SHAPE, torch.Generator().manual_seed(5)))
    expected = qtensor.dequantize()
    holders = [format for format in FORMATS if not format.problems(scheme, SHAPE)]
    assert all(format.name in " ".join(format.problems(scheme, SHAPE)) for format in FORMATS if format not in holders)
    for one in holders:
        first = through(one, qtensor)
        for other in holders:
            assert torch.equal(through(other, first).dequantize(), expected), f"{one.name} to {other.name}"
