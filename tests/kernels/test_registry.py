"""Every kernel against float64 on the dequantized weight (for int8-dynamic: and on the quantized input)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitpress.kernels.base import Kernel
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry, select

from .cpu.test_native import rounded

Make = Callable[..., QTensor]

CPU = torch.device("cpu")
ROWS = (1, 2, 7, 31, 32, 33, 65, 0)
SHAPES = {
    "int2-g32": [(5, 64)],
    "int3-channel": [(13, 31)],
    "int4-g32": [(1, 32), (13, 64), (63, 96), (64, 128), (65, 160), (577, 64)],
    "int4-g32-asym": [(1, 32), (65, 96), (577, 64)],
    "int4-g64-asym": [(31, 64), (128, 192)],
    "int4-g128": [(17, 128), (127, 256), (128, 384)],
    "int4-g256": [(33, 256)],
    "int4-g96": [(16, 96), (33, 480)],
    "int4-channel": [(1, 1), (13, 31), (7, 32), (64, 288), (64, 512)],
    "int4-channel-asym": [(129, 192)],
    "int8-g32": [(3, 64)],
    "int8-g128-asym": [(33, 256)],
    "int8-channel": [(1, 1), (31, 300)],
    "int8-dynamic": [(1, 1), (1, 64), (13, 1), (13, 31), (63, 65), (64, 64), (65, 63), (257, 129)],
    "int8-static": [(1, 1), (63, 65)],
    "int8-static-asym": [(13, 31), (257, 129)],
    "int8-dynamic-asym": [(1, 1), (13, 31), (257, 129)],
    "nf4": [(1, 1), (13, 31), (31, 64), (32, 64), (33, 128), (544, 192), (64, 96)],
    "nf4-dq": [(1, 64), (31, 65), (64, 128), (96, 192), (577, 64)],
}
KERNELS = [kernel.name for kernel in registry()]
SERVES: dict[str, tuple[str, ...]] = {  # how a scheme's name begins; else all
    "torch-int4": ("int4",), "torch-int8": ("int8-dynamic", "int8-static"), "bnb-nf4": ("nf4",)
}  # fmt: skip
CASES = [
    (kernel, scheme, shape)
    for kernel in KERNELS
    for scheme, shapes in SHAPES.items()
    if scheme.startswith(SERVES.get(kernel, ("",)))
    for shape in shapes
]


def kernel_named(name: str) -> Kernel:
    return next(kernel for kernel in registry() if kernel.name == name)


def read_inputs(name: str, q: QTensor, x: Tensor) -> Tensor:
    """float64 [rows, in]: what a kernel makes of its inputs before it multiplies."""
    bits = kernel_named(name).input_bits if q.scheme.activations is None else (8, 8)
    return x.double() if bits is None else rounded(x, q, bits)


def relative_rms(found: Tensor, q: QTensor, x: Tensor, bias: Tensor | float = 0, name: str = "") -> float:
    """RMS error of the kernel of that name, relative to the larger of the exact product and of what independent terms
    would add up to.

    The latter because weights are rounded one by one, and terms may cancel: in a product of few elements, all do.
    """
    inputs, weight = read_inputs(name, q, x), q.dequantize().double().t()
    expected = inputs @ weight + bias
    if not expected.numel():
        return 0.0
    terms = (inputs.square() @ weight.square()).sqrt()
    return float((found.double() - expected).norm() / torch.maximum(expected.norm(), terms.norm()))


def tolerance(q: QTensor, dtype: torch.dtype, count: int = 64, name: str = "") -> float:
    """For the relative_rms of `count` elements of the kernel of that name.

    An output is rounded by at most 2^-8 (bfloat16) or 2^-11 (float16) of its value, 0.41 of that in RMS. So are the
    weights, or their scales and zeros: below 2^-8 (2^-11) in RMS together, and twice as much where elements are few.
    INT8 products are exact, so that the output's rounding is all. float32: sums of up to 512 terms, in any order.
    The native kernels round scales to float16, and with integer inputs NF4's code book by 0.0020 in RMS: 0.4% of values
    that are 0.55 in RMS.
    """
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    if name.startswith("native") and not q.scheme.activations:
        rounding += 2.0**-11
        if name != "native-bf16" and q.scheme.weight.description().type == "codebook":
            rounding += 2.0**-7
    return rounding * (1 if q.scheme.activations or count >= 64 else 2) + 2.0**-20


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "scheme", "shape"), CASES)
def test_product(
    make_qtensor: Make, generator: torch.Generator, name: str, scheme: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    q, kernel = make_qtensor(scheme, *shape), kernel_named(name)
    q.check()
    if reason := kernel.unsupported(q, dtype, CPU):
        pytest.skip(reason)
    packed = kernel.pack(q, dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        with torch.inference_mode():
            y = kernel.linear(x, packed, None)
        assert y.shape == (rows, shape[0])
        assert y.dtype == dtype
        assert relative_rms(y, q, x, name=name) <= tolerance(q, dtype, y.numel(), name), rows


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int8-dynamic", "nf4-dq"])
@pytest.mark.parametrize("name", KERNELS)
def test_forms_of_input(make_qtensor: Make, generator: torch.Generator, name: str, scheme: str) -> None:
    """1, 2 and 3 dimensions, views, bias of the input's dtype or float32: all the same product."""
    q, kernel, dtype = make_qtensor(scheme, 66 if name != "bnb-nf4" else 64, 64), kernel_named(name), torch.bfloat16
    if reason := kernel.unsupported(q, dtype, CPU):
        pytest.skip(reason)
    packed = kernel.pack(q, dtype)
    bias = torch.randn(q.shape[0], generator=generator)
    cube = torch.randn(64, 50, 2, generator=generator).to(dtype)
    for x in (cube[:, 0, 0], cube[..., 0].t(), cube.permute(2, 1, 0), cube[:, :0, 0].t(), cube[:, :0].permute(2, 1, 0)):
        for b in (None, bias, bias.to(dtype)):
            with torch.no_grad():
                y = kernel.linear(x, packed, b)
            assert y.shape == (*x.shape[:-1], q.shape[0])
            assert y.dtype == dtype
            assert y.is_contiguous()
            error = relative_rms(y, q, x, 0 if b is None else b.double(), name)
            assert error <= tolerance(q, dtype, name=name) + 2**-9  # the bias added


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("int4-g64", "torch-int4"),
        ("int8-dynamic", "torch-int8"),
        ("nf4", "bnb-nf4"),
        ("int4-g32", "native-int8"),
        ("int8-dynamic", "native-int8"),
        ("int8-static", "native-int8"),
        ("int8-static-asym", "native-int8"),
        ("nf4", "native-int8"),
        ("int4-g32", "native-mixed"),
        ("nf4", "native-mixed"),
        ("int4-g32", "native-int16"),
        ("nf4", "native-int16"),
        ("int4-g64", "native-bf16"),
        ("nf4", "native-bf16"),
        ("nvfp4", "native-int16"),
        ("mxfp4", "native-bf16"),
        ("fp8", "native-bf16"),
        ("fp8-dynamic", "native-bf16"),
        ("fp8-static", "native-bf16"),
    ],
)
def test_nan_in_the_input_shows(make_qtensor: Make, scheme: str, name: str, rows: int) -> None:
    q, kernel = make_qtensor(scheme, 64, 64), kernel_named(name)
    if reason := kernel.unsupported(q, torch.bfloat16, CPU):
        pytest.skip(reason)
    x = torch.ones(rows, 64, dtype=torch.bfloat16)
    x[1, 5] = torch.nan
    y = kernel.linear(x, kernel.pack(q, torch.bfloat16), None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-dynamic-asym", "int8-static", "int8-static-asym"])
@pytest.mark.parametrize("name", ["torch-int8", "native-int8"])
def test_int8_is_exact_at_the_ends_of_its_range(make_qtensor: Make, scheme: str, name: str) -> None:
    """Codes of -128 and 127 on both sides, infinities among the inputs of a range that has an end."""
    q, kernel = make_qtensor(scheme, 64, 96), kernel_named(name)
    if reason := kernel.unsupported(q, torch.float32, CPU):
        pytest.skip(reason)
    q.codes.fill_(0)
    q.codes[::2] = -1  # the code 255
    q.scales.fill_(1)
    x = torch.full((9, 96), -127.0)
    x[1::2] = 127
    if q.scheme.static:
        q.extra["input_scale"].fill_(0.5)
        x[3:5] *= torch.inf
    expected = kernel_named("reference").linear(x, kernel_named("reference").pack(q, torch.float32), None)
    assert torch.equal(kernel.linear(x, kernel.pack(q, torch.float32), None), expected)


@pytest.mark.parametrize("name", ["torch-int8", "native-int8"])
def test_int8_rows_are_independent(make_qtensor: Make, generator: torch.Generator, name: str) -> None:
    """A row's result does not depend on how many rows come with it."""
    q, kernel = make_qtensor("int8-dynamic", 65, 64), kernel_named(name)
    if reason := kernel.unsupported(q, torch.float32, CPU):
        pytest.skip(reason)
    packed = kernel.pack(q, torch.float32)
    x = torch.randn(33, 64, generator=generator)
    assert torch.equal(kernel.linear(x, packed, None)[:1], kernel.linear(x[:1], packed, None))


@pytest.mark.parametrize(
    ("kernel", "scheme", "shape", "dtype", "device", "word"),
    [
        ("native-int8", "int4-g32", (64, 64), torch.float64, "cpu", "inputs are torch.float64"),
        ("native-int8", "int4-g32", (64, 64), torch.bfloat16, "cuda", "runs on CPUs, not on cuda"),
        ("native-int8", "int4-g48", (64, 96), torch.bfloat16, "cpu", "group_size 48 is not a multiple of 32"),
        ("native-int8", "nf4", (64, 96), torch.bfloat16, "cpu", "in_features 96 is not divisible by 64"),
        ("native-int8", "int8-dynamic", (1, 70000), torch.bfloat16, "cpu", "in_features 70000 is more than 65536"),
        ("native-bf16", "int8-dynamic", (64, 64), torch.bfloat16, "cpu", "int8-dynamic quantizes its inputs"),
        ("torch-int4", "int3-g32", (64, 64), torch.bfloat16, "cpu", "4-bit integer weights only"),
        ("torch-int4", "nf4", (64, 64), torch.bfloat16, "cpu", "4-bit integer weights only"),
        ("torch-int4", "int4-g32", (64, 64), torch.float16, "cpu", "inputs are torch.float16"),
        ("torch-int4", "int4-g48", (64, 96), torch.bfloat16, "cpu", "group_size 48 is not a multiple of 32"),
        ("torch-int4", "int4-channel", (64, 31), torch.bfloat16, "cpu", "in_features 31 is not divisible by 32"),
        ("torch-int4", "int4-g32", (64, 64), torch.bfloat16, "meta", "x86 CPUs and NVIDIA GPUs"),
        ("torch-int8", "int8-channel", (64, 64), torch.float32, "cpu", "serves int8-dynamic, int8-dynamic-asym"),
        ("torch-int8", "int8-dynamic", (64, 64), torch.int32, "cpu", "inputs are torch.int32"),
        ("torch-int8", "int8-dynamic", (64, 64), torch.float32, "meta", "not on meta"),
        ("torch-int8", "int8-dynamic", (63, 64), torch.float32, "cuda", "not divisible by 8"),
        ("triton-int4", "int8-g32", (64, 64), torch.bfloat16, "cuda", "2 to 4 bits only"),
        ("triton-int4", "nf4", (64, 64), torch.bfloat16, "cuda", "2 to 4 bits only"),
        ("triton-int4", "int4-g32", (64, 64), torch.float32, "cuda", "inputs are torch.float32"),
        ("triton-int4", "int4-g48", (64, 96), torch.bfloat16, "cuda", "group_size 48 is not a multiple of 32"),
        ("triton-int4", "int4-g32", (64, 64), torch.bfloat16, "cpu", "NVIDIA GPUs, not on cpu"),
        ("bnb-nf4", "int4-g64", (64, 64), torch.bfloat16, "cpu", "nf4 and nf4-dq only"),
        ("bnb-nf4", "nf4", (64, 64), torch.float64, "cpu", "inputs are torch.float64"),
        ("bnb-nf4", "nf4", (64, 96), torch.float32, "cpu", "in_features 96 is not divisible by 64"),
        ("bnb-nf4", "nf4", (64, 64), torch.float32, "meta", "not on meta"),
    ],
)
def test_reasons_for_rejection(
    make_qtensor: Make, kernel: str, scheme: str, shape: tuple[int, int], dtype: torch.dtype, device: str, word: str
) -> None:
    reason = kernel_named(kernel).unsupported(make_qtensor(scheme, *shape), dtype, torch.device(device))
    assert reason is not None
    assert word in reason


def test_select_falls_back_and_says_why(make_qtensor: Make) -> None:
    selection = select(make_qtensor("int3-g48", 64, 96), torch.float32, CPU)
    assert selection.kernel.name == "reference"
    assert list(selection.rejected) == KERNELS[:-1]
    assert all(selection.rejected.values())


@pytest.mark.parametrize("scheme", ["int4-g32", "nf4", "int8-dynamic"])
@pytest.mark.parametrize(
    ("wanted", "kernel", "rejected"),
    [
        (
            "auto",
            "native-mixed",
            {"native-int8": "rounds inputs to 8 bits; auto asks for 8 bits, and outliers to 16"},
        ),
        (
            "auto-int16",
            "native-int16",
            {
                "native-int8": "rounds inputs to 8 bits; auto-int16 asks for 16 bits",
                "native-mixed": "rounds inputs to 8 bits, and outliers to 16; auto-int16 asks for 16 bits",
            },
        ),
        ("auto-int8", "native-int8", {}),
        (
            "auto-bf16",
            "native-bf16",
            {
                f"native-{kind}": f"rounds inputs to {words}; auto-bf16 asks for inputs that stay as they are"
                for kind, words in (
                    ("int8", "8 bits"),
                    ("mixed", "8 bits, and outliers to 16"),
                    ("int16", "16 bits"),
                )
            },
        ),
    ],
)
def test_how_far_inputs_may_be_rounded(
    make_qtensor: Make, scheme: str, wanted: str, kernel: str, rejected: dict[str, str]
) -> None:
    """Those of weight-only schemes: int8-dynamic says itself what becomes of them, so one kernel serves it always."""
    q, fastest = make_qtensor(scheme, 64, 64), kernel_named("native-int8")
    if reason := fastest.unsupported(q, torch.float32, CPU):
        pytest.skip(reason)
    selection = select(q, torch.float32, CPU, wanted)
    if scheme == "int8-dynamic":
        kernel, rejected = "native-int8", {}
    assert (selection.kernel.name, selection.rejected) == (kernel, rejected)


def test_select_by_name(make_qtensor: Make) -> None:
    q = make_qtensor("int4-g32", 64, 64)
    assert select(q, torch.bfloat16, CPU, "reference").kernel.name == "reference"
    assert select(q, torch.bfloat16, CPU, "reference").rejected == {}
    with pytest.raises(
        ValueError,
        match=r"kernel 'torch-int5' is unknown; use auto, auto-int16, auto-int8, auto-bf16, or one of native.*ref",
    ):
        select(q, torch.bfloat16, CPU, "torch-int5")
    with pytest.raises(
        ValueError, match=r"kernel torch-int4 cannot run int4-g32 here: inputs are torch.float32.*; use auto"
    ):
        select(q, torch.float32, CPU, "torch-int4")


def test_reference_serves_everything_and_comes_last() -> None:
    assert KERNELS[-1] == "reference"
    assert len(set(KERNELS)) == len(KERNELS)
