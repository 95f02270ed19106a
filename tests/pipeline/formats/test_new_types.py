"""A weight type and a type of inputs that formats have never heard of: stored as plain elements, and read back."""

import json

import pytest
import torch
from dropped import HALVING, Drop

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.formats import first_fitting, registry

SHAPE = (64, 128)
SIX_BITS = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from bitpress.kernels.weights.base import WeightDescription

@dataclass(frozen=True)
class SixBits:
    rank: ClassVar[int] = 60
    forms: ClassVar[str] = "int6-channel"
    examples: ClassVar[tuple] = ("int6-channel",)
    holds_order: ClassVar[bool] = False
    bits: ClassVar[int] = 6
    name: ClassVar[str] = "int6-channel"
    nearest = None

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

    def layout(self, shape):
        return {"codes": (shape, (torch.uint8,)), "scales": ((shape[0], 1), (torch.float32,))}

    def check(self, shape, tensors):
        pass

    def dequantize(self, shape, tensors, dtype):
        return ((tensors["codes"].float() - 32) * tensors["scales"]).to(dtype)

    def random(self, shape, generator):
        codes = torch.randint(64, shape, dtype=torch.uint8, generator=generator)
        return {"codes": codes, "scales": torch.rand(shape[0], 1, generator=generator)}

    def elements(self, shape, tensors):
        return (tensors["codes"] - 32).view(torch.int8), tensors["scales"], None

    def from_elements(self, shape, elements, scales, zeros):
        return {"codes": elements.view(torch.uint8) + 32, "scales": scales}

PLUGINS = (SixBits,)
"""


@pytest.fixture(autouse=True)
def types(drop: Drop) -> None:
    drop("bitpress.kernels.weights", "toy_six", SIX_BITS)
    drop("bitpress.kernels.activations", "toy_halving", HALVING)


@pytest.mark.parametrize("name", ["int6-channel", "int4-halved"])
def test_stored_and_read(name: str) -> None:
    scheme = Scheme.parse(name)
    layers = {"a.0.b": (scheme, SHAPE), "a.1.b": (Scheme.parse("int4-g32"), SHAPE)}
    format, reasons = first_fitting(layers)
    assert format.name == "compressed-tensors"
    assert reasons == [f"gptq holds weight-only integers, not {name} (a.0.b)"]
    q = QTensor.of(scheme, SHAPE, scheme.random(SHAPE, torch.Generator().manual_seed(0)))
    schemes = {layer: own for layer, (own, _) in layers.items()}
    config = json.loads(json.dumps(format.quantization_config(schemes, ["lm_head"], torch.bfloat16)))
    assert config["format"] == "mixed-precision"
    rules = format.scheme_rules(config)
    assert {layer: rules.get(layer) for layer in schemes} == schemes
    stored = format.write(q, torch.bfloat16)
    assert stored["weight"].dtype == torch.int8
    again = format.read(scheme, stored)
    again.check()
    assert torch.equal(again.dequantize(), q.dequantize())


def test_a_file_of_a_type_that_is_gone_is_refused() -> None:
    config = registry()["compressed-tensors"].quantization_config(
        {"a.0.b": Scheme.parse("int6-channel")}, [], torch.float16
    )
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 7
    with pytest.raises(ValueError, match="int7 is not a scheme"):
        registry()["compressed-tensors"].scheme_rules(config)
