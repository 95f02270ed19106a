"""QLinear's own promises; what it computes is tested with the kernels."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bitpress.eval.measure.memory import resident_bytes
from bitpress.kernels.linear import QEmbedding, QExperts, QLinear
from bitpress.kernels.packing import pack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme


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
        from bitpress.kernels.reference import Reference

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
    def test_gives_the_rows_of_the_weight(self, make_qtensor: Callable[..., QTensor], scheme: str, dtype: torch.dtype):
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

    def test_rows_that_cannot_be_taken_apart_are_refused_at_once(self, make_qtensor: Callable[..., QTensor]) -> None:
        with pytest.raises(ValueError, match="blocks would run across rows"):
            QEmbedding(make_qtensor("nf4", 8, 96), torch.float32)
