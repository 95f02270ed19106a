"""Artifacts whose tensors or config were tampered with are refused, the layer named, before any kernel sees them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.linear import QLinear
from bitpress.pipeline.api import quantize
from bitpress.pipeline.errors import CheckpointError
from bitpress.pipeline.formats import open_quantized
from bitpress.pipeline.models import modules
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.storage.checkpoint import INDEX, SINGLE, Checkpoint, read_json

LAYER = "model.layers.0.mlp.down_proj"  # [64, 128]
STATE = "weight.quant_state.bitsandbytes__nf4"
Layer = dict[str, Tensor]
Change = Callable[[Layer], Any]
Fault = tuple[str, Change, str]


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


def with_byte(tensor: Tensor, value: int) -> Tensor:
    """The last element of one byte replaced."""
    tensor = tensor.clone()
    tensor.view(torch.uint8).view(-1)[-1] = value
    return tensor


def replaced(suffix: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda layer: layer.update({suffix: change(layer[suffix]).contiguous()})


def without(suffix: str) -> Change:
    return lambda layer: layer.pop(suffix)


def with_extra(suffix: str, tensor: Tensor | None = None) -> Change:
    return lambda layer: layer.update({suffix: torch.zeros(64) if tensor is None else tensor})


def state(**changes: Any) -> Change:
    """The quantization state's JSON, some keys changed."""

    def change(packed: Tensor) -> Tensor:
        text = json.dumps(json.loads(bytes(packed.tolist())) | changes)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return replaced(STATE, change)


def raw_state(content: bytes) -> Change:
    return replaced(STATE, lambda packed: torch.tensor(list(content), dtype=torch.uint8))


