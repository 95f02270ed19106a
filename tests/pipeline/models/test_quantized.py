"""Checkpoints whose layers have schemes of their own: written by the format, read back, and told right to others."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitpress.kernels.linear import QEmbedding, QLinear
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import convert, load
from bitpress.pipeline.checkpoints.coverage import coverage_of
from bitpress.pipeline.checkpoints.describe import describe
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.formats import misfits, registry
from bitpress.pipeline.methods import default_method
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.models.structure import TensorNames, kept_names, skeleton
from bitpress.pipeline.storage.checkpoint import Checkpoint

Rule = Callable[[str], str | None]

pytestmark = pytest.mark.usefixtures("registered")  # from_pretrained on our kernels


def compressed(layer: str) -> str | None:
    """int4, int8, int8 with quantized inputs, and layers that are kept; q, k and v alike, gate and up, too."""
    if layer.startswith("model.layers.1.self_attn"):
        return None
    kinds = {
        "down_proj": "int8-g32",
        "o_proj": "int8-dynamic",
        "up_proj": "int4-g32-asym",
        "gate_proj": "int4-g32-asym",
    }
    return kinds.get(layer.rpartition(".")[2], "int4-g32") if ".layers." in layer else None


def gptq(layer: str) -> str | None:
    """int8 in one layer of two and in the head, int4 elsewhere, one kept."""
    if layer == "model.layers.1.self_attn.o_proj":
        return None
    eight = layer in ("model.layers.1.mlp.down_proj", "lm_head")
    return ("int8-g32" if eight else "int4-g32") if ".layers." in layer or layer == "lm_head" else None


def with_embedding(layer: str) -> str | None:
    return {"model.embed_tokens": "int8-channel", "lm_head": "int8-g32"}.get(layer) or compressed(layer)


MIXTURES: list[tuple[str, Rule]] = [
    ("compressed-tensors", compressed), ("compressed-tensors", gptq), ("compressed-tensors", with_embedding),
    ("gptq", gptq), ("gptq-v2", gptq),
]  # fmt: skip
EVERY = pytest.mark.parametrize(("form", "rule"), MIXTURES, ids=[f"{form}-{rule.__name__}" for form, rule in MIXTURES])


def store(source: Path, out: Path, form: str, rule: Rule) -> dict[str, QTensor]:
    """An artifact by the format's own writer, two shards; returns its layers."""
    checkpoint, format = Checkpoint(source), registry()[form]
    model = skeleton(checkpoint)
    names, layers = TensorNames(model), {}
    out.mkdir()
    writer = format.writer(out, torch.bfloat16, 2)
    tensors = list(checkpoint.tensors)
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        for name in part:
            layer = name.removesuffix(".weight")
            matrix = name != layer and len(checkpoint.tensors[name].shape) == 2
            scheme = Scheme.parse(text) if matrix and (text := rule(layer)) else None
            if scheme is None:
                writer.add(name, checkpoint.read(name))
                continue
            scale_dtype = format.scale_dtype(scheme, torch.bfloat16)
            layers[layer], _ = default_method(scheme).quantize(checkpoint.read(name).float(), scheme, scale_dtype)
            writer.add(layer, layers[layer])
        writer.adopt(writer.cut(number).write())
    plain = {name: info for name, info in checkpoint.tensors.items() if name.removesuffix(".weight") not in layers}
    kept = kept_names(plain, layers, model, names)
    section = format.quantization_config({layer: q.scheme for layer, q in layers.items()}, kept, torch.bfloat16)
    files = writer.close(checkpoint.config, section, checkpoint.other_files())
    assert set(files) == {path.name for path in out.iterdir()}
    return layers


def section_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def groups_of(section: Mapping[str, Any], layer: str, kind: str) -> list[str]:
    """The groups that compressed-tensors' readers find for a layer: by its name, by re.match, by its module's class."""

    def listed(entry: str) -> bool:
        return bool(re.match(entry[3:], layer)) if entry.startswith("re:") else entry in (layer, kind)

    if any(map(listed, section["ignore"])):
        return []
    return [name for name, group in section["config_groups"].items() for target in group["targets"] if listed(target)]


