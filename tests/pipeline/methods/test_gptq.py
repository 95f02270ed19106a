"""GPTQ against the paper's algorithm, written out slowly in float64, and against trying everything."""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hessians import correlated, hessian_of
from torch import Tensor

from bitpress.kernels.packing import unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.methods import gptq, with_options
from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.methods.base import Diagnostics
from bitpress.pipeline.methods.gptq import GPTQ

SCHEMES = [
    Scheme.parse(f"int{bits}-{group}{asym}")
    for bits, group, asym in product((2, 3, 4, 8), ("g32", "channel"), ("", "-asym"))
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EVERY = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Normal, the rows of different size; one row all positive and one all negative, where there are so many."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 0, rows).unsqueeze(1)
    weight[1:2].abs_()
    weight[2:3] = -weight[2:3].abs()
    return weight


def quantized(
    weight: Tensor, inputs: Tensor, scheme: Scheme | str, method: GPTQ | None = None, dtype: torch.dtype = torch.float32
) -> tuple[QTensor, Diagnostics]:
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    q, diagnostics = (method or GPTQ()).quantize(weight, scheme, dtype, (hessian_of(inputs),))
    q.check()
    assert diagnostics.fallback is None
    return q, diagnostics


def centred(q: QTensor) -> Tensor:
    """Codes less their zero points, float64 [out, in]."""
    codes = unpack(q.codes, q.scheme.bits, q.shape[1]).double()
    zeros = torch.full_like(q.scales, q.scheme.middle) if q.zeros is None else q.zeros
    return codes - zeros.double().repeat_interleave(q.shape[1] // q.scales.shape[1], 1)


def scales(q: QTensor) -> Tensor:
    """float64 [out, in]."""
    return q.scales.double().repeat_interleave(q.shape[1] // q.scales.shape[1], 1)


def limits(q: QTensor) -> tuple[Tensor, Tensor]:
    """The least and the largest centred code of each weight."""
    low = -(torch.full_like(q.scales, q.scheme.middle) if q.zeros is None else q.zeros).double()
    low = low.repeat_interleave(q.shape[1] // q.scales.shape[1], 1)
    return low, low + q.scheme.max_code


def damped(inputs: Tensor, damping: float) -> Tensor:
    """X^T X + damping * mean diagonal, float64."""
    matrix = inputs.double().t() @ inputs.double()
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def loss(weight: Tensor, found: Tensor, matrix: Tensor) -> float:
    error = weight.double() - found.double()
    return (error @ matrix * error).sum().item()


def bytes_of(q: QTensor) -> list[bytes]:
    return [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for _, tensor in q.tensors()]


def papers_misses(weight: Tensor, q: QTensor, matrix: Tensor, order: list[int]) -> Tensor:
    """How far each code is from being what the paper's algorithm rounds to: 0 where it is that.

    Equations 2 and 3 of arXiv 2210.17323, column by column: quantize column j, spread its error over all columns that
    are left by row j of the inverse Hessian of what is left, and take column j out of that inverse by one step of
    Gaussian elimination. It goes on with the codes that are under test, so that each is judged by itself.
    """
    inverse, left, misses = torch.linalg.inv(matrix), weight.double().clone(), torch.zeros(q.shape).double()
    (low, high), step, codes = limits(q), scales(q), centred(q)
    for j in order:
        ideal = (left[:, j] / step[:, j]).clamp(low[:, j], high[:, j])
        misses[:, j] = ((ideal - codes[:, j]).abs() - 0.5).clamp(min=0)
        error = (left[:, j] - codes[:, j] * step[:, j]) / inverse[j, j]
        left -= error.unsqueeze(1) * inverse[j].unsqueeze(0)
        inverse -= inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j].clone()
    return misses


class TestThePapersAlgorithm:
    @pytest.mark.parametrize("act_order", [True, False])
    @EVERY
    def test_codes_are_the_papers_for_the_scales_given(self, scheme: Scheme, act_order: bool) -> None:
        inputs, weight = correlated(400, 96), random_weight(11, 96)
        q, _ = quantized(weight, inputs, scheme, GPTQ(rounds=1, passes=0, act_order=act_order, damping=1e-2))
        matrix = damped(inputs, 1e-2)
        order = sorted(range(96), key=lambda j: -matrix[j, j].item()) if act_order else list(range(96))
        misses = papers_misses(weight, q, matrix, order)
        # Not one code is off by more than float32's rounding makes of a tie; that happens once in a thousand codes.
        assert misses.max().item() < 2e-3 * 2 ** max(0, scheme.bits - 4)
        assert (misses > 0).double().mean().item() < 1e-3
        other = list(range(96)) if act_order else list(range(95, -1, -1))
        assert (papers_misses(weight, q, matrix, other) > 0.01).double().mean().item() > 0.1, "the order matters"

    @pytest.mark.parametrize(("block", "panel", "rows"), [(1, 4, 1), (5, 7, 3), (32, 96, 4), (200, 200, 200)])
    def test_block_and_panel_sizes_change_no_code_but_ties(
        self, block: int, panel: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inputs, weight, matrix = correlated(400, 96), random_weight(11, 96), damped(correlated(400, 96), 1e-2)
        order = sorted(range(96), key=lambda j: -matrix[j, j].item())
        expected, _ = quantized(weight, inputs, "int4-g32", GPTQ(damping=1e-2))
        for name, value in {"_BLOCK": block, "_ROWS": (rows, rows)}.items():
            monkeypatch.setattr(gptq, name, value)
        monkeypatch.setattr("bitpress.pipeline.methods.hessian._PANEL", panel)
        monkeypatch.setattr("bitpress.pipeline.methods.hessian._INVERTED", panel)
        q, _ = quantized(weight, inputs, "int4-g32", GPTQ(rounds=1, passes=0, damping=1e-2))
        assert papers_misses(weight, q, matrix, order).max().item() < 2e-3
        full, _ = quantized(weight, inputs, "int4-g32", GPTQ(damping=1e-2))
        found, before = (loss(weight, one.dequantize(), matrix) for one in (full, expected))
        assert found == pytest.approx(before, rel=0.02)  # a tie decided otherwise goes another way from there on

    def test_codes_come_from_the_scales_that_are_stored(self) -> None:
        inputs, weight = correlated(400, 64), random_weight(11, 64)
        matrix = damped(inputs, 1e-2)
        order = sorted(range(64), key=lambda j: -matrix[j, j].item())
        for dtype in DTYPES:
            q, _ = quantized(weight, inputs, "int4-g32", GPTQ(rounds=1, passes=0, damping=1e-2), dtype)
            assert q.scales.dtype == dtype
            assert papers_misses(weight, q, matrix, order).max().item() < 2e-3


class TestDescent:
    @pytest.mark.parametrize("dtype", DTYPES)
    @EVERY
    def test_never_makes_the_loss_worse(self, scheme: Scheme, dtype: torch.dtype) -> None:
        inputs, weight = correlated(200, 64), random_weight(9, 64)
        matrix = damped(inputs, 1e-4)
        found = [quantized(weight, inputs, scheme, GPTQ(passes=n), dtype)[0] for n in (0, 1, 2, 6)]
        losses = [loss(weight, q.dequantize(), matrix) for q in found]
        # float32 sums of errors that nearly cancel
        assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(losses))
        assert losses[1] < losses[0]

    @pytest.mark.parametrize("name", ["int2-channel", "int3-channel-asym", "int4-g3", "int2-g2-asym"])
    def test_ends_where_no_code_by_itself_can_be_better(self, name: str) -> None:
        """Every other value of every code is tried, all others and the scales as they are."""
        for seed in range(10):
            inputs, weight = correlated(40, 6, seed), random_weight(3, 6, seed)
            q, _ = quantized(weight, inputs, name, GPTQ(passes=10))
            matrix, codes, step = damped(inputs, 1e-4), centred(q), scales(q)
            least = loss(weight, codes * step, matrix)
            (low, high) = limits(q)
            for row, column in product(range(3), range(6)):
                for code in range(int(low[row, column]), int(high[row, column]) + 1):
                    other = codes.clone()
                    other[row, column] = code
                    assert loss(weight, other * step, matrix) >= least * (1 - 1e-5)

    @pytest.mark.parametrize("name", ["int2-channel", "int2-g2-asym", "int3-channel"])
    def test_is_near_the_best_of_all_codes(self, name: str) -> None:
        """All combinations of codes for four inputs, with the scales that were found: the best is not far below."""
        ratios = []
        for seed in range(20):
            inputs, weight = correlated(40, 4, seed), random_weight(1, 4, seed)
            q, _ = quantized(weight, inputs, name)
            matrix, step, (low, high) = damped(inputs, 1e-4), scales(q), limits(q)
            choices = [range(int(low[0, j]), int(high[0, j]) + 1) for j in range(4)]
            every = torch.tensor(list(product(*choices)), dtype=torch.float64) * step - weight.double()
            best = (every @ matrix * every).sum(1).min().item()
            ratios.append(loss(weight, q.dequantize(), matrix) / best)
        assert min(ratios) > 1 - 1e-5
        assert sorted(ratios)[10] < 1.05, "mostly it is the best itself"

    def test_scales_are_refitted(self) -> None:
        """Given its codes, a group's scale is the best there is: moving it by a hundredth makes the loss worse."""
        inputs, weight = correlated(200, 32), random_weight(4, 32)
        q, _ = quantized(weight, inputs, "int4-channel", GPTQ(passes=10))
        matrix, codes, step = damped(inputs, 1e-4), centred(q), scales(q)
        for row in range(4):
            one = [loss(weight[row], codes[row] * step[row] * f, matrix) for f in (0.99, 1.0, 1.01)]
            assert one[1] == min(one)


class TestEveryScheme:
    @EVERY
    def test_less_output_error_than_absmax(self, scheme: Scheme) -> None:
        for seed, dtype in enumerate(DTYPES):
            inputs, weight = correlated(300, 128, seed), random_weight(9, 128, seed)
            q, diagnostics = quantized(weight, inputs, scheme, dtype=dtype)
            plain, _ = Absmax().quantize(weight, scheme, dtype)
            matrix = damped(inputs, 0)
            found, before = (loss(weight, one.dequantize(), matrix) for one in (q, plain))
            assert found < 0.7 * before
            norm = loss(weight, torch.zeros_like(weight), matrix)
            assert diagnostics.output_error == pytest.approx(math.sqrt(found / norm), rel=1e-2)  # summed in float32
            relative = (torch.linalg.norm(weight - q.dequantize()) / torch.linalg.norm(weight)).item()
            assert diagnostics.relative_error == pytest.approx(relative, rel=1e-3)
            assert (diagnostics.tokens, diagnostics.damping) == (300, 1e-4)

    @EVERY
    @pytest.mark.parametrize("tokens", [60, 300])
    def test_less_than_absmax_for_ill_conditioned_inputs_too(self, scheme: Scheme, tokens: int) -> None:
        """Features that span two orders of magnitude, all directions mixed, fewer tokens than features at times: errors
        are then pushed on in amounts much larger than the weights."""
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            mixed = torch.randn(tokens, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
            inputs, weight = mixed * torch.logspace(-1, 1, 96), random_weight(8, 96, seed)
            q, _ = quantized(weight, inputs, scheme)
            plain, _ = Absmax().quantize(weight, scheme, torch.float32)
            matrix = damped(inputs, 0)
            assert loss(weight, q.dequantize(), matrix) < loss(weight, plain.dequantize(), matrix)

    @EVERY
    @pytest.mark.parametrize("options", [{}, {"rounds": 1, "passes": 0}, {"passes": 3}])
    def test_zeros_stay_zero(self, scheme: Scheme, options: dict[str, Any]) -> None:
        inputs, weight = correlated(300, 128), random_weight(7, 128)
        weight[0, :64] = 0  # whole groups, beside others whose errors would be pushed into them
        weight[3] = 0  # a whole row
        for dtype in DTYPES:
            q, _ = quantized(weight, inputs, scheme, GPTQ(**options), dtype)
            groups = weight.unflatten(1, (q.scales.shape[1], -1))
            empty = (groups == 0).all(-1)
            assert empty[3].all()
            assert (q.dequantize().view_as(groups)[empty] == 0).all()
            assert (q.scales[empty] == 1).all()
            assert q.zeros is None or (q.zeros[empty] == 0).all()

    @EVERY
    def test_nothing_but_zeros(self, scheme: Scheme) -> None:
        q, diagnostics = quantized(torch.zeros(3, 64), correlated(100, 64), scheme, dtype=torch.float16)
        assert (q.dequantize() == 0).all()
        assert (diagnostics.relative_error, diagnostics.output_error) == (0, 0)

    @EVERY
    @pytest.mark.parametrize("constant", [1e-30, -1e-30, 1e-8, -1e-8, 1.0, -3.0, 6e4, -6e4])
    def test_constant_groups(self, scheme: Scheme, constant: float) -> None:
        """Fault 27, with independent inputs, where rounding to nearest is the best that can be done."""
        inputs = torch.eye(32).repeat(2, 1)
        for dtype in DTYPES:
            q, _ = quantized(torch.full((3, 32), constant), inputs, scheme, dtype=dtype)
            found = q.dequantize()
            assert torch.isfinite(found).all()
            assert (found * constant >= 0).all()
            plain, _ = Absmax().quantize(torch.full((3, 32), constant), scheme, dtype)
            # shrunken ranges are tried after the full one: not worse, but for float32's rounding
            worst = (plain.dequantize().double() - constant).abs().max().item()
            assert (found.double() - constant).abs().max().item() <= worst * (1 + 1e-5) + abs(constant) * 2**-22

    @EVERY
    def test_odd_shapes(self, scheme: Scheme) -> None:
        widths = (32, 96, 160, 288) if scheme.group_size else (1, 3, 31, 127, 128, 129, 131)
        for rows, columns in zip((1, 7, 101, 1, 2, 7, 101), widths):
            inputs, weight = correlated(2 * columns + 2, columns), random_weight(rows, columns)
            q, _ = quantized(weight, inputs, scheme, dtype=torch.float16)
            plain, _ = Absmax().quantize(weight, scheme, torch.float16)
            matrix = damped(inputs, 1e-4)
            assert loss(weight, q.dequantize(), matrix) <= loss(weight, plain.dequantize(), matrix) * (1 + 1e-6)

    @EVERY
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_takes_every_weight_dtype_and_views(self, scheme: Scheme, dtype: torch.dtype) -> None:
        """Conv1D weights are stored [in, out]; none is written to."""
        weight, inputs = random_weight(5, 64).to(dtype), correlated(100, 64)
        stored = weight.t().contiguous()
        expected, _ = quantized(weight.float(), inputs, scheme)
        before = weight.clone()
        assert bytes_of(quantized(weight, inputs, scheme)[0]) == bytes_of(expected)
        assert bytes_of(quantized(stored.t(), inputs, scheme)[0]) == bytes_of(expected)
        assert torch.equal(weight, before)
        assert torch.equal(stored, before.t())

    @EVERY
    def test_a_scale_beyond_float16_is_refused_with_the_number(self, scheme: Scheme) -> None:
        top, inputs = 7e4 * scheme.max_code, correlated(100, 64)
        weight = torch.zeros(2, 64)
        weight[1, 0] = top / 2 if scheme.symmetric else top
        with pytest.raises(ValueError, match=r"7e\+04 does not fit torch\.float16"):
            quantized(weight, inputs, scheme, dtype=torch.float16)
        quantized(weight, inputs, scheme, dtype=torch.bfloat16)

    @EVERY
    def test_the_same_bytes_again(self, scheme: Scheme) -> None:
        inputs, weight = correlated(300, 128), random_weight(37, 128)
        assert len({tuple(bytes_of(quantized(weight, inputs, scheme)[0])) for _ in range(3)}) == 1


def test_more_threads_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may add up in another order, for which a run records how many there are."""
    monkeypatch.setattr(gptq, "_ROWS", (1, 1000))
    inputs, weight, threads = correlated(600, 256), random_weight(150, 256), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            found.append(quantized(weight, inputs, "int4-g128"))
    finally:
        torch.set_num_threads(threads)
    assert bytes_of(found[1][0]) == bytes_of(found[2][0])
    errors = [diagnostics.output_error for _, diagnostics in found]
    assert errors == pytest.approx([errors[0]] * 4, rel=1e-2)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"damping": 0.0}, "damping"),
            ({"damping": 2.0}, "damping"),
            ({"rounds": 0}, "rounds"),
            ({"passes": -1}, "passes"),
            ({"passes": 11}, "passes"),
            ({"act_order": "yes"}, "act_order"),
            ({"actorder": True}, "did you mean act_order"),
            ({"rounds": True}, "rounds"),
        ],
    )
    def test_bad_ones_are_refused_by_name(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            with_options(GPTQ(), options)

    def test_each_changes_what_it_says(self) -> None:
        inputs, weight = correlated(200, 64), random_weight(9, 64)
        plain, _ = quantized(weight, inputs, "int3-g32")
        for options in ({"damping": 0.1}, {"act_order": False}, {"rounds": 3}, {"passes": 2}):
            q, diagnostics = quantized(weight, inputs, "int3-g32", with_options(GPTQ(), options))
            assert bytes_of(q) != bytes_of(plain), options
            assert diagnostics.damping == options.get("damping", 1e-4)

    @pytest.mark.parametrize("name", ["int2-g32", "int3-g32-asym", "int4-g32"])
    def test_activation_order_and_descent_pay(self, name: str) -> None:
        """On the average of several layers. What rounds are worth only trained weights show."""
        losses = [0.0, 0.0, 0.0, 0.0]
        chosen = [GPTQ(act_order=False, rounds=1, passes=0), *(GPTQ(rounds=1, passes=n) for n in (0, 1, 5))]
        for seed in range(6):
            inputs, weight = correlated(300, 96, seed), random_weight(16, 96, seed)
            for number, method in enumerate(chosen):
                q, _ = quantized(weight, inputs, name, method)
                losses[number] += loss(weight, q.dequantize(), damped(inputs, 0))
        assert losses == sorted(losses, reverse=True)

    @pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
    def test_what_it_does_not_produce(self, name: str) -> None:
        (problem,) = GPTQ().problems(Scheme.parse(name))
        assert problem == f"gptq produces weights that have a scale per channel or group, not {name}"
