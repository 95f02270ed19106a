"""From one format to another: the same weights to the bit, or a refusal with a reason and nothing written."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.checkpoints import conversion
from bitpress.pipeline.checkpoints.convert import convert as convert_checkpoint
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import BitpressError, CheckpointError, ConfigError, DiskError, NumericsError
from bitpress.pipeline.formats import open_quantized, registry
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.storage import files as store
from bitpress.pipeline.storage.checkpoint import INDEX, Checkpoint, read_json

LAYER = "model.layers.0.mlp.down_proj"
TARGETS = ("compressed-tensors", "gptq", "gptq-v2", "awq", "mlx", "gguf")
INTEGER = (
    "int4-g32", "int8-channel", "int3-g64", "int2-g32", "int4-g32-asym", "int3-g32-asym", "int8-channel-asym"
)  # fmt: skip
ALL = (*INTEGER, "int8-dynamic", "mxfp4", "nvfp4", "nf4", "nf4-dq")


def refusal(scheme: str, to: str) -> str | None:
    """The table: what a scheme cannot become, and why."""
    if to == "compressed-tensors":
        return "holds weight-only integers, and weights whose elements" if scheme.startswith("nf4") else None
    if not scheme.startswith("int") or scheme == "int8-dynamic":
        return None if to == "gguf" and scheme.endswith("fp4") else "holds weight-only integers"
    if to == "gguf":
        return "no type of nine bits" if scheme == "int8-channel-asym" else None
    if to == "awq" and not scheme.startswith("int4"):
        return "holds weight-only integers of 4 bits"
    if to == "mlx" and "channel" in scheme:
        return "holds weight-only integers in groups of 32, 64, 128"
    return "cannot hold a zero point of 0" if to == "gptq" and "asym" in scheme else None


HOLDERS = {scheme: [form for form in TARGETS if not refusal(scheme, form)] or ["bitsandbytes"] for scheme in ALL}


@pytest.fixture(scope="module")
def source_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that llama.cpp has a name for."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("source") / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = True
    vocabulary = {token: number for token, number in tokenizer["model"]["vocab"].items() if number != 254}
    tokenizer["model"] |= {"vocab": vocabulary | {"he": 254}, "merges": [["h", "e"]]}  # without any it reads none
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def made(source_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """made(scheme, format): an artifact, read only."""
    folder = tmp_path_factory.mktemp("made")

    def make(scheme: str, form: str) -> Path:
        out = folder / f"{scheme}.{form}"
        if not out.exists():
            quantize(source_model, {"scheme": scheme, "format": form}, out)
        return out

    return make


def layers(folder: Path) -> dict[str, QTensor]:
    checkpoint = open_quantized(folder)
    contents = read_quantized(checkpoint)
    return {layer: read_layer(checkpoint, contents.format, own, layer) for layer, own in contents.schemes.items()}


def assert_same_weights(found: Path, expected: Path) -> None:
    one, other = layers(found), layers(expected)
    assert one.keys() == other.keys()
    for layer, qtensor in one.items():
        assert qtensor.scheme == other[layer].scheme
        assert torch.equal(qtensor.dequantize(), other[layer].dequantize()), layer


def assert_converts(source: Path, to: str, out: Path, scheme: str) -> None:
    notes = convert(source, to, out).notes
    assert "14 layers" in notes[0]
    assert "read back" in notes[0]
    contents = read_quantized(open_quantized(out))
    assert (contents.format.name, {own.name for own in contents.schemes.values()}) == (to, {scheme})
    assert_same_weights(out, source)
    found = diagnose(out)
    assert found.sound, found.faults


@pytest.mark.parametrize(("form", "to"), itertools.product(TARGETS, TARGETS))
def test_every_format_becomes_every_other(made: Callable[..., Path], tmp_path: Path, form: str, to: str) -> None:
    """tests/pipeline/formats/test_pairs.py has all schemes, without files."""
    assert_converts(made("int4-g32", form), to, tmp_path / "out", "int4-g32")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("scheme", ALL[1:])
def test_around_all_formats_that_hold_a_scheme_and_no_other(
    made: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    first, *others = HOLDERS[scheme]
    source = made(scheme, first)
    for to in (to for to in TARGETS if refusal(scheme, to)):
        with pytest.raises(ConfigError, match=refusal(scheme, to)):
            convert(source, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    last = source
    for to in [*others, first] if first in TARGETS else []:
        assert_converts(last, to, tmp_path / to, scheme)
        last = tmp_path / to
    assert_same_weights(last, source)


def as_llm_int8(model: Path, folder: Path, edit_json: Callable[..., None]) -> dict[str, Tensor]:
    """Make a copy of a model one of LLM.int8, as transformers saves it; returns layer -> its weight by bitsandbytes."""
    weights = {}
    (file,) = folder.glob("*.safetensors")
    tensors: dict[str, Tensor] = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        layer, weight = name.removesuffix(".weight"), tensors[name].float()
        peaks = weight.abs().amax(1)
        codes = (weight * (127 / peaks).unsqueeze(1)).round().to(torch.int8)
        tensors |= {name: codes, f"{layer}.SCB": peaks, f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        weights[layer] = codes.float() * peaks.unsqueeze(1) / 127
    store.write_safetensors(file, tensors)
    section = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0}
    edit_json(folder / "config.json", quantization_config=section | {"llm_int8_skip_modules": ["lm_head"]})
    return weights


def test_llm_int8_is_read_and_becomes_what_holds_its_scales(
    tiny: Callable[..., Path], copy_of: Callable[..., Path], edit_json: Callable[..., None], tmp_path: Path
) -> None:
    source = copy_of(tiny("qwen2"), "source")
    weights = as_llm_int8(tiny("qwen2"), source, edit_json)
    convert(source, "compressed-tensors", tmp_path / "out")
    assert_same_weights(tmp_path / "out", source)
    for layer, qtensor in layers(tmp_path / "out").items():
        torch.testing.assert_close(qtensor.dequantize(), weights.pop(layer), rtol=2.0**-22, atol=0)
    assert not weights
    found = diagnose(source)
    assert (found.faults, any("rounds the inputs" in note for note in found.notes)) == ([], True)
    assert found.runtimes["transformers"]["loads"] == "yes"
    ids = torch.arange(32).unsqueeze(0)
    with torch.inference_mode():
        one, other = (
            load_model(Checkpoint(folder), torch.device("cpu"), "float32", "reference")(ids).logits
            for folder in (source, tmp_path / "out")
        )
    assert torch.equal(one, other)
    with pytest.raises(NumericsError, match=r"scales are torch\.float32 numbers that torch\.float16 rounds"):
        convert(source, "gptq", tmp_path / "gptq")
    with pytest.raises(ConfigError, match="llm-int8 is read, and not written"):
        quantize(tiny("qwen2"), {"scheme": "int8-channel", "format": "llm-int8"}, tmp_path / "new")


@pytest.mark.parametrize(
    ("suffix", "value", "reason"),
    [
        ("SCB", torch.ones(3), r"SCB has shape \[3\], expected \[64\]"),
        ("SCB", torch.full((64,), torch.inf), "NaN or infinite"),
        ("weight", torch.ones(64, 64), "expected torch.int8"),
        ("weight_format", torch.tensor(2, dtype=torch.uint8), "weight_format is 2; only plain rows"),
    ],
)
def test_llm_int8_that_is_damaged(suffix: str, value: Tensor, reason: str) -> None:
    tensors = {"weight": torch.ones(64, 64, dtype=torch.int8), "SCB": torch.ones(64)} | {suffix: value}
    with pytest.raises(ValueError, match=reason):
        registry()["llm-int8"].read(Scheme.parse("int8-channel"), tensors).check()


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel-asym"])
def test_there_and_back_is_the_same_bytes(made: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    """bfloat16 scales go to float16, which holds them, and return."""
    source = made(scheme, "compressed-tensors")
    convert(source, "gptq-v2", tmp_path / "there")
    convert(tmp_path / "there", "compressed-tensors", tmp_path / "back")
    one, other = (Checkpoint(folder) for folder in (source, tmp_path / "back"))
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert one.tensors[name].dtype == other.tensors[name].dtype
        assert torch.equal(one.read(name), other.read(name)), name


def test_everything_else_comes_along(made: Callable[..., Path], tmp_path: Path) -> None:
    source, out = made("int4-g32", "gptq"), tmp_path / "out"
    convert(source, "compressed-tensors", out)
    before, after = Checkpoint(source), Checkpoint(out)
    plain = {name for name in before.tensors if not name.endswith(tuple(registry()["gptq"].suffixes))}
    assert plain == {name for name in after.tensors if ".weight_" not in name}
    assert all(torch.equal(before.read(name), after.read(name)) for name in plain)
    for name in ("LICENSE", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "quantize_config.json").exists()
    assert after.config["quantization_config"]["ignore"] == ["lm_head"]
    was, now = before.config, after.config
    assert {k: v for k, v in was.items() if k != "quantization_config"} == {
        k: v for k, v in now.items() if k != "quantization_config"
    }
    manifest = read_json(out / "bitpress.json")
    assert manifest["files"].keys() == {path.name for path in out.iterdir()} - {"bitpress.json"}
    assert all(entry["sha256"] == store.sha256_file(out / name) for name, entry in manifest["files"].items())
    assert manifest["fingerprint"]["convert.format"] == "compressed-tensors"


def test_early_compressed_tensors_named_the_section_otherwise(
    made: Callable[..., Path], copy_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = copy_of(made("int4-g32", "compressed-tensors"))
    config = read_json(source / "config.json")
    section = config.pop("quantization_config")
    del section["quant_method"]
    (source / "config.json").write_text(json.dumps(config | {"compression_config": section}))
    assert_same_weights(source, made("int4-g32", "compressed-tensors"))
    convert(source, "gptq", tmp_path / "out")
    assert "compression_config" not in read_json(tmp_path / "out" / "config.json")


def test_the_same_bytes_twice_and_in_any_number_of_shards(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made("int4-g32", "gptq")
    for name in ("one", "two"):
        convert(source, "gptq-v2", tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    monkeypatch.setattr(conversion, "_SHARD_BYTES", 20_000)
    steps: list[tuple[int, int]] = []
    convert(source, "gptq-v2", tmp_path / "many", lambda done, total: steps.append((done, total)))
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 4
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert steps == [(number, len(shards)) for number in range(len(shards) + 1)]
    assert_same_weights(tmp_path / "many", source)


def ordered(folder: Path, edit_json: Callable[..., None]) -> Path:
    """Every layer's inputs in another order, as GPTQ's desc_act leaves them."""
    checkpoint = Checkpoint(folder)
    index = read_json(folder / INDEX)["weight_map"]
    tensors: dict[str, dict[str, Tensor]] = {file: load_file(folder / file) for file in set(index.values())}
    for layer, qtensor in layers(folder).items():
        seed = torch.Generator().manual_seed(len(layer))
        q = QTensor(
            qtensor.scheme, qtensor.shape, qtensor.codes, qtensor.scales, qtensor.zeros,
            order=torch.randperm(qtensor.shape[1], generator=seed).to(torch.int32),
        )  # fmt: skip
        for suffix, tensor in read_quantized(checkpoint).format.write(q, torch.bfloat16).items():
            tensors[index[f"{layer}.{suffix}"]][f"{layer}.{suffix}"] = tensor
    for file, content in tensors.items():
        store.write_safetensors(folder / file, content)
    section = checkpoint.config["quantization_config"] | {"desc_act": True}
    edit_json(folder / "config.json", quantization_config=section)
    edit_json(folder / "quantize_config.json", desc_act=True)
    (folder / "bitpress.json").unlink()
    return folder


class TestActOrder:
    @pytest.fixture
    def source(self, made: Callable[..., Path], copy_of: Callable[..., Path], edit_json: Callable[..., None]) -> Path:
        return ordered(copy_of(made("int4-g32", "gptq"), "source"), edit_json)

    def test_stays_in_gptq(self, source: Path, tmp_path: Path) -> None:
        notes = convert(source, "gptq-v2", tmp_path / "out").notes
        assert "14 of them have act-order" in notes[1]
        assert_same_weights(tmp_path / "out", source)
        config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
        assert config["desc_act"] is True
        assert read_json(tmp_path / "out" / "quantize_config.json") == config
        groups = Checkpoint(tmp_path / "out").read(f"{LAYER}.g_idx")
        assert torch.equal(groups, Checkpoint(source).read(f"{LAYER}.g_idx"))
        assert diagnose(tmp_path / "out").sound

    def test_does_not_become_compressed_tensors(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="act-order"):
            convert(source, "compressed-tensors", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_computes_with_the_weights_in_the_model_s_order(self, source: Path) -> None:
        """Each layer's weight put, dense, into the model that transformers builds gives the same logits."""
        checkpoint, ids = Checkpoint(source), torch.arange(32).unsqueeze(0)
        for kernel in ("reference", "auto-bf16"):
            model = load_model(checkpoint, torch.device("cpu"), "float32", kernel)
            with torch.inference_mode():
                found = model(ids).logits
            dense = load_model(checkpoint, torch.device("cpu"), "float32", "reference")
            for layer, qtensor in layers(source).items():
                linear = torch.nn.Linear(*qtensor.shape[::-1], bias=False)
                linear.weight.data = qtensor.dequantize()
                path, _, leaf = layer.rpartition(".")
                setattr(dense.get_submodule(path), leaf, linear)
            with torch.inference_mode():
                torch.testing.assert_close(found, dense(ids).logits, rtol=1e-4, atol=1e-5)  # order of float32 sums


