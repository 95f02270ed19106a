"""The native kernels, each set of instructions that this machine has, against float64; and the library itself.

test_kernels.py tries the best set as it does every kernel. Here each is forced, on shapes around its blocks.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native_inputs import wide_codes
from torch import Tensor

from bitpress.kernels.activations.int8_token import quantize_rows, quantize_rows_asymmetric
from bitpress.kernels.cpu import library as native_library
from bitpress.kernels.cpu import native
from bitpress.kernels.cpu.library import Library, library
from bitpress.kernels.cpu.native import NativeExact, NativeInt8, NativeInt16, NativeMixed, touch
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import select
from bitpress.kernels.scheme import Scheme

Make = Callable[..., QTensor]

CPU = torch.device("cpu")
SANITIZED = "ASAN_OPTIONS" in os.environ  # five times as slow, and looks for what any count of rows of a kind shows
ROWS = (1, 7, 9, 33, 65) if SANITIZED else (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
SHAPES = {  # a block is 16 outputs, a pair 32; steps are 32 to 128 inputs, a stretch 512, a tile 64
    "int2-g32": [(17, 96)],
    "int3-g64": [(33, 192)],
    "int4-g32": [(1, 32), (31, 96), (33, 544)],
    "int4-g96": [(40, 480)],
    "int4-g128": [(16, 128), (37, 640), (63, 1152)],
    "int4-g128-asym": [(37, 640)],
    "int4-g256-asym": [(33, 768)],
    "int4-channel": [(1, 1), (13, 31), (65, 643)],
    "int4-channel-asym": [(37, 509)],
    "int8-g64": [(31, 576)],
    "int8-g128-asym": [(37, 640)],
    "int8-channel-asym": [(17, 131)],
    "int8-dynamic": [(1, 1), (15, 17), (33, 509), (47, 1151), (32, 4096)],
    "int8-dynamic-asym": [(1, 1), (15, 17), (47, 1151), (32, 4096)],
    "int8-static": [(1, 1), (33, 509), (32, 4096)],
    "int8-static-asym": [(1, 1), (15, 17), (47, 1151), (32, 4096)],
    "nf4": [(1, 64), (33, 192), (47, 704)],
    "nf4-dq": [(65, 128)],
    "mxfp4": [(1, 32), (33, 544)],
    "nvfp4": [(17, 16), (33, 208), (63, 1152)],
    "fp8": [(1, 1), (33, 509), (47, 1152)],
    "fp8-b128": [(129, 131), (37, 640)],
    "fp8-tensor": [(17, 63)],
}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
STEPS = {"g32": 32, "g64": 64, "g96": 96, "nf4": 64, "mxfp4": 32, "nvfp4": 16}  # inputs that share a scale; else 128


def found_library() -> Library:
    found = library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


INSTRUCTIONS = getattr(library(), "instructions", ("none",))


def test_the_library_can_be_built():
    """Other tests skip where there is no library; that is right only where nothing can build one."""
    found = library()
    if isinstance(found, str) and (sys.byteorder != "little" or native_library.compiler() is None):
        pytest.skip(found)
    assert isinstance(found, Library), found


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> str:
    if request.param not in found_library().runnable:
        pytest.skip(f"this machine cannot run {request.param}")
    return str(request.param)


def rounded(x: Tensor, q: QTensor, bits: tuple[int, int] = (8, 8)) -> Tensor:
    """float64 [rows, in]: x to INT8, INT16 or a mixture of them and back, by steps, or by rows for int8-dynamic, or by
    the scale and the zero point of a static scheme."""
    scheme = q.scheme.name
    if scheme.startswith("int8-static"):
        zero = int(q.extra.get("input_zero_point", torch.zeros(1)))
        codes = ((x.float() / q.extra["input_scale"]).round() + zero).clamp(-128, 127)
        return (codes - zero).double() * q.extra["input_scale"].double()
    if scheme == "int8-dynamic-asym":
        codes, scales, zeros = quantize_rows_asymmetric(x)
        return (codes.double() - zeros.double()) * scales.double()
    if scheme == "int8-dynamic":
        step = x.shape[-1]
    else:
        step = next((step for name, step in STEPS.items() if name in scheme.split("-")), 128)
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % step)).unflatten(-1, (-1, step))
    if bits != (8, 8):
        counts = (x.shape[-1] - step * torch.arange(padded.shape[-2])).clamp(max=step)
        codes, scales = wide_codes(padded, counts, mixed=bits == (8, 16))
    else:
        codes, scales = quantize_rows(padded)
    return (codes.double() * scales.double()).flatten(-2)[..., : x.shape[-1]]


def relative(found: Tensor, inputs: Tensor, weight: Tensor) -> float:
    """RMS error, relative to what independent terms would add up to."""
    terms = inputs.square() @ weight.square().t()
    return float((found.double() - inputs @ weight.t()).norm() / terms.sum().sqrt())


def bound(kernel: NativeInt8, q: QTensor) -> float:
    """Of `relative`. NF4: scales to float16, 2^-12 in RMS; with int8 inputs the code book by 0.0020 of 0.55. Squares:
    their scales to float16. Inputs that stay as they are meet codes of up to 255, whose zero points are taken off from
    the sum."""
    exact, weight = kernel.input_bits is None, q.scheme.weight.description()
    if weight.type == "codebook":
        return 2.0**-11 if exact else 2.0**-7
    if (weight.type, weight.strategy) == ("float", "block"):
        return 2.0**-11
    return 2.0**-17 if exact else 2.0**-20


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_products(
    make_qtensor: Make, generator: torch.Generator, instructions: str, scheme: str, shape: tuple[int, int]
) -> None:
    """float32 in and out, float16 scales: what is left is the order of sums, of NF4 the code book's rounding, and of
    squares that of their scales."""
    q = make_qtensor(scheme, *shape, torch.float16) if scheme.startswith("int") else make_qtensor(scheme, *shape)
    weight = q.dequantize().double()
    for kernel in (kind(instructions) for kind in (NativeInt8, NativeMixed, NativeInt16, NativeExact)):
        if kernel.unsupported(q, torch.float32, CPU):
            continue
        packed = kernel.pack(q, torch.float32)
        for rows in ROWS:
            x = torch.randn(rows, shape[1], generator=generator)
            if q.scheme.weight.description().type != "codebook":  # one large term would show its code's rounding
                x[::3, 5::41] *= 40
            y = kernel.linear(x, packed, None)
            inputs = x.double() if kernel.input_bits is None else rounded(x, q, kernel.input_bits)
            assert relative(y, inputs, weight) <= bound(kernel, q), (kernel.name, rows)


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [("fp8-dynamic", (17, 31)), ("fp8-block", (33, 257)), ("fp8-static", (31, 96)), ("fp8-tensor-static", (5, 33))],
)
def test_inputs_in_fp8(
    make_qtensor: Make, generator: torch.Generator, instructions: str, scheme: str, shape: tuple[int, int]
) -> None:
    """Rounded as the reference rounds them; with those, no more is lost than with inputs that stay as they are."""
    q, kernel = make_qtensor(scheme, *shape), NativeExact(instructions)
    packed = kernel.pack(q, torch.bfloat16)
    for rows in (1, 9, 49):
        x = torch.randn(rows, shape[1], generator=generator)
        inputs = q.scheme.activations.apply(x, dict(q.tensors())).double()
        assert relative(kernel.linear(x, packed, None), inputs, q.dequantize().double()) <= bound(kernel, q)
        assert kernel.linear(x.to(torch.bfloat16), packed, None).dtype == torch.bfloat16


@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_dequantized(make_qtensor: Make, instructions: str, scheme: str, shape: tuple[int, int]) -> None:
    """What the packed form stands for is what was packed, scales of any size included."""
    q = make_qtensor(scheme, *shape)
    if q.scales.is_floating_point() and q.scales.itemsize > 1:
        q.scales.mul_(torch.logspace(-5, 5, q.scales.numel()).view_as(q.scales))
    found = found_library()
    packed = NativeInt8().pack(q, torch.float32).get_buffer("data")
    weight = native.dequantize(packed, torch.float32, found.instructions.index(instructions), 0, *q.shape)
    expected = q.dequantize()
    single = q.scales.numel() == q.shape[0] and not q.extra  # two scales are multiplied in another order
    largest = expected.abs().amax(1, keepdim=True)  # scales lose what lies 2^-28 below the row's largest
    assert ((weight - expected).abs() <= expected.abs() * (0 if single else 2.0**-11) + largest * 2.0**-26).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_rounded_once(make_qtensor: Make, instructions: str, dtype: torch.dtype) -> None:
    """To nearest, ties to even, infinities and subnormals as torch has them."""
    q = make_qtensor("int8-dynamic", 35, 64)
    q.scales.copy_(torch.logspace(-12, 9, 35).unsqueeze(1))
    kernel = NativeInt8(instructions)
    packed = kernel.pack(q, dtype)
    for rows in (1, 9, 40):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = kernel.linear(x.to(torch.float32), packed, None)
        assert torch.equal(kernel.linear(x, packed, None), exact.to(dtype))


def test_which_serves_small_floats(make_qtensor: Make) -> None:
    """FP4 values, doubled, are whole numbers; those of FP8 are too far apart, so that inputs stay as they are."""
    found_library()
    for scheme in ("mxfp4", "nvfp4"):
        assert select(make_qtensor(scheme, 32, 64), torch.bfloat16, CPU).kernel.name == "native-mixed"
    for scheme in ("fp8", "fp8-b128", "fp8-tensor", "fp8-dynamic", "fp8-block", "fp8-static", "fp8-tensor-dynamic"):
        selection = select(make_qtensor(scheme, 32, 64), torch.bfloat16, CPU)
        assert selection.kernel.name == "native-bf16"
        assert "serves" in selection.rejected["native-mixed"]


def test_every_code_of_e4m3(make_qtensor: Make, instructions: str) -> None:
    """To the bit, subnormal numbers and both zeros too; NaN is no code of a weight."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes[:, 127] = 0
    q = replace(make_qtensor("fp8", 2, 128), codes=codes.view(torch.float8_e4m3fn), scales=torch.ones(2, 1))
    kernel = NativeExact(instructions)
    packed = kernel.pack(q, torch.float32)
    each = found_library().instructions.index(instructions)
    assert torch.equal(native.dequantize(packed.data, torch.float32, each, 0, 2, 128), q.dequantize())
    assert torch.equal(kernel.linear(torch.eye(128)[:40], packed, None), q.dequantize().t()[:40])


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (NativeInt8, "int8-dynamic"),
        (NativeInt8, "int8-dynamic-asym"),
        (NativeInt8, "int8-static-asym"),
        (NativeMixed, "int4-g128"),
        (NativeMixed, "nf4"),
        (NativeInt16, "int4-g128"),
        (NativeInt16, "int8-g64"),
        (NativeInt16, "nvfp4"),
    ],
)
def test_rows_do_not_depend_on_their_company(
    make_qtensor: Make, instructions: str, kind: type[NativeInt8], scheme: str
) -> None:
    """Codes are summed in int32, so that a row's result is the same bits among few rows as alone, on any thread."""
    q, kernel = make_qtensor(scheme, 97, 640), kind(instructions)
    packed, x = kernel.pack(q, torch.float32), torch.randn(70, 640, generator=torch.Generator().manual_seed(0))
    x[3::8, 7::64] *= 30
    together = kernel.linear(x, packed, None)
    assert torch.equal(together, torch.cat([kernel.linear(row, packed, None) for row in x.split(1)]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(kernel.linear(x, packed, None), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        (NativeInt8, "int8-dynamic"),
        (NativeInt8, "int8-dynamic-asym"),
        (NativeInt8, "int8-static-asym"),
        (NativeInt16, "int8-channel-asym"),
    ],
)
def test_instruction_sets_quantize_alike(make_qtensor: Make, kind: type[NativeInt8], scheme: str) -> None:
    """Halves and near-halves included: a code that flipped would show. Sums of steps are added in their order."""
    q = make_qtensor(scheme, 8, 512)
    if q.scheme.static:
        q.extra["input_scale"].fill_(1)
    x = torch.arange(-255, 257, dtype=torch.float32).div(2).repeat(3, 1) * torch.tensor([[1.0], [0.3], [1e-6]])
    x[:, ::128] = x[:, ::128].abs().amax(1, keepdim=True)
    outputs = [kind(name).linear(x, kind().pack(q, x.dtype), None) for name in found_library().runnable]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0 if kind is NativeInt8 else 2e-6)


