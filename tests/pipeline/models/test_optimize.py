"""Fused layers: the same model, and everything that they do not serve goes the way it went."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from checkpoints import SMALL
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
)

from bitpress.kernels.cpu.library import library
from bitpress.kernels.decoder_layer import NativeLayers
from bitpress.kernels.kv_cache import bytes_per_token, parse_cache
from bitpress.kernels.linear import inputs_left_alone
from bitpress.pipeline.api import quantize
from bitpress.pipeline.models import optimize
from bitpress.pipeline.models.kv_cache import CacheRounding, attentions, intercept
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))

SHAPE = {**SMALL, "max_position_embeddings": 256, "eos_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
}
EXACT = "native-bf16"  # leaves inputs as they are, so that no rounded code jumps at a difference in the last bit

# float32 in another order of sums, through two layers
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Callable[[Any], Path]:
    """pressed(config): the folder of a quantized model. Read only."""
    made: dict[str, Path] = {}

    def press(config: PreTrainedConfig) -> Path:
        key = config.to_json_string()
        if key not in made:
            folder = tmp_path_factory.mktemp("fusing")
            made[key] = folder / "int4"
            quantize(save_model(config, folder / "source"), "int4-g32", folder / "int4")
        return made[key]

    return press


def load(folder: Path, dtype: str = "float32", kernel: str = EXACT) -> PreTrainedModel:
    return load_model(Checkpoint(folder), torch.device("cpu"), dtype, kernel)


@pytest.fixture
def model(pressed: Callable[[Any], Path]) -> PreTrainedModel:
    """A Llama, fused, in float32."""
    return load(pressed(CONFIGS["llama"]))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The lengths with which NativeLayers.step was called, for each of its layers."""
    lengths: list[int] = []
    step = NativeLayers.step

    def counted(self: NativeLayers, *given: Any) -> Tensor:
        lengths.extend([given[2]] * len(self.layers))
        return step(self, *given)

    monkeypatch.setattr(NativeLayers, "step", counted)
    return lengths


