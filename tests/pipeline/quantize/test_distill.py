"""A quantized model is trained to say what the unquantized one says, and comes out as an ordinary artifact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpress.kernels.products import Products
from bitpress.pipeline.api import load
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.formats import open_quantized
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.quantize import distill
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.quantize.sequential import REFERENCE_LOGITS
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json
from bitpress.pipeline.storage.fingerprint import MANIFEST

IDS = torch.randint(3, 96, (32, 16), generator=torch.Generator().manual_seed(1))
RATES = {"steps": 10, "windows": 6, "rate": 0.01, "norm_rate": 0.005}


@pytest.fixture
def distilled(learn: Any, tmp_path: Path, tiny_llama: Path) -> Any:
    """distilled("name", field=value): the folder of an artifact of 2 bits, distilled on IDS, and its manifest."""

    def make(name: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
        settings = {"scheme": "int2-g32", "distill": RATES, "calibration": Calibration("a text", IDS, 0), **changes}
        learn(tiny_llama, tmp_path / name, **settings)
        return tmp_path / name, read_json(tmp_path / name / MANIFEST)

    return make


@torch.no_grad()
def divergence(baseline: Path, quantized: Path, ids: torch.Tensor) -> float:
    """The mean KL divergence, by transformers and torch alone but for loading."""
    p, q = (
        load_model(checkpoint, torch.device("cpu"), "float32", "reference")(input_ids=ids).logits.log_softmax(-1)
        for checkpoint in (Checkpoint(baseline), open_quantized(quantized))
    )
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_the_stored_model_diverges_less_by_its_scales_and_norms_alone(distilled, tiny_llama):
    plain, _ = distilled("plain", distill=None)
    out, manifest = distilled("out")
    curve = manifest["distill"]["curve"]
    assert [step for step, _ in curve] == list(range(11))
    held_out = IDS[7::8]
    assert divergence(tiny_llama, plain, held_out) == pytest.approx(curve[0][1], rel=1e-3)
    assert divergence(tiny_llama, out, held_out) == pytest.approx(manifest["distill"]["kl_after"], rel=1e-3)
    assert manifest["distill"]["kl_after"] == min(error for _, error in curve) < 0.99 * curve[0][1]
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (plain, out)
    )
    assert before.keys() == after.keys()
    assert all((t.shape, t.dtype) == (after[name].shape, after[name].dtype) for name, t in before.items())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(name.endswith((".scales", "norm.weight")) for name in changed), "codes stay"


def test_the_reloaded_model_gives_the_logits_of_the_one_in_memory(distilled, tmp_path):
    out, _ = distilled("out", transform="awq", layers={"lm_head": "int8-channel"})
    stored = Checkpoint.single(tmp_path / "out.partial" / REFERENCE_LOGITS)
    model = load_model(open_quantized(out), torch.device("cpu"), "bfloat16", "reference")
    with Products():  # as the one in memory multiplies
        logits = model(input_ids=stored.read("ids")[None]).logits[0]
    assert torch.allclose(logits, stored.read("logits"), atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"transform": "smooth", "scheme": "int8-dynamic", "keep_inputs": 0.5},
        {"method": "auto", "scheme": "auto", "budget": "4 bits", "choices": ["absmax/int2-g32", "int4-g32-asym"]},
    ],
    ids=["inputs rounded", "budget"],
)
def test_is_never_worse_than_it_began(distilled, changes):
    out, manifest = distilled("out", **{**changes, "distill": {"steps": 2, "rate": 1.0, "norm_rate": 1.0}})
    assert manifest["distill"]["kl_after"] <= manifest["distill"]["kl_before"]
    assert load(out)[0](input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_goes_on_at_a_step_with_the_same_bytes(distilled, digests, monkeypatch, tmp_path):
    expected = digests(distilled("unbroken")[0])
    original, steps = distill._Training.step, []

    def step(self: Any, number: int) -> float:
        steps.append(number)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(distill._Training, "step", step)
    with pytest.raises(KeyboardInterrupt):
        distilled("out")
    assert digests(distilled("out")[0]) == expected
    assert steps[4:] == list(range(3, 10))


def test_each_window_is_read_once_before_any_is_read_again(distilled, monkeypatch):
    training = object.__new__(distill._Training)
    training.windows, training.options = IDS[:8], Recipe.make({"scheme": "int2-g32", "distill": {"windows": 3}}).distill
    first = torch.cat([training.windows_of(step) for step in (0, 1)])
    assert len(first.unique(dim=0)) == 6
    assert not torch.equal(training.windows_of(0), training.windows_of(2))


def test_refusals(distilled):
    with pytest.raises(ConfigError, match="1 window of calibration text"):
        distilled("out", calibration=Calibration("a text", IDS[:1], 0))
    with pytest.raises(ConfigError, match="trains the scales of integer weights"):
        Recipe.make({"scheme": "nf4", "distill": 100})
