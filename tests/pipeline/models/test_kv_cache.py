"""A model whose cache is rounded, against one whose cache rounds by a formula of this test."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import ARCHITECTURES, OTHERS, SMALL
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bitpress.kernels.kv_cache import parse_cache
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.models.kv_cache import CachePeaks, CacheRounding, CacheShape, attentions, intercept, unsupported
from bitpress.pipeline.models.trial import cache_shapes
from bitpress.pipeline.quantize.plan import make_plan
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint

MLA = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MLA |= {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
KINDS = {**ARCHITECTURES, **OTHERS, "deepseek_v3": ("DeepseekV3Config", MLA)}
IDS = torch.arange(3, 15).view(1, -1)


def tiny(kind: str) -> PreTrainedModel:
    name, changes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(SMALL | changes), initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def eighths(states: Tensor) -> Tensor:
    """Each group of 8 features of a token, in 15 steps of its largest magnitude: int4-g8 in other words."""
    groups = states.reshape(*states.shape[:-1], -1, 8)
    steps = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    return (torch.round(groups / steps.clamp(min=1e-30)) * steps).reshape(states.shape)


@pytest.fixture
def rounding_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own cache rounds what is put into it."""
    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda layer, k, v, *more: update(layer, eighths(k), eighths(v), *more))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gptj", "gpt_neox", "opt", "falcon", "phi3", "mixtral"])
@torch.inference_mode()
def test_every_key_and_value_is_read_through_the_cache(kind: str, request: pytest.FixtureRequest) -> None:
    plain = tiny(kind)
    model, before = copy.deepcopy(plain), plain(input_ids=IDS, use_cache=False).logits
    assert len(attentions(model)) == 2
    for attention in attentions(model).values():
        intercept(attention, CacheRounding(parse_cache("int4-g8")))
    alone, cached = (model(input_ids=IDS, use_cache=use).logits for use in (False, True))
    model.generation_config.eos_token_id = plain.generation_config.eos_token_id = None
    text = model.generate(IDS, max_new_tokens=6, do_sample=False)
    request.getfixturevalue("rounding_layers")
    expected = plain(input_ids=IDS, use_cache=True).logits
    assert torch.allclose(cached, expected, atol=1e-5)
    assert torch.allclose(alone, expected, atol=1e-5)
    assert (alone - before).abs().max() > 1e-3
    assert torch.equal(text, plain.generate(IDS, max_new_tokens=6, do_sample=False))


def test_copies_of_an_attention_add_to_the_same_peaks() -> None:
    model, peaks = tiny("llama"), CachePeaks()
    attention = next(iter(attentions(model).values()))
    intercept(attention, peaks)
    with torch.inference_mode():
        copy.deepcopy(model)(input_ids=IDS)
    assert peaks.peaks is not None
    assert [peak.shape for peak in peaks.peaks] == [(2,), (2,)]


def test_a_copy_of_the_model_rounds_too() -> None:
    model = tiny("llama")
    for attention in attentions(model).values():
        intercept(attention, CacheRounding(parse_cache("fp8"), torch.ones(1), torch.ones(1)))
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("llama", {f"model.layers.{n}.self_attn": CacheShape(2, 16, 16) for n in (0, 1)}),
        ("gpt2", {f"transformer.h.{n}.attn": CacheShape(4, 16, 16) for n in (0, 1)}),
        (
            "gemma2",
            {f"model.layers.{n}.self_attn": CacheShape(2, 16, 16, window) for n, window in enumerate((7, None))},
        ),
        ("qwen3_next", {"model.layers.1.self_attn": CacheShape(2, 16, 16)}),  # linear attention keeps a state
    ],
)
def test_what_each_layer_keeps_of_a_token(
    kind: str, shapes: dict[str, CacheShape], save_model: Callable[..., Path], tmp_path: Path
) -> None:
    name, changes = KINDS[kind]
    folder = save_model(getattr(transformers, name)(**(SMALL | changes)), tmp_path / kind)
    assert cache_shapes(Checkpoint(folder)) == shapes


def test_what_has_no_keys_and_values_is_refused(save_model: Callable[..., Path], tmp_path: Path) -> None:
    assert "MLA" in (unsupported(tiny("deepseek_v3")) or "")
    folder = save_model(transformers.MambaConfig(**(SMALL | OTHERS["mamba"][1])), tmp_path / "mamba")
    recipe = Recipe.make({"scheme": "int4-g32", "kv_cache": "int8-g8"})
    with pytest.raises(ConfigError, match="kv_cache: MambaForCausalLM keeps no keys and values in a cache"):
        make_plan(Checkpoint(folder), recipe)


def test_scales_of_other_heads_are_refused(tiny_llama: Path) -> None:
    rounding = CacheRounding(parse_cache("int8"), torch.ones(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(CheckpointError, match="3 scales of keys, and the model has 2 heads of them"):
        rounding(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8))
