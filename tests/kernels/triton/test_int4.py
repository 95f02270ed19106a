"""The Triton kernels for INT4: in Triton's interpreter against float64, and compiled for GPUs, which takes none."""

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.triton import int4
from bitpress.kernels.triton.int4 import BATCH, BLOCK, DECODE, PREFILL, TORCH, TritonInt4, candidates
from bitpress.kernels.triton.launch import Config

Make = Callable[..., QTensor]

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not INTERPRETED, reason="it runs in test_in_the_interpreter")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

SHAPES = [
    ("int4-g32", (1, 32)),
    ("int4-g32-asym", (33, 160)),
    ("int4-g64", (15, 64)),
    ("int4-g64-asym", (17, 320)),
    ("int4-g96", (31, 288)),
    ("int4-g128", (129, 640)),
    ("int4-g128-asym", (65, 128)),
    ("int4-g256-asym", (13, 512)),
    ("int4-channel", (1, 1)),
    ("int4-channel-asym", (64, 131)),
    ("int3-g32-asym", (7, 96)),
    ("int2-channel", (5, 31)),
]
TILES = [*DECODE, *(config for configs in BATCH.values() for config in configs), PREFILL]
ROWS = {8: (1, 7, 8, 9), 16: (1, 15, 17), 32: (31, 33), 64: (2, 63, 65), 128: (65, 129)}  # by the tile's rows


def packed(q: QTensor) -> tuple[Tensor, Tensor]:
    held = TritonInt4().pack(q, torch.float16)
    return held.weight, held.scales


def exact(q: QTensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    product = x.double() @ q.dequantize().double().t()
    return product if bias is None else product + bias.double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("scheme", "shape"), SHAPES)