def ids(count: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def roll(model: PreTrainedModel, pieces: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of pieces of a text, one after the other, and the cache that they leave."""
    given = ids(sum(pieces))
    logits = []
    for piece in given.split(pieces, 1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its layers as transformers runs them."""
    copied = copy.deepcopy(model)
    optimize.unfuse(copied)
    return copied


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


TEXTS = {"decode": [9] + [1] * 20, "chat": [9, 1, 1, 7, 1, 1, 1, 12, 1], "from the first token": [1] * 9}


@pytest.mark.parametrize("pieces", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_cache_are_those_of_the_layers_own_forward(
    name: str, pieces: list[int], pressed: Callable[[Any], Path], steps: list[int], poisoned: None
):
    model = load(pressed(CONFIGS[name]))
    assert model.fusing == optimize.Fusing(2, 2, {})
    steps.clear()
    got, cache = roll(model, pieces)
    assert len(steps) == 2 * len(pieces)
    want, expected = roll(plain(model), pieces)
    assert distance(got, want) < TOLERANCE
    for ours, theirs in zip(cache.layers, expected.layers):
        assert ours.keys.shape == theirs.keys.shape
        assert distance(ours.keys, theirs.keys) < TOLERANCE
        assert distance(ours.values, theirs.values) < TOLERANCE
    assert cache.get_seq_length() == sum(pieces)


def round_cache(model: PreTrainedModel, name: str) -> optimize.Fusing:
    """Let the model's cache round keys and values, and fuse it anew."""
    optimize.unfuse(model)
    kind = parse_cache(name)
    for attention in attentions(model).values():
        scales = (None, None) if kind.dynamic else (kind.scale(torch.tensor([3.0, 4.0])), kind.scale(torch.ones(2)))
        intercept(attention, CacheRounding(kind, *scales))
    return optimize.fuse(model)


@pytest.mark.parametrize("name", ["fp8", "fp8-head", "int8", "int8-g16", "int8-g4", "int4-g16"])
def test_a_rounded_cache_holds_codes_that_attention_reads(
    name: str, model: PreTrainedModel, steps: list[int], poisoned: None
):
    """As much memory as its type says, and the same as the layers' own forward; also through changes by others."""
    assert round_cache(model, name) == optimize.Fusing(2, 2, {})
    steps.clear()
    pieces = TEXTS["chat"]
    got, cache = roll(model, pieces)
    assert len(steps) == 2 * len(pieces)
    want, expected = roll(plain(model), pieces)
    assert distance(got, want) < 5e-3  # a last bit turns a code over
    for ours, theirs in zip(cache.layers, expected.layers):
        assert distance(ours.keys, theirs.keys) < 5e-3
        assert distance(ours.values, theirs.values) < 5e-3
        codes = [each for each in (*ours.room[0].values(), *ours.room[1].values()) if each.dim() == 4]
        places = codes[0].shape[2]
        assert sum(each.nbytes for each in codes) == 2 * places * bytes_per_token(parse_cache(name), 2, 16)
    assert cache.get_seq_length() == sum(pieces)
    with torch.no_grad():
        outputs = []
        for whole, each in ((model, cache), (plain(model), expected)):
            copied = copy.deepcopy(each)  # its codes are still known
            copied.crop(-2)
            copied.batch_repeat_interleave(2)
            outputs.append(whole(input_ids=ids(3, 2, 1), past_key_values=copied, use_cache=True).logits)
        assert distance(*outputs) < 5e-3
        steps.clear()
        assert distance(model(ids(40), use_cache=False).logits, plain(model)(ids(40), use_cache=False).logits) < 5e-3
    assert steps == [0, 0]


def test_windows_of_a_rounded_cache(pressed: Callable[[Any], Path], steps: list[int]):
    model = load(pressed(MistralConfig(**SHAPE, sliding_window=12)))
    assert round_cache(model, "int8") == optimize.Fusing(2, 2, {})
    steps.clear()
    got, _ = roll(model, [9, *[1] * 20, 30, 1])
    assert len(steps) == 2 * 23
    assert distance(got, roll(plain(model), [9, *[1] * 20, 30, 1])[0]) < 5e-3


def test_a_cache_of_another_rounding_goes_through_the_layers_own_forward(model: PreTrainedModel, steps: list[int]):
    _, cache = roll(model, [9, 1])
    round_cache(model, "int8-g16")
    steps.clear()
    with torch.no_grad():
        model(input_ids=ids(1), past_key_values=cache, use_cache=True)
    assert steps == []


def test_what_else_changes_keys_and_values_is_left_alone(model: PreTrainedModel):
    optimize.unfuse(model)
    for attention in attentions(model).values():
        intercept(attention, lambda keys, values: (keys, values))
    assert optimize.fuse(model).why == {"its keys and values are changed on their way to the cache": 2}
    assert round_cache(model, "int8-g16").why == {"its keys and values are changed on their way to the cache": 2}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty makes NaN: room that is not filled yet is never read."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("kernel", [EXACT, "native-int16", "native-int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounds_no_more_than_the_layers_own_forward(kernel: str, dtype: str, pressed: Callable[[Any], Path]):
    """Both round to the dtype between layers and in the cache, transformers after every operation besides."""
    folder = pressed(CONFIGS["qwen2"])
    pieces = TEXTS["decode"]
    truth, _ = roll(load(folder, kernel=kernel), pieces)
    model = load(folder, dtype, kernel)
    ours, theirs = (roll(m, pieces)[0] for m in (model, plain(model)))
    assert distance(ours, truth) < 1.1 * distance(theirs, truth)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_return_sequences": 2, "do_sample": True}],
    ids=str,
)
def test_generates_the_same_tokens(how: dict[str, Any], threads: int, model: PreTrainedModel):
    def tokens(model: PreTrainedModel) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model.generate(ids(7), **{"max_new_tokens": 24, "do_sample": False, **how})

    want = tokens(plain(model))
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(tokens(model), want)
    finally:
        torch.set_num_threads(was)


def test_the_cache_grows_as_often_as_it_must(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    want, _ = roll(model, [5] + [1] * 20)
    monkeypatch.setattr(optimize, "_ROOM", 3)
    got, cache = roll(model, [5] + [1] * 20)
    assert torch.equal(got, want)
    assert cache.layers[0].room[0]["codes"].shape[2] == 5 + 3 + 5 * (1 + 3)


CHANGES: dict[str, Callable[[DynamicCache], Any]] = {
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "repeat": lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([1]))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_cache_that_others_changed_is_read_anew(change: Callable[[DynamicCache], Any], model: PreTrainedModel):
    results = []
    for each in (model, plain(model)):
        _, cache = roll(each, [9, 1, 1, 1, 1])
        before = [layer.keys.clone() for layer in cache.layers], [layer.keys for layer in cache.layers]
        change(cache)
        results.append(roll(each, [1, 1, 1], cache)[0])
        assert all(torch.equal(a, b) for a, b in zip(*before)), "what someone else holds has changed"
    assert distance(*results) < TOLERANCE


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_copies_of_a_cache_go_their_own_ways(copied: Callable[[Any], Any], model: PreTrainedModel):
    _, first = roll(model, [9, 1, 1])
    second = copy.copy(first)
    second.layers = [copied(layer) for layer in first.layers]
    token = torch.tensor([[5]])
    with torch.no_grad():
        model(input_ids=torch.tensor([[7]]), past_key_values=second, use_cache=True)
        got = [model(input_ids=token, past_key_values=cache, use_cache=True).logits for cache in (first, second)]
    want = roll(model, [9, 1, 1])[1]
    with torch.no_grad():
        assert torch.equal(got[0], model(input_ids=token, past_key_values=want, use_cache=True).logits)
    assert not torch.equal(got[0], got[1])


def test_a_cache_leaves_inference_mode(model: PreTrainedModel):
    with torch.inference_mode():
        _, cache = roll(model, [9, 1])
    got, _ = roll(model, [1, 1, 4, 1], cache)
    with torch.inference_mode():
        _, cache = roll(model, [9, 1])
        want, _ = roll(model, [1, 1, 4, 1], cache)
    assert torch.equal(got, want)


def padded(starts: list[int], count: int) -> Tensor:
    """The attention mask of sequences that begin at these places."""
    return (torch.arange(count) >= torch.tensor(starts).unsqueeze(1)).long()


@pytest.mark.parametrize("starts", [[0, 0], [3], [0, 4, 8]], ids=str)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=str)
def test_generates_the_same_for_batches_and_padding(
    how: dict[str, Any], starts: list[int], model: PreTrainedModel, steps: list[int]
):
    given = {"inputs": ids(9, batch=len(starts)), "attention_mask": padded(starts, 9)}
    want = plain(model).generate(**given, max_new_tokens=8, do_sample=False, **how)
    steps.clear()
    assert torch.equal(model.generate(**given, max_new_tokens=8, do_sample=False, **how), want)
    assert len(steps) == 2 * 8


@pytest.mark.parametrize("faster", [False, True])
def test_logits_without_a_cache(
    model: PreTrainedModel, steps: list[int], monkeypatch: pytest.MonkeyPatch, faster: bool
):
    """As an evaluation asks for them, with inputs left alone or rounded as the kernel does it."""
    monkeypatch.setattr(optimize.products, "faster", lambda dtype: faster)
    with torch.inference_mode():
        want = plain(model)(input_ids=ids(70), use_cache=False).logits
        steps.clear()
        assert distance(model(input_ids=ids(70), use_cache=False).logits, want) < TOLERANCE
        many = ids(70).expand(8, -1)  # more rows than go through all layers at a time
        assert distance(model(input_ids=many, use_cache=False).logits, want.expand(8, -1, -1)) < TOLERANCE
    assert steps == [0, 0] * (1 if faster else 2)  # whose products with many rows are the faster ones


def test_inputs_are_rounded_as_the_kernel_says_at_the_time(pressed: Callable[[Any], Path], steps: list[int]):
    folder = pressed(CONFIGS["llama"])
    exact, model = (load(folder, kernel=kernel) for kernel in (EXACT, "native-int8"))
    with torch.inference_mode():
        want = exact(input_ids=ids(20)).logits
        rounded = model(input_ids=ids(20)).logits
        with inputs_left_alone(model):
            assert torch.equal(model(input_ids=ids(20)).logits, want)
        assert torch.equal(model(input_ids=ids(20)).logits, rounded)
    assert not torch.equal(rounded, want)


OTHER_MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "a hole": lambda mask: mask & (torch.arange(mask.shape[-1]) != 2),
    "a window": lambda mask: mask & mask.flip(-2, -1).roll(3, -1),
    "nothing for the last": lambda mask: mask & (torch.arange(mask.shape[-2]) < mask.shape[-2] - 1).unsqueeze(1),
    "both ways": torch.ones_like,
    "numbers that are added": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -1e4),
    "each head its own": lambda mask: mask.repeat(1, 4, 1, 1),
}


