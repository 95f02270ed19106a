"""A weight type is one file: dropped into the folder, it is parsed, refused by every kernel that does not list it, and
run by the reference. So are activations, and so is a kernel."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from dropped import HALVING, Drop

from bitpress.kernels.discovery import discover
from bitpress.kernels.linear import QEmbedding, QLinear
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry, select
from bitpress.kernels.scheme import Scheme, examples
from bitpress.kernels.weights.base import WeightDescription

CPU = torch.device("cpu")

SIX_BITS = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from bitpress.kernels.weights.base import WeightDescription


@dataclass(frozen=True)
class SixBits:
    """codes: uint8 [out, in], 0..63; scales: float32 [out, 1]; bend: float32 [], of no use but to be stored."""

    rank: ClassVar[int] = 50
    forms: ClassVar[str] = "int6-channel"
    examples: ClassVar[tuple] = ("int6-channel",)
    holds_order: ClassVar[bool] = True
    bits: ClassVar[int] = 6
    name: ClassVar[str] = "int6-channel"

    @classmethod
    def parse(cls, name):
        return cls() if name == cls.name else None

    @classmethod
    def from_description(cls, description):
        return cls() if description == cls().description() else None

    def description(self):
        return WeightDescription("int", 6, "channel")

    def problems(self, shape):
        return []

    def fitted(self, shape):
        return self

    def layout(self, shape):
        return {
            "codes": (tuple(shape), (torch.uint8,)),
            "scales": ((shape[0], 1), (torch.float32,)),
            "bend": ((), (torch.float32,)),
        }

    def check(self, shape, tensors):
        if int(tensors["codes"].max()) > 63:
            raise ValueError("a code is out of range 0..63")

    def dequantize(self, shape, tensors, dtype):
        return ((tensors["codes"].float() - 32) * tensors["scales"]).to(dtype)

    def nearest(self, weight, scale_dtype):
        scales = weight.float().abs().amax(1, keepdim=True).div(31).to(scale_dtype)
        codes = (weight / scales).round().clamp(-32, 31).add(32).to(torch.uint8)
        return {"codes": codes, "scales": scales, "bend": torch.tensor(0.0)}

    def random(self, shape, generator):
        return self.nearest(torch.randn(shape, generator=generator), torch.float32)

    def rows(self, shape, tensors, ids):
        return {**tensors, "codes": tensors["codes"][ids], "scales": tensors["scales"][ids]}

    def elements(self, shape, tensors):
        return None

    def from_elements(self, shape, elements, scales, zeros):
        raise ValueError("no plain elements")


PLUGINS = (SixBits,)
'''

KERNEL = """
from bitpress.kernels.reference import Reference


class Eager(Reference):
    rank = 1
    name = "eager"


PLUGINS = (Eager(),)
"""


NATIVE = ["native-int8", "native-mixed", "native-int16", "native-bf16"]


@pytest.fixture
def six_bits(drop: Drop) -> Scheme:
    drop("bitpress.kernels.weights", "six_bits", SIX_BITS)
    return Scheme.parse("int6-channel")


def weight(scheme: Scheme, shape: tuple[int, int] = (64, 128)) -> QTensor:
    return QTensor.of(scheme, shape, scheme.random(shape, torch.Generator().manual_seed(0)))


def test_sorted_by_rank_and_helpers_have_none() -> None:
    kernels = discover("bitpress.kernels.cpu")
    assert [kernel.name for kernel in kernels] == NATIVE  # and library.py has none


def test_the_compiled_library_is_no_module(drop: Drop, tmp_path: Path) -> None:
    """An installation puts it beside the kernels, with the ending of Python's own extensions."""
    drop("bitpress.kernels.cpu", "empty", "")
    (tmp_path / "bitpress.kernels.cpu" / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(b"no module")
    assert [kernel.name for kernel in discover("bitpress.kernels.cpu")] == NATIVE


def test_a_type_is_parsed_described_and_suggested(six_bits: Scheme) -> None:
    assert six_bits.name == "int6-channel"
    assert Scheme.from_description(WeightDescription("int", 6, "channel")) == six_bits
    assert "int6-channel" in examples()
    with pytest.raises(ValueError, match="nvfp4, int6-channel, int8-dynamic"):
        Scheme.parse("sixbits")


def test_a_value_that_no_type_has_is_named_still(six_bits: Scheme) -> None:
    with pytest.raises(ValueError, match="int5 is not a scheme: bits must be one of"):
        Scheme.parse("int5-channel")


@pytest.mark.parametrize(
    "kernel", [kernel for kernel in registry() if kernel.name != "reference"], ids=lambda k: k.name
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_kernel_takes_a_type_that_it_does_not_list(six_bits: Scheme, device: str, kernel) -> None:
    q = weight(six_bits)
    assert kernel.unserved(six_bits).startswith("serves ")
    assert kernel.unsupported(q, torch.bfloat16, torch.device(device)) is not None


def test_the_reference_runs_it(six_bits: Scheme) -> None:
    q = weight(six_bits)
    q.check()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    layer = QLinear(q, None, torch.float32)
    assert layer.selection.kernel.name == "reference"
    torch.testing.assert_close(layer(x), x @ q.dequantize().t())
    ids = torch.tensor([[5, 5], [0, 63]])
    assert torch.equal(QEmbedding(q, torch.float32)(ids), q.dequantize()[ids])
    assert dict(q.to("cpu").tensors()).keys() == {"codes", "scales", "bend"}
    with pytest.raises(ValueError, match="zeros does not belong to scheme int6-channel"):
        QTensor.of(six_bits, q.shape, {**dict(q.tensors()), "zeros": q.codes}).check()


def test_activations_are_one_file_too(drop: Drop) -> None:
    drop("bitpress.kernels.activations", "halving", HALVING)
    scheme = Scheme.parse("int4-halved")
    assert (scheme.name, scheme.weight.name) == ("int4-halved", "int4-channel")
    assert Scheme.from_description(scheme.weight.description(), {"type": "halves"}) == scheme
    q, x = weight(scheme), torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    layer = QLinear(q, None, torch.float32)
    assert layer.selection.kernel.name == "reference"
    torch.testing.assert_close(layer(x), x / 2 @ q.dequantize().t())
    with pytest.raises(ValueError, match="halving activations go with int4-channel weights, not nf4"):
        Scheme(Scheme.parse("nf4").weight, scheme.activations)


@pytest.mark.parametrize("package", ["cpu", "triton", "external"])
def test_a_kernel_is_chosen_by_its_rank(drop: Drop, package: str) -> None:
    drop(f"bitpress.kernels.{package}", "eager", KERNEL)
    assert registry()[0].name == "eager"
    assert select(weight(Scheme.parse("int4-g32")), torch.float32, CPU).kernel.name == "eager"
