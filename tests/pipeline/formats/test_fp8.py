"""FP8 and NVFP4 in the layouts that servers know them by: from one to the other and back, and in transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import convert, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import ConfigError, NumericsError
from bitpress.pipeline.formats import open_quantized, registry
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer

CT = "compressed-tensors"
CHAINS = {
    "fp8-block": (CT, "fp8", "modelopt", CT),
    "fp8-tensor-dynamic": ("fp8", CT, "fp8"),
    "fp8-dynamic": (CT, "modelopt", CT),
    "nvfp4": (CT, "modelopt", CT),
}


def layers(folder: Path) -> dict[str, QTensor]:
    checkpoint = open_quantized(folder)
    contents = read_quantized(checkpoint)
    return {layer: read_layer(checkpoint, contents.format, own, layer) for layer, own in contents.schemes.items()}


@pytest.mark.parametrize("scheme", CHAINS)
def test_through_every_layout_and_back(tiny_llama: Path, tmp_path: Path, scheme: str) -> None:
    """Each step has the weights of the one before, is sound, and the last one has the bytes of the first."""
    first, *others = CHAINS[scheme]
    folders = [tmp_path / f"0-{first}"]
    quantize(tiny_llama, {"scheme": scheme, "format": first}, folders[0])
    for number, to in enumerate(others, 1):
        folders.append(tmp_path / f"{number}-{to}")
        convert(folders[-2], to, folders[-1])
        assert read_quantized(open_quantized(folders[-1])).format.name == to
        assert (found := diagnose(folders[-1])).sound, found.faults
        assert found.what["quantized"] == scheme
    for folder in folders[1:]:
        for (name, q), (other, expected) in zip(*(sorted(layers(each).items()) for each in (folder, folders[0]))):
            assert (name, q.scheme) == (other, expected.scheme)
            assert torch.equal(q.dequantize(), expected.dequantize()), name
    before, after = (open_quantized(folder) for folder in (folders[0], folders[-1]))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(name).view(-1).view(torch.uint8), after.read(name).view(-1).view(torch.uint8))
               for name in before.tensors)  # fmt: skip


def test_transformers_dequantizes_the_same_weights(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does without a GPU, and without bitpress in its registry, where another test may have put it."""
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fp8", FineGrainedFP8Config)
    artifact = quantize(tiny_llama, {"scheme": "fp8-block", "format": "fp8"}, tmp_path / "out")
    assert artifact.section()["quant_method"] == "fp8"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for layer, q in layers(tmp_path / "out").items():
        assert torch.equal(model.get_submodule(layer).weight, q.dequantize(torch.bfloat16)), layer


def test_what_has_no_place_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, {"scheme": "fp8-dynamic"}, tmp_path / "channels")
    with pytest.raises(ConfigError, match="fp8 holds FP8 weights in squares of 128"):
        convert(tmp_path / "channels", "fp8", tmp_path / "out")
    scheme = Scheme.parse("nvfp4")
    tensors = scheme.weight.random((4, 32), torch.Generator().manual_seed(0))
    near = 1.7 + torch.arange(64) * 2.0**-23
    tensors["global_scale"] = near[near.reciprocal().reciprocal() != near][:1]
    with pytest.raises(NumericsError, match="stores the reciprocal of a global scale"):
        registry()["modelopt"].write(QTensor.of(scheme, (4, 32), tensors), torch.bfloat16)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["lm_head", "model.layers.0.mlp.down_proj"], "quantized, and the config's modules_to_not_convert matches"),
        (["nothing"], None),
    ],
)
def test_doctor_compares_the_config_with_the_files(
    tiny_llama: Path, tmp_path: Path, edit_json: Callable[..., None], entries: list[str], said: str | None
) -> None:
    quantize(tiny_llama, {"scheme": "fp8-block", "format": "fp8"}, tmp_path / "out")
    section = open_quantized(tmp_path / "out").config["quantization_config"] | {"modules_to_not_convert": entries}
    edit_json(tmp_path / "out" / "config.json", quantization_config=section)
    (tmp_path / "out" / "bitpress.json").unlink()  # with the config's hash
    faults = diagnose(tmp_path / "out").faults
    assert (said in " ".join(faults)) if said else not faults


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modules_to_not_convert": [7]}, "expected a list of names"),
        ({"fmt": "e5m2"}, "fmt 'e5m2' is not supported"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size \[64, 128\] is not supported"),
        ({"activation_scheme": "static"}, "beside weight_block_size is not supported"),
        ({"activation_scheme": ["static"]}, "is not supported, only"),
        ({"expert_dtype": "fp4"}, "expert_dtype 'fp4' is not fp8"),
    ],
)
def test_configs_that_are_not_read(change: dict[str, object], said: str) -> None:
    format = registry()["fp8"]
    section = format.quantization_config({"a.0.b": Scheme.parse("fp8-block")}, [], torch.bfloat16)
    with pytest.raises(ValueError, match=said):
        format.scheme_rules(section | change)
