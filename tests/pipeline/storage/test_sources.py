"""Coded checkpoints are read as the plain tensors that they stand for: compared with a decoder of its own, in numpy."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from bitpress.kernels.qtensor import QTensor
from bitpress.pipeline.api import convert, quantize
from bitpress.pipeline.checkpoints.describe import describe
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import CheckpointError
from bitpress.pipeline.formats import open_quantized
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.storage.checkpoint import INDEX, SINGLE, Checkpoint

Tensors = dict[str, Tensor]
Encode = Callable[[str, tuple[int, ...], np.random.Generator], tuple[Tensors, Tensor]]

SIGNS = np.array([1.0, -1.0])


def minifloat(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """The value of each code, from the definition: a sign, an exponent, a mantissa; subnormal at exponent 0."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = SIGNS[codes >> (exponent_bits + mantissa_bits)]
    return sign * np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))


E4M3, E5M2, E2M1 = minifloat(4, 3, 7), minifloat(5, 2, 15), minifloat(2, 1, 1)
E4M3[[0x7F, 0xFF]] = np.nan
E5M2[0x7C:0x80] = E5M2[0xFC:] = np.nan


def decoded(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """float32 products, element by element: scales[row // height, column // width]."""
    rows, columns = (np.arange(size) // step for size, step in zip(values.shape, block, strict=True))
    return values.astype(np.float32) * scales.astype(np.float32)[rows][:, columns]


def bfloat16(values: np.ndarray) -> Tensor:
    """Rounded to the nearest bfloat16, ties to even, by the bits of a float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """How weights are coded: what config.json (or a side file) says, and the tensors of one weight.

    block: of a scale; None for the whole dimension. suffix: what the scales are called. stored: the scales [rows,
    columns] as the files hold them, or their exponents where they are `powers` of two. extra: other tensors of a layer.
    """

    section: dict[str, Any]
    block: tuple[int | None, int | None] = (128, 128)
    suffix: str = "weight_scale_inv"
    stored: Callable[[np.ndarray], Tensor] = lambda scales: torch.from_numpy(scales.astype(np.float32))
    powers: bool = False
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)
    codes: tuple[np.ndarray, torch.dtype] = (E4M3, torch.float8_e4m3fn)
    side_file: bool = False

    def encode(self, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, Tensor]:
        """Random codes and scales of a weight, and the weight."""
        layer = name.removesuffix(".weight")
        table, dtype = self.codes
        codes = rng.choice(np.flatnonzero(np.isfinite(table)), shape).astype(np.uint8)
        block = (self.block[0] or shape[0], self.block[1] or shape[1])
        grid = [-(-size // step) for size, step in zip(shape, block, strict=True)]
        exponents = rng.integers(-14, -10, grid)
        scales = np.exp2(exponents) if self.powers else rng.uniform(1e-4, 4e-4, grid)
        stored = self.stored(exponents + 127 if self.powers else scales)
        tensors = {name: torch.from_numpy(codes).view(dtype), f"{layer}.{self.suffix}": stored}
        tensors |= {f"{layer}.{name}": torch.ones(size) for name, size in self.extra.items()}
        if not self.powers:
            scales = stored.to(torch.float32).numpy().reshape(grid)
        return tensors, bfloat16(decoded(table[codes], scales, block))


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def scalar(scales: np.ndarray) -> Tensor:
    return torch.tensor(scales.item(), dtype=torch.float32)


def exponents(scales: np.ndarray) -> Tensor:
    return torch.from_numpy(scales.astype(np.uint8))


STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
LAYOUTS = {
    "deepseek": Layout({**FP8, "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}),
    "odd blocks": Layout(
        {**FP8, "weight_block_size": [48, 40]}, (48, 40), "weight_scale_inv", lambda s: torch.from_numpy(s).bfloat16()
    ),
    "no block in the config": Layout(FP8),
    "ue8m0": Layout(
        {**FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        suffix="scale",
        powers=True,
        stored=lambda s: exponents(s).view(torch.float8_e8m0fnu),
    ),
    "powers of two": Layout(
        {**FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, powers=True, stored=exponents
    ),
    "transformers": Layout(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        (None, None),
        stored=scalar,
        extra={"activation_scale": ()},
    ),
    "dynamic": Layout(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]},
        (None, None),
        "weight_scale",
        lambda s: scalar(s).reshape(1),
    ),
    "mxfp8": Layout({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, (1, 32), stored=exponents, powers=True),
    "static": Layout(
        {"quant_method": "fp8", "activation_scheme": "static"},
        (None, None),
        "weight_scale",
        scalar,
        extra={"input_scale": (1,)},
    ),
    "mistral": Layout({"quant_method": "fp8"}, (None, None), "qscale_weight", scalar, extra={"qscale_act": ()}),
    "fbgemm": Layout({"quant_method": "fbgemm_fp8"}, (1, None), "weight_scale", extra={"input_scale_ub": (1,)}),
    "e5m2": Layout(
        {"quant_method": "fp8", "fmt": "e5m2"},
        (None, None),
        "weight_scale_inv",
        scalar,
        codes=(E5M2, torch.float8_e5m2),
    ),
    "compressed channel": Layout(
        compressed({"strategy": "channel"}), (1, None), "weight_scale", lambda s: torch.from_numpy(s).bfloat16()
    ),
    "compressed tensor": Layout(
        compressed({"strategy": "tensor"}, STATIC),
        (None, None),
        "weight_scale",
        lambda s: scalar(s).reshape(1),
        extra={"input_scale": (1,)},
    ),
    "compressed block": Layout(compressed({"strategy": "block", "block_structure": [128, 128]}), suffix="weight_scale"),
    "modelopt": Layout(
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        (None, None),
        "weight_scale",
        scalar,
        extra={"input_scale": (), "k_scale": (), "v_scale": ()},
    ),
    "modelopt channel": Layout(
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"]},
        (1, None),
        "weight_scale",
        lambda s: torch.from_numpy(s.astype(np.float32)).flatten(),
    ),
    "modelopt side file": Layout(
        {"quant_algo": "FP8_PB_WO"},
        suffix="weight_scale",
        stored=lambda s: torch.from_numpy(s.astype(np.float32))[:, None, :, None],
        side_file=True,
    ),
}


def rewrite(folder: Path, encode: Encode, chosen: Callable[[str], bool], section: dict[str, Any] | None) -> Path:
    """Code the chosen weights of a saved model, in place; returns a folder with what they stand for."""
    dense = shutil.copytree(folder, folder.with_name(f"{folder.name}-dense"))
    rng, coded, plain = np.random.default_rng(0), {}, load_file(folder / SINGLE)
    for name, tensor in plain.items():
        tensors = {name: tensor}
        if chosen(name) and tensor.dim() > 1:
            tensors, plain[name] = encode(name, tuple(tensor.shape), rng)
        coded |= tensors
    save_file(plain, dense / SINGLE, metadata={"format": "pt"})
    save_file(coded, folder / SINGLE, metadata={"format": "pt"})
    if section:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return dense


def code(folder: Path, layout: Layout) -> Path:
    """Code the projections of a saved model's blocks, in place; returns a folder with what they stand for."""
    if layout.side_file:
        side_file = {"producer": {"name": "modelopt"}, "quantization": layout.section}
        (folder / "hf_quant_config.json").write_text(json.dumps(side_file))
    section = None if layout.side_file else layout.section
    return rewrite(folder, layout.encode, lambda name: "proj" in name, section)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Every layout in turn."""
    return request.param


@pytest.fixture
def coded(
    tmp_path: Path, save_model: Callable[..., Path], llama_config: Callable[..., LlamaConfig]
) -> Callable[[str], tuple[Path, Path]]:
    """coded(layout): the folder of a tiny Llama whose weights are coded so, and that of what they stand for. Blocks of
    128 are cut: its layers have 64 or 192 features."""

    def make(name: str) -> tuple[Path, Path]:
        config = llama_config(intermediate_size=192, num_hidden_layers=1, vocab_size=256)
        folder = save_model(config, tmp_path / "coded")
        return folder, code(folder, LAYOUTS[name])

    return make


def test_is_read_as_what_it_stands_for(coded: Callable[[str], tuple[Path, Path]], layout: str):
    """Names, shapes, dtypes and every bit; whole or in rows that begin inside of a block."""
    folder, dense = coded(layout)
    checkpoint, expected = Checkpoint(folder), Checkpoint(dense)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in checkpoint.tensors.items()} == {
        name: (info.dtype, info.shape, info.nbytes) for name, info in expected.tensors.items()
    }
    assert checkpoint.config == expected.config
    for name in expected.tensors:
        weight = expected.read(name)
        assert torch.equal(checkpoint.read(name), weight), name
        first, counts = len(weight) // 4 + 1, (len(weight) // 3, len(weight) // 5)
        parts = list(checkpoint.read_rows(name, counts, first))
        assert torch.equal(torch.cat(parts), weight[first : first + sum(counts)]), name
    assert "7 weights lie in the files as" in str(checkpoint.dequantization)
    assert "bfloat16" in str(checkpoint.dequantization)
    others = 7 * 4 * len(LAYOUTS[layout].extra)
    in_files = sum(info.nbytes for info in checkpoint.stored.values())
    assert sum(map(checkpoint.stored_bytes, checkpoint.tensors)) + others == in_files
    assert [path.name for path in checkpoint.other_files()] == [path.name for path in expected.other_files()]


# what a layout is as an artifact; the others are sources only
ARTIFACTS = {
    "deepseek": "fp8-block",
    "powers of two": "fp8-block",
    "static": "fp8-tensor-static",
    "transformers": "fp8-tensor-static",
    "dynamic": "fp8-tensor-dynamic",
    "compressed channel": "fp8",
    "compressed tensor": "fp8-tensor-static",
    "compressed block": "fp8-b128",
    "modelopt": "fp8-tensor-static",
    "modelopt channel": "fp8-dynamic",
    "modelopt side file": "fp8-block",
}


def test_is_an_artifact_where_a_scheme_holds_it(coded: Callable[[str], tuple[Path, Path]], layout: str):
    """The same weights, layer by layer, and inputs as the config says."""
    folder, dense = coded(layout)
    checkpoint, expected = open_quantized(folder), Checkpoint(dense)
    assert (checkpoint.dequantization is None) == (layout in ARTIFACTS)
    if layout in ARTIFACTS:
        layers = quantized_layers(checkpoint)
        assert {qtensor.scheme.name for qtensor in layers.values()} == {ARTIFACTS[layout]}
        assert len(layers) == 7
        for layer, qtensor in layers.items():
            assert torch.equal(qtensor.dequantize(torch.bfloat16), expected.read(f"{layer}.weight")), layer


def test_scales_of_a_cache_come_along(coded: Callable[[str], tuple[Path, Path]], tmp_path: Path):
    """Beside a layer, where servers look for them; that they count is said in the config."""
    folder, _ = coded("modelopt")
    convert(folder, "compressed-tensors", tmp_path / "out")
    before, after = open_quantized(folder), open_quantized(tmp_path / "out")
    name = "model.layers.0.self_attn.k_proj.k_scale"
    assert torch.equal(before.read(name), after.read(name))
    assert after.config["quantization_config"]["kv_cache_scheme"]["strategy"] == "tensor"
    assert read_quantized(after).cache == read_quantized(before).cache is not None
    assert len(quantized_layers(after)) == 7
    convert(tmp_path / "out", "modelopt", tmp_path / "back")
    side = json.loads((tmp_path / "back" / "hf_quant_config.json").read_text())["quantization"]
    assert (side["quant_algo"], side["kv_cache_quant_algo"]) == ("FP8", "FP8")


def quantized_layers(checkpoint: Checkpoint) -> dict[str, QTensor]:
    """Every quantized layer of a checkpoint, checked."""
    contents = read_quantized(checkpoint)
    return {layer: read_layer(checkpoint, contents.format, own, layer) for layer, own in contents.schemes.items()}


def test_identity_is_that_of_the_files(coded: Callable[[str], tuple[Path, Path]]):
    folder, dense = coded("modelopt side file")
    before = Checkpoint(folder).identity()
    assert before.keys() == {*Checkpoint(dense).identity(), "hf_quant_config.json"}
    tensors = load_file(folder / SINGLE)
    scales = next(name for name in tensors if name.endswith("weight_scale"))
    save_file({**tensors, scales: tensors[scales] * 2}, folder / SINGLE, metadata={"format": "pt"})
    changed = {name for name, value in Checkpoint(folder).identity().items() if value != before[name]}
    assert changed == {SINGLE}


@pytest.mark.parametrize("layout", ["deepseek", "modelopt side file"])
def test_artifact_is_that_of_the_dense_model(coded: Callable[[str], tuple[Path, Path]], tmp_path: Path, layout: str):
    """To the byte, its config too: nothing is left of the source's coding. What was read is said."""
    folder, dense = coded(layout)
    artifacts = []
    for source in (folder, dense):
        out = tmp_path / f"{source.name}-int4"
        notes = quantize(source, "int4-g32", out).notes
        assert any("dequantized" in note for note in notes) == (source == folder)
        artifacts.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != "bitpress.json"})
    assert artifacts[0] == artifacts[1]


