"""The doctor finds each planted fault, and nothing in what is whole; its verdicts on runtimes follow their rules."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import quantize
from bitpress.pipeline.checkpoints import headers
from bitpress.pipeline.checkpoints.doctor import Diagnosis, diagnose
from bitpress.pipeline.checkpoints.runtimes import (
    RUNTIMES,
    Facts,
    serve_command,
    shard_problems,
    tensor_parallel,
    verdicts,
)
from bitpress.pipeline.errors import CheckpointError
from bitpress.pipeline.formats import registry
from bitpress.pipeline.storage import finite
from bitpress.pipeline.storage.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from bitpress.pipeline.system import remembered

LAYER = "model.layers.0.mlp.down_proj"  # [64, 128]
KINDS = {
    "gptq": "int4-g32",
    "gptq-v2": "int4-g32-asym",
    "compressed-tensors": "int4-g32-asym",
    "int-quantized": "int8-dynamic",
    "bitsandbytes": "nf4-dq",
}
FORMATS = {"int-quantized": "compressed-tensors"}  # where a kind has another name than its format
Plant = Callable[["Patient"], Any]


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> an artifact, read only."""
    folder = tmp_path_factory.mktemp("whole")
    for form, scheme in KINDS.items():
        quantize(tiny_llama, {"scheme": scheme, "format": FORMATS.get(form, form)}, folder / form)
    return {form: folder / form for form in KINDS}


class Patient:
    """A copy of an artifact, to damage."""

    def __init__(self, folder: Path, edit_tensors: Any):
        self.folder, self.edit_tensors = folder, edit_tensors

    def tensors(self, change: Callable[[dict[str, Tensor]], Any], near: str = f"{LAYER}.") -> None:
        """The shard that holds LAYER, rewritten; the index follows."""
        index = json.loads((self.folder / INDEX).read_text())
        file = next(file for name, file in index["weight_map"].items() if name.startswith(near))

        def edit(tensors: dict[str, Tensor]) -> None:
            change(tensors)
            others = {name: where for name, where in index["weight_map"].items() if where != file}
            index["weight_map"] = others | dict.fromkeys(tensors, file)

        self.edit_tensors(self.folder / file, edit)
        (self.folder / INDEX).write_text(json.dumps(index))
        self.forget()

    def tensor(self, suffix: str, change: Callable[[Tensor], Tensor]) -> None:
        name = f"{LAYER}.{suffix}"
        self.tensors(lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))

    def config(self, **changes: Any) -> None:
        config = read_json(self.folder / "config.json")
        config["quantization_config"] |= changes
        (self.folder / "config.json").write_text(json.dumps(config))
        (self.folder / "quantize_config.json").unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Without its hashes the damage must show by itself."""
        (self.folder / "bitpress.json").unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        self.forget()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()
        self.forget()


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([0]), value)


def without(name: str) -> Plant:
    return lambda patient: patient.tensors(lambda tensors: tensors.pop(name))


def flipped(patient: Patient) -> None:
    """Every layer's groups in reverse, in one shard."""
    patient.tensors(lambda t: t.update({name: t[name].flip(0).contiguous() for name in t if name.endswith(".g_idx")}))