GPTQ: list[Fault] = [
    ("scales: a column less", replaced("scales", lambda t: t[:, :-1]), "shape"),
    ("scales: a group less", replaced("scales", lambda t: t[:-1]), "shape"),
    ("scales: transposed", replaced("scales", lambda t: t.t()), "shape"),
    ("scales: flat", replaced("scales", lambda t: t.flatten()), "dimensions"),
    ("scales: NaN", replaced("scales", with_nan), "NaN"),
    ("scales: infinite", replaced("scales", lambda t: t * torch.inf), "infinite"),
    ("scales: integers", replaced("scales", lambda t: t.to(torch.int32)), "dtype"),
    ("scales: missing", without("scales"), "scales is missing"),
    ("qweight: a word less", replaced("qweight", lambda t: t[:-1]), "codes has shape"),
    ("qweight: a column less", replaced("qweight", lambda t: t[:, :-1]), "codes has shape"),
    ("qweight: int64", replaced("qweight", lambda t: t.long()), "codes has dtype"),
    ("qweight: missing", without("qweight"), "qweight is missing"),
    ("qzeros: a group less", replaced("qzeros", lambda t: t[:-1]), "qzeros has shape"),
    ("qzeros: a word less", replaced("qzeros", lambda t: t[:, :-1]), "qzeros has shape"),
    ("qzeros: a word more", replaced("qzeros", lambda t: torch.cat([t, t], 1)), "qzeros has shape"),
    ("qzeros: scalar", replaced("qzeros", lambda t: t[0, 0]), "dimensions"),
    ("qzeros: int64", replaced("qzeros", lambda t: t.long()), "dtype"),
    ("qzeros: of no version", replaced("qzeros", lambda t: t - 0x11111111), "qzeros hold 6, expected 7"),
    ("qzeros: of both versions", replaced("qzeros", lambda t: t + 0x11111111 * torch.eye(*t.shape).int()), "hold 7, 8"),
    ("qzeros: one of them changed", replaced("qzeros", lambda t: t ^ torch.eye(*t.shape).int()), "expected 7"),
    ("qzeros: missing", without("qzeros"), "qzeros is missing"),
    ("g_idx: unbalanced", replaced("g_idx", lambda t: t // 2), "g_idx gives group 0 64 members, expected 32"),
    ("g_idx: out of range", replaced("g_idx", lambda t: t + 1000), "g_idx holds group 1003, which is out of range"),
    ("g_idx: negative", replaced("g_idx", lambda t: t - 1), "g_idx holds group -1, which is out of range"),
    ("g_idx: too short", replaced("g_idx", lambda t: t[:-32]), "codes has shape"),
    ("g_idx: empty", replaced("g_idx", lambda t: t[:0]), "is empty"),
    ("g_idx: floats", replaced("g_idx", lambda t: t.float()), "dtype"),
    ("g_idx: missing", without("g_idx"), "g_idx is missing"),
    ("a bias that the model does not have", with_extra("bias", torch.ones(64)), "the layer has no bias"),
    ("a weight beside it", with_extra("weight", torch.zeros(64, 128)), "does not belong"),
    ("a tensor of another format", with_extra("weight_zero_point"), "does not belong"),
]
PACKED: list[Fault] = [
    ("packed: a word less", replaced("weight_packed", lambda t: t[:, :-1]), "codes has shape"),
    ("packed: a row less", replaced("weight_packed", lambda t: t[:-1]), "codes has shape"),
    ("packed: int64", replaced("weight_packed", lambda t: t.long()), "codes has dtype"),
    ("packed: missing", without("weight_packed"), "weight_packed is missing"),
    ("scale: NaN", replaced("weight_scale", with_nan), "NaN"),
    ("scale: a group less", replaced("weight_scale", lambda t: t[:, :-1]), "scales has shape"),
    ("scale: float64", replaced("weight_scale", lambda t: t.double()), "scales has dtype"),
    ("scale: missing", without("weight_scale"), "weight_scale is missing"),
    ("shape: another", replaced("weight_shape", lambda t: t + 32), "shape"),
    ("shape: swapped", replaced("weight_shape", lambda t: t.flip(0)), "shape"),
    ("shape: negative", replaced("weight_shape", lambda t: -t), "positive whole numbers"),
    ("shape: of a huge matrix", replaced("weight_shape", lambda t: t + (1 << 60)), "shape"),
    ("shape: floats", replaced("weight_shape", lambda t: t.float()), "positive whole numbers"),
    ("shape: nested", replaced("weight_shape", lambda t: t.unsqueeze(1)), "positive whole numbers"),
    ("shape: missing", without("weight_shape"), "weight_shape is missing"),
    ("zero point: a word less", replaced("weight_zero_point", lambda t: t[:-1]), "weight_zero_point has shape"),
    ("zero point: a group less", replaced("weight_zero_point", lambda t: t[:, :-1]), "weight_zero_point has shape"),
    ("zero point: int64", replaced("weight_zero_point", lambda t: t.long()), "weight_zero_point has dtype"),
    ("zero point: missing", without("weight_zero_point"), "zeros missing"),
    ("zero point: of 2024, transposed", with_extra("weight_zero_point", torch.zeros(4, 64).to(torch.int8)), "[64, 4]"),
    ("zero point: beyond 4 bits", with_extra("weight_zero_point", torch.full((64, 4), 8).to(torch.int8)), "holds 8..8"),
    ("g_idx: int64", with_extra("weight_g_idx", torch.arange(128) // 32), "weight_g_idx has dtype"),
    ("g_idx: out of range", with_extra("weight_g_idx", torch.arange(128).int()), "weight_g_idx holds group 127"),
    ("g_idx: too short", with_extra("weight_g_idx", torch.arange(96).int() // 32), "weight_g_idx has shape"),
    ("a weight beside it", with_extra("weight", torch.zeros(64, 128)), "does not belong"),
]
INT8: list[Fault] = [
    ("weight: a column less", replaced("weight", lambda t: t[:, :-1]), "shape"),
    ("weight: flat", replaced("weight", lambda t: t.flatten()), "shape"),
    ("weight: unsigned", replaced("weight", lambda t: t.view(torch.uint8)), "dtype"),
    ("weight: floats", replaced("weight", lambda t: t.float()), "dtype"),
    ("weight: missing", without("weight"), "weight is missing"),
    ("scale: NaN", replaced("weight_scale", with_nan), "NaN"),
    ("scale: flat", replaced("weight_scale", lambda t: t.flatten()), "scales has shape"),
    ("scale: a row less", replaced("weight_scale", lambda t: t[:-1]), "scales has shape"),
    ("scale: integers", replaced("weight_scale", lambda t: t.int()), "scales has dtype"),
    ("scale: missing", without("weight_scale"), "scales are missing"),
    ("a scale for the inputs", with_extra("input_scale", torch.ones(1)), "does not belong"),
    ("a zero point", with_extra("weight_zero_point", torch.eye(64, 1).to(torch.int8)), "1 of 64 are not zero"),
]
NF4: list[Fault] = [
    ("weight: a byte less", replaced("weight", lambda t: t[:-1]), "codes has shape"),
    ("weight: signed", replaced("weight", lambda t: t.view(torch.int8)), "codes has dtype"),
    (
        "weight: half of it as bfloat16",
        replaced("weight", lambda t: t[:2048].flatten().view(torch.bfloat16)),
        "codes has shape",
    ),
    ("weight: missing", without("weight"), "weight is missing"),
    ("absmax: a block less", replaced("weight.absmax", lambda t: t[:-1]), "scales has shape"),
    ("absmax: missing", without("weight.absmax"), "weight.absmax is missing"),
    ("quant_map: another", replaced("weight.quant_map", lambda t: t * 0.5), "code book"),
    ("quant_map: NaN", replaced("weight.quant_map", with_nan), "code book"),
    ("quant_map: float64", replaced("weight.quant_map", lambda t: t.double()), "code book"),
    ("quant_map: shorter", replaced("weight.quant_map", lambda t: t[:8]), "code book"),
    ("quant_map: missing", without("weight.quant_map"), "weight.quant_map is missing"),
    ("state: missing", without(STATE), f"{STATE} is missing"),
    ("state: not JSON", raw_state(b"{'quant_type'"), ""),
    ("state: not UTF-8", raw_state(b"\xff\xfe{}"), ""),
    ("state: empty", raw_state(b""), ""),
    ("state: a list", raw_state(b"[1]"), "not a JSON object"),
    ("state: nested deeply", raw_state(b"[" * 4096), ""),
    ("state: long", raw_state(b" " * 5000 + b"{}"), "not a short JSON"),
    ("state: a matrix of other bytes", replaced(STATE, lambda t: t[: len(t) // 2 * 2].view(2, -1)), ""),
    ("state: floats", replaced(STATE, lambda t: t.float()), "not a short JSON"),
    ("state: FP4", state(quant_type="fp4"), "quant_type is 'fp4'"),
    ("state: blocks of 128", state(blocksize=128), "blocksize is 128"),
    ("state: another shape", state(shape=[32, 256]), "shape"),
    ("state: a flat shape", state(shape=[8192]), "shape is [8192]"),
    ("state: a negative shape", state(shape=[-64, -128]), "shape is [-64, -128]"),
    ("state: a huge shape", state(shape=[10**30, 64]), "shape"),
    ("state: a shape of words", state(shape=["64", "128"]), "shape is ['64', '128']"),
    ("a weight_scale beside it", with_extra("weight_scale"), "does not belong"),
]
SINGLE_ONLY: list[Fault] = [
    ("absmax: NaN", replaced("weight.absmax", with_nan), "NaN"),
    ("absmax: bytes", replaced("weight.absmax", lambda t: t.to(torch.uint8)), "scales has dtype"),
    ("nested absmax: extra", with_extra("weight.nested_absmax", torch.ones(1)), "nested"),
    ("nested map: extra", with_extra("weight.nested_quant_map", torch.ones(256)), "nested"),
]
DOUBLE_ONLY: list[Fault] = [
    ("absmax: floats", replaced("weight.absmax", lambda t: t.float()), "scales has dtype"),
    ("nested absmax: NaN", replaced("weight.nested_absmax", with_nan), "NaN"),
    ("nested absmax: a block more", replaced("weight.nested_absmax", lambda t: torch.cat([t, t])), "nested.absmax"),
    ("nested absmax: missing", without("weight.nested_absmax"), "nested_absmax is missing"),
    ("nested map: shorter", replaced("weight.nested_quant_map", lambda t: t[:16]), "nested.codebook has shape"),
    ("nested map: NaN", replaced("weight.nested_quant_map", with_nan), "NaN"),
    ("nested map: missing", without("weight.nested_quant_map"), "nested_quant_map is missing"),
    ("state: offset NaN", state(nested_offset=float("nan")), "NaN"),
    ("state: offset beyond float32", state(nested_offset=1e300), ""),
    ("state: offset a word", state(nested_offset="0.1"), "nested_offset is '0.1'"),
    ("state: no offset", state(nested_offset=None), "nested_offset is None"),
    ("state: nested blocks of 64", state(nested_blocksize=64), "nested_blocksize is 64"),
]
FP8: list[Fault] = [
    ("weight: a column less", replaced("weight", lambda t: t[:, :-1]), "shape [64, 127] in the file"),
    ("weight: flat", replaced("weight", lambda t: t.flatten()), "has shape [8192], expected"),
    ("weight: bytes", replaced("weight", lambda t: t.view(torch.uint8)), "elements have dtype torch.uint8"),
    ("weight: of another float8", replaced("weight", lambda t: t.view(torch.float8_e5m2)), ""),
    ("weight: NaN", replaced("weight", lambda t: with_byte(t, 0x7F)), "codes has 1 NaN"),
    ("weight: missing", without("weight"), "is the scale of a weight that is not in the files"),
    ("scale: NaN", replaced("weight_scale_inv", with_nan), "scales has 1 NaN"),
    ("scale: zero", replaced("weight_scale_inv", torch.zeros_like), "1 scales are not positive"),
    ("scale: another shape", replaced("weight_scale_inv", lambda t: t.repeat(2, 1)), "has shape [2, 1], expected"),
    ("scale: float64", replaced("weight_scale_inv", lambda t: t.double()), "is no dtype of scales"),
    ("scale: a NaN power of two", replaced("weight_scale_inv", lambda t: torch.full_like(t, 255).byte()), "NaN"),
    ("scale: missing", without("weight_scale_inv"), "its scales are missing"),
    ("scale: two of them", with_extra("weight_scale", torch.ones(1)), "several tensors of scales"),
    ("a tensor of another format", with_extra("weight_packed"), "does not belong"),
]
MODELOPT: list[Fault] = [
    ("weight: a byte less", replaced("weight", lambda t: t[:, :-1]), "is not divisible by 16"),
    ("weight: a row less", replaced("weight", lambda t: t[:-1]), "scales has shape"),
    ("weight: signed", replaced("weight", lambda t: t.view(torch.int8)), "codes has dtype"),
    ("weight: flat", replaced("weight", lambda t: t.flatten()), "expected a matrix"),
    ("weight: missing", without("weight"), "weight is missing"),
    ("scale: NaN", replaced("weight_scale", lambda t: with_byte(t, 0x7F)), "scales has 1 NaN"),
    ("scale: negative", replaced("weight_scale", lambda t: with_byte(t, 0x81)), "1 scales are negative"),
    ("scale: a group less", replaced("weight_scale", lambda t: t[:, :-1]), "scales has shape"),
    ("scale: floats", replaced("weight_scale", lambda t: t.float()), "scales has dtype"),
    ("factor: NaN", replaced("weight_scale_2", lambda t: t * torch.nan), "weight_scale_2 is nan, expected positive"),
    ("factor: zero", replaced("weight_scale_2", torch.zeros_like), "weight_scale_2 is 0.0, expected positive"),
    ("factor: tiny", replaced("weight_scale_2", lambda t: t.fill_(1e-45)), "global_scale has 1 NaN or infinite"),
    ("factor: two", replaced("weight_scale_2", lambda t: t.repeat(2)), "expected a single number"),
    ("factor: float64", replaced("weight_scale_2", lambda t: t.double()), "weight_scale_2 has dtype"),
    ("factor: missing", without("weight_scale_2"), "weight_scale_2 is missing"),
    ("a scale for the inputs", with_extra("input_scale", torch.ones(1)), "does not belong"),
]
FAULTS = {
    "int4-g32": GPTQ,
    "fp8-block": FP8,
    "nvfp4": MODELOPT,
    "int4-g32-asym": PACKED,
    "int8-dynamic": INT8,
    "nf4": NF4 + SINGLE_ONLY,
    "nf4-dq": NF4 + DOUBLE_ONLY,
}


@pytest.fixture(scope="module")
def artifacts(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scheme -> a whole artifact, read only."""
    folder = tmp_path_factory.mktemp("artifacts")
    formats = {"fp8-block": "fp8", "nvfp4": "modelopt"}  # others have the first that holds them
    for scheme in FAULTS:
        quantize(tiny_llama, {"scheme": scheme, "format": formats.get(scheme, "auto")}, folder / scheme)
    return {scheme: folder / scheme for scheme in FAULTS}


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tampered layer fails the test if it reaches a kernel; others may."""
    tampered: list[int] = []

    def read(checkpoint: Checkpoint, format: Any, scheme: Any, layer: str) -> Any:
        qtensor = read_layer(checkpoint, format, scheme, layer)
        if layer == LAYER:
            tampered.append(qtensor.codes.data_ptr())
        return qtensor

    def guarded(qtensor: Any, *arguments: Any) -> QLinear:
        if qtensor.codes.data_ptr() in tampered:
            pytest.fail("a kernel was about to get a tampered weight")
        return QLinear(qtensor, *arguments)

    monkeypatch.setattr(modules, "read_layer", read)
    monkeypatch.setattr(modules, "QLinear", guarded)


def tamper(folder: Path, change: Change, edit_tensors: Any) -> None:
    """Change one layer's tensors, and the index with them."""
    index = json.loads((folder / INDEX).read_text())
    file = next(file for name, file in index["weight_map"].items() if name.startswith(f"{LAYER}."))

    def edit(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if name.startswith(f"{LAYER}.")]
        layer = {name.removeprefix(f"{LAYER}."): tensors.pop(name) for name in names}
        change(layer)
        tensors.update({f"{LAYER}.{suffix}": tensor for suffix, tensor in layer.items()})
        others = {name: where for name, where in index["weight_map"].items() if where != file}
        index["weight_map"] = others | dict.fromkeys(tensors, file)

    edit_tensors(folder / file, edit)
    (folder / INDEX).write_text(json.dumps(index))


def load_reference(folder: Path) -> Any:
    return load_model(open_quantized(folder), torch.device("cpu"), "auto", "reference")


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [pytest.param(scheme, *rest, id=f"{scheme}-{name}") for scheme, faults in FAULTS.items() for name, *rest in faults],
)
def test_tampered_tensors(
    artifacts: dict[str, Path],
    copy_of: Callable[..., Path],
    edit_tensors: Any,
    scheme: str,
    change: Change,
    said: str,
) -> None:
    folder = copy_of(artifacts[scheme])
    tamper(folder, change, edit_tensors)
    with pytest.raises(CheckpointError) as caught:
        load_reference(folder)
    assert LAYER in str(caught.value)
    assert said in str(caught.value), str(caught.value)


def group(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda section: section["config_groups"]["group_0"]["weights"].update(changes)


def inputs(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda section: section["config_groups"]["group_0"]["input_activations"].update(changes)


def outputs(section: dict[str, Any]) -> None:
    section["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8, "dynamic": True}


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize(
    ("scheme", "change", "said"),
    [
        ("int4-g32", lambda section: section.update(bits=8), LAYER),
        ("int4-g32", lambda section: section.update(bits=5), "int5 is not a scheme"),
        ("int4-g32", lambda section: section.update(bits="4"), "bits is '4'"),
        ("int4-g32", lambda section: section.pop("bits"), "bits is missing"),
        ("int4-g32", lambda section: section.pop("group_size"), "group_size is missing"),
        ("int4-g32", lambda section: section.update(group_size=64), LAYER),
        ("int4-g32", lambda section: section.update(group_size=-1), LAYER),
        ("int4-g32", lambda section: section.update(group_size=48), LAYER),
        ("int4-g32", lambda section: section.update(group_size=-7), "group_size: -7"),
        ("int4-g32", lambda section: section.update(sym="no"), "symmetric is 'no'"),
        ("int4-g32", lambda section: section.update(checkpoint_format="marlin"), "'marlin' is not supported"),
        ("int4-g32", lambda section: section.update(dynamic={"+:.*down.*": {"bits": 8}}), LAYER),
        ("int4-g32", lambda section: section.update(dynamic={"(a+)+$": {"bits": 8}}), "the pattern '(a+)+$'"),
        ("int4-g32", lambda section: section.update(quant_method="hqq"), "hqq"),
        ("int4-g32", lambda section: section.update(quant_method="bitsandbytes"), "no tensor name ends in"),
        ("int4-g32-asym", group(num_bits=8), LAYER),
        ("int4-g32-asym", group(group_size=64), LAYER),
        ("int4-g32-asym", group(strategy="channel"), LAYER),
        ("int4-g32-asym", group(symmetric=True), LAYER),
        ("int4-g32-asym", group(num_bits=[4]), "bits is [4]"),
        ("int4-g32-asym", group(actorder="group"), "these tensors are missing"),
        ("int4-g32-asym", lambda section: section.update(config_groups=[]), "config_groups"),
        ("int4-g32-asym", group(actorder="dynamic"), "these tensors are missing"),
        ("int4-g32-asym", group(dynamic=True), "weights that are dynamic"),
        ("int4-g32-asym", lambda section: section.update(kv_cache_scheme=8), "kv_cache_scheme is 8"),
        ("int4-g32-asym", lambda section: section.update(sparsity_config={"format": "sparse-24"}), "'sparse-24'"),
        ("int8-dynamic", inputs(dynamic=False), "input activations of"),
        ("int8-dynamic", inputs(dynamic="local"), "input activations of"),
        ("int8-dynamic", inputs(type="float"), "fp8-token activations go with fp8 or fp8-tensor weights, not"),
        ("int8-dynamic", inputs(num_bits=4), "input activations of"),
        ("int8-dynamic", inputs(strategy="group", group_size=128), "input activations of"),
        ("int8-dynamic", inputs(group_size=128), "input_activations with group_size 128"),
        ("int8-dynamic", inputs(actorder="group"), "input_activations with actorder 'group'"),
        ("int8-dynamic", outputs, "output_activations"),
        ("int8-dynamic", group(num_bits=4), "out of range -8..7"),
        ("int8-dynamic", group(strategy="group"), "int-quantized is read for 8-bit"),
        ("nf4", lambda section: section.update(bnb_4bit_use_double_quant=True), LAYER),
        ("nf4-dq", lambda section: section.update(bnb_4bit_use_double_quant=False), LAYER),
        ("nf4", lambda section: section.update(bnb_4bit_quant_type="fp4"), "fp4"),
    ],
)
def test_tampered_config(
    artifacts: dict[str, Path],
    copy_of: Callable[..., Path],
    scheme: str,
    change: Callable[[dict[str, Any]], Any],
    said: str,
) -> None:
    folder = copy_of(artifacts[scheme])
    config = read_json(folder / "config.json")
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load_reference(folder)
    assert said in str(caught.value), str(caught.value)


@pytest.mark.usefixtures("no_kernel")
def test_a_layer_that_the_model_does_not_have(
    artifacts: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any
) -> None:
    folder = copy_of(artifacts["int4-g32"])
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][f"{LAYER}.qweight"]
    index["weight_map"]["model.layers.7.mlp.down_proj.qweight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    name = "model.layers.7.mlp.down_proj.qweight"
    edit_tensors(folder / file, lambda tensors: tensors.update({name: tensors[f"{LAYER}.qweight"].clone()}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.down_proj is no linear layer"):
        load_reference(folder)


def test_a_bias_of_zeros_is_nothing(
    artifacts: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any
) -> None:
    """AutoGPTQ wrote one for layers that have none."""
    folder = copy_of(artifacts["int4-g32"])
    tamper(folder, with_extra("bias"), edit_tensors)
    load_reference(folder)


@pytest.mark.parametrize("tag", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shift", [0, 0x11111111])
def test_symmetric_zero_points_of_either_version_count_the_same(
    artifacts: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any, tag: str, shift: int
) -> None:
    """Files are about that are tagged with one version and hold the other's; there is no doubt what they mean."""
    folder = copy_of(artifacts["int4-g32"])
    config = read_json(folder / "config.json")
    config["quantization_config"]["checkpoint_format"] = tag
    (folder / "config.json").write_text(json.dumps(config))
    tamper(folder, replaced("qzeros", lambda t: t + shift), edit_tensors)
    layer = load_reference(folder).get_submodule(LAYER)
    expected = load_reference(artifacts["int4-g32"]).get_submodule(LAYER)
    assert torch.equal(layer.packed.qtensor.dequantize(), expected.packed.qtensor.dequantize())


@pytest.mark.parametrize("scheme", FAULTS)
def test_untouched_artifacts_load(artifacts: dict[str, Path], scheme: str) -> None:
    """So that the refusals above are the faults' own."""
    assert not (artifacts[scheme] / SINGLE).exists()
    load_reference(artifacts[scheme])