def test_calibrated_artifact_is_that_of_the_dense_model(
    coded: Callable[[str], tuple[Path, Path]], learn: Callable[..., list[str]], tmp_path: Path
):
    shards = []
    for source in coded("odd blocks"):
        learn(source, tmp_path / f"{source.name}-gptq")
        shards.append([path.read_bytes() for path in sorted((tmp_path / f"{source.name}-gptq").glob("*.safetensors"))])
    assert shards[0] == shards[1]


SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
}
MODELS = {
    "qwen3": {"head_dim": 24, "num_key_value_heads": 2},
    "deepseek_v3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 160,
        "num_key_value_heads": 4, "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_a_published_model(
    model_type: str, tmp_path: Path, save_model: Callable[..., Path], logits: Callable[[Path], Tensor]
):
    """By its own names, experts stored one by one among them: loaded as it is and quantized, it is its dense twin."""
    config = AutoConfig.for_model(model_type, **SHAPE, **MODELS[model_type])
    folder = save_model(config, tmp_path / model_type)
    dense = code(folder, LAYOUTS["deepseek"])
    expected = Checkpoint(dense)
    for layer, qtensor in quantized_layers(open_quantized(folder)).items():
        assert torch.equal(qtensor.dequantize(torch.bfloat16), expected.read(f"{layer}.weight")), layer
    for source in (folder, dense):
        quantize(source, "int4-g16", tmp_path / f"{source.name}-int4")
    assert torch.equal(logits(tmp_path / f"{model_type}-int4"), logits(tmp_path / f"{model_type}-dense-int4"))


