"""FP8 in Triton: on a GPU, in Triton's interpreter on any CPU, and as compiled code on neither."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.triton import fp8
from bitpress.kernels.triton.fp8 import FEW, MANY, MANY_AS_IS, SOME, TritonFp8, quantize
from bitpress.kernels.triton.launch import Config

from .devices import DEVICE, INTERPRETED, ON_CUDA, needs_triton, runs

Make = Callable[..., QTensor]

INPUTS = {"fp8-dynamic": fp8.TOKEN, "fp8-block": fp8.GROUPED, "fp8-static": fp8.TENSOR}
WEIGHTS = [
    ("fp8-dynamic", (1, 1)), ("fp8-dynamic", (65, 129)), ("fp8-dynamic", (40, 1000)), ("fp8-block", (13, 31)),
    ("fp8-block", (129, 257)), ("fp8-block", (257, 384)), ("fp8-static", (64, 127)), ("fp8-tensor", (13, 31)),
    ("fp8", (129, 257)), ("fp8-b128", (129, 257)), ("fp8-b128", (257, 96)),
]  # fmt: skip
EVERY = [*FEW, *SOME, *MANY, *MANY_AS_IS]


def dtypes(scheme: str) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16, *([torch.float32] if scheme in INPUTS else [])]


def relative_rms(found: Tensor, q: QTensor, x: Tensor, bias: Tensor | float = 0) -> float:
    """RMS error of the product with x rounded as the scheme says, relative to the larger of the exact one and of what
    independent terms would add up to."""
    inputs = x.cpu()
    if q.scheme.activations:
        inputs = q.scheme.activations.apply(inputs, dict(q.tensors()))
    weight = q.dequantize().double().t()
    expected = inputs.double() @ weight + bias
    terms = (inputs.double().square() @ weight.square()).sqrt()
    return float((found.cpu().double() - expected).norm() / torch.maximum(expected.norm(), terms.norm()))


def tolerance(dtype: torch.dtype) -> float:
    """No weight is rounded; an output is, and it may be a single one. The interpreter drops what bfloat16 has no bits
    for, up to 2^-7. Sums of a step on Hopper's FP8 tensor cores have 14 bits."""
    rounding = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
    return rounding[dtype] + (2.0**-13 if ON_CUDA else 0)