@pytest.mark.parametrize("scheme", ["int8-static", "int8-static-asym"])
def test_restored_ranges_of_inputs_may_hold_anything(make_qtensor: Make, instructions: str, scheme: str) -> None:
    """They come from files: whatever they are, codes are of int8 and nothing else is spoilt."""
    q, kernel = make_qtensor(scheme, 33, 130), NativeInt8(instructions)
    x = torch.randn(9, 130, generator=torch.Generator().manual_seed(0))
    for values in ((0.0, 0.0), (torch.nan, torch.nan), (torch.inf, -torch.inf), (1e-40, 1e38), (-1.0, 300.0)):
        packed = kernel.pack(q, torch.float32).get_buffer("data").clone()
        at = int(packed[:128].view(torch.int64)[14])
        packed[at : at + 8].view(torch.float32).copy_(torch.tensor(values))
        restored = kernel.restore(QTensor.without_content(q.scheme, q.shape), {"data": native.copied(packed)})
        assert kernel.linear(x, restored, None).shape == (9, 33)


@pytest.mark.parametrize("kind", [NativeMixed, NativeInt16, NativeExact])
def test_an_outlier_spoils_no_neighbour(make_qtensor: Make, instructions: str, kind: type[NativeInt8]) -> None:
    """One feature a thousand times as large as those it shares a scale with: 8 bits would leave nothing of these."""
    q = make_qtensor("int4-g128", 33, 256, torch.float16)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 1000
    weight = q.dequantize().double()
    weight[:, 7] = 0
    outlier = x[:, 7:8].double() * q.dequantize().double()[:, 7:8].t()
    for rows in (1, 40):
        kernel = kind(instructions)
        y = kernel.linear(x[:rows], kernel.pack(q, torch.float32), None).double() - outlier[:rows]
        assert relative(y, x[:rows].double(), weight) < 0.03


