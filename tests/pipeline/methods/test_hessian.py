"""X^T X and the factor of its inverse, against float64; what is done where there is none."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hessians import correlated, hessian_of
from torch import Tensor

from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.methods import hessian as module
from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.methods.gptq import GPTQ
from bitpress.pipeline.methods.hessian import DAMPING_CAP, Factor, Hessian

CPU = torch.device("cpu")
SCHEME = Scheme.parse("int4-g16")


def product(inputs: Tensor) -> Tensor:
    rows = inputs.double().reshape(-1, inputs.shape[-1])
    return rows.t() @ rows


def inverse_factor(matrix: Tensor, order: Tensor, added: float) -> Tensor:
    """U in float64, by inverting: (M + added I)^-1 = U^T U."""
    damped = matrix.double()[order][:, order] + added * torch.eye(len(order), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


@pytest.fixture(params=[4, 1024])
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Panels narrower and wider than the matrices of these tests."""
    monkeypatch.setattr(module, "_PANEL", request.param)
    monkeypatch.setattr(module, "_INVERTED", request.param)
    return request.param


class TestSum:
    @pytest.mark.parametrize("width", [1, 3, 4, 5, 13, 64])
    def test_is_the_product_and_symmetric(self, panel: int, width: int) -> None:
        inputs = correlated(50, width)
        found = hessian_of(inputs).matrix()
        assert torch.equal(found, found.t())
        # each entry a sum of 50 products in float32: half a unit in the last place for each of its terms at most
        limit = 50 * 2**-24 * product(inputs.abs())
        assert ((found.double() - product(inputs)).abs() <= limit).all()

    def test_in_pieces_of_any_shape_as_whole(self, panel: int) -> None:
        inputs = correlated(60, 13)
        whole = hessian_of(inputs)
        pieces = hessian_of(inputs[:1], inputs[1:37].view(4, 9, 13), inputs[37:37], inputs[37:])
        assert pieces.tokens == whole.tokens == 60
        torch.testing.assert_close(pieces.matrix(), whole.matrix(), rtol=1e-5, atol=1e-5)  # the order of sums
        assert torch.equal(hessian_of(inputs).matrix(), whole.matrix())

    def test_bfloat16_products_lose_nothing(self) -> None:
        """With 4 bits of mantissa, products and their sums are whole multiples of 2^-8 below 2^24 of them: exact."""
        inputs = (torch.randint(-15, 16, (300, 40), generator=torch.Generator().manual_seed(1)) / 16).bfloat16()
        with module.bfloat16_products([torch.bfloat16]):
            found = hessian_of(inputs).matrix()
        assert torch.equal(found.double(), product(inputs))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_every_dtype_is_summed_in_float32(self, dtype: torch.dtype) -> None:
        inputs = correlated(2000, 8).to(dtype)
        found = hessian_of(inputs).matrix()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), product(inputs), rtol=1e-5, atol=1e-3)  # 2000 terms of up to 100

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_global_precision_is_left_as_it_was(self, dtype: torch.dtype) -> None:
        matmul = torch.backends.mkldnn.matmul
        before, within = matmul.fp32_precision, []

        def fail() -> None:
            with module.bfloat16_products([torch.bfloat16, dtype]):
                within.append(matmul.fp32_precision)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert within == ["bf16" if dtype == torch.bfloat16 else before]
        assert matmul.fp32_precision == before

    def test_float32_products_are_not_rounded_to_bfloat16(self) -> None:
        inputs = torch.full((1, 2), 1 + 2**-12)
        hessian_of(torch.ones(1, 2, dtype=torch.bfloat16))
        assert hessian_of(inputs).matrix()[0, 1].item() == pytest.approx((1 + 2**-12) ** 2, rel=2**-23)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_rows_that_are_not_finite_are_left_out_and_counted(self, bad: float) -> None:
        inputs = correlated(20, 8)
        spoiled = inputs.clone()
        spoiled[3, 2] = spoiled[17, 0] = spoiled[17, 5] = bad
        found, rest = hessian_of(spoiled), hessian_of(inputs[[i for i in range(20) if i not in (3, 17)]])
        assert (found.tokens, found.dropped) == (18, 2)
        assert torch.equal(found.matrix(), rest.matrix())
        assert spoiled[3, 2] != inputs[3, 2], "the inputs are not written to"

    def test_the_inputs_are_not_written_to(self) -> None:
        inputs = correlated(20, 8)
        before = inputs.clone()
        hessian_of(inputs).factor(0.01, True)
        assert torch.equal(inputs, before)

    def test_divided_it_is_that_of_the_divided_inputs(self, panel: int) -> None:
        inputs, scale = torch.randn(40, 10), torch.randint(-9, 9, (10,)).float().exp2()
        divided = hessian_of(inputs).divided(scale)
        assert torch.equal(divided.matrix(), hessian_of(inputs / scale).matrix())
        assert divided.tokens == 40

    def test_dead_columns(self) -> None:
        inputs = correlated(30, 8)
        inputs[:, 2] = inputs[:, 7] = 0
        found = hessian_of(inputs)
        assert found.dead().nonzero().flatten().tolist() == [2, 7]
        expected = product(inputs)
        expected[[2, 7], [2, 7]] = expected.diagonal().mean()
        torch.testing.assert_close(found.matrix().double(), expected, rtol=1e-5, atol=1e-4)


