"""What the modules promise; what their kernels compute is tested in test_registry.py."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.eval.measure.memory import resident_bytes
from bitpress.kernels import registry as kernel_registry
from bitpress.kernels.base import Kernel, PackedWeight
from bitpress.kernels.cpu.library import library
from bitpress.kernels.linear import QEmbedding, QExperts, QLinear, inputs_left_alone, join_projections
from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.reference import Reference
from bitpress.kernels.registry import registry
from bitpress.kernels.scheme import Scheme

Make = Callable[..., QTensor]


def weight() -> QTensor:
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return QTensor(Scheme.parse("int4-g32"), (32, 64), pack(codes, 4), torch.full((32, 2), 0.1, dtype=torch.float16))


def shuffled() -> QTensor:
    return replace(weight(), order=torch.randperm(64, generator=torch.Generator().manual_seed(1)).to(torch.int32))


def layer() -> QLinear:
    return QLinear(weight(), torch.zeros(32), torch.float32, "reference")


@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_another_dtype_is_refused_rather_than_half_done(move: str) -> None:
    with pytest.raises(ValueError, match="load the model again"):
        getattr(layer(), move)()


def test_a_move_that_moves_nothing_is_fine() -> None:
    module = torch.nn.Sequential(layer())
    assert module.to("cpu", torch.float32) is module
    assert module.float()[0].packed.scales.dtype == torch.float16


class TestOrder:
    """A weight whose inputs were quantized in another order: the inputs follow, and kernels know nothing of it."""

    @pytest.mark.parametrize("kernel", ["reference", "auto"])
    @pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (0, 64), (2, 0, 64)])
    def test_multiplies_by_the_weight_in_the_model_s_order(self, kernel: str, shape: tuple[int, ...]) -> None:
        q, bias = shuffled(), torch.arange(32, dtype=torch.bfloat16)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
        expected = x.double() @ q.dequantize().double().t() + bias.double()
        found = QLinear(q, bias, torch.bfloat16, kernel)(x)
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=0.25)  # bfloat16's sums of 64 terms

    def test_kernels_never_see_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        pack = Reference.pack
        monkeypatch.setattr(Reference, "pack", lambda self, q, dtype: seen.append(q) or pack(self, q, dtype))
        QLinear(shuffled(), None, torch.float32, "reference")
        assert [q.order for q in seen] == [None]

    def test_its_bytes_count_and_it_stays_where_it_is(self) -> None:
        module = torch.nn.Sequential(QLinear(shuffled(), None, torch.float32, "reference"))
        assert resident_bytes(module) == shuffled().nbytes == weight().nbytes + 4 * 64
        assert module.float() is module
        assert module[0].order.dtype == torch.int32
        assert not module.state_dict()
        assert "inputs reordered" in repr(module)
        with pytest.raises(ValueError, match="load the model again"):
            module.half()

    def test_experts_follow_theirs(self) -> None:
        pieces = [QLinear(q, None, torch.float32, "reference") for q in (shuffled(), weight())]
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
        found = torch.nn.functional.linear(x, QExperts([pieces])[0])
        expected = torch.cat([x @ q.dequantize().t() for q in (shuffled(), weight())], -1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32's order of sums


class TestEmbedding:
    SCHEMES = ("int8-g32", "int4-channel-asym", "int3-g32", "nf4", "nf4-dq", "int8-dynamic")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_gives_the_rows_of_the_weight(self, make_qtensor: Make, scheme: str, dtype: torch.dtype):
        q = make_qtensor(scheme, 97, 64)
        layer = QEmbedding(q, dtype)
        for ids in (torch.tensor([[0, 96, 5], [5, 5, 1]]), torch.tensor([3]), torch.empty(2, 0, dtype=torch.int64)):
            assert torch.equal(layer(ids), q.dequantize(dtype)[ids])
            assert layer(ids).dtype == dtype
        assert (layer.num_embeddings, layer.embedding_dim) == (97, 64)
        assert resident_bytes(layer) == q.nbytes
        assert not layer.state_dict()
        assert repr(layer) == f"QEmbedding(\n  97, 64, {scheme}\n  (packed): UnpackedWeight()\n)"

    def test_an_order_is_undone(self) -> None:
        ids = torch.tensor([31, 2, 2])
        assert torch.equal(QEmbedding(shuffled(), torch.float32)(ids), shuffled().dequantize()[ids])

    @pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
    def test_another_dtype_is_refused(self, move: str) -> None:
        layer = QEmbedding(weight(), torch.float32)
        assert torch.nn.Sequential(layer).to("cpu", torch.float32)[0] is layer
        with pytest.raises(ValueError, match="load the model again"):
            getattr(layer, move)()

    def test_an_id_out_of_range_is_an_error(self) -> None:
        with pytest.raises(IndexError):
            QEmbedding(weight(), torch.float32)(torch.tensor([32]))

    def test_rows_that_cannot_be_taken_apart_are_refused_at_once(self, make_qtensor: Make) -> None:
        with pytest.raises(ValueError, match="blocks would run across rows"):
            QEmbedding(make_qtensor("nf4", 8, 96), torch.float32)


# Projections that share one product give what they gave alone, whichever is asked, with whatever input.

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


def test_joined_layers_have_one_product(attention: nn.Module, generator: torch.Generator) -> None:
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
def test_joined_layers_are_asked_in_any_order(attention: nn.Module, generator: torch.Generator, order: str) -> None:
    """Another tensor for each but two that are the same, though of equal shape: none gets what is another's."""
    inputs = [torch.randn(3, 64, generator=generator) for _ in range(2)]
    alone = [expected(attention, x) for x in inputs]
    join_projections(attention)
    for turn in range(4):
        for place, letter in enumerate(order):
            which = (turn + place // 2) % 2
            found = attention.get_submodule(f"{letter}_proj")(inputs[which])
            torch.testing.assert_close(found, alone[which][f"{letter}_proj"])


def test_joined_layers_compile_in_one_piece(attention: nn.Module, generator: torch.Generator) -> None:
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
def test_layers_that_stay_alone(attention: nn.Module, make_qtensor: Make, what: str) -> None:
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
    monkeypatch.setattr(sys.modules[type(kernel).__module__], "unsupported_device", lambda device: None)
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


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-dynamic-asym", "int8-static", "int8-static-asym"])
def test_inputs_that_a_scheme_rounds_are_left_alone_on_request(make_qtensor: Make, scheme: str) -> None:
    if isinstance(reason := library(), str):
        pytest.skip(reason)
    q, x = make_qtensor(scheme, 33, 64), torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    layer, exact = QLinear(q, None, torch.float32), x @ q.dequantize().t()
    rounding = layer(x)
    with inputs_left_alone(layer) as count:
        assert torch.equal(layer(x), rounding)
        assert count == 0
    with inputs_left_alone(layer, of_all_schemes=True) as count:
        torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-4)  # the order of sums
        assert count == 1
    assert torch.equal(layer(x), rounding)
    assert (rounding - exact).abs().max() > 1e-2