def test_many_threads_and_a_narrow_weight(make_qtensor: Make, generator: torch.Generator) -> None:
    found_library()
    q, x = make_qtensor("int4-g64", 5, 128, torch.float16), torch.randn(700, 128, generator=generator)
    kernel = NativeInt8()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        y = kernel.linear(x, kernel.pack(q, torch.float32), None)
    finally:
        torch.set_num_threads(threads)
    assert relative(y, rounded(x, q), q.dequantize().double()) <= 2.0**-20


def test_op_is_sound_under_compilation(make_qtensor: Make) -> None:
    """The fake implementation agrees with the real one, and no graph breaks."""
    found_library()
    q, kernel = make_qtensor("int4-g32", 48, 64), NativeInt8()
    packed, x = kernel.pack(q, torch.float32), torch.randn(2, 3, 64)
    arguments = (x, packed.get_buffer("data"), None, 48, kernel.inputs, kernel.chosen())
    torch.library.opcheck(
        torch.ops.bitpress.linear_cpu.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    compiled = torch.compile(lambda x: kernel.linear(x, packed, None), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), kernel.linear(x, packed, None))


def test_inputs_that_do_not_fit(make_qtensor: Make) -> None:
    found_library()
    kernel = NativeInt8()
    packed = kernel.pack(make_qtensor("int4-g32", 32, 64), torch.float32)
    with pytest.raises(ValueError, match=r"inputs are \[2, 63\] of torch.float32, expected \[..., 64\]"):
        kernel.linear(torch.zeros(2, 63), packed, None)
    with pytest.raises(ValueError, match=r"of torch.float64"):
        kernel.linear(torch.zeros(2, 64, dtype=torch.float64), packed, None)