def test_inspect_and_doctor_say_it(coded: Callable[[str], tuple[Path, Path]]):
    folder, dense = coded("fbgemm")
    described, plain = describe(folder), describe(dense)
    assert described["parameters"] == plain["parameters"]
    assert described["bytes"] < plain["bytes"]
    assert "float8_e4m3fn" in str(described["bytes by dtype"])
    diagnosis = diagnose(folder)
    assert diagnosis.sound, diagnosis.faults
    for text in (described["source"], " ".join(diagnosis.notes)):
        assert "7 weights lie in the files as fp8; they are dequantized one at a time to bfloat16" in text
        assert "7 scales of inputs and caches are left out" in text


Q, GATE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"


def put(name: str, index: Any, value: float) -> Callable[[Tensors], Any]:
    """Change some values of a tensor; float8 ones by their bytes."""

    def change(tensors: Tensors) -> None:
        tensor = tensors[name]
        (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor)[index] = value

    return change


# what the doctor says of values that a source and an artifact check each in its own way
AS_ARTIFACT = {
    "NaN codes": f"{GATE}: codes has 2 NaN or infinite values",
    "zero scale": f"{GATE}: 1 scales are not positive",
    "negative scale": f"{Q}: 1 scales are not positive",
    "too large": f"{Q}: 1 scales are too large for weights in float32",
}
DAMAGES: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "NaN codes": ("deepseek", put(f"{GATE}.weight", (slice(1, 3), 0), 0xFF), f"{GATE}.weight: 2 of its codes are NaN"),
    "infinite code": ("e5m2", put(f"{Q}.weight", (0, 0), 0x7C), f"{Q}.weight: 1 of its codes are NaN or infinite"),
    "zero scale": ("deepseek", put(f"{GATE}.weight_scale_inv", (1, 0), 0), f"1 scales in {GATE}.weight_scale_inv"),
    "negative scale": ("static", lambda t: t[f"{Q}.weight_scale"].neg_(), f"1 scales in {Q}.weight_scale are NaN"),
    "infinite scale": ("fbgemm", put(f"{Q}.weight_scale", (3, 0), float("inf")), f"{Q}.weight: 1 scales"),
    "NaN exponent": ("mxfp8", put(f"{Q}.weight_scale_inv", (0, 0), 255), f"1 scales in {Q}.weight_scale_inv are NaN"),
    "codes without scales": (
        "deepseek",
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}),
        "model.norm.weight is float8_e4m3fn and its scales are missing",
    ),
    "too large": ("static", lambda t: t[f"{Q}.weight_scale"].fill_(1e37), f"{Q}.weight: "),
    "no scales": ("deepseek", lambda t: t.pop(f"{Q}.weight_scale_inv"), f"{Q}.weight is float8_e4m3fn and its scales"),
    "no weight": ("deepseek", lambda t: t.pop(f"{Q}.weight"), f"{Q}.weight_scale_inv is the scale of a weight"),
    "scales of another shape": (
        "deepseek",
        lambda t: t.update({f"{GATE}.weight_scale_inv": torch.ones(1, 1)}),
        f"{GATE}.weight_scale_inv has shape [1, 1], expected [2, 1] for a weight of shape [192, 64]",
    ),
    "scales that are transposed": (
        "fbgemm",
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(1, 64)}),
        f"{Q}.weight_scale has shape [1, 64], expected",
    ),
    "integer scales": (
        "deepseek",
        lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}),
        f"{Q}.weight_scale_inv is int32",
    ),
    "two kinds of scales": (
        "deepseek",
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(1)}),
        f"{Q}.weight is float8_e4m3fn and has several tensors of scales",
    ),
    "a vector": (
        "static",
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][0]}),
        f"the weight of {Q}.weight_scale has shape [64]",
    ),
}


