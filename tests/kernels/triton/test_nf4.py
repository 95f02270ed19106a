"""NF4 in Triton: on a GPU where there is one, in Triton's interpreter on any CPU, and as compiled code on neither."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.triton import nf4
from bitpress.kernels.triton.launch import Config
from bitpress.kernels.triton.nf4 import FEW, TORCH, TritonNF4, configs
from bitpress.kernels.weights.nf4 import NF4_CODEBOOK

from .devices import DEVICE, INTERPRETED, needs_triton, runs

Make = Callable[..., QTensor]

ROWS = {torch.bfloat16: (1, 8, 33, 257), torch.float16: (2, 9, 17, 65)}
SHAPES = [(1, 64), (13, 128), (63, 192), (64, 256), (65, 320), (3, 2304)]
EVERY = list(dict.fromkeys(config for rows in (8, 16, 32, 64) for config in configs(rows)))


def relative_rms(found: Tensor, q: QTensor, x: Tensor, bias: Tensor | float = 0) -> float:
    """RMS error relative to the larger of the exact product and of what independent terms would add up to."""
    inputs, weight = x.cpu().double(), q.dequantize().double().t()
    expected = inputs @ weight + bias
    terms = (inputs.square() @ weight.square()).sqrt()
    return float((found.cpu().double() - expected).norm() / torch.maximum(expected.norm(), terms.norm()))


def tolerance(dtype: torch.dtype, count: int) -> float:
    """Of `count` outputs: they and the code book are rounded by at most 2^-8 (bfloat16) or 2^-11 of their values, 0.41
    of that in RMS; the interpreter drops what bfloat16 has no bits for, up to 2^-7. A few may all be rounded badly."""
    rounding = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}[dtype]
    return rounding * (1 if count >= 64 else 2)


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scheme", "dtype"), [("nf4", torch.bfloat16), ("nf4-dq", torch.float16)])
def test_product(make_qtensor: Make, generator: torch.Generator, scheme: str, shape: tuple[int, int], dtype) -> None:
    q, kernel = make_qtensor(scheme, *shape), TritonNF4()
    packed, bias = kernel.pack(q.to(DEVICE), dtype), torch.randn(shape[0], generator=generator)
    for rows in ROWS[dtype]:
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        y = kernel.linear(x.to(DEVICE), packed, bias.to(DEVICE))
        assert y.shape == (rows, shape[0])
        assert y.dtype == dtype
        assert relative_rms(y, q, x, bias) <= tolerance(dtype, y.numel()), rows


@runs
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_configuration(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    q, kernel = make_qtensor("nf4-dq", 17, 768), TritonNF4()
    monkeypatch.setattr(nf4, "choose", lambda *args: config)
    x = torch.randn(config.rows + 1, 768, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    y = kernel.linear(x.to(DEVICE), kernel.pack(q.to(DEVICE), torch.bfloat16), None)
    assert relative_rms(y, q, x) <= tolerance(torch.bfloat16, y.numel())


def test_very_many_rows_are_for_torch() -> None:
    assert TORCH not in configs(64)
    assert configs(65)[-1] == configs(257)[0] == TORCH


@runs
@pytest.mark.usefixtures("poisoned_empty")
def test_forms_of_input(make_qtensor: Make, generator: torch.Generator) -> None:
    """1, 2 and 3 dimensions, views, no rows, bias of x's dtype, float32 or none: all the same product."""
    q, kernel, dtype = make_qtensor("nf4-dq", 66, 64), TritonNF4(), torch.bfloat16
    packed, bias = kernel.pack(q.to(DEVICE), dtype), torch.randn(66, generator=generator)
    cube = torch.randn(64, 50, 2, generator=generator).to(DEVICE, dtype)
    for x in (cube[:, 0, 0], cube[..., 0].t(), cube.permute(2, 1, 0), cube[:, :0, 0].t(), cube[:, :0].permute(2, 1, 0)):
        for b in (None, bias, bias.to(dtype)):
            y = kernel.linear(x, packed, None if b is None else b.to(DEVICE))
            assert y.shape == (*x.shape[:-1], 66)
            assert y.dtype == dtype
            assert y.is_contiguous()
            if y.numel():
                assert relative_rms(y, q, x, 0 if b is None else b.double()) <= tolerance(dtype, y.numel())