@pytest.mark.parametrize("kind", [NativeInt8, NativeMixed, NativeInt16, NativeExact])
def test_gradients_of_the_inputs(make_qtensor: Make, kind: type[NativeInt8]) -> None:
    """Those of a product with the dequantized weight, as adapters that are trained beside it need them."""
    found_library()
    q, kernel = make_qtensor("int4-g64-asym", 33, 128, torch.float16), kind()
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = kernel.linear(x, kernel.pack(q, torch.float32), None)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach() @ q.dequantize(), rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("scheme", ["int3-g32", "int4-g32", "int8-channel-asym"])
def test_codes_may_lie_transposed(make_qtensor: Make, scheme: str) -> None:
    """As GPTQ's files have them."""
    qtensor = make_qtensor(scheme, 37, 96)
    transposed = replace(qtensor, codes=qtensor.codes.t().contiguous().t())
    kernel = NativeInt8()
    packed = [kernel.pack(q, torch.float32).data for q in (qtensor, transposed)]  # type: ignore[union-attr]
    assert torch.equal(*packed)


@pytest.mark.parametrize("scheme", ["fp8-tensor", "mxfp4"])
def test_codes_of_one_row_may_have_any_stride(make_qtensor: Make, scheme: str) -> None:
    q = make_qtensor(scheme, 1, 64)
    strange = replace(q, codes=q.codes.as_strided(q.codes.shape, (1, 1)))
    first, other = (NativeExact().pack(each, torch.float32).get_buffer("data") for each in (q, strange))
    assert torch.equal(first, other)