FAULTS: list[tuple[str, str, Plant, str]] = [
    ("gptq", "zeros of version 2", lambda p: p.tensor("qzeros", lambda t: t + 0x11111111),
     f"tagged gptq, but version 2's zero points are in {LAYER}: who goes by the tag"),
    ("gptq", "zeros of version 1", lambda p: p.config(checkpoint_format="gptq_v2"),
     "tagged gptq_v2, but version 1's zero points are in model.layers.0.mlp.down_proj and 13 more"),
    ("gptq", "zeros of neither", lambda p: p.tensor("qzeros", lambda t: t - 0x11111111), f"{LAYER}: qzeros hold 6"),
    ("gptq", "g_idx beyond", lambda p: p.tensor("g_idx", lambda t: t + 1), f"{LAYER}: g_idx holds group 4"),
    ("gptq", "g_idx negative", lambda p: p.tensor("g_idx", lambda t: t - 1), f"{LAYER}: g_idx holds group -1"),
    ("gptq", "g_idx unbalanced", lambda p: p.tensor("g_idx", lambda t: t // 2), "g_idx gives group 0 64 members"),
    ("gptq", "an order that the config denies", flipped, "the config denies desc_act, but g_idx is out of order in"),
    ("gptq", "a scale is NaN", lambda p: p.tensor("scales", spoiled(torch.nan)), f"{LAYER}: scales has 64 NaN"),
    ("gptq", "a scale is zero", lambda p: p.tensor("scales", spoiled(0)), f"{LAYER}: 64 of 256 scales are zero"),
    ("compressed-tensors", "a scale is infinite", lambda p: p.tensor("weight_scale", spoiled(torch.inf)), "infinite"),
    ("compressed-tensors", "a scale is zero", lambda p: p.tensor("weight_scale", spoiled(0)), "scales are zero"),
    ("bitsandbytes", "absmax is NaN", lambda p: p.tensor("weight.nested_absmax", spoiled(torch.nan)), "NaN"),
    ("gptq", "a word less", lambda p: p.tensor("qweight", lambda t: t[:-1]), f"{LAYER}: codes has shape"),
    ("gptq", "another shape", lambda p: p.config(group_size=64), "out of range 0..1 for 128 inputs in groups of 64"),
    ("int-quantized", "a row less", lambda p: (p.tensor("weight", lambda t: t[:-1]),
                                               p.tensor("weight_scale", lambda t: t[:-1])), "[63, 128] in the file"),
    ("gptq", "no qweight", without(f"{LAYER}.qweight"), f"{LAYER}.qweight is missing"),
    ("gptq", "no norm", without("model.layers.0.input_layernorm.weight"),
     "model.layers.0.input_layernorm.weight: no tensor in the files"),
    ("gptq", "a tensor too many", lambda p: p.tensors(lambda t: t.update({f"{LAYER}.perm": torch.zeros(3)})),
     f"{LAYER}.perm does not belong"),
    ("gptq", "a norm is NaN", lambda p: p.tensors(
        lambda t: t["model.layers.0.input_layernorm.weight"].fill_(torch.nan)),
     "model.layers.0.input_layernorm.weight: 64 values are NaN or infinite"),
    ("gptq", "a norm is too short", lambda p: p.tensors(
        lambda t: t.update({"model.layers.0.input_layernorm.weight": torch.ones(32)})),
     "model.layers.0.input_layernorm.weight: shape [32] in the file, [64] by config.json"),
    ("gptq", "no tokenizer", lambda p: p.remove("tokenizer.json"), "no tokenizer"),
    ("gptq", "half a tokenizer", lambda p: p.write("tokenizer.json", '{"version"'), "not a readable JSON"),
    ("gptq", "a shard is gone", lambda p: p.remove("model-00001-of-00003.safetensors"), "are missing"),
    ("gptq", "half a shard", lambda p: p.write("model-00001-of-00003.safetensors", "half"), "truncated or corrupt"),
    ("gptq", "no config", lambda p: p.remove("config.json"), "config.json is missing"),
    ("gptq", "code of its own", lambda p: p.write("config.json", json.dumps(
        read_json(p.folder / "config.json") | {"auto_map": {"AutoConfig": "x.Y"}, "model_type": "y"})),
     "asks for code of its own"),
    ("gptq", "bits that are none", lambda p: p.config(bits=5), "int5 is not a scheme"),
    ("gptq", "mixed bits", lambda p: p.config(dynamic={"+:.*": {"bits": 8}}), f"{LAYER}: qzeros has shape"),
    ("gptq", "configs that differ", lambda p: p.write("quantize_config.json", json.dumps(
        read_json(p.folder / "quantize_config.json") | {"desc_act": True})),
     "desc_act is False in config.json, True in quantize_config.json"),
    ("gptq", "a config that is missing", lambda p: p.write("config.json", json.dumps(
        {k: v for k, v in read_json(p.folder / "config.json").items() if k != "quantization_config"})),
     "config.json has no quantization_config, quantize_config.json has"),
    ("compressed-tensors", "a head that is not ignored", lambda p: p.config(ignore=[]), "lm_head: neither quantized"),
    ("gptq", "a changed file", lambda p: (p.folder / "LICENSE").write_text("x"), "LICENSE is not as it was written"),
    ("gptq", "a missing file", lambda p: (p.folder / "LICENSE").unlink(), "LICENSE is missing: bitpress.json lists it"),
    ("gptq", "hashes of nothing", lambda p: (p.folder / "bitpress.json").write_text('{"files": {"a": 1}}'), "no hash"),
    ("gptq", "hashes of another folder", lambda p: (p.folder / "bitpress.json").write_text(
        json.dumps({"files": {"../passwd": {"sha256": "0"}}})), "'../passwd' is not a plain file name"),
    ("gptq", "a manifest that is none", lambda p: (p.folder / "bitpress.json").write_text("[]"), "expected an object"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "plant", "said"), [pytest.param(f, p, s, id=f"{f}-{name}") for f, name, p, s in FAULTS]
)
def test_finds_the_planted_fault(
    whole: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any, form: str, plant: Plant, said: str
) -> None:
    patient = Patient(copy_of(whole[form]), edit_tensors)
    plant(patient)
    found = diagnose(patient.folder)
    assert not found.sound
    assert any(said in fault for fault in found.faults), found.faults
    assert not any(str(patient.folder) in fault for fault in found.faults)  # it is said once, above
    json.dumps(found.to_dict())


@pytest.mark.parametrize("form", KINDS)
def test_finds_nothing_in_what_is_whole(whole: dict[str, Path], form: str) -> None:
    steps: list[tuple[int, int]] = []
    found = diagnose(whole[form], lambda done, total: steps.append((done, total)))
    assert (found.faults, found.notes) == ([], [])
    assert found.what["format"] == FORMATS.get(form, form)
    assert found.what["quantized"] == KINDS[form]
    assert list(found.runtimes) == list(RUNTIMES)
    assert found.tensor_parallel.keys() == {"1", "2", "4", "8"}
    assert (
        steps[-1][0]
        == steps[-1][1]
        == len(Checkpoint(whole[form]).tensors) + len(read_json(whole[form] / "bitpress.json")["files"])
    )


def test_several_faults_are_told_at_once(
    whole: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any
) -> None:
    patient = Patient(copy_of(whole["gptq"]), edit_tensors)
    patient.tensor("scales", spoiled(torch.nan))
    patient.tensors(lambda tensors: tensors.pop("model.layers.0.post_attention_layernorm.weight"))
    patient.remove("tokenizer.json")
    assert len(diagnose(patient.folder).faults) == 3


def test_notes_are_no_faults(whole: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any) -> None:
    patient = Patient(copy_of(whole["gptq"]), edit_tensors)
    patient.config(desc_act=True)
    patient.tensor("scales", lambda tensor: tensor.float())
    patient.tensors(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    found = diagnose(patient.folder)
    assert found.sound, found.faults
    assert [note.split(":")[0].split(",")[0] for note in found.notes] == [
        "the config says desc_act", "scales are float16 and float32", "not of the model as transformers builds it",
    ]  # fmt: skip


class TestUnquantized:
    def test_whole(self, tiny_llama: Path, sharded_llama: Path) -> None:
        for folder in (tiny_llama, sharded_llama):
            found = diagnose(folder)
            assert found.sound, found.faults
            assert found.what["quantized"] == "no"
            assert not found.runtimes

    def test_damaged(self, source: Path, edit_tensors: Any) -> None:
        def damage(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"][3] = torch.inf
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:7].clone()
            del tensors["model.layers.1.mlp.up_proj.weight"]

        edit_tensors(source / SINGLE, damage)
        faults = "\n".join(diagnose(source).faults)
        assert "model.norm.weight: 1 values are NaN or infinite" in faults
        assert "lm_head.weight: shape [7, 64] in the file, [256, 64] by config.json" in faults
        assert "model.layers.1.mlp.up_proj.weight: no tensor in the files" in faults


def test_patterns_of_a_checkpoint_are_not_run(
    whole: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any
) -> None:
    patient = Patient(copy_of(whole["compressed-tensors"]), edit_tensors)
    patient.config(ignore=["re:(a+)+$"])
    assert diagnose(patient.folder).sound


def test_names_that_a_terminal_would_obey(source: Path, edit_tensors: Any) -> None:
    edit_tensors(source / SINGLE, lambda tensors: tensors.update({"\x1b[2Jgone\u202e": torch.full((3,), torch.nan)}))
    found = diagnose(source)
    assert found.faults == ["\ufffd[2Jgone\ufffd: 3 values are NaN or infinite"]
    assert found.notes[-1].endswith("builds it: \ufffd[2Jgone\ufffd")


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        diagnose(tmp_path / "nothing")
    assert diagnose(tmp_path).faults == ["has neither model.safetensors nor model.safetensors.index.json"]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(
    whole: dict[str, Path], copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, as_json: bool
) -> None:
    from bitpress.pipeline.cli import app

    folder = copy_of(whole["gptq"])

    def run() -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["bitpress", "doctor", str(folder), *(["--json"] if as_json else [])])
        with pytest.raises(SystemExit) as stop:
            app.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    code, text = run()
    assert code == 0
    assert json.loads(text)["sound"] is True if as_json else "sound" in text and "vLLM: limited (0.33)" in text
    serve = f"vllm serve {folder}"
    assert json.loads(text)["commands"]["vLLM"] == serve if as_json else f"    $ {serve}\n" in text
    (folder / "tokenizer.json").unlink()
    code, text = run()
    assert code == 3
    assert json.loads(text)["sound"] is False if as_json else "unsound" in text and "no tokenizer" in text


LLAMA = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
         "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
         "mlp.down_proj": (4096, 14336)}  # fmt: skip


def facts(form: str, scheme: str, **changes: Any) -> Facts:
    shapes = {f"model.layers.0.{name}": shape for name, shape in LLAMA.items()}
    rows = ("o_proj", "down_proj")
    split: dict[str, str | None] = {name: "row" if name.endswith(rows) else "column" for name in shapes}
    shapes, split = changes.pop("shapes", shapes), changes.pop("split", split)
    schemes = dict.fromkeys(shapes, Scheme.parse(scheme))
    given = Facts(registry()[FORMATS.get(form, form)], schemes, False, shapes, split, heads=(32, 8))
    return replace(given, **changes)


# transformers, GPTQModel, vLLM, SGLang; llama.cpp, MLX, ORT GenAI, TensorRT-LLM; for a Llama of 8 billion weights.
VERDICTS = [
    ("gptq", "int4-g128", {}, "yes yes yes yes", "limited no limited unknown"),
    ("gptq", "int8-channel", {}, "yes yes yes yes", "limited no limited unknown"),
    ("gptq", "int4-g128", {"ordered": True}, "yes yes no yes", "limited no unknown unknown"),
    ("gptq", "int4-g256", {}, "yes yes limited limited", "limited no limited unknown"),
    ("gptq", "int3-g128", {}, "yes yes no limited", "no no no unknown"),
    ("gptq", "int4-g128-asym", {}, "yes yes no unknown", "unknown no unknown unknown"),
    ("gptq-v2", "int4-g128", {}, "yes yes yes yes", "limited no no unknown"),
    ("gptq-v2", "int4-g128-asym", {}, "yes yes no limited", "limited no no unknown"),
    ("compressed-tensors", "int4-g128", {}, "yes unknown yes yes", "limited no limited unknown"),
    ("compressed-tensors", "int4-channel", {}, "yes unknown yes yes", "no no limited unknown"),
    ("compressed-tensors", "int4-g128-asym", {}, "limited unknown yes limited", "unknown no limited unknown"),
    ("compressed-tensors", "int8-g128-asym", {}, "limited unknown yes limited", "unknown no limited unknown"),
    ("compressed-tensors", "int2-g64", {}, "yes unknown yes unknown", "limited no limited unknown"),
    ("compressed-tensors", "int4-g128", {"ordered": True}, "no unknown no unknown", "unknown no limited unknown"),
    ("compressed-tensors", "int4-g128", {"embeddings": {"a"}}, "yes unknown unknown yes", "limited no limited unknown"),
    ("int-quantized", "int8-dynamic", {}, "yes unknown yes yes", "limited no limited unknown"),
    ("bitsandbytes", "nf4", {}, "yes unknown yes yes", "no no no unknown"),
    ("mlx", "int4-g128", {}, "no no no no", "no yes no no"),
    ("mlx", "int4-g128-asym", {}, "no no no no", "no limited no no"),
    ("awq", "int4-g128-asym", {}, "yes yes yes yes", "no yes limited unknown"),
    (
        "gptq",
        "int4-g128",
        {"shapes": {"a": (40, 128)}},
        "limited limited limited limited",
        "limited no limited unknown",
    ),
]


@pytest.mark.parametrize(("form", "scheme", "changes", "first", "others"), VERDICTS)
def test_verdicts(form: str, scheme: str, changes: dict[str, Any], first: str, others: str) -> None:
    found = verdicts(facts(form, scheme, **changes))
    assert " ".join(verdict["loads"] for verdict in found.values()) == f"{first} {others}", found
    assert {name: verdict["version"] for name, verdict in found.items()} == RUNTIMES
    assert all(verdict["why"] for verdict in found.values() if verdict["loads"] != "yes")
    needed = {"gptq": "optimum, gptqmodel", "gptq-v2": "optimum, gptqmodel", "bitsandbytes": "bitsandbytes"}
    needed |= {"awq": "gptqmodel", "mlx": ""}
    assert found["transformers"]["needs"] == needed.get(form, "compressed-tensors")


NO_KERNEL, AMX = "as it has no kernel for it there", "unless the processor has AMX"


@pytest.mark.parametrize(
    ("form", "scheme", "loads", "stops"),
    [
        ("fp8", "fp8-tensor-dynamic", "yes", NO_KERNEL),
        ("fp8", "fp8-tensor-static", "yes", NO_KERNEL),
        ("fp8", "fp8-block", "yes", AMX),
        ("modelopt", "fp8-tensor-static", "yes", NO_KERNEL),
        ("modelopt", "nvfp4", "limited", NO_KERNEL),
        ("modelopt", "fp8-dynamic", "yes", None),
    ],
)
def test_where_vllm_stops_on_a_cpu(form: str, scheme: str, loads: str, stops: str | None) -> None:
    verdict = verdicts(facts(form, scheme))["vLLM"]
    said = [why for why in verdict["why"] if "on a CPU, vLLM 0.32 stops" in why]
    assert (verdict["loads"], [stops in why for why in said] if stops else said) == (loads, [True] if stops else [])


def test_the_commands_that_serve_it() -> None:
    found = verdicts(facts("gguf", "int4-g32"))
    assert serve_command(found["llama.cpp"], "/my models/a") == "llama-server -m '/my models/a'/model.gguf"
    assert serve_command(found["llama.cpp"], "a", "me/a").splitlines()[0] == "hf download me/a --local-dir a"
    assert serve_command(found["vLLM"], "a") == ""  # it is not known to load it
    assert serve_command(verdicts(facts("gptq", "int4-g32"))["vLLM"], "a", "me/a") == "vllm serve me/a"


MIXED = {f"model.layers.1.{name}": Scheme.parse("int4-g128") for name in LLAMA}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schemes": {**MIXED, "model.layers.1.mlp.down_proj": Scheme.parse("int8-g128")}}, "to have one scheme"),
        (
            {"kept": {"lm_head", "model.layers.0.mlp.up_proj"}},
            r"get random packed weights \(model.layers.0.mlp.up_proj\)",
        ),
        ({"schemes": {**MIXED, "lm_head": Scheme.parse("int4-g128")}}, r"of the decoder blocks alone \(lm_head\)"),
        ({"kept": {"lm_head", "model.visual.blocks.0.mlp.up_proj"}}, None),
    ],
)
def test_optimum_knows_one_setting_for_all_layers(changes: dict[str, Any], why: str | None) -> None:
    shapes = dict.fromkeys(changes.get("schemes", MIXED), (4096, 4096))
    mixed = replace(facts("gptq", "int4-g128", shapes=shapes), **changes)
    table = verdicts(mixed)
    assert table["transformers"]["loads"] == ("no" if why else "yes")
    assert not why or re.search(why, table["transformers"]["why"][0])
    assert table["GPTQModel"]["loads"] == "yes"