@runs
def test_nan_stays_in_its_row(make_qtensor: Make, nan_stays_in_its_row: Callable[..., None]) -> None:
    nan_stays_in_its_row(TritonNF4(), make_qtensor("nf4", 64, 320).to(DEVICE))


@runs
def test_pieces_of_a_large_weight(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitpress.kernels.triton import product

    monkeypatch.setattr(product, "_PIECE", 320 * 50)
    q, kernel = make_qtensor("nf4", 113, 320), TritonNF4()
    x = torch.randn(257, 320, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    y = kernel.linear(x.to(DEVICE), kernel.pack(q.to(DEVICE), torch.float16), None)
    assert relative_rms(y, q, x) <= tolerance(torch.float16, y.numel())


@needs_triton
def test_in_the_interpreter(interpreted: Callable[[str], int]) -> None:
    assert interpreted(__file__) >= 2 * len(SHAPES) + len(EVERY)


def emulated(ptx: str, word: int) -> tuple[int, int]:
    """What a piece of PTX makes of $2: $0 and $1. It knows the instructions that the kernel's has, and no others."""
    registers = {"$2": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    def permute(low: int, high: int, selector: int) -> int:
        data, found = (low | high << 32).to_bytes(8, "little"), 0
        for place in range(4):
            nibble = selector >> 4 * place & 15
            byte = data[nibble & 7]
            found |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * place
        return found

    def logic(a: int, b: int, c: int, table: int) -> int:
        bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
        return sum((table >> index & 1) << i for i, index in enumerate(bits))

    does = {
        "mov": lambda a: a, "xor": lambda a, b: a ^ b, "shl": lambda a, b: a << b & 0xFFFFFFFF,
        "shr": lambda a, b: a >> b, "prmt": permute, "lop3": logic,
    }  # fmt: skip
    for line in ptx.strip().strip("{}").split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            name, target, *operands = re.fullmatch(r"\s*(\w+)\.b32 ([^,]+)" + r"(?:, ([^,]+))?" * 4, line).groups()
            registers[target] = does[name](*(value(operand) for operand in operands if operand))
    return registers["$0"], registers["$1"]


@pytest.mark.skipif(nf4.triton is None, reason="Triton is not installed; there is none but on Linux")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_assembly_finds_every_code(dtype: torch.dtype) -> None:
    """Each pair of codes in each place, the others at random: against the code book times the gain."""
    book = (torch.tensor(NF4_CODEBOOK) * nf4._GAIN[dtype]).to(dtype).view(torch.int16).tolist()
    constants = nf4.decoder(dtype)
    generator = torch.Generator().manual_seed(0)
    for lower, upper, tile in itertools.product(range(16), range(16), range(4)):
        word = int(torch.randint(0, 1 << 32, (), generator=generator))
        word = word & ~(255 << 8 * tile) | (lower | upper << 4) << 8 * tile
        found = emulated(constants["FIRST" if tile < 2 else "SECOND"], word)[tile % 2]
        assert found == (book[lower] & 0xFFFF | (book[upper] & 0xFFFF) << 16)


def test_the_gain_makes_the_code_book_closer() -> None:
    book = torch.tensor(NF4_CODEBOOK, dtype=torch.float64)
    for dtype, gain in nf4._GAIN.items():
        errors = [float(((book * g).to(torch.float32).to(dtype).double() / g - book).norm()) for g in (gain, 1.0)]
        assert errors[0] < 0.6 * errors[1]


KINDS = {
    "x_at": "*bf16", "codes_at": "*i32", "scales_at": "*fp32", "bias_at": "*bf16", "y_at": "*bf16",
    "weight_at": "*bf16", "rows": "i32", "outs": "i32", "ins": "i32", "first": "i32", "some": "i32",
}  # fmt: skip
NESTED = {"scales_at": "*i32", "absmax_at": "*fp32", "levels_at": "*fp32"}
CODE = [
    config for config in EVERY if config in FEW or config.split == 1
]  # more programs share an output by the same code


def kinds_and_constants(kernel: Any, nested: bool, constants: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    constants = nf4.decoder(torch.bfloat16) | constants
    if not nested:
        constants |= {"absmax_at": None, "levels_at": None}
    kinds = KINDS | (NESTED if nested else {})
    return {name: kinds[name] for name in kernel.arg_names if name in kinds and name not in constants}, constants


@needs_triton
@pytest.mark.parametrize(("capability", "nested"), [(80, False), (90, True)])
@pytest.mark.parametrize("config", CODE, ids=str)
def test_compiled_product(config: Config, nested: bool, capability: int, compiled: Callable[..., Any]) -> None:
    """No spills; up to 16 rows, two programs or more share a multiprocessor's registers; wide copies; tensor cores."""
    kernel = nf4._few if config in FEW else nf4._many
    constants: dict[str, Any] = {"ROWS": config.rows, "OUTS": config.outs, "STAGES": config.stages}
    if config in FEW:
        constants["PARTS"] = config.split
    kinds, constants = kinds_and_constants(kernel, nested, constants)
    program = compiled(kernel, kinds, constants, capability, odd=("rows",), num_warps=config.warps)
    assert program.stack == program.count("STL") == program.count("LDL") == 0
    assert program.registers <= (128 if config in FEW else 192 if config.rows <= 16 else 255)
    assert program.shared <= 140 << 10
    assert program.count("LDGSTS.E.BYPASS.128") >= 4 * config.stages
    assert program.count("HGMMA" if capability == 90 and config.rows > 8 else "HMMA") >= 16
    # 16 words of a step in each thread, of 14 byte permutations each; a few more are about addresses.
    assert 16 * 14 <= program.count("PRMT") <= 16 * 14 + 48


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("nested", [False, True])
def test_compiled_unpacking(nested: bool, capability: int, compiled: Callable[..., Any]) -> None:
    kinds, constants = kinds_and_constants(nf4._unpack, nested, {"OUTS": nf4._UNPACKED})
    program = compiled(nf4._unpack, kinds, constants, capability, odd=("first",))
    assert program.stack == program.count("STL") == program.count("LDL") == 0
    assert program.registers <= 128
    assert program.count("STG.E.128") >= 4


def test_reasons(make_qtensor: Make) -> None:
    kernel, cpu = TritonNF4(), torch.device("cpu")
    assert "nf4 and nf4-dq only" in kernel.unsupported(make_qtensor("int4-g64", 64, 64), torch.bfloat16, cpu)
    assert "inputs are torch.float32" in kernel.unsupported(make_qtensor("nf4", 64, 64), torch.float32, cpu)
    assert "in_features 96 is not divisible by 64" in kernel.unsupported(
        make_qtensor("nf4", 64, 96), torch.bfloat16, cpu
    )
    assert kernel.unsupported(make_qtensor("nf4", 64, 64), torch.bfloat16, cpu) == "runs on NVIDIA GPUs, not on cpu"


def test_inputs_that_the_weight_was_not_packed_for(make_qtensor: Make) -> None:
    packed = TritonNF4().pack(make_qtensor("nf4", 64, 64), torch.bfloat16)
    for x in (torch.ones(2, 64), torch.ones(2, 63, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"inputs are .*, expected \[\.\.\., 64\] of torch.bfloat16"):
            TritonNF4().linear(x, packed, None)


def test_the_fake_operator(make_qtensor: Make) -> None:
    """Shapes for torch.compile, with nothing computed."""
    packed = TritonNF4().pack(make_qtensor("nf4-dq", 65, 256), torch.float16).to("meta")
    y = TritonNF4().linear(torch.empty(2, 3, 256, dtype=torch.float16, device="meta"), packed, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 65), torch.float16, "meta")
