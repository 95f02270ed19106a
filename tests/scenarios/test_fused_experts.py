"""Experts that the files hold in one tensor are quantized one by one, whichever way they lie in it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from bitpress.eval.measure import layer_errors
from bitpress.eval.measure.protocols import halves
from bitpress.pipeline.api import convert, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.evaluate.verify import in_memory_logits
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.models.modules import names_of_experts, part_experts
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.models.structure import decoder
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint, read_json

from ..fixtures.checkpoints import SMALL, save_tokenizer

EXPERTS, CPU = 4, torch.device("cpu")
SOME = {"num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LLAMA4 = {"intermediate_size": 96, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1, "head_dim": 16}
DBRX: dict[str, Any] = {
    "vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": EXPERTS, "moe_top_k": 2, "hidden_size": 64},
}  # fmt: skip

# config, its changes, and the layer names of block 0's experts
MODELS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "gpt_oss": ("GptOssConfig", SMALL | SOME | {"head_dim": 16, "intermediate_size": 96}, "mlp.experts", ()),
    "llama4": ("Llama4TextConfig", SMALL | SOME | LLAMA4 | {"num_experts_per_tok": 1}, "feed_forward.experts", ()),
    "granitemoe": ("GraniteMoeConfig", SMALL | SOME | {"intermediate_size": 96}, "block_sparse_moe.experts", ()),
    "qwen3_moe": ("Qwen3MoeConfig", SMALL | SOME | {"head_dim": 16}, "mlp.experts", ()),
    "mixtral": ("MixtralConfig", SMALL | SOME | {"intermediate_size": 96}, "mlp.experts", ("w1", "w3", "w2")),
    "jetmoe": ("JetMoeConfig", SMALL | SOME | {"intermediate_size": 96, "kv_channels": 16}, "mlp.input_linear", ("",)),
    "dbrx": ("DbrxConfig", DBRX, "ffn.experts.mlp", ("w1", "v1", "w2")),
}


def save_fused(name: str, folder: Path) -> Path:
    """A seeded random model, all experts of a block in one tensor."""
    kind, changes, _, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**changes)).to(torch.float32)
        for parameter in model.parameters():  # some start as constants, and some are not set at all
            parameter.data = 0.1 * torch.randn_like(parameter) + (parameter.dim() == 1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if name in ("mixtral", "qwen3_moe"):  # which transformers saves one by one
        tensors = {n: p.detach().clone() for n, p in model.named_parameters()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """fused(name): the folder of a float32 model. Read only."""
    saved: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in saved:
            saved[name] = save_fused(name, tmp_path_factory.mktemp(name))
        return saved[name]

    return make


def dense_with_the_artifacts_weights(source: Path, artifact: Path) -> PreTrainedModel:
    """transformers' own model of the source, each quantized layer's part of its parameters overwritten."""
    model = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager").eval()
    checkpoint = Checkpoint(artifact)
    contents = read_quantized(checkpoint)
    for layer, target in contents.quantized.items():
        weight = read_layer(checkpoint, contents.format, contents.schemes[layer], layer).dequantize()
        parameter = model.get_parameter(target.parameter).data
        if target.expert is None:
            parameter.copy_(weight)
            continue
        expert, piece, pieces = target.expert
        rows = parameter.view(EXPERTS, -1, parameter.shape[-1])[expert]
        leaf = target.parameter.rpartition(".")[2]
        if "gpt_oss" in model.config.model_type:  # [in, out], gate and up alternate
            rows.t()[piece::pieces] = weight
        elif "llama4" in model.config.model_type:
            rows.t().chunk(pieces)[piece].copy_(weight)
        elif leaf == "w2" and model.config.model_type == "dbrx":
            rows.copy_(weight.t())
        else:
            rows.chunk(pieces)[piece].copy_(weight)
    return model


def logits(model: PreTrainedModel, seed: int = 1) -> torch.Tensor:
    ids = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, "int4-g32") for name in MODELS), ("gpt_oss", "nf4"), ("dbrx", "nf4")]
)
def test_reloads_as_transformers_runs_its_weights(name: str, scheme: str, fused: Any, tmp_path: Path) -> None:
    source = fused(name)
    quantize(source, scheme, tmp_path / "out")
    model = load_model(Checkpoint(tmp_path / "out"), CPU, "auto", "reference")
    expected = logits(dense_with_the_artifacts_weights(source, tmp_path / "out"))
    # the same products; Llama 4's with fewer rows at a time, which may change the order of sums
    assert (logits(model) - expected).norm() <= (1e-6 if name == "llama4" else 1e-7) * expected.norm()
    _, _, module, pieces = MODELS[name]
    prefix = "transformer.blocks.0" if name == "dbrx" else "model.layers.0"
    if scheme == "nf4":
        kept = read_json(tmp_path / "out" / "config.json")["quantization_config"]["llm_int8_skip_modules"]
        routers = [layer for layer in kept if "router" in layer or layer.endswith("mlp.gate")]
        assert {layer.split(".")[2] for layer in routers} == {"0", "1"}, "servers have them as linear layers"
    quantized = read_quantized(Checkpoint(tmp_path / "out")).quantized
    for expert in range(EXPERTS):
        for piece in pieces or ("gate_proj", "up_proj", "down_proj"):
            assert ".".join(filter(None, (prefix, module, str(expert), piece))) in quantized


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "qwen3_moe", "jetmoe", "dbrx"])
def test_each_expert_is_calibrated_by_its_own_tokens(
    name: str, fused: Any, learn: Any, proved: Any, tmp_path: Path
) -> None:
    """Against the logits of the very model that gptq worked on, whose experts were dense."""
    text = Calibration("a text", torch.randint(3, 96, (16, 16), generator=torch.Generator().manual_seed(2)), 0)
    notes = learn(fused(name), tmp_path / "out", calibration=text)
    assert proved(tmp_path / "out")["tokens"] == 16
    layers = read_json(tmp_path / "out" / "bitpress.json")["coverage"]["layers"]
    experts = [layer for layer in layers if any(part.isdigit() for part in layer["name"].split(".")[3:])]
    tokens = {layer["tokens"] for layer in experts}
    assert len(tokens) > 1, "each expert counts its own"
    assert max(tokens) < 256 or name == "jetmoe"
    few = [layer for layer in experts if layer["tokens"] < 2 * layer["shape"][1]]
    assert few
    assert all("note" in layer for layer in few)
    assert any(few[0]["name"] in note for note in notes)
    assert all(layer["output_error"] < layer["relative_error"] for layer in experts if layer not in few)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "jetmoe", "dbrx"])
def test_inputs_are_quantized_too(name: str, fused: Any, tmp_path: Path) -> None:
    quantize(fused(name), "int8-dynamic", tmp_path / "out")
    found = logits(load_model(Checkpoint(tmp_path / "out"), CPU, "auto", "reference"))
    ids = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1))
    expected = in_memory_logits(Checkpoint(fused(name)), Recipe.make("int8-dynamic"), ids, CPU, "auto")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the same weights and operations, in float32
    dense = logits(AutoModelForCausalLM.from_pretrained(fused(name)).eval())
    assert 0 < (found - dense).norm() < 0.1 * dense.norm()


@pytest.mark.usefixtures("registered")
def test_transformers_loads_and_saves_it_by_bitpress(fused: Any, tmp_path: Path) -> None:
    """Biases of single experts too, which transformers does not know by their names."""
    quantize(fused("gpt_oss"), "int4-g32", tmp_path / "out")
    expected = logits(load_model(Checkpoint(tmp_path / "out"), CPU, "auto"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    first, second = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "again")
    assert set(first.tensors) == set(second.tensors)
    assert torch.equal(logits(load_model(second, CPU, "auto")), expected)
    facts = diagnose(first.folder).runtimes
    assert facts["transformers"]["loads"] == facts["vLLM"]["loads"] == "no"
    assert any("bitpress.pipeline.hf" in why for why in facts["transformers"]["why"])


@pytest.mark.parametrize("name", ["gpt_oss", "dbrx"])
def test_errors_of_layers_are_those_of_each_expert(name: str, fused: Any, tmp_path: Path) -> None:
    quantize(fused(name), "int8-g32", tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(fused(name)).eval()
    expected = logits(dense)
    model = load_model(Checkpoint(tmp_path / "out"), CPU, "auto")
    part_experts(dense, model)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-5)  # the same products, one by one
    windows = halves(torch.randint(3, 96, (48,), generator=torch.Generator().manual_seed(1)), 24, 0)
    errors = layer_errors.output_errors(dense, model, windows, decoder(dense))["layers"]
    names = names_of_experts(read_quantized(Checkpoint(tmp_path / "out")))
    experts = {names[layer["name"]]: layer["output_error"] for layer in errors if layer["name"] in names}
    assert set(experts) == set(names.values())
    assert all(error is None or 0 < error < 0.03 for error in experts.values()), experts


def test_a_broken_run_goes_on_to_the_same_bytes(fused: Any, learn: Any, tmp_path: Path) -> None:
    source, stop = fused("gpt_oss"), KeyError("power cut")

    def fail(done: int, total: int) -> None:
        if done == 2:
            raise stop

    learn(source, tmp_path / "whole")
    with pytest.raises(KeyError, match="power cut"):
        learn(source, tmp_path / "out", on_step=fail)
    assert list((tmp_path / "out.partial" / "artifact.tmp").glob("*.safetensors"))
    learn(source, tmp_path / "out")
    whole, out = (read_json(tmp_path / name / "bitpress.json")["files"] for name in ("whole", "out"))
    assert whole == out


def test_the_shape_tells_whether_experts_lie_transposed(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's first files have them as [in, out], transformers saves them as [out, in]; both give the same."""
    text = SMALL | SOME | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 4, "num_position_embeddings": 16}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    saved, before = tmp_path / "saved", tmp_path / "before"
    AutoModelForImageTextToText.from_config(config).to(torch.float32).save_pretrained(saved)
    save_tokenizer(saved)
    shutil.copytree(saved, before)
    tensors = load_file(saved / "model.safetensors")
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    assert any(tensors[name].shape != turned[name].shape for name in tensors)
    save_file(turned, before / "model.safetensors", {"format": "pt"})
    for layers in ({}, {"*.experts.down_proj": "none"}):
        out = [tmp_path / f"{source.name}-{len(layers)}" for source in (saved, before)]
        for source, folder in zip((saved, before), out):
            quantize(source, {"scheme": "int4-g32", "layers": layers, "allow_split_fused": True}, folder)
        first, second = (logits(load_model(Checkpoint(folder), CPU, "auto", "reference")) for folder in out)
        assert torch.equal(first, second)


def test_converts_there_and_back(tmp_path: Path) -> None:
    """Biases and routers come along; the weights stay the same to the bit."""
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(save_fused("gpt_oss", tmp_path / "float32")).bfloat16().save_pretrained(source)
    save_tokenizer(source)
    quantize(source, {"scheme": "int4-g32", "format": "compressed-tensors"}, tmp_path / "first")
    convert(tmp_path / "first", "gptq", tmp_path / "gptq")
    convert(tmp_path / "gptq", "compressed-tensors", tmp_path / "back")
    expected = logits(load_model(Checkpoint(tmp_path / "first"), CPU, "float32", "reference"))
    for name in ("gptq", "back"):
        assert torch.equal(logits(load_model(Checkpoint(tmp_path / name), CPU, "float32", "reference")), expected)
