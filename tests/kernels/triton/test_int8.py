"""INT8 weights in Triton: on a GPU, in Triton's interpreter on any CPU, and as compiled code on neither."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.triton import int8
from bitpress.kernels.triton.int8 import TORCH, TritonInt8Weights, configs, constants_of
from bitpress.kernels.triton.launch import Config

from .devices import DEVICE, INTERPRETED, needs_triton, runs

Make = Callable[..., QTensor]

WEIGHTS = [
    ("int8-channel", (1, 1)), ("int8-channel", (13, 31)), ("int8-channel-asym", (65, 129)), ("int8-g64", (63, 192)),
    ("int8-g64-asym", (7, 320)), ("int8-g128", (129, 384)), ("int8-g128-asym", (31, 256)), ("int8-g192", (17, 384)),
]  # fmt: skip
ROWS = {torch.bfloat16: (1, 9, 33, 257), torch.float16: (2, 8, 17, 65)}
EVERY = [config for rows in (8, 16, 32, 64) for config in configs(rows)]


def relative_rms(found: Tensor, q: QTensor, x: Tensor, bias: Tensor | float = 0) -> float:
    """RMS error relative to the larger of the exact product and of what independent terms would add up to."""
    inputs, weight = x.cpu().double(), q.dequantize().double().t()
    expected = inputs @ weight + bias
    terms = (inputs.square() @ weight.square()).sqrt()
    return float((found.cpu().double() - expected).norm() / torch.maximum(expected.norm(), terms.norm()))


def tolerance(y: Tensor) -> float:
    """No weight is rounded but for very many rows; an output is, by at most 2^-8 (bfloat16) or 2^-11 of its value, 0.41
    of that in RMS. The interpreter drops what bfloat16 has no bits for, up to 2^-7. A few may all be rounded badly."""
    rounding = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}[y.dtype]
    return rounding * (1 if len(y) > 256 or y.numel() < 64 else 0.5)


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scheme", "shape"), WEIGHTS)
def test_product(make_qtensor: Make, generator: torch.Generator, scheme: str, shape: tuple[int, int], dtype) -> None:
    q, kernel = make_qtensor(scheme, *shape), TritonInt8Weights()
    packed, bias = kernel.pack(q.to(DEVICE), dtype), torch.randn(shape[0], generator=generator)
    for rows in ROWS[dtype]:
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        y = kernel.linear(x.to(DEVICE), packed, bias.to(DEVICE))
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        assert relative_rms(y, q, x, bias) <= tolerance(y), rows


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_configuration(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    q, kernel = make_qtensor("int8-g64-asym", 67, 448), TritonInt8Weights()
    monkeypatch.setattr(int8, "choose", lambda *args: config)
    x = torch.randn(config.rows + 1, 448, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    y = kernel.linear(x.to(DEVICE), kernel.pack(q.to(DEVICE), torch.float16), None)
    assert relative_rms(y, q, x) <= tolerance(y)


def test_very_many_rows_are_for_torch() -> None:
    assert TORCH not in configs(64)
    assert configs(65)[-1] == configs(257)[0] == TORCH


@runs
@pytest.mark.usefixtures("poisoned_empty")
def test_forms_of_input(make_qtensor: Make, generator: torch.Generator) -> None:
    """1, 2 and 3 dimensions, views, no rows: all the same product."""
    q, kernel = make_qtensor("int8-g64", 66, 64), TritonInt8Weights()
    packed = kernel.pack(q.to(DEVICE), torch.float16)
    cube = torch.randn(64, 50, 2, generator=generator).to(DEVICE, torch.float16)
    for x in (cube[:, 0, 0], cube[..., 0].t(), cube.permute(2, 1, 0), cube[:, :0, 0].t(), cube[:, :0].permute(2, 1, 0)):
        y = kernel.linear(x, packed, None)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((*x.shape[:-1], 66), torch.float16, True)
        if y.numel():
            assert relative_rms(y, q, x) <= tolerance(y)


@runs
def test_nan_stays_in_its_row(make_qtensor: Make, nan_stays_in_its_row: Callable[..., None]) -> None:
    nan_stays_in_its_row(TritonInt8Weights(), make_qtensor("int8-channel", 64, 320).to(DEVICE))


@needs_triton
def test_in_the_interpreter(interpreted: Callable[[str], int]) -> None:
    assert interpreted(__file__) >= 2 * len(WEIGHTS) + len(EVERY)


def emulated(ptx: str, words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a piece of PTX makes of $2, int32 [count]: dtype [count, 2] for $0 and $1. It knows the instructions that
    the kernel's has, and no others."""
    registers = {"$2": words}

    def value(operand: str) -> Tensor:
        number = registers.get(operand)
        if number is None:
            bits = int(operand, 16)
            number = torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).expand_as(words)
        return number.contiguous()

    def logic(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
        """Each bit of the table that is set stands for one combination of the three inputs' bits."""
        found = torch.zeros_like(a)
        for index in range(8):
            if table >> index & 1:
                found |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        return found

    def halves(operand: str) -> Tensor:
        return value(operand).view(dtype).double()

    def rounded(exact: Tensor) -> Tensor:
        assert torch.equal(exact.to(dtype).double(), exact)
        return exact.to(dtype).view(torch.int32)

    for line in ptx.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, target, operands = re.fullmatch(r"\s*([\w.]+) (\$?\w+), (.*)", line).groups()
        given = operands.split(", ")
        if name == "mov.b32":
            registers[target] = value(given[0])
        elif name == "shr.b32":
            registers[target] = value(given[0]) >> int(given[1]) & (1 << 32 - int(given[1])) - 1
        elif name == "lop3.b32":
            registers[target] = logic(*(value(operand) for operand in given[:3]), int(given[3], 16))
        elif name == "sub.rn.f16x2":
            registers[target] = rounded(halves(given[0]) - halves(given[1]))
        else:
            assert name == "fma.rn.bf16x2"
            registers[target] = rounded(halves(given[0]) * halves(given[1]) + halves(given[2]))
    return registers["$0"].view(dtype).view(-1, 2), registers["$1"].view(dtype).view(-1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_assembly_converts_every_code(dtype: torch.dtype) -> None:
    """All codes in all four places, beside others."""
    codes = torch.stack([torch.arange(256).roll(shift) for shift in (0, 85, 170, 201)], -1).to(torch.uint8)
    lower, upper = emulated(int8._CONVERSION[dtype], codes.view(torch.int32).flatten(), dtype)
    centred = codes.to(dtype) - 128
    assert torch.equal(lower, centred[:, [0, 2]])
    assert torch.equal(upper, centred[:, [1, 3]])


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("config", "group", "zeros", "kind"),
    [(config, None, False, "bf16") for config in EVERY if config.split == 1]
    + [(config, 128, config.rows != 32, "bf16") for config in EVERY if config.split == 1]
    + [(configs(16)[0], 128, True, "fp16")],
    ids=str,
)
def test_compiled_product(
    config: Config, group: int | None, zeros: bool, kind: str, capability: int, compiled: Callable[..., Any]
) -> None:
    """No spills, wide copies, tensor cores, and no code converted but by its bits. How many programs share outputs
    is no part of the program."""
    kinds = {"codes_at": "*i32", "scales_at": "*fp32"} | dict.fromkeys(("rows", "outs", "ins"), "i32")
    kinds |= dict.fromkeys(("x_at", "bias_at", "y_at"), f"*{kind}")
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    constants = constants_of(dtype, 2 * (group or 1), 2 if group else 1)
    constants |= {"GROUP": group, "ROWS": config.rows, "OUTS": config.outs, "STAGES": config.stages}
    if zeros:
        kinds["zeros_at"] = f"*{kind}"
    else:
        constants["zeros_at"] = None
    kernel = int8._product
    program = compiled(kernel, kinds, constants, capability, odd=("rows",), num_warps=config.warps)
    assert program.stack == program.count("STL") == program.count("LDL") == 0
    assert program.registers <= (192 if config.rows == 64 else 144)
    assert program.shared <= 96 << 10
    assert program.count("LDGSTS.E.BYPASS.128") >= 4 * config.stages
    assert program.count("HGMMA" if capability == 90 and config.rows > 8 else "HMMA") >= 8
    assert program.count("I2F") <= 1  # which shares the steps out


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_unpacking(capability: int, compiled: Callable[..., Any]) -> None:
    kinds = {"codes_at": "*i32", "scales_at": "*fp32", "zeros_at": "*bf16", "weight_at": "*bf16"}
    kinds |= dict.fromkeys(("first", "some", "outs", "ins"), "i32")
    constants = constants_of(torch.bfloat16, 256, 2) | {"OUTS": int8._UNPACKED}
    program = compiled(int8._unpack, kinds, constants, capability, odd=("first",))
    assert program.stack == 0
    assert program.registers <= 128
    assert program.count("STG.E.128") >= 2


def test_reasons(make_qtensor: Make) -> None:
    kernel, cpu = TritonInt8Weights(), torch.device("cpu")
    assert "inputs that stay as they are" in kernel.unsupported(
        make_qtensor("int8-dynamic", 64, 64), torch.bfloat16, cpu
    )
    assert "8-bit integer weights" in kernel.unsupported(make_qtensor("int4-g64", 64, 64), torch.bfloat16, cpu)
    q = make_qtensor("int8-g32", 64, 64)
    assert "inputs are torch.float32" in kernel.unsupported(q, torch.float32, cpu)
    assert "group_size 32 is not a multiple of 64" in kernel.unsupported(q, torch.bfloat16, cpu)
    q = make_qtensor("int8-channel", 64, 64)
    assert kernel.unsupported(q, torch.bfloat16, cpu) == "runs on NVIDIA GPUs, not on cpu"


def test_inputs_that_the_weight_was_not_packed_for(make_qtensor: Make) -> None:
    packed = TritonInt8Weights().pack(make_qtensor("int8-g64-asym", 64, 64), torch.bfloat16)
    for x in (torch.ones(2, 64), torch.ones(2, 63, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"inputs are .*, expected \[\.\.\., 64\] of torch.bfloat16"):
            TritonInt8Weights().linear(x, packed, None)


def test_the_fake_operator(make_qtensor: Make) -> None:
    """Shapes for torch.compile, with nothing computed."""
    packed = TritonInt8Weights().pack(make_qtensor("int8-g64", 65, 256), torch.float16).to("meta")
    y = TritonInt8Weights().linear(torch.empty(2, 3, 256, dtype=torch.float16, device="meta"), packed, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 65), torch.float16, "meta")