def settings_of(section: Mapping[str, Any], layer: str) -> tuple[int, int] | None:
    """(bits, group size) that GPTQ's readers take for a layer, None for one that they leave alone."""
    if layer == "lm_head" and not section["lm_head"]:
        return None
    for pattern, own in section.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), layer):
            merged = {**section, **own}
            return None if pattern.startswith("-:") else (merged["bits"], merged["group_size"])
    return section["bits"], section["group_size"]


@EVERY
def test_each_layer_comes_back_by_its_own_scheme(tiny_llama: Path, tmp_path: Path, form: str, rule: Rule) -> None:
    layers = store(tiny_llama, tmp_path / "out", form, rule)
    checkpoint = Checkpoint(tmp_path / "out")
    contents = read_quantized(checkpoint)
    assert contents.schemes == {layer: q.scheme for layer, q in layers.items()}
    for layer, expected in layers.items():
        q = read_layer(checkpoint, contents.format, contents.schemes[layer], layer)
        assert torch.equal(q.dequantize(), expected.dequantize()), layer
    model, _ = load(tmp_path / "out", dtype="float32", kernel="reference")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for layer, q in layers.items():
        module = dense.get_submodule(layer)
        module.weight.data = q.dequantize()
        assert isinstance(model.get_submodule(layer), QEmbedding if layer.endswith("embed_tokens") else QLinear)
        if q.scheme.activations:
            module.register_forward_pre_hook(lambda module, args, act=q.scheme.activations: (act.apply(args[0], {}),))
    ids = torch.arange(32).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)  # order of float32 sums


@EVERY
def test_other_readers_find_one_scheme_for_each_layer(tiny_llama: Path, tmp_path: Path, form: str, rule: Rule) -> None:
    layers, section = store(tiny_llama, tmp_path / "out", form, rule), section_of(tmp_path / "out")
    every = {
        name.removesuffix(".weight") for name in Checkpoint(tiny_llama).tensors if "_proj" in name or "lm_" in name
    }
    for layer in every | layers.keys():
        scheme = layers[layer].scheme if layer in layers else None
        if form != "compressed-tensors":
            described = scheme.weight.description() if scheme else None
            assert settings_of(section, layer) == (described and (described.num_bits, described.group_size)), layer
            continue
        groups = groups_of(section, layer, "Embedding" if layer.endswith("embed_tokens") else "Linear")
        if scheme is None:
            assert groups == [], layer
            continue
        assert len(groups) == 1, layer
        group = section["config_groups"][groups[0]]
        assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (scheme.bits, scheme.group_size)
        assert (group["input_activations"] is not None) == (scheme.activations is not None)
    if form == "compressed-tensors":
        formats = {group.get("format", section["format"]) for group in section["config_groups"].values()}
        assert section["format"] == ("mixed-precision" if len(formats) > 1 else "pack-quantized")
    else:
        assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == section
        fused = "model.layers.0.self_attn.qkv_proj"  # the name that vLLM asks by
        assert settings_of(section, fused) == (4, 32)


@EVERY
def test_described_and_examined(tiny_llama: Path, tmp_path: Path, form: str, rule: Rule) -> None:
    layers = store(tiny_llama, tmp_path / "out", form, rule)
    what = describe(tmp_path / "out")
    assert (what["quantized"], what["format"], what["quantized layers"]) == ("mixed", form, len(layers))
    assert {line.partition(":")[0] for line in what["layers by scheme"]} == {q.scheme.name for q in layers.values()}
    diagnosis = diagnose(tmp_path / "out")
    assert diagnosis.sound, diagnosis.faults
    assert diagnosis.runtimes["vLLM"]["loads"] != "no", diagnosis.runtimes["vLLM"]
    coverage = coverage_of(Checkpoint(tmp_path / "out"))
    assert {layer["name"]: layer["scheme"] for layer in coverage["layers"]} == {
        layer: q.scheme.name for layer, q in layers.items()
    }


def test_converted(tiny_llama: Path, tmp_path: Path) -> None:
    """A mixture of two bit widths, there and back, to the bit."""
    layers = store(tiny_llama, tmp_path / "out", "gptq", gptq)
    convert(tmp_path / "out", "compressed-tensors", tmp_path / "there")
    convert(tmp_path / "there", "gptq", tmp_path / "back")
    for folder in ("there", "back"):
        checkpoint = Checkpoint(tmp_path / folder)
        contents = read_quantized(checkpoint)
        for layer, expected in layers.items():
            q = read_layer(checkpoint, contents.format, contents.schemes[layer], layer)
            assert torch.equal(q.dequantize(), expected.dequantize()), layer
    assert section_of(tmp_path / "back") == section_of(tmp_path / "out")


