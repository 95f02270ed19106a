"""The package is optional; the products are tested in test_registry.py."""

import sys
from collections.abc import Callable

import pytest
import torch

from bitpress.kernels.external.bitsandbytes_nf4 import BitsAndBytesNF4
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import select

Make = Callable[..., QTensor]

CPU = torch.device("cpu")


def test_bitsandbytes_absent(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    q = make_qtensor("nf4", 64, 96)  # which no other kernel takes
    selection = select(q, torch.bfloat16, CPU)
    assert selection.kernel.name == "reference"
    q = make_qtensor("nf4", 64, 64)
    assert (
        BitsAndBytesNF4().unsupported(q, torch.bfloat16, CPU)
        == "bitsandbytes is not installed; pip install bitsandbytes"
    )
    with pytest.raises(ValueError, match=r"kernel bnb-nf4 cannot run nf4 here: .*pip install"):
        select(q, torch.bfloat16, CPU, "bnb-nf4")


def test_bitsandbytes_is_not_imported_for_other_schemes(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    select(make_qtensor("int4-g32", 64, 64), torch.float32, CPU)
    assert "bitsandbytes" not in sys.modules


@pytest.mark.parametrize("interleaved", [True, False])
def test_bitsandbytes_leaves_the_qtensor_alone(make_qtensor: Make, interleaved: bool) -> None:
    kernel, dtype = BitsAndBytesNF4(), torch.bfloat16 if interleaved else torch.float32
    q = make_qtensor("nf4-dq", 64, 128)
    if reason := kernel.unsupported(q, dtype, CPU):
        pytest.skip(reason)
    before = {name: tensor.clone() for name, tensor in q.tensors()}
    packed = kernel.pack(q, dtype)
    x = torch.ones(2, 128, dtype=dtype)
    first = kernel.linear(x, packed, None)
    assert torch.equal(first, kernel.linear(x, packed, None))
    assert all(torch.equal(tensor, before[name]) for name, tensor in q.tensors())