def read_everything(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(coded: Callable[[str], tuple[Path, Path]], edit_tensors: Callable[..., None], damage: str):
    """By quantize's reader and by the doctor."""
    layout, change, sentence = DAMAGES[damage]
    folder, _ = coded(layout)
    edit_tensors(folder / SINGLE, change)
    with pytest.raises(CheckpointError) as caught:
        read_everything(folder)
    assert sentence in str(caught.value)
    diagnosis = diagnose(folder)
    assert AS_ARTIFACT.get(damage, sentence) in "\n".join(diagnosis.faults)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (None, "has no quantization_config, and tensors such as"),
        ({**FP8, "weight_block_size": [128, "x"]}, "weight_block_size is [128, 'x'], expected two whole numbers"),
        ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size is [0, 128], expected two whole numbers"),
        ({"quant_method": "modelopt", "quant_algo": ["FP8"]}, "quant_algo is ['FP8']; bitpress reads FP8"),
        (compressed({"strategy": "block", "block_structure": 7}), "no config group has a strategy"),
        (
            compressed({"strategy": "tensor", "num_bits": [4]}),
            "its floats are of num_bits, strategy, group_size [4] te",
        ),
        ({"quant_method": "mxfp4"}, "its weights cannot be dequantized (mxfp4)"),
        ({**FP8, "weight_block_size": [1 << 70, 1 << 70]}, "expected [1, 1]"),
    ],
)
def test_section_is_not_trusted(
    coded: Callable[[str], tuple[Path, Path]], edit_json: Callable[..., None], section: Any, sentence: str
):
    folder, _ = coded("deepseek")
    edit_json(folder / "config.json", quantization_config=section)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder).config  # noqa: B018
    assert sentence in str(caught.value)