def test_a_unit_with_two_schemes_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    def rule(layer: str) -> str | None:
        return "int8-g32" if layer == "model.layers.0.self_attn.k_proj" else compressed(layer)

    store(tiny_llama, tmp_path / "split", "compressed-tensors", rule)
    store(tiny_llama, tmp_path / "half", "gptq", lambda layer: None if "q_proj" in layer else gptq(layer))
    for folder, parts in (("split", "int4-g32 and int8-g32"), ("half", "int4-g32 and unquantized")):
        diagnosis = diagnose(tmp_path / folder)
        assert diagnosis.sound, diagnosis.faults
        for server in ("vLLM", "SGLang"):
            assert diagnosis.runtimes[server]["loads"] == "no"
            assert any(parts in why and "self_attn.qkv_proj" in why for why in diagnosis.runtimes[server]["why"])


def test_what_a_format_cannot_hold() -> None:
    schemes = {"a": Scheme.parse("nf4"), "b": Scheme.parse("nf4-dq")}
    (problem,) = registry()["bitsandbytes"].mixture_problems(schemes)
    assert problem == "bitsandbytes holds one scheme for all layers, not nf4 and nf4-dq"
    layers = {"a": (Scheme.parse("int4-g32"), (64, 64))}
    assert misfits(registry()["gptq"], layers) == []
    assert misfits(registry()["gptq"], layers, ["a"]) == ["gptq has no place for quantized embeddings (a)"]


class TestTied:
    @pytest.fixture
    def source(self, save_model: Any, llama_config: Any, tmp_path: Path) -> Path:
        return save_model(llama_config(tie_word_embeddings=True), tmp_path / "tied")

    def test_the_head_shares_a_quantized_embedding(self, source: Path, tmp_path: Path) -> None:
        def rule(layer: str) -> str | None:
            return "int8-channel" if layer == "model.embed_tokens" else compressed(layer)

        layers = store(source, tmp_path / "out", "compressed-tensors", rule)
        model, _ = load(tmp_path / "out", dtype="float32", kernel="reference")
        assert isinstance(model.model.embed_tokens, QEmbedding)
        assert isinstance(model.lm_head, QLinear)
        weight = layers["model.embed_tokens"].dequantize()
        states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.lm_head(states), states @ weight.t())
        model.save_pretrained(tmp_path / "again")
        assert Checkpoint(tmp_path / "again").tensors.keys() == Checkpoint(tmp_path / "out").tensors.keys()

    def test_a_head_with_tensors_of_its_own_keeps_them(self, source: Path, tiny_llama: Path, tmp_path: Path) -> None:
        """Though config.json ties it to the embedding."""
        layers = store(tiny_llama, tmp_path / "out", "gptq", gptq)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        model, _ = load(tmp_path / "out", dtype="float32", kernel="reference")
        assert isinstance(model.lm_head, QLinear)
        weight = layers["lm_head"].dequantize()
        states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.lm_head(states), states @ weight.t())
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert isinstance(theirs.lm_head, QLinear)

    def test_an_unquantized_head_beside_a_quantized_embedding(
        self, source: Path, tmp_path: Path, edit_json: Callable[..., None], edit_tensors: Any
    ) -> None:
        """Again tied by config.json alone; by bitpress and by transformers."""
        rule = lambda layer: "int8-channel" if layer == "model.embed_tokens" else compressed(layer)  # noqa: E731
        store(source, tmp_path / "out", "compressed-tensors", rule)
        head = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
        file = sorted((tmp_path / "out").glob("*.safetensors"))[0]
        edit_tensors(file, lambda tensors: tensors.update({"lm_head.weight": head}))
        index = tmp_path / "out" / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        edit_json(index, weight_map=names | {"lm_head.weight": file.name})
        ours, _ = load(tmp_path / "out", dtype="float32", kernel="reference")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        for model in (ours, theirs):
            assert isinstance(model.model.embed_tokens, QEmbedding)
            assert torch.equal(model.lm_head.weight, head)


