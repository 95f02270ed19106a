"""ONNX: what the builder is given, and that nothing is kept whose logits are others than bitpress's."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.kernels.packing import unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.checkpoints import onnx_export
from bitpress.pipeline.checkpoints.onnx_export import _BuilderInput, as_built, unsupported, widened
from bitpress.pipeline.errors import ConfigError, NumericsError

BUILDER = all(map(importlib.util.find_spec, ("onnxruntime_genai", "onnx_ir")))


def random(name: str, shape: tuple[int, int]) -> QTensor:
    scheme = Scheme.parse(name)
    tensors = scheme.weight.random(shape, torch.Generator().manual_seed(0))
    return QTensor(scheme, shape, tensors["codes"], tensors["scales"], tensors.get("zeros"))


@pytest.mark.parametrize(
    ("name", "built"),
    [
        ("int4-g32", "int4-g32"), ("int3-g96", "int4-g32"), ("int2-g32-asym", "int2-g32-asym"),
        ("int3-channel-asym", "int4-g64-asym"), ("int8-channel", "int8-g64"), ("int4-g16-asym", "int4-g16-asym"),
    ],
)  # fmt: skip
def test_the_builder_gets_the_same_weights(name: str, built: str) -> None:
    """Read as the builder reads it: codes along the inputs, one added to each zero point, whose low bits stay."""
    qtensor = random(name, (32, 192))
    if qtensor.zeros is not None:
        qtensor.zeros[0] = 0
    tensors = _BuilderInput().write(qtensor, torch.bfloat16)
    scheme = as_built(qtensor.scheme, 192)
    assert scheme.name == built
    bits, size = scheme.bits, scheme.group_size
    codes = unpack(tensors["qweight"].t().contiguous(), bits, 192).long()
    zeros = (unpack(tensors["qzeros"], bits, 32).long().t() + 1) % 2**bits
    weight = (codes - zeros.repeat_interleave(size, 1)) * tensors["scales"].t().float().repeat_interleave(size, 1)
    assert torch.equal(weight, qtensor.dequantize())
    assert torch.equal(widened(qtensor).dequantize(), qtensor.dequantize())
    assert torch.equal(_BuilderInput().read(qtensor.scheme, tensors).dequantize(), qtensor.dequantize())


def test_what_has_no_place_there() -> None:
    format = _BuilderInput()
    assert "weight-only integers" in format.problems(Scheme.parse("int8-dynamic"), (64, 64))[0]
    assert "multiples of 16" in format.problems(Scheme.parse("int4-channel"), (64, 24))[0]
    assert "multiples of 16" in format.problems(Scheme.parse("int4-g8"), (64, 64))[0]


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "quantized"
    recipe = {"scheme": "int4-g32-asym", "layers": {"*.down_proj": "int8-g16"}, "format": "compressed-tensors"}
    quantize(tiny_llama, recipe, out)
    return out


def test_a_package_that_is_missing(quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="onnxruntime-genai and onnx-ir cannot be imported: pip install"):
        convert(quantized, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_layers_of_a_block_that_are_not_quantized(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny_llama, {"scheme": "int4-g32", "layers": {"*.0.mlp.*": "none"}, "format": "gptq"}, tmp_path / "mixed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.down_proj\.weight and 2 more: not quantized"):
        convert(tmp_path / "mixed", "onnx", tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None),
        ({"architectures": ["MixtralForCausalLM"]}, "does not know MixtralForCausalLM"),
        ({}, "does not know None"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "asks Gemma 3's config for rope_local_base_freq"),
        ({"architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 4096}, None),
        (
            {
                "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 64,
                "original_max_position_embeddings": 4096,
            },
            "the config has no long_factor",
        ),
    ],
)  # fmt: skip
def test_what_the_builder_cannot_make_is_refused_before_it_starts(
    config: dict[str, Any], reason: str | None, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = unsupported(config)
    assert (said is None) == (reason is None)
    if reason is None:
        return
    assert reason in str(said)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(onnx_export, "unsupported", lambda config: said)
    with pytest.raises(ConfigError, match="cannot become onnx: "):
        convert(quantized, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("off", "problem"), [({}, None), ({"exact": 0.1}, "with float inputs"), ({"shipped": 0.5}, "with inputs of 8 bits")]
)
def test_other_logits_are_refused(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: dict[str, float], problem: str | None
) -> None:
    """The builder and the runtime stand aside; what they are asked for, and what becomes of their answer, is seen."""
    asked: list[str] = []

    def run(module: str, arguments: list[str], options: list[str], private: Path) -> None:
        asked.extend(options)
        if options:
            aside, folder = Path(arguments[1]), Path(arguments[3])
            assert (aside / "config.json").exists()
            (folder / "model.onnx").write_bytes(b"model")
            return
        ids = load_file(arguments[1])["ids"]
        with torch.no_grad():
            logits = load(quantized, device="cpu", dtype="float32", kernel="reference")[0](ids[None]).logits
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)) * logits.std()
        answers = {name: logits + off.get(name, 0) * noise for name in ("exact", "shipped")}
        save_file(answers, arguments[2])

    monkeypatch.setattr(onnx_export, "_run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    if problem:
        with pytest.raises(NumericsError, match=problem):
            convert(quantized, "onnx", tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    notes = convert(quantized, "onnx", tmp_path / "out").notes
    assert "1.0000000" in notes[0]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.onnx", "bitpress.json", "tokenizer.json"} <= names
    assert "aside" not in names
    assert asked == ["hf_token=false", "nodes_to_exclude=/model/embed_tokens/Gather,/lm_head/MatMul"]


@pytest.mark.skipif(not BUILDER, reason="onnxruntime-genai is not installed")
def test_onnxruntime_genai_computes_the_same(quantized: Path, tmp_path: Path) -> None:
    notes: Any = convert(quantized, "onnx", tmp_path / "out").notes
    assert "with float inputs their cosine with bitpress's own is 1.0000000" in notes[0]
