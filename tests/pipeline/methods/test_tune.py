"""Learning from a whole block: where it begins, that it never gets worse, what it leaves alone."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hessians import correlated, hessian_of
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline import api
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.methods.gptq import GPTQ
from bitpress.pipeline.methods.learned import LearnedInteger
from bitpress.pipeline.methods.tune import Tune
from bitpress.pipeline.quantize.sequential import CalibratedBlocks
from bitpress.pipeline.storage.checkpoint import read_json

INTEGERS = [f"int{bits}-{group}{asym}" for bits, group, asym in product((2, 4, 8), ("g32", "channel"), ("", "-asym"))]


class TwoLayers:
    """A block that computes x + B relu(A x), and batches of random inputs; the last batch is held out."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.weights = {name: torch.randn(64, 64, generator=generator) / 8 for name in "ab"}
        self.inputs = correlated(400, 64, seed).split(50)
        self.steps: list[tuple[int, int]] = []
        self.batches = len(self.inputs) - 1
        self.on_step = lambda done, total: self.steps.append((done, total))

    def weight(self, layer: str) -> Tensor:
        return self.weights[layer]

    def quantized(self, scheme: str = "int2-g32") -> dict[str, QTensor]:
        x = torch.cat(self.inputs)
        read = {"a": x, "b": (x @ self.weights["a"].t()).relu()}
        parsed = Scheme.parse(scheme)
        return {
            name: GPTQ().quantize(weight, parsed, torch.bfloat16, (hessian_of(read[name]),))[0]
            for name, weight in self.weights.items()
        }

    def outputs(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return x + (x @ weights["a"].t()).relu() @ weights["b"].t()

    def error(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        x = self.inputs[batch]
        expected = self.outputs(x, self.weights)
        off = (self.outputs(x, weights) - expected).square().sum(-1) / expected.square().sum(-1)
        return off.mean()

    def held_out_error(self, layers: Mapping[str, QTensor]) -> float:
        return self.error(-1, {name: q.dequantize() for name, q in layers.items()}).item()


class TestALayer:
    @pytest.mark.parametrize("scheme", INTEGERS)
    def test_begins_at_the_codes_that_it_was_given(self, scheme: str) -> None:
        block = TwoLayers()
        for name, q in block.quantized(scheme).items():
            layer = LearnedInteger(block.weight(name), q)
            assert torch.equal(layer.weight().detach(), q.dequantize())
            same = dict(layer.qtensor().tensors())
            assert all(torch.equal(tensor, same[kind]) for kind, tensor in q.tensors())

    def test_groups_of_zeros_stay_zeros(self) -> None:
        weight = TwoLayers().weight("a").clone()
        weight[3, :32] = 0
        q, _ = GPTQ().quantize(weight, Scheme.parse("int2-g32"), torch.float32, (hessian_of(correlated(200, 64)),))
        layer = LearnedInteger(weight, q)
        with torch.no_grad():
            layer.offsets += 0.8
        after = layer.qtensor().dequantize()
        assert (after[3, :32] == 0).all()
        assert (after[4] != 0).any()
        layer.qtensor().check()

    def test_a_scale_that_its_dtype_cannot_hold_stays_what_it_was(self) -> None:
        block = TwoLayers()
        q = block.quantized()["a"]
        layer = LearnedInteger(block.weight("a"), q)
        with torch.no_grad():
            layer.factors[0], layer.factors[1] = -1, float("inf")
        assert torch.equal(layer.qtensor().scales, q.scales)


class TestTune:
    def test_the_block_gets_better_and_the_curve_is_that_of_what_is_stored(self) -> None:
        block = TwoLayers()
        before = block.quantized()
        after, tuned = Tune(steps=60).learn(block, before)
        assert tuned.layers == ("a", "b")
        assert tuned.curve[0] == (0, block.held_out_error(before))
        assert [step for step, _ in tuned.curve] == [0, 6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
        assert min(error for _, error in tuned.curve) == block.held_out_error(after)
        assert block.held_out_error(after) < block.held_out_error(before)
        assert block.steps == [(step, 60) for step in range(1, 61)]
        for q in after.values():
            q.check()

    def test_what_only_gets_worse_is_left_as_it_was(self) -> None:
        block = TwoLayers()
        before = block.quantized("int8-g32")
        after, _ = Tune(steps=3, rate=1.0, scale_rate=1.0).learn(block, before)
        assert all(after[name] is before[name] for name in before)

    def test_the_same_twice(self) -> None:
        made = [Tune(steps=12).learn(TwoLayers(), TwoLayers().quantized()) for _ in range(2)]
        assert made[0][1] == made[1][1]
        assert all(torch.equal(made[0][0][name].codes, made[1][0][name].codes) for name in "ab")

    def test_codes_that_are_no_integers_are_refused(self) -> None:
        assert Tune().problems(Scheme.parse("nvfp4")) == ["tune learns integer weights, not nvfp4"]
        assert not GPTQ().problems(Scheme.parse("nvfp4"))
        assert not Tune().problems(Scheme.parse("int2-g32"))

    def test_the_global_seed_is_left_alone(self) -> None:
        before = torch.random.get_rng_state()
        Tune(steps=2).learn(TwoLayers(), TwoLayers().quantized())
        assert torch.equal(torch.random.get_rng_state(), before)


class TestAModel:
    OPTIONS: Mapping[str, Any] = {"method": "tune", "scheme": "int2-g32", "options": {"steps": 4}}

    def test_resumes_at_a_block_with_the_same_bytes(
        self, source: Path, tmp_path: Path, learn: Any, digests: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, made = tmp_path / "out", []
        original = CalibratedBlocks.quantize_block
        monkeypatch.setattr(CalibratedBlocks, "quantize_block", lambda *a: made.append(a[1].name) or original(*a))

        def stop(done: int, total: int) -> None:
            if (made, done % 4) == (["block 0", "block 1"], 2):  # in the middle of the second block
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            learn(source, out, stop, **self.OPTIONS)
        assert learn(source, out, **self.OPTIONS) == []
        assert made == ["block 0", "block 1", "block 1"]
        learn(source, tmp_path / "unbroken", **self.OPTIONS)
        assert digests(out) == digests(tmp_path / "unbroken")
        coverage = read_json(out / "bitpress.json")["coverage"]
        assert [line["block"] for line in coverage["tuned"]] == [0, 1]
        assert {layer["method"] for layer in coverage["layers"]} == {"tune"}
        assert api.load(out)[0](input_ids=torch.arange(8)[None]).logits.isfinite().all()

    def test_layers_of_another_method_stay_as_they_are(self, source: Path, tmp_path: Path, learn: Any) -> None:
        learn(source, tmp_path / "out", **self.OPTIONS, layers={"*.down_proj": "gptq/int4-g32"})
        coverage = read_json(tmp_path / "out" / "bitpress.json")["coverage"]
        assert not any("down_proj" in name for line in coverage["tuned"] for name in line["layers"])

    def test_one_window_is_too_little(self, source: Path, tmp_path: Path, learn: Any) -> None:
        one = Calibration("a text", torch.arange(3, 19)[None], 0)
        with pytest.raises(ConfigError, match="1 window of calibration text"):
            learn(source, tmp_path / "out", **self.OPTIONS, calibration=one)
