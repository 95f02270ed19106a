"""Methods that need no calibration, by every scheme that they produce: error bounds, zeros, odd shapes, formulas."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitpress.kernels.packing import unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.kernels.weights.base import WeightDescription
from bitpress.kernels.weights.integer import Integer
from bitpress.kernels.weights.nf4 import NF4_CODEBOOK, block_scales
from bitpress.pipeline.methods import absmax, default_method, registry, uncalibrated_method, with_options
from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.methods.base import Method

INTEGERS = [
    f"int{bits}-{group}{asym}" for bits, group, asym in product((2, 3, 4, 8), ("g32", "g128", "channel"), ("", "-asym"))
]
SCHEMES = [Scheme.parse(name) for name in (*INTEGERS, "int8-dynamic", "nf4", "nf4-dq")]
CASES = [
    pytest.param(method, scheme, id=f"{method.name}-{scheme.name}")
    for method in registry().values()
    for scheme in SCHEMES
    if not method.needs_calibration and not method.problems(scheme)
]
INTEGER_CASES = [case for case in CASES if case.values[1].weight.description().type == "int"]
EVERY = pytest.mark.parametrize(("method", "scheme"), CASES)
EVERY_INTEGER = pytest.mark.parametrize(("method", "scheme"), INTEGER_CASES)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KNOWN = ["absmax", "nf4", "gptq", "tune"]  # others join the tests of every method by themselves
NF4_WIDEST_GAP = NF4_CODEBOOK[1] - NF4_CODEBOOK[0]
CONSTANTS = (1e-30, -1e-30, 1e-8, -1e-8, 1.0, -3.0, 6e4, -6e4)


def scale_dtypes(scheme: Scheme) -> tuple[torch.dtype, ...]:
    return DTYPES if scheme.weight.description().type == "int" else (torch.float32,)


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    """Normal, the rows of different size; one row all positive and one all negative, where there are so many."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-2, 0, shape[0]).unsqueeze(1)
    weight[1:2].abs_()
    weight[2:3] = -weight[2:3].abs()
    return weight


def codes(q: QTensor) -> Tensor:
    """Unsigned integer codes [out, groups, group size]."""
    return unpack(q.codes, q.scheme.bits, q.shape[1]).unflatten(1, (q.scales.shape[1], -1))