class TestKept:
    @pytest.fixture
    def source(self, tiny_llama: Path, copy_of: Any, edit_tensors: Any) -> Path:
        """A third block and a projection, which the causal model does not have: multi-token prediction; a tower."""
        folder = copy_of(tiny_llama, "mtp")

        def edit(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.startswith("model.layers.1.")]:
                tensors[name.replace("layers.1.", "layers.2.")] = tensors[name].clone()
            tensors["mtp.fc.weight"] = torch.randn(64, 128).bfloat16()
            tensors["visual.pos_embed.weight"] = torch.randn(16, 64).bfloat16()

        edit_tensors(folder / "model.safetensors", edit)
        return folder

    @pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
    def test_what_only_the_files_name(self, source: Path, tmp_path: Path, form: str) -> None:
        layers = store(source, tmp_path / "out", form, lambda layer: None if ".2." in layer else gptq(layer))
        section = section_of(tmp_path / "out")
        kept = [f"model.layers.2.{leaf}" for leaf in ("mlp.down_proj", "self_attn.q_proj")] + ["mtp.fc"]
        for layer in kept:
            told = settings_of(section, layer) if form == "gptq" else groups_of(section, layer, "Linear")
            assert not told, layer
        assert "visual.pos_embed" not in json.dumps(section)  # an embedding by its name
        assert form != "gptq" or all(settings_of(section, layer) for layer in layers)
        diagnosis = diagnose(tmp_path / "out")
        assert diagnosis.sound, diagnosis.faults

    @pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
    def test_the_doctor_names_what_the_config_does_not(self, source: Path, tmp_path: Path, form: str) -> None:
        store(source, tmp_path / "out", form, lambda layer: None if ".2." in layer else gptq(layer))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        section = config["quantization_config"]
        if form == "gptq":
            section["dynamic"] = {key: own for key, own in section["dynamic"].items() if "mtp" not in key}
            (tmp_path / "out" / "quantize_config.json").unlink()
        else:
            section["ignore"] = [name for name in section["ignore"] if name != "mtp.fc"]
            for group in section["config_groups"].values():
                group["targets"].append("re:mtp.*")
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        (fault,) = diagnose(tmp_path / "out").faults
        assert fault.startswith("mtp.fc: neither quantized nor in the config's")

    def test_entries_of_the_source_are_carried_over(self, source: Path, tmp_path: Path) -> None:
        uniform = lambda layer: "int4-g32" if ".layers." in layer and ".2." not in layer else None  # noqa: E731
        store(source, tmp_path / "out", "compressed-tensors", uniform)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        ignore = ["lm_head", "re:mtp.*", "re:model.layers.2.*", "re:nothing.*", "re:(a+)+$", "visual", "re:.*q_proj"]
        config["quantization_config"]["ignore"] = ignore
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        convert(tmp_path / "out", "gptq", tmp_path / "there")
        dynamic = section_of(tmp_path / "there")["dynamic"]
        assert {r"-:^mtp\.fc$", "-:mtp.*", "-:model.layers.2.*", "-:^visual$"} <= dynamic.keys()
        assert not {"-:nothing.*", "-:(a+)+$", "-:.*q_proj"} & dynamic.keys()
        convert(tmp_path / "there", "compressed-tensors", tmp_path / "back")
        assert {"lm_head", "re:mtp.*", "re:model.layers.2.*", "visual"} <= set(section_of(tmp_path / "back")["ignore"])


def test_layers_without_a_scheme_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    store(tiny_llama, tmp_path / "out", "compressed-tensors", compressed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"].popitem()
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is quantized, and config\.json gives it no scheme"):
        load(tmp_path / "out")


def test_gptq_refuses_embeddings_in_convert(tiny_llama: Path, tmp_path: Path) -> None:
    def rule(layer: str) -> str | None:
        return "int8-channel" if layer == "model.embed_tokens" else gptq(layer)

    store(tiny_llama, tmp_path / "out", "compressed-tensors", rule)
    with pytest.raises(ConfigError, match="gptq has no place for quantized embeddings"):
        convert(tmp_path / "out", "gptq", tmp_path / "there")