class TestScales:
    @pytest.mark.parametrize("value", [1e-7, 70000.0, 1 + 2**-12])
    def test_what_float16_would_round_is_refused(
        self, made: Callable[..., Path], copy_of: Callable[..., Path], tmp_path: Path, edit_tensors: Any, value: float
    ) -> None:
        folder = copy_of(made("int4-g32", "compressed-tensors"), "source")
        name = f"{LAYER}.weight_scale"
        file = folder / read_json(folder / INDEX)["weight_map"][name]
        edit_tensors(file, lambda t: t.update({name: t[name].float().index_fill(0, torch.tensor([3]), value)}))
        with pytest.raises(NumericsError, match=rf"{LAYER}: 4 of 256 scales .* torch\.float16 rounds"):
            convert(folder, "gptq", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        convert(folder, "compressed-tensors", tmp_path / "out")  # which holds them
        assert_same_weights(tmp_path / "out", folder)

    def test_float16_stays_where_the_model_s_dtype_would_round(self, made: Callable[..., Path], tmp_path: Path) -> None:
        notes = convert(made("int4-g32", "gptq"), "compressed-tensors", tmp_path / "out").notes
        assert "14 of them keep the dtype of their scales, which bfloat16 would round" in notes[1]
        assert Checkpoint(tmp_path / "out").tensors[f"{LAYER}.weight_scale"].dtype == torch.float16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_plain_transformers_reads_them_to_the_bit(
        self, made: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
    ) -> None:
        """In bfloat16 it rounds them, as the note says."""
        pytest.importorskip("compressed_tensors")
        from transformers import AutoModelForCausalLM

        convert(made("int4-g32", "gptq"), "compressed-tensors", tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        ids = torch.arange(32).unsqueeze(0)
        with torch.inference_mode():
            found = model(ids).logits
            if dtype == torch.float32:
                ours, _ = load(tmp_path / "out", dtype="float32", kernel="reference")
                assert torch.equal(found, ours(ids).logits)
        expected = layers(tmp_path / "out")[LAYER].dequantize(dtype)
        assert torch.equal(model.get_submodule(LAYER).weight, expected)  # it decompressed at the forward


class TestRefusals:
    def test_formats_that_are_none(self, made: Callable[..., Path], tmp_path: Path) -> None:
        for to in ("gptqv2", "bitsandbytes", ""):
            with pytest.raises(ConfigError, match="nothing can be converted to"):
                convert(made("int4-g32", "gptq"), to, tmp_path / "out")

    def test_a_checkpoint_that_is_not_quantized(self, tiny_llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is not quantized"):
            convert(tiny_llama, "gptq", tmp_path / "out")

    def test_outputs_that_are_taken(self, made: Callable[..., Path], tmp_path: Path) -> None:
        source, out = made("int4-g32", "gptq"), tmp_path / "out"
        out.mkdir()
        convert(source, "gptq-v2", out)  # an empty folder is replaced
        content = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(ConfigError, match="exists; choose another output"):
            convert(source, "gptq-v2", out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == content
        with pytest.raises(ConfigError, match="checkpoint's own folder"):
            convert(source, "gptq-v2", source / "out")

    @pytest.mark.parametrize("name", ["journal.jsonl", "thesis.tex"])
    def test_what_is_somebody_else_s_is_left_alone(self, made: Callable[..., Path], tmp_path: Path, name: str) -> None:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / name).write_text("{}")
        with pytest.raises(ConfigError, match="is in the way"):
            convert(made("int4-g32", "gptq"), "gptq-v2", tmp_path / "out")
        assert (tmp_path / "out.partial" / name).read_text() == "{}"

    def test_a_damaged_layer(
        self, made: Callable[..., Path], copy_of: Callable[..., Path], tmp_path: Path, edit_tensors: Any
    ) -> None:
        folder, name = copy_of(made("int4-g32", "gptq"), "source"), f"{LAYER}.g_idx"
        file = folder / read_json(folder / INDEX)["weight_map"][name]
        edit_tensors(file, lambda tensors: tensors.update({name: tensors[name] + 1}))
        with pytest.raises(CheckpointError, match=f"{LAYER}: g_idx holds group 4"):
            convert(folder, "gptq-v2", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_a_weight_that_came_out_otherwise(
        self, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The check of what was written can fail."""
        format = registry()["gptq-v2"]
        write = type(format).write

        def spoiled(self: Any, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
            tensors = write(self, qtensor, dtype)
            tensors["qweight"][0, 0] ^= 1
            return tensors

        monkeypatch.setattr(type(format), "write", spoiled)
        with pytest.raises(NumericsError, match="its weights changed on the way to gptq-v2"):
            convert(made("int4-g32", "gptq"), "gptq-v2", tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_the_command(
    made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitpress.pipeline.cli import app

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bitpress", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    source = made("int4-g32", "gptq")
    code, out, err = run(source, "--to", "gptq-v2", "-o", tmp_path / "out")
    assert code == 0
    assert "bitpress doctor" in out
    assert "14 layers from gptq to gptq-v2" in err
    code, _, err = run(source, "--to", "nf4", "-o", tmp_path / "other")
    assert code == 2
    targets = "awq, compressed-tensors, fp8, gguf, gguf-q4_1, gptq, gptq-v2, mlx, modelopt, mxfp4, onnx"
    assert err == f"error: nothing can be converted to 'nf4'; use {targets}\n"


class TestInterrupted:
    @pytest.mark.parametrize("call", [0, 3, 8])
    def test_a_full_disk_leaves_nothing_behind(
        self, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
    ) -> None:
        calls = iter(range(1000))
        write = store.write

        def full(descriptor: int, data: bytes | memoryview) -> int:
            if next(calls) >= call:
                raise OSError(28, "No space left on device")
            return write(descriptor, data)

        source = made("int4-g32", "gptq")
        monkeypatch.setattr(store, "write", full)
        with pytest.raises(DiskError, match="disk is full"):
            convert(source, "gptq-v2", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_killed_one_is_begun_anew(self, made: Callable[..., Path], tmp_path: Path) -> None:
        stale = tmp_path / "out.partial" / "artifact.tmp"
        stale.mkdir(parents=True)
        (stale / "model-00001-of-00009.safetensors").write_text("half")
        convert(made("int4-g32", "gptq"), "gptq-v2", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1

    def test_a_source_that_changes_meanwhile(
        self, made: Callable[..., Path], copy_of: Callable[..., Path], tmp_path: Path
    ) -> None:
        folder = copy_of(made("int4-g32", "gptq"), "source")

        def touch(done: int, total: int) -> None:
            (folder / "LICENSE").write_text("Other terms.\n")

        with pytest.raises(BitpressError, match="LICENSE changed while it was being read"):
            convert_checkpoint(Checkpoint(folder), {}, "gptq-v2", tmp_path / "out", touch)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantized_head_and_a_bias_of_zeros(
    made: Callable[..., Path], copy_of: Callable[..., Path], tmp_path: Path, edit_tensors: Any
) -> None:
    """lm_head: true comes along; the zeros that AutoGPTQ wrote as biases of layers that have none do not."""
    folder = copy_of(made("int4-g32", "gptq"), "source")
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["lm_head.weight"]

    def press(tensors: dict[str, Tensor]) -> None:
        from bitpress.pipeline.methods import default_method

        scheme = Scheme.parse("int4-g32")
        q, _ = default_method(scheme).quantize(tensors.pop("lm_head.weight"), scheme, torch.float16)
        written = registry()["gptq"].write(q, torch.bfloat16)
        tensors.update({f"lm_head.{suffix}": tensor for suffix, tensor in written.items()})
        tensors[f"{LAYER}.bias"] = torch.zeros(64, dtype=torch.float16)
        others = {name: where for name, where in index["weight_map"].items() if where != file}
        index["weight_map"] = others | dict.fromkeys(tensors, file)

    edit_tensors(folder / file, press)
    (folder / INDEX).write_text(json.dumps(index))
    ids = torch.arange(32).unsqueeze(0)
    with torch.inference_mode():
        expected = load(folder, dtype="float32", kernel="reference")[0](ids).logits
        for to in TARGETS:
            convert(folder, to, tmp_path / to)
            assert torch.equal(load(tmp_path / to, dtype="float32", kernel="reference")[0](ids).logits, expected)
            section = read_json(tmp_path / to / "config.json")["quantization_config"]
            assert section.get("lm_head", True) is True
            assert section.get("ignore", []) == []
            assert f"{LAYER}.bias" not in Checkpoint(tmp_path / to).tensors