@pytest.mark.parametrize("change", OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_other_masks_go_the_old_way(change: Callable[[Tensor], Tensor], model: PreTrainedModel, steps: list[int]):
    mask = change(torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
    if (mask == 0).all(-1).any():
        mask[..., 0] = True
    layer = model.model.layers[0]
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    rotation = model.model.rotary_emb(x, torch.arange(9).unsqueeze(0))
    steps.clear()
    with torch.no_grad():
        got, want = (
            forward(x, attention_mask=mask, position_embeddings=rotation)
            for forward in (layer, MethodType(type(layer).forward, layer))
        )
    assert torch.equal(got, want)
    assert not steps


def test_a_mask_that_changed_is_read_again(model: PreTrainedModel):
    layer = model.model.layers[0]
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    rotation = model.model.rotary_emb(x, torch.arange(9).unsqueeze(0))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        before = layer(x, attention_mask=mask, position_embeddings=rotation)
        mask[..., :3] = False
        after = layer(x, attention_mask=mask, position_embeddings=rotation)
        own = type(layer).forward(layer, x, attention_mask=mask, position_embeddings=rotation)
    assert distance(after[:, 3:], own[:, 3:]) < TOLERANCE
    assert not torch.equal(before[:, 3:], after[:, 3:])


def attach_hook(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)


def replace_child(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj, nn.Hardtanh())


@pytest.mark.parametrize("change", [attach_hook, replace_child])
def test_steps_aside_for_changed_modules(
    change: Callable[[PreTrainedModel], None], model: PreTrainedModel, steps: list[int]
):
    roll(model, [9, 1])
    steps.clear()
    change(model)
    assert distance(roll(model, [9, 1, 1])[0], roll(plain(model), [9, 1, 1])[0]) < TOLERANCE
    assert len(steps) == 3  # of the other layer


@pytest.mark.parametrize("given", [{"output_attentions": True}, {"output_hidden_states": True}], ids=str)
def test_outputs_on_request(given: dict[str, bool], model: PreTrainedModel, steps: list[int]):
    if "output_attentions" in given:
        model.set_attn_implementation("eager")
    _, cache = roll(model, [9, 1])
    steps.clear()
    with torch.no_grad():
        output = model(input_ids=ids(1), past_key_values=cache, use_cache=True, **given)
    assert not steps
    assert len(output.attentions or output.hidden_states) in (2, 3)
    model.set_attn_implementation("sdpa")
    roll(model, [9, 1])
    assert steps, "the hooks that transformers leaves behind do nothing more"


def test_training_gradients_and_other_caches_go_the_old_way(model: PreTrainedModel, steps: list[int]):
    _, cache = roll(model, [9, 1])
    steps.clear()
    embedded = model.get_input_embeddings()(ids(1)).detach().requires_grad_()
    model(inputs_embeds=embedded, past_key_values=copy.deepcopy(cache)).logits.sum().backward()
    assert embedded.grad is not None
    roll(model.train(), [9, 1, 1])
    roll(model.eval(), [9, 1, 1], StaticCache(config=model.config, max_cache_len=32))
    assert not steps


def test_a_copy_of_the_model_is_its_own(model: PreTrainedModel, steps: list[int]):
    want, _ = roll(model, [9, 1, 1])
    copied = copy.deepcopy(model)
    steps.clear()
    model.model.layers[0].mlp.down_proj.packed.data[128:] = 0
    assert torch.equal(roll(copied, [9, 1, 1])[0], want)
    assert len(steps) == 6
    assert not torch.equal(roll(model, [9, 1, 1])[0], want)


def test_unfuse(model: PreTrainedModel, steps: list[int]):
    optimize.unfuse(model)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    roll(model, [9, 1, 1])
    assert not steps
    assert optimize.fuse(model).fused == 2


FUSED = ("gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("name", FUSED)
def test_other_architectures(name: str, tiny: Callable[..., Path], tmp_path: Path, steps: list[int], poisoned: None):
    """Prompts, padding, pieces of a text and single tokens, beyond the windows of 8 that some have."""
    changes = {"num_experts_per_tok": 2} if "mo" in name or name == "mixtral" else {}
    quantize(tiny(name, **changes), "int4-g32", tmp_path / "int4")
    model = load(tmp_path / "int4")
    assert model.fusing.fused == 2
    own, batch, mask = plain(model), ids(27, 2), padded([0, 5], 27)
    results = []
    for each in (model, own):
        steps.clear()
        cache, logits = None, [each(batch, attention_mask=mask, use_cache=False).logits]
        for start, end in [(0, 11), *((i, i + 1) for i in range(11, 20)), (20, 27)]:
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            output = each(batch[:, start:end], attention_mask=mask[:, :end], position_ids=places,
                          past_key_values=cache, use_cache=True)  # fmt: skip
            cache = output.past_key_values
            logits.append(output.logits)
        results.append(torch.cat(logits, 1)[mask.repeat(1, 2).bool()])
        assert len(steps) == (2 * 12 if each is model else 0)
    assert distance(*results) < TOLERANCE
    arguments = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(batch, **arguments), own.generate(batch, **arguments))


REASONS = {
    "gpt_neox": "it has no self_attn.q_proj",
    "falcon": "it has no self_attn.q_proj",
}


@pytest.mark.parametrize("name", REASONS)
def test_architectures_that_stay_as_they_are(name: str, tiny: Callable[..., Path], tmp_path: Path):
    quantize(tiny(name), "int4-g32", tmp_path / "int4")
    model = load(tmp_path / "int4")
    assert model.fusing == optimize.Fusing(0, 2, {REASONS[name]: 2})
    assert not any("decoding" in module.__dict__ for module in model.get_decoder().modules())


def test_each_layer_is_tried(pressed: Callable[[Any], Path]):
    """SmolLM3 does not rotate in every layer, which no module tells of."""
    some = SmolLM3Config(**{**SHAPE, "num_hidden_layers": 4}, no_rope_layers=[1, 0, 1, 0])
    reason = "it computes something else than its parts say"
    assert load(pressed(some)).fusing == optimize.Fusing(2, 4, {reason: 2})


def test_another_cap_is_found_out(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The scores of a layer with random weights are so small that no cap of 50 changes them."""
    quantize(tiny("gemma2"), "int4-g32", tmp_path / "int4")
    own = optimize.Parts
    monkeypatch.setattr(optimize, "Parts", lambda *parts: own(*parts[:7], 100.0, parts[8]))
    assert load(tmp_path / "int4").fusing.why == {"it computes something else than its parts say": 2}


@torch.inference_mode()
def test_router_logits_are_those_of_the_layers_own_forward(tiny: Callable[..., Path], tmp_path: Path):
    quantize(tiny("mixtral"), "int4-g32", tmp_path / "int4")
    model = load(tmp_path / "int4")
    got, want = (each(ids(5), output_router_logits=True).router_logits for each in (model, plain(model)))
    assert len(got) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_window_of_a_long_text(pressed: Callable[[Any], Path], steps: list[int], monkeypatch: pytest.MonkeyPatch):
    """Of the tokens before its window, a cache lets go when it has no room; a changed cache is read anew."""
    monkeypatch.setattr(optimize, "_ROOM", 3)
    model = load(pressed(MistralConfig(**SHAPE, sliding_window=8)))
    steps.clear()
    results = []
    for each in (model, plain(model)):
        logits, cache = roll(each, [30, *[1] * 20, 9, 4])
        assert cache.layers[0].keys.shape[2] == 7
        cache.reorder_cache(torch.tensor([0]))
        more, cache = roll(each, [1, 2], cache)
        assert cache.get_seq_length() == 66
        results.append(torch.cat([logits, more], 1))
    assert len(steps) == 2 * 25
    assert distance(*results) < TOLERANCE


def test_other_kernels_and_dense_layers_say_so(pressed: Callable[[Any], Path], model: PreTrainedModel):
    other = load(pressed(CONFIGS["llama"]), kernel="reference")
    assert other.fusing == optimize.Fusing(0, 2, {"a linear layer runs on reference": 2})
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 128)
    optimize.unfuse(model)
    assert optimize.fuse(model) == optimize.Fusing(1, 2, {"mlp.up_proj is not quantized": 1})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call of NativeLayers.step had."""
    counts: list[int] = []
    step = NativeLayers.step

    def counted(self: NativeLayers, *given: Any) -> Tensor:
        counts.append(len(self.layers))
        return step(self, *given)

    monkeypatch.setattr(NativeLayers, "step", counted)
    return counts


def test_the_whole_decoder_is_one_call_for_generate(model: PreTrainedModel, calls: list[int]):
    calls.clear()
    batch = ids(9, 2)
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    got = model.generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True,
                         return_dict_in_generate=True)  # fmt: skip
    assert calls == [2] * 5
    want = plain(model).generate(batch, attention_mask=mask, max_new_tokens=5, do_sample=False, output_logits=True,
                                 return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(got.sequences, want.sequences)
    assert distance(torch.stack(got.logits), torch.stack(want.logits)) < 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},  # two texts in one sequence
        {"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])},
        {"attention_mask": torch.ones(1, 1, 6, 6).tril().bool()},
    ],
    ids=str,
)
@torch.inference_mode()
def test_the_whole_decoder_steps_aside(model: PreTrainedModel, calls: list[int], arguments: dict[str, Any]):
    batch = ids(6)
    want = plain(model)(batch, **arguments)
    calls.clear()
    got = model(batch, **arguments)
    assert 2 not in calls
    real = arguments.get("attention_mask", torch.ones(1, 6))[0] == 1
    rows = real if real.dim() == 1 else slice(None)
    assert distance(got.logits[:, rows], want.logits[:, rows]) < 1e-4
    assert len(got.hidden_states or []) == len(want.hidden_states or [])


@torch.inference_mode()
def test_the_whole_decoder_steps_aside_for_hooks_and_other_modules(model: PreTrainedModel, calls: list[int]):
    seen: list[Tensor] = []
    handle = model.model.layers[1].register_forward_hook(lambda module, given, output: seen.append(output))
    calls.clear()
    model(ids(3))
    assert (calls, len(seen)) == ([1, 1], 1)
    handle.remove()
    model(ids(3))
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    model(ids(3))
    assert calls == [1, 1, 2, 1]


def test_a_decoder_that_does_more_than_its_layers_says_so(pressed: Callable[[Any], Path]):
    other = load(pressed(CONFIGS["llama"]))
    optimize.unfuse(other)
    other.model.extra = torch.nn.Tanh()
    assert "the decoder has embed_tokens, extra, layers" in str(optimize.fuse(other).apart)


@torch.inference_mode()
@pytest.mark.parametrize(("multiplies", "expected"), [(True, [1, 4]), (False, [1, 4, 5, 32])])
def test_a_dense_head_of_few_rows_is_the_librarys(
    pressed: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch, multiplies: bool, expected: list[int]
):
    """More rows, too, where torch has no products of bfloat16."""
    model = load(pressed(CONFIGS["llama"]), "bfloat16")
    rows: list[int] = []
    own = optimize.dense_linear
    monkeypatch.setattr(optimize, "dense_linear", lambda x, weight: rows.append(len(x)) or own(x, weight))
    monkeypatch.setattr(optimize.products, "faster", lambda dtype: not multiplies)
    for batch in (1, 4, 5, 32, 33):
        x = torch.randn(batch, 1, 64).bfloat16()
        want = torch.nn.functional.linear(x, model.lm_head.weight)
        assert distance(model.lm_head(x), want) < 2**-8
    assert rows == expected


@torch.inference_mode()
def test_rows_that_lie_apart_reach_the_head_side_by_side(
    pressed: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would copy the head's weight for each sequence."""
    model, own, contiguous = load(pressed(CONFIGS["llama"]), "bfloat16"), torch.nn.functional.linear, []
    monkeypatch.setattr(optimize.products, "faster", lambda dtype: False)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *a: contiguous.append(x.is_contiguous()) or own(x, *a))
    states = torch.randn(8, 5, 64).bfloat16()
    assert distance(model.lm_head(states[:, -1:]), own(states[:, -1:], model.lm_head.weight)) < 2**-8
    assert contiguous == [True]