@runs
@pytest.mark.parametrize(("ins", "dtype"), [(1, torch.float32), (127, torch.float16), (1100, torch.bfloat16)])
@pytest.mark.parametrize("scheme", INPUTS)
def test_inputs_are_quantized_as_by_the_reference(
    make_qtensor: Make, scheme: str, ins: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: zeros, subnormal scales, ties, the largest numbers; and what is not finite shows."""
    monkeypatch.setattr(fp8, "_BLOCK", 1024)
    x = torch.randn(9, ins, generator=torch.Generator().manual_seed(ins)).to(dtype)
    x[1], x[2] = 0, torch.finfo(dtype).tiny / 3
    x[3] = (torch.arange(ins) % 255 - 127) / 16  # ties among them
    x[3, 0] = 28
    x[4], x[5, -1], x[6, ins // 2], x[7, 0] = torch.finfo(dtype).max, torch.nan, torch.inf, -torch.inf
    tensors = dict(make_qtensor(scheme, 2, ins).tensors())
    codes, scales = quantize(x.to(DEVICE), INPUTS[scheme], tensors.get("input_scale"))
    expected, expected_scales, _ = Scheme.parse(scheme).activations.codes(x, tensors)
    whole = codes.cpu().float()
    assert not whole[[0, 1, 2, 3, 4, 8], ins:].any()
    if scales is None:
        assert torch.equal(whole[:, :ins].nan_to_num(nan=1e3), expected.float().nan_to_num(nan=1e3))
        return
    each = scales.cpu().unsqueeze(1) if scheme == "fp8-dynamic" else scales.cpu().repeat_interleave(128, 1)[:, :ins]
    finite = expected_scales.isfinite().expand(9, ins)
    assert torch.equal(whole[:, :ins][finite], expected.float()[finite])
    assert torch.equal(each.nan_to_num(nan=-1).expand(9, ins), expected_scales.nan_to_num(nan=-1).expand(9, ins))


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("scheme", "shape"), WEIGHTS)
def test_product(make_qtensor: Make, generator: torch.Generator, scheme: str, shape: tuple[int, int]) -> None:
    q, kernel = make_qtensor(scheme, *shape), TritonFp8()
    bias = torch.randn(shape[0], generator=generator)
    for dtype, rows in zip(dtypes(scheme), (1, 17, 65)):
        packed = kernel.pack(q.to(DEVICE), dtype)
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        y = kernel.linear(x.to(DEVICE), packed, bias.to(DEVICE))
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        assert relative_rms(y, q, x, bias) <= tolerance(dtype), rows


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_configuration(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(fp8, "choose", lambda *args: config)
    generator = torch.Generator().manual_seed(1)
    schemes = ["fp8-b128"] if config in MANY_AS_IS else ["fp8-block", *(["fp8-dynamic"] if config.split > 1 else [])]
    for scheme in schemes:
        q, kernel = make_qtensor(scheme, 136, 272), TritonFp8()
        x, bias = torch.randn(config.rows + 1, 272, generator=generator), torch.randn(136, generator=generator)
        x = x.to(torch.float16)
        y = kernel.linear(x.to(DEVICE), kernel.pack(q.to(DEVICE), x.dtype), bias.to(DEVICE, torch.bfloat16))
        assert relative_rms(y, q, x, bias.to(torch.bfloat16).double()) <= tolerance(x.dtype)


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-b128"])
def test_forms_of_input(make_qtensor: Make, generator: torch.Generator, scheme: str) -> None:
    """1, 2 and 3 dimensions, views, no rows: all the same product."""
    q, kernel = make_qtensor(scheme, 66, 64), TritonFp8()
    packed = kernel.pack(q.to(DEVICE), torch.float16)
    cube = torch.randn(64, 50, 2, generator=generator).to(DEVICE, torch.float16)
    for x in (cube[:, 0, 0], cube[..., 0].t(), cube.permute(2, 1, 0), cube[:, :0, 0].t(), cube[:, :0].permute(2, 1, 0)):
        y = kernel.linear(x, packed, None)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((*x.shape[:-1], 66), torch.float16, True)
        if y.numel():
            assert relative_rms(y, q, x) <= tolerance(torch.float16)


@runs
@pytest.mark.parametrize("scheme", ["fp8", "fp8-dynamic", "fp8-block"])
def test_nan_stays_in_its_row(make_qtensor: Make, scheme: str, nan_stays_in_its_row: Callable[..., None]) -> None:
    nan_stays_in_its_row(TritonFp8(), make_qtensor(scheme, 64, 320).to(DEVICE))


@runs
@pytest.mark.skipif(INTERPRETED, reason="to the interpreter's product the code of NaN is 480")
def test_nan_shows_without_a_scale_of_the_row(make_qtensor: Make, nan_stays_in_its_row: Callable[..., None]) -> None:
    nan_stays_in_its_row(TritonFp8(), make_qtensor("fp8-static", 64, 320).to(DEVICE))


@runs
@pytest.mark.parametrize(("scheme", "first"), [("fp8", 30), ("fp8-dynamic", 5), ("fp8-block", 128)])
def test_joined_weights_are_one(make_qtensor: Make, scheme: str, first: int) -> None:
    weights, kernel = [make_qtensor(scheme, outs, 160).to(DEVICE) for outs in (first, 77)], TritonFp8()
    parts = [kernel.pack(q, torch.float16) for q in weights]
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.float16)
    together = torch.cat([kernel.linear(x, part, None) for part in parts], -1)
    torch.testing.assert_close(kernel.linear(x, kernel.join(parts), None), together, rtol=2**-10, atol=0)


def test_weights_that_are_not_joined(make_qtensor: Make) -> None:
    kernel = TritonFp8()
    for scheme in ("fp8-block", "fp8-static"):
        assert kernel.join([kernel.pack(make_qtensor(scheme, 100, 128), torch.float16) for _ in range(2)]) is None


@needs_triton
def test_in_the_interpreter(interpreted: Callable[[str], int]) -> None:
    assert interpreted(__file__) >= len(WEIGHTS) + len(EVERY)


def program(compiled: Callable[..., Any], scheme: str, config: Config, capability: int) -> Any:
    """The product of bfloat16 inputs as a GPU gets it."""
    as_is, squares = scheme in ("fp8", "fp8-b128"), scheme in ("fp8-block", "fp8-b128")
    kinds = {"x_at": "*bf16", "weight_at": "*i8"} if as_is else dict.fromkeys(("x_at", "weight_at"), "*fp8e4nv")
    kinds |= {"scales_at": "*fp32"} | dict.fromkeys(("bias_at", "y_at"), "*bf16")
    kinds |= dict.fromkeys(("rows", "outs", "pitch", "width", "squares"), "i32")
    constants = {"ROWS": config.rows, "OUTS": config.outs, "DEPTH": config.depth, "STAGES": config.stages}
    constants |= {"SQUARES": squares, "CONVERT": as_is}
    if scheme in ("fp8-dynamic", "fp8-block"):
        kinds["row_scales_at"] = "*fp32"
    else:
        constants["row_scales_at"] = None
    odd = ("rows", "squares")
    return compiled(fp8._multiply, kinds, constants, capability, odd=odd, num_warps=config.warps)


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "config", "capability"),
    [("fp8-block", config, 90) for config in (*FEW, *SOME, *MANY) if config.split == 1]
    + [("fp8-dynamic", config, 90) for config in MANY]
    + [("fp8-block", config, 89) for config in (FEW[0], *MANY)],
    ids=str,
)
def test_compiled_product(scheme: str, config: Config, capability: int, compiled: Callable[..., Any]) -> None:
    """No spills, wide copies, FP8 tensor cores. How many programs share outputs is no part of the code."""
    found = program(compiled, scheme, config, capability)
    assert found.stack == found.count("STL") == found.count("LDL") == 0
    assert found.registers <= (128 if config.rows == 16 else 255)
    assert found.shared <= 100 << 10
    copies = config.stages * (config.rows + config.outs) * config.depth // (16 * 32 * config.warps)
    assert found.count("LDGSTS.E.BYPASS.128") >= copies
    assert found.count("QGMMA" if capability == 90 else "QMMA.16832.F32.E4M3.E4M3") >= config.depth // 32


@needs_triton
@pytest.mark.parametrize(
    ("scheme", "config", "capability"),
    [("fp8-b128", config, 80) for config in (*FEW, *SOME, *MANY_AS_IS) if config.split == 1]
    + [("fp8-b128", config, 90) for config in (FEW[0], SOME[0], *MANY_AS_IS)]
    + [("fp8", FEW[0], 80)],
    ids=str,
)
def test_compiled_product_of_inputs_as_they_are(
    scheme: str, config: Config, capability: int, compiled: Callable[..., Any]
) -> None:
    """A code of E4M3 becomes a number without a conversion that GPUs of 8.0 lack, subnormal ones too."""
    found = program(compiled, scheme, config, capability)
    assert found.stack == found.count("STL") == found.count("LDL") == 0
    assert found.registers <= 255
    assert found.shared <= 160 << 10
    assert found.count("LDGSTS.E.BYPASS.128") >= 4
    assert found.count("HGMMA" if capability == 90 else "HMMA") >= 4
    assert found.count("FMUL") > 0
    assert "FMUL.FTZ" not in found.sass


@needs_triton
@pytest.mark.parametrize(("kind", "capability"), [("*bf16", 89), ("*fp32", 90)])
def test_compiled_quantizing(kind: str, capability: int, compiled: Callable[..., Any]) -> None:
    kinds = {"x_at": kind, "codes_at": "*fp8e4nv", "scales_at": "*fp32", "ins": "i32", "width": "i32"}
    rows = compiled(fp8._quantize_rows, kinds, {"BLOCK": fp8._BLOCK}, capability, num_warps=8)
    kinds["groups"] = "i32"
    constants = {"BLOCK": fp8._BLOCK, "STATIC": False}
    groups = compiled(fp8._quantize_groups, kinds, constants, capability, odd=("groups",), num_warps=8)
    for found in (rows, groups):
        assert found.stack == 0
        assert found.registers <= 80
        assert found.count("LDG.E.128") >= 2
        assert found.count("MUFU.RCP") > 0  # where IEEE's division begins
        assert "F2FP.SATFINITE.E4M3" in found.sass


def test_reasons(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, cpu, cuda = TritonFp8(), torch.device("cpu"), torch.device("cuda")
    assert "fp8-tensor-static only" in kernel.unsupported(make_qtensor("int8-channel", 64, 64), torch.bfloat16, cpu)
    q, dynamic = make_qtensor("fp8", 64, 64), make_qtensor("fp8-dynamic", 64, 64)
    assert "torch.float32, expected float16 or bfloat16" in kernel.unsupported(q, torch.float32, cpu)
    assert "torch.float64" in kernel.unsupported(dynamic, torch.float64, cpu)
    assert kernel.unsupported(dynamic, torch.float32, cpu) == "runs on NVIDIA GPUs, not on cpu"
    monkeypatch.setattr(fp8, "unsupported_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert kernel.unsupported(q, torch.float16, cuda) is None
    assert "capability 8.9 or higher" in kernel.unsupported(dynamic, torch.float16, cuda)


def test_inputs_that_do_not_fit(make_qtensor: Make) -> None:
    packed = TritonFp8().pack(make_qtensor("fp8", 64, 63), torch.bfloat16)
    for x in (torch.ones(2, 63), torch.ones(2, 64, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"inputs are .*, expected \[\.\.\., 63\] of float16 or bfloat16"):
            TritonFp8().linear(x, packed, None)


def test_the_fake_operator(make_qtensor: Make) -> None:
    """Shapes for torch.compile, with nothing computed."""
    packed = TritonFp8().pack(make_qtensor("fp8-block", 65, 63), torch.float16).to("meta")
    y = TritonFp8().linear(torch.empty(2, 3, 63, device="meta"), packed, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 65), torch.float32, "meta")
