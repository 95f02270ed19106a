"""What bitpress writes as GGUF, against the gguf package's own dequantization and transformers' own reader of GGUF."""

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import save_tokenizer_of_llamacpp as save_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import convert, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.evaluate import worker
from bitpress.pipeline.evaluate.verify import verify_artifact, verify_task
from bitpress.pipeline.formats import registry
from bitpress.pipeline.formats.gguf import FILE
from bitpress.pipeline.hub.download import resolve
from bitpress.pipeline.models.loading import load_dense, load_model
from bitpress.pipeline.models.pretrained import load_tokenizer
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint
from bitpress.pipeline.storage.gguf.architectures import generated_tensors, model_metadata, permute, permute_back
from bitpress.pipeline.storage.gguf.file import TYPES, read_gguf
from bitpress.pipeline.storage.gguf.tokenizer import tokenizer_metadata

FORMAT = registry()["gguf"]
CPU = torch.device("cpu")
IDS = torch.tensor([[5, 17, 60, 33, 2, 80, 9, 41]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """source(architecture, key=value): a tiny model with a tokenizer that llama.cpp knows."""

    def make(name: str, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(name) / name
        shutil.copytree(tiny(name, vocab_size=300, **changes), folder)
        save_tokenizer(folder)
        return folder

    return make


def logits_of(folder: Path) -> torch.Tensor:
    """bitpress's own logits of an artifact, by the reference kernel."""
    with torch.no_grad():
        return load_model(Checkpoint(folder), CPU, "float32", "reference")(IDS).logits


def logits_by_transformers(folder: Path, alone: Path) -> torch.Tensor:
    """Those of transformers, which is given the GGUF file, and a config where its own reader passes over keys."""
    alone.mkdir()
    shutil.copy(folder / FILE, alone)
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    options = {} if config.model_type == "mistral" else {"config": config}  # the file says llama, and so it is read
    model = AutoModelForCausalLM.from_pretrained(alone, gguf_file=FILE, dtype=torch.float32, **options)
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_read_without_its_folder(artifact: Path, folder: Path, alone: Path) -> None:
    """A file alone, as another program's, has the same weights, dequantized to bfloat16, and the same tokenizer."""
    own, other = Checkpoint(artifact), Checkpoint(resolve(str(alone / FILE)).folder)
    contents = read_quantized(own)
    for layer, scheme in contents.schemes.items():
        dense = read_layer(own, contents.format, scheme, layer).dequantize()
        read = other.read(f"{layer}.weight")
        # a global scale lies in the file as its reciprocal, which float32 rounds, as it does the product
        exact = 0.0 if f"{layer}.global_scale" not in own.tensors else 2.0**-22
        torch.testing.assert_close(read, dense.to(read.dtype), rtol=exact, atol=0)
    for name in contents.plain:
        assert torch.equal(other.read(name).float(), own.read(name).float()), name
    text = "hello world, hello"
    assert load_tokenizer(other.folder)(text).input_ids == load_tokenizer(folder)(text).input_ids
    assert load_dense(other)(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("int4-g32", "Q4_0"), ("int4-g128", "Q4_0"), ("int4-channel", "Q4_0"), ("int4-g64-asym", "Q5_0"),
        ("int8-g32", "Q8_0"), ("int8-channel", "Q8_0"), ("int3-g32", "Q4_0"), ("int3-channel", "Q3_K"),
        ("int3-g256", "Q3_K"), ("int3-g128-asym", "Q4_0"), ("int2-g32", "Q4_0"), ("int2-channel-asym", "Q4_0"),
        ("mxfp4", "MXFP4"), ("nvfp4", "NVFP4"),
    ],
)  # fmt: skip
def test_blocks_stand_for_the_weights_to_the_bit(name: str, kind: str) -> None:
    scheme, shape = Scheme.parse(name), (5, 512)
    tensors = scheme.weight.random(shape, torch.Generator().manual_seed(3))
    qtensor = QTensor.of(scheme, shape, tensors)
    assert FORMAT.block_type(scheme, shape[1]) == kind
    written = FORMAT.write(qtensor, torch.bfloat16)
    theirs = gguf.quants.dequantize(written["blocks"].flatten(1).numpy(), gguf.GGMLQuantizationType[kind])
    one = {"global_scale": torch.ones(1)} if qtensor.extra else {}  # llama.cpp multiplies products by its reciprocal
    assert np.array_equal(theirs, replace(qtensor, extra=one).dequantize().numpy())
    again = FORMAT.read(scheme, written)
    again.check()
    assert torch.equal(again.dequantize(), qtensor.dequantize())
    if scheme.symmetric:
        assert torch.equal(again.codes, qtensor.codes)
        assert torch.equal(again.scales, qtensor.scales)


@pytest.mark.parametrize("scale", [0.013, 3.1e-7])
def test_q4_1_rounds_the_minimum_and_nothing_else(scale: float) -> None:
    form, scheme, shape = registry()["gguf-q4_1"], Scheme.parse("int4-g64-asym"), (64, 512)
    qtensor = QTensor.of(scheme, shape, scheme.weight.random(shape, torch.Generator().manual_seed(3)))
    scales = (qtensor.scales * (scale / qtensor.scales.mean())).to(torch.float16)
    qtensor = replace(qtensor, scales=scales.clamp(min=2.0**-24))
    written = form.write(qtensor, torch.bfloat16)
    theirs = gguf.quants.dequantize(written["blocks"].flatten(1).numpy(), gguf.GGMLQuantizationType.Q4_1)
    steps = (torch.from_numpy(theirs) - qtensor.dequantize()).unflatten(1, (8, 64)) / qtensor.scales.unsqueeze(-1)
    assert (scale < 1e-4) != (0.001 < steps.abs().max() < 0.008)  # multiples of the smallest float16 are exact
    again = form.read(scheme, written)
    for (_, one), (_, other) in zip(again.tensors(), qtensor.tensors()):
        assert torch.equal(one, other)
    written["blocks"][5, 3, 3] ^= 0x10
    with pytest.raises(ValueError, match="1 minima of its Q4_1 blocks are those of no zero point"):
        form.read(scheme, written)
    with pytest.raises(ValueError, match="too large for float16"):
        form.write(replace(qtensor, scales=torch.full_like(scales, 6e4)), torch.bfloat16)


def test_types_have_the_sizes_of_the_gguf_package() -> None:
    for number, kind in TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (kind.values, kind.nbytes)
        assert gguf.GGMLQuantizationType(number).name == kind.name


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("int8-g32-asym", (4, 64), "nine bits"), ("int4-g16", (4, 64), "blocks of 32"), ("nf4", (4, 64), "not nf4"),
        ("int4-channel", (4, 48), "blocks of 32"), ("int8-dynamic", (4, 64), "not int8-dynamic"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold(name: str, shape: tuple[int, ...], reason: str) -> None:
    assert reason in FORMAT.problems(Scheme.parse(name), shape)[0]


def test_rows_of_heads_come_back() -> None:
    rows = torch.arange(24).reshape(12, 2)
    assert permute(rows, 2)[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]
    assert torch.equal(permute_back(permute(rows, 2), 2), rows)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_transformers_computes_the_same(name: str, source: Callable[..., Path], tmp_path: Path) -> None:
    artifact, gemma = tmp_path / "artifact", name.startswith("gemma")  # whose embeddings are scaled, and not quantized
    layers = {"*down_proj": "int8-g32"} | ({} if gemma else {"*embed_tokens": "int8-g32", "lm_head": "int8-g32"})
    folder = source(name, **({"query_pre_attn_scalar": 16} if gemma else {}))
    quantize(folder, {"scheme": "int4-g32", "format": "gguf", "layers": layers}, artifact)
    assert sorted(path.name for path in artifact.iterdir() if path.suffix in (".gguf", ".safetensors")) == [FILE]
    ours = logits_of(artifact)
    theirs = logits_by_transformers(artifact, tmp_path / "alone")
    # the order of sums is the same; Gemma's norms are stored plus 1, which rounds the last bit of float32
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert_read_without_its_folder(artifact, folder, tmp_path / "alone")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_lie_in_one_tensor(name: str, source: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"norm_topk_prob": True} if name == "qwen3_moe" else {}
    folder, artifact, other = source(name, **changes), tmp_path / "artifact", tmp_path / "other"
    quantize(folder, {"scheme": "int4-g32", "format": "gguf"}, artifact)
    quantize(folder, {"scheme": "int4-g32", "format": "gptq"}, other)
    file = read_gguf(artifact / FILE)
    assert file.tensors["blk.0.ffn_gate_exps.weight"].shape == (4, 128 if name == "mixtral" else 64, 64)
    assert file.metadata[f"{file.metadata['general.architecture']}.expert_count"] == 4
    (tmp_path / "alone").mkdir()
    shutil.copy(artifact / FILE, tmp_path / "alone")
    assert_read_without_its_folder(artifact, folder, tmp_path / "alone")
    assert torch.equal(logits_of(artifact), logits_of(other))  # gptq has float16 scales, too, so the same codes
    first = Checkpoint(artifact).read(
        next(n for n in Checkpoint(artifact).tensors if "experts.3." in n and ".blocks" in n)
    )
    assert first.dim() == 3


@pytest.mark.parametrize(
    ("model", "scheme", "form", "layers"),
    [
        ("llama", "int4-g32", "gptq", {"*down_proj": "int8-g64"}),
        ("mixtral", "nvfp4", "compressed-tensors", {}),
        ("qwen2", "mxfp4", "compressed-tensors", {}),
    ],
)
def test_an_artifact_is_sound_and_converts_back(
    source: Callable[..., Path], tmp_path: Path, model: str, scheme: str, form: str, layers: dict[str, str]
) -> None:
    first, file, back = tmp_path / "first", tmp_path / "gguf", tmp_path / "back"
    folder = source(model)
    quantize(folder, {"scheme": scheme, "format": form, "layers": layers}, first)
    assert any("same to the bit" in note for note in convert(first, "gguf", file).notes)
    convert(file, form, back)
    one, two = Checkpoint(first), Checkpoint(back)
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)
    diagnosis = diagnose(file)
    assert diagnosis.faults == []
    assert diagnosis.runtimes["llama.cpp"]["loads"] == "yes"
    (tmp_path / "alone").mkdir()
    shutil.copy(file / FILE, tmp_path / "alone")
    assert_read_without_its_folder(file, folder, tmp_path / "alone")


@pytest.mark.parametrize(
    ("model", "changes", "layers", "named"),
    [
        ("qwen2", {}, {}, "mlp"), ("gemma2", {"query_pre_attn_scalar": 16}, {}, "mlp"),
        ("llama", {}, {"*embed_tokens": "nvfp4"}, "embed_tokens"), ("llama", {"mlp_bias": True}, {}, "mlp"),
    ],
)  # fmt: skip
def test_nvfp4_where_llamacpp_leaves_its_factor_out_is_refused(
    source: Callable[..., Path], tmp_path: Path, model: str, changes: dict[str, Any], layers: dict[str, str], named: str
) -> None:
    recipe = {"scheme": "nvfp4", "format": "gguf", "layers": layers}
    with pytest.raises(ConfigError, match=f"leaves out what the weights of .*{named}.* use mxfp4 there"):
        quantize(source(model, **changes), recipe, tmp_path / "artifact")


def test_global_scales_that_are_not_those_of_the_file_are_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    quantize(source("llama"), {"scheme": "nvfp4", "format": "gguf"}, artifact)
    data = (artifact / FILE).read_bytes()
    place = data.index(b"bitpress.global_scales") + len(b"bitpress.global_scales")
    nothing, other = struct.pack("<f", float("nan")), struct.pack("<f", 1.5)
    whole = struct.pack("<I", 5)  # the type of its numbers: integers
    for offset, value, reason in ((16, nothing, "14 numbers"), (4, whole, "14 numbers"), (16, other, "differ")):
        changed = bytearray(data)
        changed[place + offset : place + offset + 4] = value
        (artifact / FILE).write_bytes(changed)
        with pytest.raises(CheckpointError, match=reason):
            list(map(Checkpoint(artifact).read, Checkpoint(artifact).tensors))


def test_the_file_says_what_the_config_says(source: Callable[..., Path], tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    quantize(source("llama"), {"scheme": "int4-g32", "format": "gguf"}, artifact)
    fields = gguf.GGUFReader(artifact / FILE).fields
    read = {name: field.contents() for name, field in fields.items()}
    assert (read["llama.block_count"], read["llama.attention.head_count_kv"], read["general.file_type"]) == (2, 2, 2)
    assert len(read["tokenizer.ggml.tokens"]) == 300
    assert read["tokenizer.ggml.tokens"][299] == "[PAD299]"
    assert read["tokenizer.ggml.merges"][2] == "he ll"
    assert read["tokenizer.chat_template"].startswith("{% for")
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    shutil.copy(artifact / FILE, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    for text in ("hello world", "it's 2024:  well\n\nhello"):
        assert theirs(text).input_ids == tokenizer(text).input_ids


def test_a_name_with_phi3_in_it_needs_its_tokens(source: Callable[..., Path], tmp_path: Path) -> None:
    """As of Phi-4 mini, whose config calls it Phi3ForCausalLM: llama.cpp would not load the file."""
    quantize(source("phi3"), {"scheme": "int4-g32", "format": "gguf"}, tmp_path / "artifact")
    assert read_gguf(tmp_path / "artifact" / FILE).metadata["general.name"] == "PhiForCausalLM"


def test_llama3_scales_frequencies(source: Callable[..., Path], tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32, "rope_theta": 500.0}
    folder = source("llama", rope_parameters=scaling, head_dim=32)
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 1 / 500.0 ** (torch.arange(0, 32, 2) / 32)
    factors = generated_tensors(config)["rope_freqs.weight"]
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-6)
    quantize(folder, {"scheme": "int4-g32", "format": "gguf"}, tmp_path / "artifact")
    assert Checkpoint(tmp_path / "artifact").stored["rope_freqs.weight"].shape == (16,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": pre_tokenizers.Whitespace()}, "the pre-tokenizer Whitespace has no name in llama.cpp"),
        ({"ignore_merges": True}, "with ignore_merges"),
        ({"normalizer": normalizers.Lowercase()}, "normalizes text by Lowercase"),
        ({"split": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
        (
            {"split": pre_tokenizers.Sequence([
                pre_tokenizers.Split(Regex("[a-z]+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ])},
            "Split by {'Regex': '[a-z]+'}",
        ),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llamacpp_would_read_otherwise_is_refused(
    changes: dict[str, Any], reason: str, source: Callable[..., Path], tmp_path: Path
) -> None:
    folder = source("llama")
    save_tokenizer(folder, **changes)
    with pytest.raises(ConfigError, match="cannot be saved as gguf") as refused:
        quantize(folder, {"scheme": "int4-g32", "format": "gguf"}, tmp_path / "artifact")
    assert reason in str(refused.value)
    assert not (tmp_path / "artifact").exists()


def test_known_splits_have_their_names(tmp_path: Path) -> None:
    config = {"vocab_size": 300}
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    llama3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    both = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(llama3), "isolated"), plain])
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    cases = [
        ({"split": both, "ignore_merges": True}, "llama-bpe"),
        ({"split": both}, "dbrx"),
        ({"split": digits}, "smollm"),
    ]
    for changes, name in cases:
        save_tokenizer(tmp_path, **changes)
        files = {path.name: path for path in tmp_path.iterdir()}
        assert tokenizer_metadata(files, config)["tokenizer.ggml.pre"] == name


def test_what_q4_1_costs_is_said_wherever_it_is_made(source: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {"scheme": "int4-g32-asym", "format": "gguf-q4_1", "layers": {"*down_proj": "int8-g32"}}
    artifact = quantize(source("llama"), recipe, tmp_path / "artifact")
    converted = convert(tmp_path / "artifact", "gguf", tmp_path / "exact")
    again = convert(tmp_path / "exact", "gguf-q4_1", tmp_path / "again")
    one, other = Checkpoint(tmp_path / "again"), Checkpoint(tmp_path / "artifact")
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    said = "int4-g32-asym lies there as Q4_1, whose minimum is float16"
    for notes, expected in (
        (artifact.notes, True), (again.notes, True), (diagnose(tmp_path / "again").notes, True),
        (converted.notes, False), (diagnose(tmp_path / "exact").notes, False),
    ):  # fmt: skip
        assert any(said in note for note in notes) == expected


def test_an_unknown_architecture_is_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the architecture 'opt' is not known here as GGUF"):
        quantize(source("opt"), {"scheme": "int4-g32", "format": "gguf"}, tmp_path / "artifact")


def test_a_config_that_means_another_model_is_refused(source: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="norm_topk_prob is false"):
        quantize(source("qwen3_moe"), {"scheme": "int4-g32", "format": "gguf"}, tmp_path / "artifact")


def test_metadata_needs_what_the_config_leaves_out() -> None:
    config = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    metadata = model_metadata(config)
    assert metadata["gemma3.attention.key_length"] == 256
    assert (metadata["gemma3.rope.freq_base"], metadata["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)


class TestDamage:
    """A file that nobody trusts: refused in one sentence, before its numbers are believed."""

    @pytest.fixture(scope="class")
    def artifact(self, source: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("damage") / "artifact"
        quantize(source("llama"), {"scheme": "int4-g32", "format": "gguf"}, folder)
        return folder

    @pytest.mark.parametrize(
        ("offset", "code", "value", "reason"),
        [
            (0, "4s", b"GGML", "it begins with b'GGML'"), (4, "I", 99, "version 99"),
            (8, "Q", 1 << 60, "are too many"), (16, "Q", 1 << 62, "are too many"), (24, "Q", 1 << 50, "a text of"),
        ],
    )  # fmt: skip
    def test_numbers_of_the_header(
        self, artifact: Path, tmp_path: Path, offset: int, code: str, value: Any, reason: str
    ) -> None:
        data = bytearray((artifact / FILE).read_bytes())
        struct.pack_into(f"<{code}", data, offset, value)
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(CheckpointError, match=reason):
            read_gguf(tmp_path / FILE)

    def test_any_length_of_it(self, artifact: Path, tmp_path: Path) -> None:
        data = (artifact / FILE).read_bytes()
        for length in (0, 3, 20, 200, 5000, len(data) // 2, len(data) - 1):
            (tmp_path / FILE).write_bytes(data[:length])
            with pytest.raises(CheckpointError, match="get the file again"):
                read_gguf(tmp_path / FILE)

    def test_every_tensor_info(self, artifact: Path, tmp_path: Path) -> None:
        """Whatever one word of a tensor's entry is replaced by, the file is read, or refused in a sentence."""
        data = (artifact / FILE).read_bytes()
        place = data.index(b"blk.0.attn_q.weight")
        for offset in range(place - 8, place + 60, 4):
            for value in (0, 0xFFFFFFFF, 1 << 30):
                changed = bytearray(data)
                struct.pack_into("<I", changed, offset, value)
                (tmp_path / FILE).write_bytes(changed)
                with contextlib.suppress(CheckpointError):
                    read_gguf(tmp_path / FILE)


def test_a_run_verifies_it(source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "call", lambda task, request: verify_task(request))  # here, not in a fresh process
    folder, artifact, settings = source("llama"), tmp_path / "artifact", {"scheme": "int4-g32", "format": "gguf"}
    quantize(folder, settings, artifact)
    verified = verify_artifact(Checkpoint(folder), Recipe.make(settings), artifact, IDS[0], "cpu", "float32")
    assert verified["max_difference"] <= verified["tolerance"]
