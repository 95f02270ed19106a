"""int8-dynamic and int8-dynamic-asym in Triton: on a GPU, in the interpreter on any CPU, compiled code on neither."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.activations.int8_token import Int8Token, Int8TokenAsymmetric
from bitpress.kernels.packing import unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.triton import int8_dynamic
from bitpress.kernels.triton.int8_dynamic import FEW, MANY, SOME, WIDE, TritonInt8, configs, quantize
from bitpress.kernels.triton.launch import Config

from .devices import DEVICE, INTERPRETED, needs_triton, runs

Make = Callable[..., QTensor]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCHEMES = ["int8-dynamic", "int8-dynamic-asym"]
SHAPES = [(1, 1), (13, 31), (64, 64), (65, 127), (129, 257), (40, 1000)]
EVERY = [*FEW, *SOME, *MANY]


def relative_rms(found: Tensor, q: QTensor, x: Tensor, bias: Tensor | float = 0) -> float:
    """RMS error of the product with x rounded as the reference rounds it, relative to the exact one."""
    assert q.scheme.activations
    codes, scales, zeros = q.scheme.activations.codes(x.cpu(), {})
    inputs = (codes.double() - (0 if zeros is None else zeros.double())) * scales.double()
    expected = inputs @ q.dequantize().double().t() + bias
    return float((found.cpu().double() - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype) -> float:
    """Integers are exact; of an output's rounding, float32's three are the smaller part. It may be a single one that is
    rounded; the interpreter drops what bfloat16 has no bits for, up to 2^-7."""
    return {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}[
        dtype
    ]


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ins", [1, 15, 16, 127, 4095, 4097])
@pytest.mark.parametrize("inputs", [Int8Token(), Int8TokenAsymmetric()], ids=SCHEMES)
def test_rows_are_quantized_as_by_the_reference(
    inputs: Int8Token, ins: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: zeros, subnormal scales, ties, the largest numbers; and what is not finite shows."""
    monkeypatch.setattr(int8_dynamic, "_BLOCK", 1024)
    x = torch.randn(11, ins, generator=torch.Generator().manual_seed(ins)).to(dtype)
    x[1], x[2] = 0, torch.finfo(dtype).tiny / 3
    x[3] = (torch.arange(ins) % 255 - 127) / 2  # of a scale of 1/2 or 1: half of them ties
    x[3, 0] = 127
    x[8] = x[8].abs() + 1  # all on one side of 0
    x[4], x[5, -1], x[6, ins // 2], x[7, 0] = torch.finfo(dtype).max, torch.nan, torch.inf, -torch.inf
    codes, scales, zeros = (each if each is None else each.cpu() for each in quantize(x.to(DEVICE), inputs.symmetric))
    expected, expected_scales, expected_zeros = inputs.codes(x, {})
    expected_scales = expected_scales.flatten()
    finite = expected_scales.isfinite()
    assert finite.sum() == 8
    assert torch.equal(codes[finite, :ins], expected[finite])
    assert torch.equal(scales.nan_to_num(nan=-1), expected_scales.nan_to_num(nan=-1))
    if zeros is None:
        assert expected_zeros is None
        assert not codes[:, ins:].any()
    else:
        assert expected_zeros is not None
        assert torch.equal(zeros[finite], expected_zeros.flatten()[finite].to(torch.int32))
        assert not zeros[~finite].any()
    assert not codes[~finite, :ins].any()


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("shape", "dtype", "scheme"), list(zip(SHAPES, [*DTYPES, *DTYPES], 3 * SCHEMES)))
def test_product(
    make_qtensor: Make, generator: torch.Generator, shape: tuple[int, int], dtype: torch.dtype, scheme: str
) -> None:
    q, kernel = make_qtensor(scheme, *shape), TritonInt8()
    packed, bias = kernel.pack(q.to(DEVICE), dtype), torch.randn(shape[0], generator=generator)
    for rows in (1, 2, 17, 65):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        y = kernel.linear(x.to(DEVICE), packed, bias.to(DEVICE))
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        assert relative_rms(y, q, x, bias) <= tolerance(dtype), rows


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("config", EVERY, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_configuration(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch, scheme: str, config: Config) -> None:
    """All sums are exact, so that all configurations agree to the bit, which a bias in bfloat16 does not change."""
    q, kernel = make_qtensor(scheme, 136, 140), TritonInt8()
    monkeypatch.setattr(int8_dynamic, "choose", lambda *args: config)
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(config.rows + 1, 140, generator=generator), torch.randn(136, generator=generator)
    packed = kernel.pack(q.to(DEVICE), torch.float32)
    y = kernel.linear(x.to(DEVICE), packed, bias.to(DEVICE, torch.bfloat16))
    assert relative_rms(y, q, x, bias.to(torch.bfloat16).double()) <= tolerance(torch.float32)
    codes = (unpack(q.codes, 8, 140).int() - 128).double()
    assert q.scheme.activations
    rounded, scales, zeros = q.scheme.activations.codes(x, {})
    whole = rounded.double() - (0 if zeros is None else zeros.double())
    exact = (whole @ codes.t()).float() * scales * q.scales.flatten()
    assert torch.equal(kernel.linear(x.to(DEVICE), packed, None).cpu(), exact)


@runs
@pytest.mark.usefixtures("poisoned_empty")
def test_forms_of_input(make_qtensor: Make, generator: torch.Generator) -> None:
    """1, 2 and 3 dimensions, views, no rows: all the same product."""
    q, kernel = make_qtensor("int8-dynamic-asym", 66, 64), TritonInt8()
    packed = kernel.pack(q.to(DEVICE), torch.float16)
    cube = torch.randn(64, 50, 2, generator=generator).to(DEVICE, torch.float16)
    for x in (cube[:, 0, 0], cube[..., 0].t(), cube.permute(2, 1, 0), cube[:, :0, 0].t(), cube[:, :0].permute(2, 1, 0)):
        y = kernel.linear(x, packed, None)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((*x.shape[:-1], 66), torch.float16, True)
        if y.numel():
            assert relative_rms(y, q, x) <= tolerance(torch.float16)


@runs
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_row(make_qtensor: Make, nan_stays_in_its_row: Callable[..., None], scheme: str) -> None:
    nan_stays_in_its_row(TritonInt8(), make_qtensor(scheme, 64, 320).to(DEVICE))


@runs
def test_parts_are_joined(make_qtensor: Make, generator: torch.Generator) -> None:
    """As query, key and value layers are: each output's sum stays with its weight."""
    kernel, qs = TritonInt8(), [make_qtensor("int8-dynamic-asym", outs, 64) for outs in (16, 8)]
    parts = [kernel.pack(q.to(DEVICE), torch.float32) for q in qs]
    whole, x = kernel.join(parts), torch.randn(3, 64, generator=generator).to(DEVICE)
    assert whole is not None
    apart = torch.cat([kernel.linear(x, part, None) for part in parts], 1)
    assert torch.equal(kernel.linear(x, whole, None), apart)


@needs_triton
def test_in_the_interpreter(interpreted: Callable[[str], int]) -> None:
    assert interpreted(__file__) >= len(SHAPES) + 2 * len(EVERY)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("config", [config for config in EVERY if config.rows and config.split == 1], ids=str)
def test_compiled_product(config: Config, capability: int, compiled: Callable[..., Any]) -> None:
    """No spills, wide copies, INT8 tensor cores. How many programs share outputs is no part of the code. Zero points
    take more registers, which WIDE does not have."""
    kinds = dict.fromkeys(("codes_at", "weight_at"), "*i8") | dict.fromkeys(("row_scales_at", "scales_at"), "*fp32")
    kinds |= dict.fromkeys(("bias_at", "y_at"), "*bf16") | dict.fromkeys(("rows", "outs", "width"), "i32")
    constants = {"ROWS": config.rows, "OUTS": config.outs, "DEPTH": config.depth, "STAGES": config.stages}
    zero_points: dict[str, Any] = dict.fromkeys(("zeros_at", "sums_at"))
    if config in (*FEW, *SOME, *configs(1000, 8, zero_points=True)):
        kinds |= dict.fromkeys(zero_points, "*i32")
    else:
        assert config == WIDE
        constants |= zero_points
    program = compiled(int8_dynamic._multiply, kinds, constants, capability, odd=("rows",), num_warps=config.warps)
    assert program.stack == program.count("STL") == program.count("LDL") == 0
    assert program.registers <= (128 if config.rows == 16 else 255)
    assert program.shared <= 100 << 10
    copies = config.stages * (config.rows + config.outs) * config.depth // (16 * 32 * config.warps)
    assert program.count("LDGSTS.E.BYPASS.128") >= copies
    assert program.count("IGMMA" if capability == 90 else "IMMA.16832.S8.S8") >= 4


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_quantizing(scheme: str, kind: str, capability: int, compiled: Callable[..., Any]) -> None:
    kinds = {"x_at": kind, "codes_at": "*i8", "scales_at": "*fp32", "ins": "i32", "width": "i32"}
    constants: dict[str, Any] = {"BLOCK": int8_dynamic._BLOCK}
    if scheme == "int8-dynamic-asym":
        kinds["zeros_at"] = "*i32"
    else:
        constants["zeros_at"] = None
    program = compiled(int8_dynamic._quantize, kinds, constants, capability, num_warps=8)
    assert program.stack == 0
    assert program.registers <= 64  # four programs share a multiprocessor
    assert program.count("LDG.E.128") >= 4
    assert program.count("STG.E.128") >= 1
    assert program.count("MUFU.RCP") > 0  # where IEEE's division begins


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_adding(capability: int, compiled: Callable[..., Any]) -> None:
    from bitpress.kernels.triton import product

    kinds = {"parts_at": "*i32", "y_at": "*bf16", "row_scales_at": "*fp32", "out_scales_at": "*fp32"}
    kinds |= {"bias_at": "*bf16", "rows": "i32", "outs": "i32"}
    program = compiled(product._add_parts, kinds, {"SPLIT": 8, "COLUMNS": product._COLUMNS}, capability, odd=("rows",))
    assert program.stack == 0
    assert program.count("LDG.E.128") >= 16


def test_reasons(make_qtensor: Make) -> None:
    kernel, cpu = TritonInt8(), torch.device("cpu")
    q = make_qtensor("int8-channel", 64, 64)
    assert "int8-dynamic and int8-dynamic-asym only" in kernel.unsupported(q, torch.bfloat16, cpu)
    q = make_qtensor("int8-dynamic", 1, (1 << 17) + 1)
    assert "inputs are torch.float64" in kernel.unsupported(q, torch.float64, cpu)
    assert "in_features 131073 is more than 131072" in kernel.unsupported(q, torch.bfloat16, cpu)
    q = make_qtensor("int8-dynamic-asym", 1, (1 << 16) + 1)
    assert "in_features 65537 is more than 65536" in kernel.unsupported(q, torch.bfloat16, cpu)
    q = make_qtensor("int8-dynamic", 64, 64)
    assert kernel.unsupported(q, torch.bfloat16, cpu) == "runs on NVIDIA GPUs, not on cpu"


def test_inputs_that_do_not_fit(make_qtensor: Make) -> None:
    packed = TritonInt8().pack(make_qtensor("int8-dynamic", 64, 63), torch.bfloat16)
    for x in (torch.ones(2, 63, dtype=torch.float64), torch.ones(2, 64)):
        with pytest.raises(ValueError, match=r"inputs are .*, expected \[\.\.\., 63\] of float16, bfloat16 or float32"):
            TritonInt8().linear(x, packed, None)


def test_the_fake_operator(make_qtensor: Make) -> None:
    """Shapes for torch.compile, with nothing computed."""
    packed = TritonInt8().pack(make_qtensor("int8-dynamic", 65, 63), torch.float16).to("meta")
    y = torch.ops.bitpress.linear_int8(torch.empty(2, 3, 63, device="meta"), packed.weight, packed.scales, None, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 65), torch.float32, "meta")