class TestTensorParallel:
    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [
            ("int4-g128", "yes yes yes yes"),  # 14336 / 8 = 14 groups of 128
            ("int4-channel", "yes yes yes yes"),
            ("int4-g512", "yes yes yes no"),  # 14336 / 8 is three groups and a half
        ],
    )
    def test_a_llama_of_8_billion(self, scheme: str, expected: str) -> None:
        found = tensor_parallel(facts("gptq", scheme))
        assert " ".join(split["loads"] for split in found.values()) == expected, found

    def test_group_boundaries_and_the_kernel_s_steps(self) -> None:
        shapes = {"model.layers.0.mlp.down_proj": (4096, 7392 * 2), "model.layers.0.self_attn.o_proj": (4096, 4096)}
        given = facts("compressed-tensors", "int4-g32", shapes=shapes)
        assert shard_problems(given, 1) == [
            "a piece has 14784 input features, no multiple of 128 (model.layers.0.mlp.down_proj)"
        ]
        given = facts("compressed-tensors", "int4-g32", shapes={"model.layers.0.mlp.down_proj": (4096, 192)})
        assert shard_problems(given, 4) == [
            "a piece has 48 input features, which are no whole groups of 32 (model.layers.0.mlp.down_proj)",
            "a piece has 48 input features, no multiple of 128 (model.layers.0.mlp.down_proj)",
        ]

    def test_joined_layers_count_together_and_few_heads_are_repeated(self) -> None:
        shapes = {f"x.{name}_proj": (size, 256) for name, size in (("q", 512), ("k", 64), ("v", 64))}
        split: dict[str, str | None] = dict.fromkeys(shapes, "column")
        given = facts("gptq", "int4-g128", shapes=shapes, split=split, heads=(8, 1))
        assert shard_problems(given, 4) == []  # 512 / 4 + 64 + 64 = 256
        assert shard_problems(replace(given, heads=(8, 4)), 4) == [  # 512 / 4 + 16 + 16
            "a piece has 160 output features, no multiple of 64 (x.qkv_proj)"
        ]
        assert "9 attention heads do not divide among 4 GPUs" in shard_problems(replace(given, heads=(9, 1)), 4)

    def test_what_is_not_known_is_said(self) -> None:
        assert "no tensor-parallel plan" in shard_problems(facts("gptq", "int4-g128", split=None), 2)[0]
        assert shard_problems(facts("gptq", "int4-g128", split=None), 1) == []
        assert "not documented" in shard_problems(facts("bitsandbytes", "nf4"), 2)[0]