class TestFactor:
    @pytest.mark.parametrize("act_order", [True, False])
    @pytest.mark.parametrize("width", [1, 3, 4, 5, 13, 64])
    def test_against_an_inverse_in_float64(self, panel: int, width: int, act_order: bool) -> None:
        inputs = correlated(4 * width + 8, width)
        hessian = hessian_of(inputs)
        found = hessian.factor(1e-2, act_order)
        assert isinstance(found, Factor)
        assert found.damping == 1e-2
        diagonal = hessian.matrix().diagonal()
        expected = torch.arange(width)
        if act_order:
            expected = torch.tensor(sorted(range(width), key=lambda j: -diagonal[j].item()))
        assert torch.equal(found.order, expected)
        assert torch.equal(found.upper, found.upper.triu())
        reference = inverse_factor(hessian.matrix(), expected, 1e-2 * diagonal.double().mean().item())
        # float32, and condition numbers of some 1e4
        assert ((found.upper - reference).norm() / reference.norm()).item() < 1e-3

    def test_equal_activations_keep_their_order(self) -> None:
        found = hessian_of(torch.eye(9) * torch.tensor([1.0, 2, 1, 2, 1, 2, 1, 2, 1])).factor(0.1, True)
        assert found is not None
        assert found.order.tolist() == [1, 3, 5, 7, 0, 2, 4, 6, 8]

    def test_is_computed_once_for_each_question(self) -> None:
        hessian = hessian_of(correlated(40, 8))
        assert hessian.factor(0.01, True) is hessian.factor(0.01, True)
        assert hessian.factor(0.01, True) is not hessian.factor(0.01, False)
        with pytest.raises(AssertionError, match="takes no more inputs"):
            hessian.add(correlated(1, 8))

    @pytest.mark.parametrize("kind", ["one direction", "each feature twice", "fewer tokens than features"])
    def test_singular_ones_are_factored_with_the_damping_that_is_told(self, kind: str) -> None:
        inputs = correlated(100, 16)
        if kind == "one direction":
            inputs = inputs[:, :1] * torch.arange(1.0, 17)
        elif kind == "each feature twice":
            inputs = inputs[:, torch.arange(16) // 2]
        else:
            inputs = inputs[:5]
        hessian = hessian_of(inputs)
        found = hessian.factor(1e-4, True)
        assert found is not None
        assert found.damping == 1e-4
        added = found.damping * hessian.matrix().diagonal().double().mean().item()
        reference = inverse_factor(hessian.matrix(), found.order, added)
        # the condition number is 1e4 times the width, float32 has 1e7
        assert ((found.upper - reference).norm() / reference.norm()).item() < 0.05

    def test_damping_goes_up_tenfold_until_it_is_enough(self) -> None:
        """A negative eigenvalue, 2% of the mean diagonal: more than 1% must be added."""
        hessian = hessian_of(torch.eye(4))
        hessian.matrix().copy_(torch.diag(torch.tensor([2.0, 1.0, 1.0, -0.02])))
        found = hessian.factor(1e-5, False)
        assert found is not None
        assert found.damping == pytest.approx(0.1)
        _, diagnostics = GPTQ(damping=1e-5, act_order=False).quantize(
            torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
            Scheme.parse("int4-channel"),
            torch.float32,
            (hessian,),
        )
        assert diagnostics.damping == pytest.approx(0.1)
        assert diagnostics.fallback is None

    @pytest.mark.parametrize("start", [1e-4, 3e-3, 1.0])
    def test_the_ladder_ends_at_the_cap(self, start: float, monkeypatch: pytest.MonkeyPatch) -> None:
        tried: list[tuple[float, torch.dtype]] = []

        def never(matrix: Tensor, order: Tensor, added: float, dtype: torch.dtype) -> None:
            tried.append((added, dtype))

        monkeypatch.setattr(module, "_inverse_factor", never)
        hessian = hessian_of(correlated(40, 8))
        assert hessian.factor(start, True) is None
        mean = hessian.matrix().diagonal().mean().item()
        steps = [added / mean for added, _ in tried[::2]]
        assert steps[0] == pytest.approx(start)
        assert all(later == pytest.approx(10 * earlier) for earlier, later in pairwise(steps))
        assert steps[-1] <= DAMPING_CAP < steps[-1] * 10.01
        assert [dtype for _, dtype in tried] == [torch.float32, torch.float64] * len(steps)

    def test_float64_where_float32_does_not_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """1e-9 of the mean diagonal is less than float32's rounding: only float64 sees that M is positive definite."""
        dtypes: list[torch.dtype] = []
        original = module._inverse_factor

        def spy(*arguments: Any) -> Tensor | None:
            dtypes.append(arguments[-1])
            return original(*arguments)

        monkeypatch.setattr(module, "_inverse_factor", spy)
        inputs = torch.ones(1, 6)
        assert original(hessian_of(inputs).matrix(), torch.arange(6), 1e-9, torch.float32) is None
        found = hessian_of(inputs).factor(1e-9, False)
        assert found is not None
        assert found.damping == 1e-9
        assert dtypes == [torch.float32, torch.float64]
        reference = inverse_factor(torch.ones(6, 6), torch.arange(6), 1e-9)
        # the condition number is 6e9, float64 has 1e16
        assert ((found.upper - reference).norm() / reference.norm()).item() < 1e-5


class TestNoFactor:
    """Faults 30 and 31."""

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -2.0])
    def test_falls_back_to_absmax(self, value: float) -> None:
        """Not positive definite up to the cap, or not finite."""
        hessian = hessian_of(correlated(40, 16))
        hessian.matrix()[5, 5] = value * hessian.matrix().diagonal().sum()
        self.check(hessian, "its Hessian is not positive definite", 40)

    def test_inputs_beyond_float32(self) -> None:
        self.check(hessian_of(torch.full((3, 16), 1e25)), "its Hessian is not positive definite", 3)

    @pytest.mark.parametrize("tokens", [0, 7])
    def test_nothing_but_zeros(self, tokens: int) -> None:
        self.check(hessian_of(torch.zeros(tokens, 16)), "its inputs were always 0", tokens)

    def check(self, hessian: Hessian, reason: str, tokens: int) -> None:
        weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        assert hessian.factor(1e-4, True) is None
        found, diagnostics = GPTQ().quantize(weight, SCHEME, torch.float32, (hessian,))
        expected, plain = Absmax().quantize(weight, SCHEME, torch.float32)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        assert (diagnostics.fallback, diagnostics.tokens, diagnostics.damping) == (reason, tokens, None)
        assert diagnostics.relative_error == plain.relative_error

    @pytest.mark.parametrize("name", ["int4-g16", "int4-channel-asym", "int3-g8-asym"])
    @pytest.mark.parametrize("options", [{}, {"act_order": False}, {"passes": 0}, {"rounds": 1, "passes": 4}])
    def test_weights_of_dead_inputs_are_rounded_and_not_zeroed(self, name: str, options: dict[str, Any]) -> None:
        """They neither take up others' errors nor give theirs to others: nearest code of the group's scale."""
        inputs, weight = correlated(200, 32), torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
        dead = [0, 5, 16, 31]
        inputs[:, dead] = 0
        q, _ = GPTQ(**options).quantize(weight, Scheme.parse(name), torch.float32, (hessian_of(inputs),))
        scales = q.scales.repeat_interleave(32 // q.scales.shape[1], 1).double()
        middle = torch.full_like(q.scales, q.scheme.middle) if q.zeros is None else q.zeros
        zeros = middle.double().repeat_interleave(32 // q.scales.shape[1], 1)
        nearest = ((weight.double() / scales).round() + zeros).clamp(0, q.scheme.max_code)
        expected = scales * (nearest - zeros)
        torch.testing.assert_close(q.dequantize().double()[:, dead], expected[:, dead], rtol=1e-6, atol=0)
        assert (expected[:, dead] != 0).any()
