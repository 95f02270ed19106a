"""Layers that share one product give what they gave alone, whoever is asked, with whatever."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.kernels import registry as kernel_registry
from bitpress.kernels.base import Kernel, PackedWeight
from bitpress.kernels.linear import QLinear, join_projections
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.reference import Reference
from bitpress.kernels.registry import registry

Make = Callable[..., QTensor]
OUTS = {"q_proj": 48, "k_proj": 16, "v_proj": 24}


class Joining(Reference):
    name: ClassVar[str] = "joining"
    calls = 0

    def pack(self, qtensor: QTensor, dtype: torch.dtype) -> nn.Module:
        return PackedWeight(qtensor, weight=qtensor.dequantize(dtype))

    def linear(self, x: Tensor, packed: nn.Module, bias: Tensor | None) -> Tensor:
        Joining.calls += 1
        return F.linear(x, packed.get_buffer("weight"), bias)

    def join(self, parts: Sequence[PackedWeight]) -> PackedWeight:
        return PackedWeight.joined(parts, {"weight": 0})


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_registry, "registry", lambda: [Joining(), Reference()])
    monkeypatch.setattr(Joining, "calls", 0)


@pytest.fixture
def attention(kernels: None, make_qtensor: Make, generator: torch.Generator) -> nn.Module:
    parent = nn.Module()
    for name, outs in OUTS.items():
        bias = None if name == "k_proj" else torch.randn(outs, generator=generator)
        parent.add_module(name, QLinear(make_qtensor("int4-g32", outs, 64), bias, torch.float32))
    return parent


def stacked(weights: list[QTensor]) -> QTensor:
    """One weight of all their output features."""
    first = weights[0]
    shape = (sum(q.shape[0] for q in weights), first.shape[1])
    tensors = [dict(q.tensors()) for q in weights]
    return QTensor(first.scheme, shape, **{name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})


def expected(parent: nn.Module, x: Tensor) -> dict[str, Tensor]:
    weights = {name: parent.get_submodule(name).packed.get_buffer("weight") for name in OUTS}
    return {name: F.linear(x, weights[name], parent.get_submodule(name).bias) for name in OUTS}


def test_one_product_for_all(attention: nn.Module, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 64, generator=generator)
    alone = expected(attention, x)
    before = sum(buffer.nbytes for buffer in attention.buffers())
    assert join_projections(attention) == 2
    assert sum(buffer.nbytes for buffer in attention.buffers()) == before
    for _ in range(2):
        for name in OUTS:
            found = attention.get_submodule(name)(x)
            torch.testing.assert_close(found, alone[name])
            assert found.view(2, 5, -1, 8).shape[2] == OUTS[name] // 8
    assert Joining.calls == 2
    assert attention.q_proj.joined._held is None
    assert "joined" in repr(attention.k_proj)
    assert join_projections(attention) == 0


@pytest.mark.parametrize("order", ["vkq", "kk", "v", "qvkq", "kqv"])
def test_any_order(attention: nn.Module, generator: torch.Generator, order: str) -> None:
    """Another tensor for each but two that are the same, though of equal shape: none gets what is another's."""
    inputs = [torch.randn(3, 64, generator=generator) for _ in range(2)]
    alone = [expected(attention, x) for x in inputs]
    join_projections(attention)
    for turn in range(4):
        for place, letter in enumerate(order):
            which = (turn + place // 2) % 2
            found = attention.get_submodule(f"{letter}_proj")(inputs[which])
            torch.testing.assert_close(found, alone[which][f"{letter}_proj"])


def test_compiled_in_one_piece(attention: nn.Module, generator: torch.Generator) -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.cat([attention.get_submodule(name)(x + 0 if name == "v_proj" else x) for name in OUTS], -1)

    x = torch.randn(3, 64, generator=generator)
    alone = torch.cat([expected(attention, x)[name] for name in OUTS], -1)
    join_projections(attention)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), alone)
    assert attention.q_proj.joined._held is None


@pytest.mark.parametrize("what", ["scheme", "order", "kernel", "missing"])
def test_who_stays_alone(attention: nn.Module, make_qtensor: Make, what: str) -> None:
    q = make_qtensor("int4-g64" if what == "scheme" else "int4-g32", 16, 64)
    if what == "order":
        q = replace(q, order=torch.arange(64, dtype=torch.int32).flip(0))
    attention.k_proj = QLinear(q, None, torch.float32, "reference" if what == "kernel" else "auto")
    if what == "missing":
        attention.k_proj = nn.Linear(64, 16)
    assert join_projections(attention) == 0
    assert attention.q_proj.joined is None


JOINING = [kernel for kernel in registry() if type(kernel).join is not Kernel.join]


@pytest.mark.parametrize(
    "scheme", ["int4-g32-asym", "int3-channel", "int8-dynamic", "int8-g32", "int8-g64-asym", "nf4"]
)
@pytest.mark.parametrize("kernel", JOINING, ids=lambda kernel: kernel.name)
def test_joined_is_what_the_whole_would_be(
    make_qtensor: Make, monkeypatch: pytest.MonkeyPatch, kernel: Kernel, scheme: str
) -> None:
    monkeypatch.setattr(sys.modules[type(kernel).__module__], "problem", lambda device: None)
    weights = [make_qtensor(scheme, outs, 192) for outs in (33, 7, 16)]
    if reason := kernel.unsupported(weights[0], torch.float16, torch.device("cuda")):
        pytest.skip(reason)
    whole = kernel.pack(stacked(weights), torch.float16)
    joined = kernel.join([kernel.pack(q, torch.float16) for q in weights])
    assert joined.shape == whole.shape
    assert vars(joined).keys() == vars(whole).keys()
    assert joined._buffers.keys() == whole._buffers.keys()
    assert all(torch.equal(tensor, joined.get_buffer(name)) for name, tensor in whole.named_buffers())


def test_scales_with_code_books_of_their_own_are_not_joined(make_qtensor: Make) -> None:
    kernel = next(kernel for kernel in JOINING if kernel.name == "triton-nf4")
    assert kernel.join([kernel.pack(make_qtensor("nf4-dq", 8, 256), torch.float16) for _ in range(2)]) is None