TOY = """
from .base import PER_TENSOR, Source, float8_coding


class Toy(Source):
    name, rank, quant_methods = "toy coding", 90, ("toy",)

    def coding(self, section, stored):
        return float8_coding(stored, (PER_TENSOR,))


PLUGINS = (Toy(),)
"""


def test_a_source_is_one_file(
    coded: Callable[[str], tuple[Path, Path]], drop: Callable[[str, str, str], None], edit_json: Callable[..., None]
):
    """Dropped into the folder, it is asked, and what it says is said."""
    folder, dense = coded("mistral")
    edit_json(folder / "config.json", quantization_config={"quant_method": "toy"})
    drop("bitpress.pipeline.storage.sources", "toy", TOY)
    assert "7 weights lie in the files as toy coding" in describe(folder)["source"]
    name = f"{Q}.weight"
    assert torch.equal(Checkpoint(folder).read(name), Checkpoint(dense).read(name))


@pytest.mark.parametrize("nested", [False, True])
def test_the_dtype_is_the_configs(
    coded: Callable[[str], tuple[Path, Path]], edit_json: Callable[..., None], nested: bool
):
    """Of the model, or of the text decoder that it holds; the coding may be described there too."""
    folder, _ = coded("deepseek")
    values = {"dtype": "float32", "quantization_config": LAYOUTS["deepseek"].section}
    absent = {"dtype": None, "quantization_config": None}
    edit_json(folder / "config.json", **(absent | {"text_config": values} if nested else values))
    checkpoint = Checkpoint(folder)
    assert checkpoint.tensors[f"{Q}.weight"].dtype == torch.float32 == checkpoint.read(f"{Q}.weight").dtype
    assert "quantization_config" not in checkpoint.config
    assert "quantization_config" not in checkpoint.config.get("text_config", {})
    assert "to float32" in str(checkpoint.dequantization)


