"""A method with a statistic and a transform of its own is one file in methods/, and no other line is edited for it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.discovery import discover
from bitpress.pipeline import api, methods
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

# SmoothQuant (arXiv 2211.10438), equation 4 with alpha 0.5 and without the weights' part.
SMOOTH = '''
from dataclasses import replace

import torch

from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.methods.base import Method


class Largest:
    """The largest magnitude of each input, float32 [in]."""

    multiplies_inputs = False
    by_gradient = False

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 4 * in_features

    def __init__(self, in_features, device):
        self.tokens = self.dropped = 0
        self.values = torch.zeros(in_features, device=device)

    def add(self, inputs):
        rows = inputs.flatten(0, -2).float()
        self.tokens += len(rows)
        self.values = torch.maximum(self.values, rows.abs().amax(0))


class Smooth(Method):
    name, rank, version = "smooth", 60, 1
    statistics = (Largest,)

    def problems(self, scheme):
        return Absmax().problems(scheme)

    def transform(self, block):
        for group, largest in zip(block.groups, block.collect(Largest)):
            if group.norm is None:
                continue
            scale = largest.values.clamp(min=1e-5).sqrt()
            for name in {f"{group.norm}.weight", f"{group.norm}.bias"} & set(block.names):
                block.set(name, block.tensor(name) / scale)
            for layer in group.layers:
                block.set(f"{layer}.weight", block.tensor(f"{layer}.weight") * scale)

    def quantize(self, weight, scheme, scale_dtype, statistics=()):
        (largest,) = statistics
        qtensor, diagnostics = Absmax().quantize(weight, scheme, scale_dtype)
        return qtensor, replace(diagnostics, tokens=largest.tokens, note=f"inputs up to {largest.values.max():.3g}")


PLUGINS = (Smooth(),)
'''


@pytest.fixture
def smooth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The method "smooth" lies in methods/."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "smooth.py").write_text(SMOOTH)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "more")])
    discover.cache_clear()
    yield
    monkeypatch.undo()
    sys.modules.pop(f"{methods.__name__}.smooth", None)
    discover.cache_clear()


@torch.inference_mode()
def logits(folder: Path) -> Tensor:
    model = load_model(Checkpoint(folder), torch.device("cpu"), "float32", "reference")
    return model(torch.arange(32).unsqueeze(0)).logits.double()


def relative(folder: Path, source: Path) -> float:
    """How far a model's logits are from its source's."""
    expected = logits(source)
    return ((logits(folder) - expected).norm() / expected.norm()).item()


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "phi3", "gpt_neox"])
def test_the_transformed_model_computes_what_the_original_computed(
    name: str, tiny: Callable[..., Path], tmp_path: Path, learn: Callable[..., Any], proved: Callable[..., Any]
) -> None:
    """As well as INT8 allows; without the norms' part, the logits would be others altogether."""
    source, out = tiny(name), tmp_path / "out"
    learn(source, out, method="smooth", scheme="int8-g32")
    api.quantize(source, "int8-g32", tmp_path / "plain")
    before, after = Checkpoint(source), Checkpoint(out)
    kept = after.tensors.keys() & before.tensors.keys()
    changed = {each for each in kept if not torch.equal(after.read(each), before.read(each))}
    norms = {each for each in kept if "norm" in each or ".ln_" in each}
    assert changed <= norms
    assert len({each.rpartition(".")[0] for each in changed}) == (2 if name == "mixtral" else 4), changed
    assert relative(out, source) < 3 * relative(tmp_path / "plain", source) < 0.05
    layers = read_json(out / "bitpress.json")["coverage"]["layers"]
    assert {layer["method"] for layer in layers} == {"smooth"}
    assert all(layer["note"].startswith("inputs up to") for layer in layers if ".experts." not in layer["name"])
    proved(out)