def test_the_plan_is_transformers_own(whole: dict[str, Path], copy_of: Callable[..., Path], edit_tensors: Any) -> None:
    """A checkpoint's config may hold patterns of its own, made to take for ever; they are not run."""
    patient = Patient(copy_of(whole["gptq"]), edit_tensors)
    config = read_json(patient.folder / "config.json")
    patient.write("config.json", json.dumps(config | {"base_model_tp_plan": {"*" * 200 + "x": "colwise"}}))
    found: Diagnosis = diagnose(patient.folder)
    assert "(2 layers, such as model.layers.0.self_attn.o_proj)" in found.tensor_parallel["2"]["why"][1]


def test_one_tensor_at_a_time(whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is read for a layer than its own tensors."""
    reads: list[str] = []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, digest=None: reads.append(name) or read(self, name, digest)
    )
    diagnose(whole["gptq"])
    assert len(reads) == len(Checkpoint(whole["gptq"]).tensors) + 14  # and qzeros once more, for their version
    assert finite._PIECE < 1 << 23


def test_the_second_doctor_needs_no_model_and_says_the_same(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "folder", lambda: tmp_path)
    first = diagnose(whole["gptq"])
    monkeypatch.setattr(headers, "quantized_headers", None)
    assert diagnose(whole["gptq"]) == first