def test_layout(make_qtensor: Make, scheme: str, shape: tuple[int, int]) -> None:
    """As the module's docstring has it, read element by element."""
    q = make_qtensor(scheme, *shape, scale_dtype=torch.float16)
    weight, scales = packed(q)
    blocks = -(-shape[1] // BLOCK)
    assert weight.shape == (blocks, shape[0], 32)
    groups = len(scales) // blocks
    codes = (weight.to(torch.int32)[:, :, None, :] >> torch.tensor([0, 4, 8, 12])[:, None]) & 15
    codes = codes.permute(1, 0, 2, 3).reshape(shape[0], -1)
    steps = (scales & ~15).view(torch.float32).t().repeat_interleave(BLOCK // groups, 1)
    zeros = (scales & 15).t().repeat_interleave(BLOCK // groups, 1)
    assert torch.equal(((codes - zeros) * steps)[:, : shape[1]], q.dequantize())
    assert (codes[:, shape[1] :] == 0).all()
    assert (scales[-(-shape[1] * groups // BLOCK) :] == 0).all()


def test_float32_scales_keep_twenty_bits(make_qtensor: Make) -> None:
    q = make_qtensor("int4-g32-asym", 65, 128)
    _, scales = packed(q)
    kept = (scales & ~15).view(torch.float32).t()
    assert ((kept - q.scales).abs() <= 2.0**-20 * q.scales).all()


@runs
@pytest.mark.parametrize(("scheme", "shape"), SHAPES)
def test_every_tile(make_qtensor: Make, generator: torch.Generator, scheme: str, shape: tuple[int, int]) -> None:
    """Sums of float32 are all that may differ; float16 and bfloat16 inputs and codes multiply without rounding."""
    q = make_qtensor(scheme, *shape, scale_dtype=torch.float16)
    weight, scales = packed(q)
    bias = torch.randn(shape[0], generator=generator)
    groups = len(scales) // len(weight)
    turn = SHAPES.index((scheme, shape))
    for number, config in enumerate(TILES):
        if config.rows == 128 and groups > 1:
            continue
        rows = ROWS[config.rows][(turn + number) % len(ROWS[config.rows])]
        x = torch.randn(rows, shape[1], generator=generator).to((torch.float16, torch.bfloat16)[number % 2])
        parts = 1 if config in DECODE else config.split
        memory = torch.full((parts * rows + 2, shape[0]), torch.nan)
        added = bias if turn % 2 and parts == 1 else None
        int4._launch(config, x, weight, scales, added, memory[1:-1])
        assert memory[[0, -1]].isnan().all()
        expected = exact(q, x, added)
        terms = (x.double().square() @ q.dequantize().double().square().t()).sqrt().norm()
        found = memory[1:-1].view(parts, rows, shape[0]).double().sum(0)
        error = (found - expected).norm() / torch.maximum(expected.norm(), terms)
        assert error <= 2.0**-21, (config, rows)


@runs
@pytest.mark.parametrize("rows", [1, 5, 20, 64, 65, 1030])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear(make_qtensor: Make, generator: torch.Generator, dtype: torch.dtype, rows: int) -> None:
    """As the operator calls it: a view, more dimensions, a bias of the weight's dtype. The interpreter cuts off where
    bfloat16 is rounded: 2^-7."""
    q = make_qtensor("int4-g64-asym", 67, 192)
    x = torch.randn(192, rows, 1, generator=generator).to(dtype).permute(1, 2, 0)
    bias = torch.randn(67, generator=generator).to(dtype)
    y = int4._linear(x, *packed(q), bias)
    assert y.shape == (rows, 1, 67)
    assert y.dtype == dtype
    assert y.is_contiguous()
    tolerance = 2.0**-11 if dtype == torch.float16 else 2.0**-7
    assert relative(y.flatten(0, 1), exact(q, x.flatten(0, 1), bias)) <= tolerance


@runs
def test_no_rows(make_qtensor: Make) -> None:
    q = make_qtensor("int4-g64", 8, 64)
    assert int4._linear(torch.ones(2, 0, 64, dtype=torch.float16), *packed(q), None).shape == (2, 0, 8)


@runs
@pytest.mark.parametrize("config", [DECODE[0], BATCH[16][0], BATCH[16][1]])
def test_nan_stays_in_its_row(make_qtensor: Make, config: Config) -> None:
    q = make_qtensor("int4-g64", 33, 192)
    x = torch.ones(3, 192, dtype=torch.float16)
    x[1, 5] = torch.nan
    y = int4._product(config, x, *packed(q), None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@runs
def test_joined(make_qtensor: Make, generator: torch.Generator) -> None:
    kernel, weights = TritonInt4(), [make_qtensor("int4-g64-asym", outs, 192, torch.float16) for outs in (40, 8, 17)]
    joined = kernel.join([kernel.pack(q, torch.float16) for q in weights])
    x = torch.randn(3, 192, generator=generator).to(torch.float16)
    y = int4._product(DECODE[0], x, joined.weight, joined.scales, None)
    assert relative(y, torch.cat([exact(q, x) for q in weights], 1)) <= 2.0**-11
    assert joined.shape == (65, 192)


@runs
@pytest.mark.parametrize(("scheme", "shape"), SHAPES)
def test_dequantize(make_qtensor: Make, scheme: str, shape: tuple[int, int]) -> None:
    q = make_qtensor(scheme, *shape, scale_dtype=torch.float16)
    start = shape[0] // 3
    found = torch.full((shape[0] - start, shape[1]), torch.nan, dtype=torch.float16)
    int4.dequantize(*packed(q), start, found)
    assert torch.equal(found, q.dequantize(torch.float16)[start:])


@compiles
def test_in_the_interpreter(interpreted: Callable[[str], int]) -> None:
    assert interpreted(__file__) > 3 * len(SHAPES)


@compiles
def test_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of rows has a few, and on a GPU of 132 multiprocessors the default keeps all of them busy."""
    pytest.importorskip("triton")
    h200 = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    cuda = torch.device("cuda")
    for rows in range(1, 1100):
        found = candidates(rows, 4096, 128, cuda)
        assert 3 <= len(found) <= 6
        assert (TORCH in found) == (rows > 64)
        assert (found[0] == TORCH) == (rows >= 1024)
        assert PREFILL not in candidates(rows, 4096, 64, cuda)
        assert all(config.rows >= rows for config in found if rows <= 64)
    assert candidates(1, 14336, 128, cuda)[0] == DECODE[0]
    assert candidates(1, 4096, 128, cuda)[0] == DECODE[2]
    assert candidates(16, 4096, 128, cuda)[0].split > 1
    assert candidates(16, 28672, 128, cuda)[0] == BATCH[16][0]
    assert candidates(512, 14336, 128, cuda)[0] == PREFILL


@compiles
@pytest.mark.parametrize("magic", ["0x64006400", "0x43004300"])
def test_conversion(magic: str) -> None:
    """The PTX, instruction by instruction, on all words: what the interpreter cannot run."""
    pytest.importorskip("triton")
    words = torch.arange(1 << 16, dtype=torch.int64)
    registers = {"$4": words | words.flip(0) << 16}
    for line in re.findall(r"((?:shr|lop3)[^;]*);", int4._conversion(magic)):
        name, target, *operands = re.split(r"[ ,]+", line)
        values = [registers.get(text, text) for text in operands]
        if name == "shr.u32":
            registers[target] = values[0] >> int(values[1])
        else:
            assert (name, values[3]) == ("lop3.b32", "0xEA")  # (a & b) | c: 0xEA = (0xF0 & 0xCC) | 0xAA
            registers[target] = (values[0] & int(values[1], 16)) | int(values[2], 16)
    dtype, offset = (torch.float16, 1024) if magic == "0x64006400" else (torch.bfloat16, 128)
    for j in range(4):
        pairs = registers[f"${j}"].to(torch.int32).view(torch.int16).view(-1, 2).view(dtype).double()
        assert torch.equal(pairs[:, 0], ((words >> 4 * j) & 15) + offset)
        assert torch.equal(pairs[:, 1], ((words.flip(0) >> 4 * j) & 15) + offset)


def compile_tile(
    compiled: Callable[..., Any], config: Config, groups: int, capability: int, dtype: str, ones: dict[str, int]
) -> Any:
    kernel = int4._decode if config in DECODE else int4._multiply
    kinds = {"x_at": f"*{dtype}", "weight_at": "*i16", "scales_at": "*i32", "bias_at": f"*{dtype}", "y_at": f"*{dtype}"}
    kinds |= {name: "i32" for name in ("rows", "ins", "outs", "blocks") if name not in ones}
    constants = {"ROWS": config.rows, "OUTS": config.outs, "GROUPS": groups, "ASM": True, **ones}
    if config in DECODE:
        constants["PARTS"] = config.split
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compiled(kernel, kinds, constants, capability, odd=("rows", "blocks"), **options)


# Registers of a thread, most of any of the configurations: 128 let 4 programs of 4 warps share a multiprocessor.
REGISTERS = {8: 128, 16: 168, 32: 210, 64: 184, 128: 255}
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that a program can have


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("groups", [1, 4])  # the fewest and the most of a block
@pytest.mark.parametrize(
    "config", sorted({config._replace(split=1) if config not in DECODE else config for config in TILES})
)
def test_compiled(compiled: Callable[..., Any], config: Config, groups: int, capability: int) -> None:
    """All that there is to compile, for bfloat16: `split` is no constant but of DECODE."""
    if config.rows == 128 and groups > 1:
        pytest.skip("candidates() leaves it out")
    program = compile_tile(compiled, config, groups, capability, "bf16", {})
    assert program.stack == program.count("STL") == program.count("LDL") == 0
    assert program.registers <= REGISTERS[config.rows]
    assert program.shared <= SHARED[capability]
    # Weights come in pieces of 16 bytes, past the level-1 cache, while earlier ones are multiplied.
    assert program.count("LDGSTS.E.BYPASS.128") >= config.stages
    # All codes by masks of two at a time, none by a conversion.
    codes = config.outs * 128 * (config.split if config in DECODE else 1) // (32 * config.warps)
    assert program.sass.count("0xf000f, ") == codes // 2
    assert program.count("I2F") == program.count("I2FP") == 0
    on_hopper = capability == 90 and config not in DECODE  # which has too few rows for its tensor cores' new way
    assert (program.count("HGMMA.64x") > 0) == on_hopper
    assert (program.count("HMMA.16816.F32.BF16") > 0) != on_hopper


@compiles
@pytest.mark.parametrize("config", [DECODE[0], BATCH[16][0]])
def test_compiled_for_float16_and_sizes_of_one(compiled: Callable[..., Any], config: Config) -> None:
    """Triton makes a constant of an integer that is 1."""
    sizes = dict.fromkeys(["rows", "ins", "outs", "blocks"], 1)
    program = compile_tile(compiled, config, 1, 90, "fp16", sizes)
    assert program.stack == 0
    assert program.count("HMMA.16816.F32") + program.count("HGMMA.64x16x16.F32") > 0


@compiles
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_dequantize_compiled(compiled: Callable[..., Any], capability: int, one: bool) -> None:
    pointers = {"weight_at": "*i16", "scales_at": "*i32", "output_at": "*bf16"}
    names = {"ins", "outs", "first", "count"}
    kinds = pointers | dict.fromkeys(names if not one else set(), "i32")
    sizes = dict.fromkeys(names, 1) if one else {}
    program = compiled(int4._dequantize, kinds, {"OUTS": 64, "GROUPS": 4, **sizes}, capability)
    assert program.stack == 0
    assert program.registers <= 128
    assert one or program.count("STG.E.128") > 0
    assert program.count("LDG.E.128") > 0
