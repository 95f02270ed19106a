"""fp8, mxfp4 and nvfp4 against decoders in numpy that are written from the formats' descriptions."""

import numpy as np
import pytest
import torch

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.e2m1 import pack_e2m1, round_to_e2m1, unpack_e2m1
from bitpress.pipeline.formats import registry
from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.methods.gptq import GPTQ
from bitpress.pipeline.methods.hessian import Hessian
from bitpress.pipeline.quantize.spec import LayerSpec

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NAMES = [
    "fp8",
    "fp8-b128",
    "mxfp4",
    "nvfp4",
    "fp8-dynamic",
    "fp8-block",
    "fp8-static",
    "fp8-tensor",
    "fp8-tensor-static",
]


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    values = np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa, -9))
    return np.where(codes & 128, -values, values).astype(np.float32)


def decoded(stored: dict[str, torch.Tensor]) -> np.ndarray:
    """What a compressed-tensors layer stands for, by its tensors alone."""
    scales = stored["weight_scale"]
    if "weight" in stored:
        values, wide = e4m3(stored["weight"].view(torch.uint8).numpy()), scales.float().numpy()
        if wide.size == 1 or wide.shape == (len(values), 1):
            return values * wide
        return values * wide.repeat(128, 0)[: len(values)].repeat(128, 1)[:, : values.shape[1]]
    packed = stored["weight_packed"].numpy()
    values = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1).reshape(len(packed), -1)
    if scales.dtype == torch.uint8:
        wide = np.ldexp(np.float32(1), scales.numpy().astype(int) - 127)
    else:
        wide = e4m3(scales.view(torch.uint8).numpy()) / stored["weight_global_scale"].numpy()
    return values * wide.repeat(values.shape[1] // wide.shape[1], 1)


def test_e2m1_rounds_to_nearest_and_ties_to_even() -> None:
    values = torch.linspace(-6.9, 6.9, 4001)
    rounded = round_to_e2m1(values.clone()).clamp_(-6, 6)
    distance = (values.unsqueeze(1) - torch.from_numpy(E2M1)).abs()
    assert torch.equal((values - rounded).abs(), distance.amin(1))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_to_e2m1(ties.clone()).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert torch.equal(unpack_e2m1(pack_e2m1(rounded[:4000].view(4, 1000))), rounded[:4000].view(4, 1000) + 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_compressed_tensors_says_and_read_to_the_bit(name: str) -> None:
    scheme, format = Scheme.parse(name), registry()["compressed-tensors"]
    weight = torch.randn(200, 192, generator=torch.Generator().manual_seed(0))
    weight[3, :64] = 0
    q, diagnostics = Absmax().quantize(weight, scheme, format.scale_dtype(scheme, torch.bfloat16))
    q.extra.update(scheme.static.random(torch.Generator().manual_seed(0)) if scheme.static else {})
    q.check()
    stored = format.write(q, torch.bfloat16)
    assert np.array_equal(q.dequantize().numpy(), decoded(stored))
    assert diagnostics.relative_error < (0.03 if scheme.bits == 8 else 0.13)
    config = format.quantization_config({"a.0.b": scheme}, ["lm_head"], torch.bfloat16)
    assert format.scheme_rules(config).get("a.0.b") == scheme
    again = format.read(scheme, stored)
    again.check()
    assert torch.equal(again.dequantize(), q.dequantize())


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "nvfp4", "fp8-dynamic", "fp8-tensor"])
def test_gptq_rounds_to_the_values_of_the_type(name: str) -> None:
    """And loses less of the output than absmax does."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight, scheme = torch.randn(40, 96, generator=generator), Scheme.parse(name)
    hessian = Hessian(96, torch.device("cpu"))
    hessian.add(inputs)
    learned, _ = GPTQ().quantize(weight, scheme, torch.bfloat16, (hessian,))
    learned.check()
    plain, _ = Absmax().quantize(weight, scheme, torch.bfloat16)
    losses = [((weight - q.dequantize()) @ inputs.t()).norm().item() for q in (learned, plain)]
    assert losses[0] < 0.8 * losses[1]
    stored = registry()["compressed-tensors"].write(learned, torch.bfloat16)
    assert np.array_equal(learned.dequantize().numpy(), decoded(stored))


def test_fused_layers_share_the_global_scale() -> None:
    weights = [torch.randn(8, 32) * size for size in (1.0, 5.0)]
    common = Scheme.parse("nvfp4").weight.fused(weights)  # type: ignore[attr-defined]
    scales = [common.nearest(weight, torch.float32)["global_scale"] for weight in weights]
    assert scales[0].item() == scales[1].item() == pytest.approx((2688 / weights[1].abs().max()).item(), rel=2e-7)
    assert scales[0].reciprocal().reciprocal() == scales[0]
    assert common == Scheme.parse("nvfp4").weight


@pytest.mark.parametrize("name", ["fp8-b128", "fp8-block"])
def test_gptq_refuses_squares(name: str) -> None:
    with pytest.raises(ValueError, match="a scale per channel or group, not fp8-b"):
        LayerSpec.parse(f"gptq/{name}")


def test_values_that_are_none_are_refused() -> None:
    for name, tensor, code in (("mxfp4", "scales", 255), ("nvfp4", "scales", 127), ("fp8", "codes", 127)):
        scheme = Scheme.parse(name)
        tensors = scheme.weight.random((4, 32), torch.Generator().manual_seed(0))
        tensors[tensor].view(torch.uint8)[0, 0] = code
        with pytest.raises(ValueError, match="NaN"):
            QTensor.of(scheme, (4, 32), tensors).check()