def test_touch_reads_everything() -> None:
    found_library()
    words = torch.arange(1 << 16, dtype=torch.int64)
    before = touch(words)
    words[12345] ^= 1 << 40
    assert before ^ touch(words) == 1 << 40


def test_weights_share_huge_pages_and_nothing_else(make_qtensor: Make) -> None:
    """They lie side by side, each as a storage of its own bytes; a large one gets a mapping of its own."""
    pool, loaded = native._Pool(), found_library()
    first, second, large = (pool.take(loaded, size) for size in (1000, 200, 17 << 20))
    assert first.data_ptr() % (2 << 20) == large.data_ptr() % (2 << 20) == 0
    assert second.data_ptr() - first.data_ptr() == 1024
    assert [each.untyped_storage().nbytes() for each in (first, second, large)] == [1000, 200, 17 << 20]
    first.fill_(255)
    assert not second.any()
    packed = NativeInt8().pack(make_qtensor("int8-dynamic", 64, 64), torch.float32).get_buffer("data")
    assert packed.untyped_storage().nbytes() == packed.numel()


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same values on every machine and with every torch."""
    places = torch.arange(torch.Size(shape).numel())
    values = (places % 97 + 64) / 128 if dtype.is_floating_point else places * 2654435761 % 2147483629
    return values.to(dtype).view(shape)


def test_the_layout_has_a_number() -> None:
    """Files of packed weights name it: whoever changes what is packed gives it the next number, and this hash."""
    digest = hashlib.sha256()
    for name, shapes in SHAPES.items():
        scheme, shape = Scheme.parse(name), (33, shapes[-1][1])
        tensors = {each: filled(size, kinds[0]) for each, (size, kinds) in scheme.layout(shape).items()}
        data = native._pack(found_library(), QTensor.of(scheme, shape, tensors))
        digest.update(data.numpy().tobytes())
    assert (native._LAYOUT, digest.hexdigest()[:16]) == (2, "99e4660b08654441")


@pytest.mark.parametrize(
    "scheme", ["int4-g128-asym", "int8-dynamic", "int8-dynamic-asym", "int8-static-asym", "fp8-static"]
)
def test_packed_weights_are_restored(make_qtensor: Make, scheme: str) -> None:
    kernel = NativeExact() if scheme.startswith("fp8") else NativeInt8()
    qtensor = make_qtensor(scheme, 33, 256)
    packed = kernel.pack(qtensor, torch.float32)
    empty = QTensor.without_content(qtensor.scheme, qtensor.shape)
    buffers = dict(packed.named_buffers())
    x = torch.randn(3, 256)
    restored = kernel.restore(empty, buffers)
    assert torch.equal(kernel.linear(x, restored, None), kernel.linear(x, packed, None))
    data = buffers.pop("data")
    for at in range(128):
        wrong = data.clone()
        wrong[at] ^= 0x41
        with pytest.raises(ValueError, match="its header is that of another weight"):
            kernel.restore(empty, {"data": wrong, **buffers})
    space = torch.empty(data.numel() + 64, dtype=torch.uint8)
    for odd in (data[:-1], data.view(torch.int8), data.view(1, -1), space[1 : data.numel() + 1].copy_(data)):
        with pytest.raises(ValueError, match="well aligned"):
            kernel.restore(empty, {"data": odd, **buffers})
    for names in ({}, {"data": data, "more": data, **buffers}):
        with pytest.raises(ValueError, match="it holds"):
            kernel.restore(empty, names)
    for name, tensor in buffers.items():
        with pytest.raises(ValueError, match=name):
            kernel.restore(empty, {"data": data, name: tensor.double()})
    assert kernel.packed_form() != type(kernel)("portable").packed_form()


def test_without_a_library(make_qtensor: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing built and no compiler: others serve, and the reason is said."""
    monkeypatch.setattr(native_library, "_HERE", tmp_path)
    monkeypatch.setattr(native_library, "compiler", lambda: None)
    library.cache_clear()
    try:
        selection = select(make_qtensor("int4-g32", 64, 64), torch.float32, CPU)
        assert selection.kernel.name == "reference"
        assert "there is no C compiler here" in selection.rejected["native-int16"]
    finally:
        library.cache_clear()