def test_float8_experts_in_one_tensor(tmp_path: Path):
    """Each expert has blocks of its own, and the last ones are cut."""
    rng, layout = np.random.default_rng(0), LAYOUTS["odd blocks"]
    experts = [layout.encode("x.weight", (50, 72), rng) for _ in range(3)]
    codes = torch.stack([tensors["x.weight"].view(torch.uint8) for tensors, _ in experts])
    scales = torch.stack([tensors["x.weight_scale_inv"] for tensors, _ in experts])
    coded = {"experts.up_proj": codes.view(torch.float8_e4m3fn), "experts.up_proj_scale_inv": scales}
    save_file(coded, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": layout.section}))
    checkpoint, expected = Checkpoint(tmp_path), torch.stack([weight for _, weight in experts])
    assert torch.equal(checkpoint.read("experts.up_proj"), expected)
    (last,) = checkpoint.read_rows("experts.up_proj", [1], first=2)
    assert torch.equal(last, expected[2:])


PACKED: dict[str, tuple[dict[str, Any], int, tuple[str, str, str]]] = {
    # what config.json says, codes of a scale, and the names of codes, scales and the factor of all scales
    "nvfp4": (
        compressed({"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
        16,
        ("weight_packed", "weight_scale", "weight_global_scale"),
    ),
    "mxfp4": (
        compressed({"num_bits": 4, "strategy": "group", "group_size": 32}),
        32,
        ("weight_packed", "weight_scale", ""),
    ),
    "deepseek": ({**FP8, "weight_block_size": [128, 128], "expert_dtype": "fp4"}, 32, ("weight", "scale", "")),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        16,
        ("weight", "weight_scale", "weight_scale_2"),
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_four_bits(
    kind: str, tmp_path: Path, save_model: Callable[..., Path], llama_config: Callable[..., LlamaConfig]
):
    """Two codes to a byte, the first in its low half; a scale for a group, and one number for all scales."""
    section, group, (codes, scales, factor) = PACKED[kind]

    def encode(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, Tensor]:
        layer, (rows, columns) = name.removesuffix(".weight"), shape
        packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
        bytes_of_scales = rng.integers(118, 122, (rows, columns // group), dtype=np.uint8)  # E4M3: from 176 to 240
        stored = {f"{layer}.{codes}": torch.from_numpy(packed), f"{layer}.{scales}": torch.from_numpy(bytes_of_scales)}
        if factor:
            number = np.float32(9000.0 if kind == "nvfp4" else 1 / 9000)
            stored[f"{layer}.{scales}"] = stored[f"{layer}.{scales}"].view(torch.float8_e4m3fn)
            stored[f"{layer}.{factor}"] = torch.tensor([number])
            values = E4M3[bytes_of_scales].astype(np.float32)
            scale = values / number if kind == "nvfp4" else values * number
        else:
            scale = np.exp2(bytes_of_scales.astype(float) - 127)
        if kind == "deepseek":
            stored = {f"{layer}.weight": stored[name].view(torch.int8), f"{layer}.scale": stored[f"{layer}.scale"]}
        unpacked = np.stack((E2M1[packed & 15], E2M1[packed >> 4]), -1).reshape(shape)
        return stored, bfloat16(decoded(unpacked, scale, (1, group)))

    folder = save_model(llama_config(num_hidden_layers=1), tmp_path / "coded")
    dense = rewrite(folder, encode, lambda name: "proj" in name, section)
    checkpoint, expected = Checkpoint(folder), Checkpoint(dense)
    assert set(checkpoint.tensors) == set(expected.tensors)
    for name in expected.tensors:
        assert torch.equal(checkpoint.read(name), expected.read(name)), name


def test_scales_in_another_shard(coded: Callable[[str], tuple[Path, Path]]):
    folder, dense = coded("deepseek")
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    shard_of = {name: f"model-0000{1 + name.endswith('_inv')}-of-00002.safetensors" for name in tensors}
    for shard in set(shard_of.values()):
        save_file({name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    checkpoint, expected = Checkpoint(folder), Checkpoint(dense)
    assert set(checkpoint.tensors) == set(expected.tensors)
    assert torch.equal(checkpoint.read(f"{GATE}.weight"), expected.read(f"{GATE}.weight"))


def test_float8_is_no_dtype_of_a_model(
    coded: Callable[[str], tuple[Path, Path]], edit_json: Callable[..., None], logits: Callable[[Path], Tensor]
):
    """Some configs name the dtype of their codes."""
    folder, dense = coded("e5m2")
    edit_json(folder / "config.json", dtype="float8_e4m3fn")
    assert Checkpoint(folder).config["dtype"] == "bfloat16"
    assert torch.equal(logits(folder), logits(dense))


class TestMxfp4:
    """gpt-oss as it is published: experts as codes of four bits, the rest as it is."""

    EXPERTS = "model.layers.0.mlp.experts"

    @staticmethod
    def encode(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensors, Tensor]:
        """Random experts [experts, in, out]. Value 2i of a row of `out` is the low half of its byte i."""
        experts, features, out = shape
        blocks = rng.integers(0, 256, (experts, out, features // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 124, blocks.shape[:3], dtype=np.uint8)
        values = np.empty((experts, out, features))
        values[..., 0::2] = E2M1[blocks & 15].reshape(experts, out, -1)
        values[..., 1::2] = E2M1[blocks >> 4].reshape(experts, out, -1)
        weight = bfloat16(values * np.exp2(scales.astype(float) - 127).repeat(32, -1)).transpose(1, 2)
        stored = {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        return stored, weight.contiguous()

    @pytest.fixture
    def folders(self, tmp_path: Path, save_model: Callable[..., Path]) -> tuple[Path, Path]:
        """A tiny gpt-oss with its experts coded, and what it stands for."""
        shape = {**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2}
        folder = save_model(AutoConfig.for_model("gpt_oss", **{**shape, "num_hidden_layers": 1}), tmp_path / "coded")
        section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}
        return folder, rewrite(folder, self.encode, lambda name: name.endswith(("up_proj", "down_proj")), section)

    def test_is_read_and_used_as_the_model_has_it(
        self, folders: tuple[Path, Path], tmp_path: Path, logits: Callable[..., Tensor]
    ):
        """[experts, in, out], one expert or all; loaded and quantized it is its dense twin."""
        checkpoint, expected = map(Checkpoint, folders)
        assert set(checkpoint.tensors) == set(expected.tensors)
        for name in expected.tensors:
            weight = expected.read(name)
            assert torch.equal(checkpoint.read(name), weight)
            (row,) = checkpoint.read_rows(name, [1], first=1)
            assert torch.equal(row, weight[1:2])
        assert torch.equal(*(logits(folder, "reference") for folder in folders))
        outputs = [tmp_path / "artifact", tmp_path / "artifact-dense"]
        for folder, out in zip(folders, outputs, strict=True):
            quantize(folder, "int4-g32", out)
        assert torch.equal(*map(logits, outputs))

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda t, n: t.pop(f"{n}_scales"), "gate_up_proj_scales is missing, which belongs to"),
            (lambda t, n: t.pop(f"{n}_blocks"), "gate_up_proj_blocks is missing, which belongs to"),
            (lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"][:1].clone()}), "has shape [1, 320, 2], exp"),
            (lambda t, n: t.update({f"{n}_blocks": t[f"{n}_blocks"].flatten(2)}), "expected [experts, out, in"),
            (lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"].float()}), "expected uint8"),
            (lambda t, n: t.update({n: torch.zeros(2, 64, 320)}), "is there twice"),
            (lambda t, n: t[f"{n}_scales"].fill_(255), "experts.gate_up_proj: 1280 scales in"),
            (lambda t, n: t[f"{n}_scales"].fill_(254), "are too large for torch.bfloat16"),
        ],
    )  # fmt: skip
    def test_damage_is_named(
        self, folders: tuple[Path, Path], edit_tensors: Callable[..., None], change: Callable[..., Any], sentence: str
    ):
        folder, _ = folders
        edit_tensors(folder / SINGLE, lambda tensors: change(tensors, f"{self.EXPERTS}.gate_up_proj"))
        with pytest.raises(CheckpointError) as caught:
            read_everything(folder)
        assert sentence in str(caught.value)