def bytes_of(q: QTensor) -> list[tuple[str, bytes]]:
    return [(name, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for name, tensor in q.tensors()]


def rounding(scales: Tensor) -> Tensor:
    """How far a stored scale may be from the exact one: half a unit in the last place, subnormals included."""
    info = torch.finfo(scales.dtype)
    return (scales.double() * info.eps).clamp(min=info.tiny * info.eps) / 2


def allowed(weight: Tensor, q: QTensor) -> Tensor:
    """Largest error of each element, float64 [out, in].

    Integers: half a step, and what rounding the scale moves the last code by (its number of steps times the rounding).
    NF4: half of the widest gap between codes; and where scales are quantized too, what that moved them by.
    """
    wide = weight.double()
    if q.scheme.weight.description().type == "int":
        steps = q.scheme.max_code
        limit = q.scales.double() / 2 + steps * rounding(q.scales)
        limit = limit * (1 + 2**-20)  # w / S is computed in float32
        return limit.repeat_interleave(weight.shape[1] // q.scales.shape[1], 1)
    absmax = torch.stack([block.abs().max() for block in wide.flatten().split(64)])
    moved = (block_scales(q.extra | {"scales": q.scales}).double() - absmax).abs()
    limit = absmax * (NF4_WIDEST_GAP / 2 + 2**-20) + moved
    return limit.repeat_interleave(64)[: weight.numel()].view(weight.shape)


def check_bound(method: Method, scheme: Scheme, weight: Tensor, scale_dtype: torch.dtype) -> QTensor:
    q, _ = method.quantize(weight, scheme, scale_dtype)
    q.check()
    found = q.dequantize()
    assert torch.isfinite(found).all()
    excess = (found.double() - weight.double()).abs() - allowed(weight, q)
    assert (excess <= 0).all(), f"{excess.max().item():.3g} above the bound with {scale_dtype}"
    return q


def test_every_scheme_has_a_method() -> None:
    assert {case.values[1].name for case in CASES} == {scheme.name for scheme in SCHEMES}
    assert all(not default_method(scheme).problems(scheme) for scheme in SCHEMES)


class TestEveryMethod:
    @EVERY
    def test_error_is_at_most_half_a_step(self, method: Method, scheme: Scheme) -> None:
        for dtype in scale_dtypes(scheme):
            check_bound(method, scheme, random_weight(9, 256), dtype)

    @EVERY
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_takes_every_weight_dtype(self, method: Method, scheme: Scheme, dtype: torch.dtype) -> None:
        weight = random_weight(5, 128).to(dtype)
        q = check_bound(method, scheme, weight, torch.float32)
        assert bytes_of(q) == bytes_of(method.quantize(weight.float(), scheme, torch.float32)[0])

    @EVERY
    def test_odd_shapes(self, method: Method, scheme: Scheme) -> None:
        width = scheme.group_size if scheme.weight.description().type == "int" else None
        widths = (width, 3 * width) if width else (1, 31, 65, 257)
        for rows, columns in product((1, 7, 31, 101), widths):
            check_bound(method, scheme, random_weight(rows, columns), torch.float32)

    @EVERY
    def test_a_transposed_view_is_read_as_it_looks(self, method: Method, scheme: Scheme) -> None:
        """Conv1D weights are stored [in, out]."""
        stored = random_weight(256, 24)
        expected, _ = method.quantize(stored.t().contiguous(), scheme, torch.float32)
        assert bytes_of(method.quantize(stored.t(), scheme, torch.float32)[0]) == bytes_of(expected)

    @EVERY
    def test_zeros_stay_zero(self, method: Method, scheme: Scheme) -> None:
        weight = random_weight(5, 256)
        weight[0, :128] = 0  # whole groups
        weight[3] = 0  # a whole row
        weight[4, ::2] = 0  # zeros among others: exact in integer codes and in NF4 alike
        for dtype in scale_dtypes(scheme):
            q = check_bound(method, scheme, weight, dtype)
            assert (q.dequantize()[weight == 0] == 0).all()
            if scheme.weight.description().type == "int":
                empty = (weight.unflatten(1, (q.scales.shape[1], -1)) == 0).all(-1)
                assert empty[3].all()
                assert (q.scales[empty] == 1).all()
                assert q.zeros is None or (q.zeros[empty] == 0).all()

    @EVERY
    @pytest.mark.parametrize("shape", [(1, 128), (3, 128), (3, 384)])
    def test_nothing_but_zeros(self, method: Method, scheme: Scheme, shape: tuple[int, int]) -> None:
        for dtype in scale_dtypes(scheme):
            q, diagnostics = method.quantize(torch.zeros(shape), scheme, dtype)
            q.check()
            assert (q.dequantize() == 0).all()
            assert diagnostics.relative_error == 0

    @EVERY
    @pytest.mark.parametrize("constant", CONSTANTS)
    def test_constant_groups(self, method: Method, scheme: Scheme, constant: float) -> None:
        weight = torch.full((3, 256), constant)
        for dtype in scale_dtypes(scheme):
            found = check_bound(method, scheme, weight, dtype).dequantize()
            assert (found * constant >= 0).all()  # the sign is kept
            if abs(constant) >= 1 or dtype != torch.float16:
                assert (found != 0).all()

    @EVERY
    def test_one_thread_or_two_and_again_the_same_bytes(self, method: Method, scheme: Scheme) -> None:
        weight, threads = random_weight(2100, 512), torch.get_num_threads()
        found = []
        try:
            for count in (1, 1, 1, 2, 2):
                torch.set_num_threads(count)
                q, diagnostics = method.quantize(weight, scheme, torch.float32)
                found.append((bytes_of(q), diagnostics))
        finally:
            torch.set_num_threads(threads)
        assert all(one == found[0] for one in found)

    @EVERY
    def test_relative_error_is_what_was_lost(self, method: Method, scheme: Scheme) -> None:
        weight = random_weight(37, 256).double()
        for dtype in scale_dtypes(scheme):
            q, diagnostics = method.quantize(weight.float(), scheme, dtype)
            expected = (torch.linalg.norm(weight - q.dequantize().double()) / torch.linalg.norm(weight)).item()
            assert diagnostics.relative_error == pytest.approx(expected, rel=1e-3)  # summed in float32

    @EVERY
    def test_the_weight_is_not_written_to(self, method: Method, scheme: Scheme) -> None:
        weight = random_weight(5, 256)
        before = weight.clone()
        method.quantize(weight, scheme, torch.float32)
        assert torch.equal(weight, before)


class TestIntegers:
    @EVERY_INTEGER
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_codes_come_from_the_scale_that_is_stored(self, method: Method, scheme: Scheme, dtype: torch.dtype) -> None:
        weight = random_weight(64, 512)
        q, _ = method.quantize(weight, scheme, dtype)
        groups = weight.unflatten(1, (q.scales.shape[1], -1))

        def encoded(scales: Tensor) -> Tensor:
            zeros = scheme.middle if q.zeros is None else q.zeros.float().unsqueeze(-1)
            return ((groups / scales.float().unsqueeze(-1)).round() + zeros).clamp(0, scheme.max_code).to(torch.uint8)

        exact, _ = method.quantize(weight, scheme, torch.float32)
        assert torch.equal(codes(q), encoded(q.scales))
        if q.zeros is None or torch.equal(q.zeros, exact.zeros):
            assert not torch.equal(codes(q), encoded(exact.scales))  # it makes a difference

    @pytest.mark.parametrize(("method", "scheme"), [case for case in INTEGER_CASES if case.values[1].symmetric])
    def test_the_positive_end_of_symmetric_codes_is_clipped(self, method: Method, scheme: Scheme) -> None:
        """S = 2 max|w| / (2^n - 1) puts +max at 7.5 steps (n = 4), and the last code stands for 7."""
        weight = torch.zeros(2, 128)
        weight[0, ::32], weight[1, ::32] = 7.5, -7.5
        q, _ = method.quantize(weight, scheme, torch.float32)
        step = 15 / scheme.max_code
        torch.testing.assert_close(q.scales, torch.full_like(q.scales, step))
        found = q.dequantize()[:, ::32]
        torch.testing.assert_close(found[0], torch.full((4,), 7.5 - step / 2))
        torch.testing.assert_close(found[1], torch.full((4,), -7.5 - step / 2))

    @EVERY_INTEGER
    def test_a_scale_beyond_float16_is_refused_with_the_number(self, method: Method, scheme: Scheme) -> None:
        top = 7e4 * scheme.max_code
        weight = torch.zeros(2, 128)
        weight[1, 0] = top / 2 if scheme.symmetric else top
        with pytest.raises(ValueError, match=r"7e\+04 does not fit torch\.float16"):
            method.quantize(weight, scheme, torch.float16)
        check_bound(method, scheme, weight, torch.bfloat16)

    def test_the_worked_example(self) -> None:
        weight = torch.tensor([[1.2, 2.5, 3.7, 4.1]])
        q, _ = Absmax().quantize(weight, Scheme.parse("int8-channel-asym"), torch.float32)
        assert q.scales.item() == pytest.approx(4.1 / 255, rel=1e-6)
        assert q.zeros is not None
        assert q.zeros.item() == 0
        assert codes(q).flatten().tolist() == [75, 155, 230, 255]
        torch.testing.assert_close(q.dequantize(), weight, rtol=0, atol=4.1 / 255 / 2)


SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
values = st.floats(-6e4, 6e4, width=32)


def rounded(value: float) -> set[int]:
    """Nearest whole numbers in float64; both where float32's division may have crossed the middle."""
    return {round(value)} | ({math.floor(value), math.ceil(value)} if abs(value % 1 - 0.5) < 1e-4 else set())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    row=st.lists(values, min_size=1, max_size=9),
    bits=st.sampled_from((2, 3, 4, 8)),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_the_formulas_number_by_number(row: list[float], bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    """S = (max - min) / (2^n - 1), Z = round(-min / S), q = clamp(round(w / S) + Z, 0, 2^n - 1), w' = S (q - Z)."""
    scheme, last = Scheme(Integer(bits, None, symmetric)), 2**bits - 1
    q, _ = Absmax().quantize(torch.tensor([row]), scheme, dtype)
    q.check()
    low, high = min(*row, 0.0, 0.0), max(*row, 0.0, 0.0)
    spread = 2 * max(high, -low) if symmetric else high - low
    scale = q.scales.item()
    exact = max(spread / last, SMALLEST[dtype]) if spread else 1.0
    ulp = max(exact * torch.finfo(dtype).eps, SMALLEST[dtype] if dtype == torch.float16 else 0.0)
    assert abs(scale - exact) <= ulp / 2 + exact * 2**-23  # the difference and the quotient are rounded to float32
    if q.zeros is None:
        zero = 2 ** (bits - 1)
    else:
        zero = int(q.zeros)
        assert zero in {min(max(z, 0), last) for z in rounded(-low / scale)}
    for weight, code, found in zip(row, codes(q).flatten().tolist(), q.dequantize().flatten().tolist()):
        assert code in {min(max(nearest + zero, 0), last) for nearest in rounded(weight / scale)}
        assert found == torch.tensor(scale * (code - zero), dtype=torch.float64).float().item()


class TestNF4:
    @pytest.mark.parametrize("double", [False, True])
    @pytest.mark.parametrize("shape", [(1, 64), (31, 65), (128, 257)])
    def test_is_what_bitsandbytes_makes(self, double: bool, shape: tuple[int, int]) -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = random_weight(*shape)
        q, _ = registry()["nf4"].quantize(weight, Scheme.parse("nf4-dq" if double else "nf4"), torch.float32)
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
        assert torch.equal(q.codes, packed.flatten())
        # their double-quantized scales may be multiplied and added in one step: one rounding less
        rtol = 2**-22 if double else 0
        torch.testing.assert_close(q.dequantize(), dequantize_4bit(packed, state), rtol=rtol, atol=0)

    @pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
    def test_a_last_short_block_of_zeros(self, name: str) -> None:
        weight = random_weight(1, 64 * 3 + 5)
        weight[0, 64 * 3 :] = 0
        q, _ = registry()["nf4"].quantize(weight, Scheme.parse(name), torch.float32)
        assert (q.dequantize()[0, 64 * 3 :] == 0).all()


class TestRegistry:
    def test_in_the_order_of_their_ranks(self) -> None:
        assert [method.rank for method in registry().values()] == sorted(method.rank for method in registry().values())
        assert [name for name in registry() if name in KNOWN] == KNOWN

    def test_defaults(self) -> None:
        for name, method in {"int4-g128": "absmax", "int8-dynamic": "absmax", "nf4": "nf4", "nf4-dq": "nf4"}.items():
            assert default_method(Scheme.parse(name)).name == method
            uncalibrated = uncalibrated_method(Scheme.parse(name))
            assert uncalibrated is not None
            assert uncalibrated.name == method

    def test_what_each_needs(self) -> None:
        needs = {name: (registry()[name].needs_calibration, registry()[name].packages) for name in KNOWN}
        calibrated = dict.fromkeys(("gptq", "tune"), (True, ()))
        assert needs == {"absmax": (False, ()), "nf4": (False, ("bitsandbytes",))} | calibrated

    def test_a_transform_alone_needs_calibration_too(self) -> None:
        class Transforms(Absmax):
            def transform(self, block: Any) -> None:
                block.set("w", block.tensor("w"))

        assert Transforms().needs_calibration

    def test_no_options_leave_a_method_what_it_is(self) -> None:
        for method in registry().values():
            assert with_options(method, {}) is method


@dataclass(frozen=True)
class OneScale:
    """Integers -127..127 with one scale for the whole weight."""

    name = "one-scale"

    def description(self) -> WeightDescription:
        return WeightDescription("int", 8, "tensor")

    def nearest(self, weight: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        scale = (weight.float().abs().max() / 127).to(scale_dtype)
        return {"codes": (weight / scale.float()).round().to(torch.int8), "scales": scale}

    def dequantize(self, shape: tuple[int, int], tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["codes"] * tensors["scales"].float()).to(dtype)


def test_absmax_rounds_a_weight_whose_rows_share_a_scale_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absmax, "_CHUNK", 64)  # else it would be one chunk anyway
    weight = random_weight(9, 32)
    q, diagnostics = Absmax().quantize(weight, Scheme(OneScale()), torch.float32)
    assert q.scales.item() == pytest.approx(weight.abs().max().item() / 127)
    assert (q.dequantize() - weight).abs().max() <= q.scales / 2 * (1 + 2**-20)
    lost = torch.linalg.norm(q.dequantize() - weight) / torch.linalg.norm(weight)
    assert diagnostics.relative_error == pytest.approx(lost.item(), rel=1e-5)