@pytest.fixture
def tiny_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache of a library that is compiled in no time; its csrc/ is beside it, in kernels/."""
    (tmp_path / "kernels" / "csrc").mkdir(parents=True)
    (tmp_path / "kernels" / "csrc" / "api.c").write_text("int bitpress_kernel_count(void) { return 0; }\n")
    monkeypatch.setattr(native_library, "_HERE", tmp_path / "kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "cache" / "bitpress"


@pytest.mark.skipif(native_library.compiler() is None, reason="no C compiler")
class TestCache:
    @pytest.mark.parametrize(
        "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"x"]
    )
    def test_what_is_damaged_is_built_again(self, tiny_library: Path, damage: Callable[[bytes], bytes]) -> None:
        first = native_library._build()
        whole = first.read_bytes()
        first.write_bytes(damage(whole))
        assert native_library._build() == first
        assert first.read_bytes() == whole
        assert list(tiny_library.iterdir()) == [first]

    def test_of_somebody_else(self, tiny_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that others may write to is built again; a folder that they may write to is left alone."""
        first = native_library._build()
        first.chmod(0o666)
        assert native_library._build().stat().st_mode & 0o777 == 0o600
        tiny_library.chmod(0o777)
        other = tmp_path / f"bitpress-{os.geteuid()}"
        assert native_library._build().parent == other
        other.chmod(0o775)
        with pytest.raises(OSError, match=r"cache/bitpress is not this user's alone; .* is not this user's alone"):
            native_library._build()

    def test_a_folder_that_is_a_link(self, tiny_library: Path, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        tiny_library.parent.mkdir()
        tiny_library.symlink_to(tmp_path / "theirs")
        assert native_library._build().parent == tmp_path / f"bitpress-{os.geteuid()}"

    def test_without_a_home(self, tiny_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert native_library._build().parent == tmp_path / f"bitpress-{os.geteuid()}"

    def test_a_compiler_in_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "cc").write_text("#!/bin/sh\n")
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", ":.")
        assert native_library.compiler() is None


def check_installed(built: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed library serves as long as every source is as it was; then it is built anew, or that is asked for."""
    installed = here / "_native.abi3.so"
    shutil.copy(built, installed)
    assert native_library._installed() == installed
    for source in (here / "csrc").iterdir():
        text = source.read_text()
        source.write_text(text + "\n")
        assert native_library._installed() is None, source
        with monkeypatch.context() as patch:
            patch.setattr(native_library, "compiler", lambda: None)
            with pytest.raises(OSError, match=r"_native\.abi3\.so is of other sources: install bitpress again"):
                native_library._build()
        source.write_text(text)
    installed.unlink()


@pytest.mark.skipif(native_library.compiler() is None, reason="no C compiler")
def test_built_on_first_use_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = tmp_path / "kernels"
    (here / "csrc").mkdir(parents=True)
    source = Path(native_library.__file__).parent / "csrc"
    for file in source.glob("*.[ch]"):
        shutil.copy(file, here / "csrc")
    monkeypatch.setattr(native_library, "_HERE", here)
    monkeypatch.setattr(native_library, "_FLAGS", [*native_library._FLAGS[1:], "-O0"])  # quicker
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "on first use" in str(native_library.pending())
    first = native_library._build()
    assert native_library.pending() is None
    check_installed(first, here, monkeypatch)
    assert first.parent == tmp_path / "cache" / "bitpress"
    stamp = first.stat().st_mtime_ns
    assert native_library._build() == first
    assert first.stat().st_mtime_ns == stamp
    (here / "csrc" / "api.c").write_text("#error not today\n")
    library.cache_clear()
    try:
        assert "the compiler failed" in str(library())
        assert "not today" in str(library())
    finally:
        library.cache_clear()
    assert len(list(first.parent.iterdir())) == 1  # nothing half made is left


_SANITIZED = """
import sys
from pathlib import Path
import bitpress.kernels.cpu.library as native
native._HERE, native._build = Path({empty!r}), lambda: Path({library!r})
import pytest
options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib"]
sys.exit(pytest.main([*options, {tests!r}, "-k", "products or dequantized"]))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_clean_under_sanitizers(tmp_path: Path) -> None:
    """All products again, with AddressSanitizer and UBSan built in: nothing is read or written out of bounds.

    AMX is emulated, so that its kernels are tried on machines that have none.
    """
    found_library()
    csrc = Path(native_library.__file__).parent / "csrc"
    emulated = Path(__file__).with_name("emulated_amx.c")
    sources = [str(emulated if path.name == "amx.c" else path) for path in sorted(csrc.glob("*.c"))]
    flags = [flag for flag in native_library._FLAGS if not flag.startswith("-O")]
    target = tmp_path / "sanitized.so"
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["gcc", *flags, *sanitizers, f"-I{csrc}", "-shared", "-o", str(target), *sources, "-lm", "-lpthread"]
    subprocess.run(command, check=True)
    names = ("libasan.so", "libubsan.so")
    paths = [
        subprocess.run(["gcc", f"-print-file-name={n}"], capture_output=True, text=True).stdout.strip() for n in names
    ]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("gcc came without its sanitizers")
    code = _SANITIZED.format(empty=str(tmp_path), library=str(target), tests=__file__)
    environment = {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_a_dense_weight_of_few_rows(rows: int, dtype: torch.dtype):
    """As torch in float64, but for rounding to the dtype; outputs beyond a task of 256 and beyond 16 lanes."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(531, 48, generator=generator).to(dtype)
    x = torch.randn(rows, 1, 48, generator=generator).to(dtype)
    want = x.double() @ weight.double().T
    got = native.dense_linear(x, weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_dense_weights_that_are_not_served():
    assert native.dense_unsupported(torch.ones(4, 24)) == "in_features 24 is not a multiple of 16"
    assert "CPU" in str(native.dense_unsupported(torch.ones(4, 32).T))
    assert native.dense_unsupported(torch.ones(4, 32)) is None
