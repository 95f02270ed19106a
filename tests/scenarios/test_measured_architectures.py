"""Every architecture is measured by the same code, whatever its blocks take and give, and whatever it caches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.eval.measure import layer_errors, memory, speed
from bitpress.eval.measure import scores as quality
from bitpress.eval.measure.protocols import halves
from bitpress.pipeline.api import quantize
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.models.modules import names_of_experts, part_experts
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.structure import decoder
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

CPU = torch.device("cpu")
UNGROUPED = ("opt", "gpt2", "gpt_neo", "gpt_neox", "falcon")  # Falcon repeats its few heads before it caches them
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture
def both(architecture: str, tiny: Any, tmp_path: Path) -> tuple[Any, Any]:
    """The model, and its copy with layers of 4 bits."""
    quantize(tiny(architecture), "int4-g32", tmp_path / "out")
    dense, pressed = (load_model(Checkpoint(folder), CPU, "auto") for folder in (tiny(architecture), tmp_path / "out"))
    return dense, pressed


def test_errors_by_depth(architecture: str, both: tuple[Any, Any], tmp_path: Path) -> None:
    dense, pressed = both
    windows = halves(torch.randint(3, 96, (48,), generator=torch.Generator().manual_seed(1)), 24, 0)
    expected = dense(input_ids=windows[0].ids.unsqueeze(0)).logits
    part_experts(dense, pressed)
    torch.testing.assert_close(dense(input_ids=windows[0].ids.unsqueeze(0)).logits, expected)
    found = layer_errors.output_errors(dense, pressed, windows, decoder(dense))
    quantized = read_json(tmp_path / "out" / "bitpress.json")["coverage"]["layers"]
    experts = names_of_experts(read_quantized(Checkpoint(tmp_path / "out")))
    assert (architecture in SPARSE) == bool(experts)
    assert {experts.get(x["name"], x["name"]) for x in found["layers"]} == {layer["name"] for layer in quantized}
    for layer in found["layers"]:
        # of 4 bits in groups of 32; the outputs of random weights are as far off as the weights
        assert 0.02 < layer["output_error"] < 0.25, layer["name"]
        assert layer["block"] in (0, 1)
    assert len(found["blocks"]) == 2
    first, second = found["blocks"]
    assert 0 < first["output_error"] < 0.5
    assert first["cumulative_error"] == pytest.approx(first["output_error"], rel=1e-4)
    assert second["cumulative_error"] > second["output_error"] > 0
    assert any(scores["kl"].max() > 0 for scores in quality.compare(dense, pressed, windows))


def test_what_a_prompt_takes(architecture: str, both: tuple[Any, Any]) -> None:
    """The cache by the config: keys and values of each layer, in float32."""
    _, pressed = both
    config = pressed.config
    heads = config.num_attention_heads if architecture in UNGROUPED else config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found, _ = memory.prefill(pressed, torch.arange(3, 9))  # six tokens: within the shortest of the sliding windows
    windows = found.get("kv_cache_windows", [])
    whole = 2 * config.num_hidden_layers * heads * width * 4
    assert memory.cache_size(6, found["kv_cache_bytes_per_token"], windows) == 6 * whole
    assert found["kv_cache_bytes_per_token"] == whole - sum(window["bytes_per_token"] for window in windows)
    load = speed.Load(2, 8, 2, 1)
    assert speed.measure(pressed, torch.arange(3, 40), load, None)["decode"]["median"] > 0
    assert (speed.read_bytes(pressed) is None) == (architecture in SPARSE)
