"""Unquantized checkpoints: loaded to the bit as transformers loads them, or refused where it would fill in numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.checkpoints.describe import describe
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import CheckpointError, NumericsError
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.storage.checkpoint import SINGLE, Checkpoint

UP = "model.layers.1.mlp.up_proj.weight"
CPU = torch.device("cpu")


@torch.inference_mode()
def same_model(folder: Path, dtype: str = "auto") -> bool:
    """Whether our model and from_pretrained's have the same tensors, of the same dtypes, and give the same logits."""
    ours = load_model(Checkpoint(folder), CPU, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in other.items()}
    assert all(torch.equal(mine[name], other[name]) for name in other)
    ids = torch.arange(3, 35)[None]
    return torch.equal(ours(ids).logits, theirs(ids).logits)


class TestAsTransformersLoadsIt:
    def test_every_architecture(self, architecture: str, tiny: Callable[..., Path]):
        assert same_model(tiny(architecture))

    @pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_in_another_dtype(self, name: str, dtype: str, tiny: Callable[..., Path]):
        assert same_model(tiny(name), dtype)

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_and_untied(self, tied: bool, tiny: Callable[..., Path]):
        folder = tiny("llama", tie_word_embeddings=tied)
        assert same_model(folder)
        model = load_model(Checkpoint(folder), CPU, "auto")
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied

    def test_sharded(self, sharded_llama: Path):
        assert same_model(sharded_llama)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_what_a_class_keeps_in_float32(self, dtype: str, tmp_path: Path, save_model: Any):
        """The correction bias of DeepSeek-V3's router."""
        from transformers import DeepseekV3Config

        sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 96}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16}
        ranks = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        config = DeepseekV3Config(**sizes, **heads, **ranks, **experts, first_k_dense_replace=1)
        folder = save_model(config, tmp_path / "deepseek")
        assert same_model(folder, dtype)
        assert load_model(Checkpoint(folder), CPU, dtype).model.layers[1].mlp.gate.e_score_correction_bias.dtype == (
            torch.float32
        )

    def test_names_without_the_models_prefix(self, source: Path, edit_tensors: Any):
        def strip(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.startswith("model.")]:
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        edit_tensors(source / SINGLE, strip)
        assert same_model(source)

    def test_a_stored_copy_of_what_is_tied(self, tiny: Callable[..., Path], copy_of: Any, edit_tensors: Any):
        folder = copy_of(tiny("llama", tie_word_embeddings=True), "copy")
        table = "model.embed_tokens.weight"
        edit_tensors(folder / SINGLE, lambda t: t.update({"lm_head.weight": t[table].clone()}))
        assert same_model(folder)

    def test_masks_that_old_files_hold_are_left_out(self, tiny: Callable[..., Path], copy_of: Any, edit_tensors: Any):
        """GPT-2's files have the causal mask as floats, of any size; the model makes its own."""
        folder = copy_of(tiny("gpt2"), "gpt2")
        edit_tensors(folder / SINGLE, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}))
        assert same_model(folder)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def _prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def _poison(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = value

    return poison


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "a weight is missing": (_drop, f"{UP}: no tensor in the files"),
    "a weight has another name": (lambda t: t.update({UP.replace("up", "upper"): t.pop(UP)}), f"{UP}: no tensor"),
    "another prefix": (_prefix, "21 of 21 tensors are not of that model, such as module."),
    "I8": (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP}: dtype torch.int8, expected floating-point"),
    "BOOL": (lambda t: t.update({UP: t[UP].bool()}), f"{UP}: dtype torch.bool, expected floating-point"),
    "U8 in a norm": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.uint8)}),
        "model.norm.weight: dtype torch.uint8",
    ),
    "another shape": (lambda t: t.update({UP: t[UP][:-1].clone()}), f"{UP}: shape [127, 64] in the file, [128, 64]"),
    "twice": (lambda t: t.update({UP.removeprefix("model."): t[UP] + 1}), "is the same weight of the model as"),
    "NaN": (_poison(float("nan")), "model.norm.weight: 1 of 64 values are NaN or infinite"),
    "infinite": (_poison(float("inf")), "model.norm.weight: 1 of 64 values are NaN or infinite"),
}


class TestRefused:
    @pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
    def test_by_load_by_quantize_and_by_doctor(
        self, change: Callable[..., Any], said: str, source: Path, tmp_path: Path, edit_tensors: Any
    ):
        edit_tensors(source / SINGLE, change)
        for use in (lambda: load(source), lambda: quantize(source, "int4-g32", tmp_path / "out")):
            with pytest.raises((CheckpointError, NumericsError)) as caught:
                use()
            assert said in str(caught.value)
        assert not diagnose(source).sound

    def test_the_same_sentence_from_load_and_quantize(self, source: Path, tmp_path: Path, edit_tensors: Any):
        edit_tensors(source / SINGLE, _drop)
        said = []
        for use in (lambda: load(source), lambda: quantize(source, "int4-g32", tmp_path / "out")):
            with pytest.raises(CheckpointError) as caught:
                use()
            said.append(str(caught.value))
        assert said[0] == said[1]

    def test_more_layers_in_the_config_than_in_the_files(self, source: Path, edit_json: Callable[..., None]):
        edit_json(source / "config.json", num_hidden_layers=3)
        with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: no tensor in the files"):
            load(source)

    def test_one_expert_of_many_is_missing(self, tiny: Callable[..., Path], copy_of: Any, edit_tensors: Any):
        folder = copy_of(tiny("qwen3_moe"), "experts")
        edit_tensors(folder / SINGLE, lambda t: t.pop("model.layers.0.mlp.experts.2.up_proj.weight"))
        with pytest.raises(CheckpointError, match="7 expert tensors in the files, expected 8"):
            load_model(Checkpoint(folder), CPU, "auto")

    def test_a_head_that_differs_from_what_it_is_tied_to(
        self, tiny: Callable[..., Path], copy_of: Any, edit_tensors: Any
    ):
        folder = copy_of(tiny("llama", tie_word_embeddings=True), "differs")
        edit_tensors(folder / SINGLE, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            load_model(Checkpoint(folder), CPU, "auto")
        assert "lm_head.weight differs from model.embed_tokens.weight" in str(diagnose(folder).faults)

    def test_such_a_head_in_a_quantized_checkpoint(self, source: Path, tmp_path: Path, edit_json: Callable[..., None]):
        quantize(source, "int4-g32", tmp_path / "out")
        edit_json(tmp_path / "out" / "config.json", tie_word_embeddings=True)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            load(tmp_path / "out")
        assert "lm_head.weight differs from model.embed_tokens.weight" in str(diagnose(tmp_path / "out").faults)

    def test_values_beyond_float16(self, source: Path, edit_tensors: Any):
        edit_tensors(source / SINGLE, _poison(1e6))
        load_model(Checkpoint(source), CPU, "bfloat16")
        with pytest.raises(NumericsError, match=r"values up to 9.99e\+05, torch.float16 ends at 6.55e\+04"):
            load_model(Checkpoint(source), CPU, "float16")

    def test_a_nan_that_quantizing_left_as_it_was(self, source: Path, tmp_path: Path, edit_tensors: Any):
        quantize(source, "int4-g32", tmp_path / "out")
        for file in sorted((tmp_path / "out").glob("*.safetensors")):
            if "model.norm.weight" in load_file(file):
                edit_tensors(file, _poison(float("nan")))
        with pytest.raises(NumericsError, match=r"model\.norm\.weight: 1 of 64 values"):
            load(tmp_path / "out")


def test_an_adapter_in_the_folder_changes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch):
    """Even with peft, since transformers is shown no folder of weights."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "target_modules": ["q_proj"]}
    before = load(source)[0].state_dict()
    (source / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)},
              source / "adapter_model.safetensors")  # fmt: skip
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: True)
    after = load(source)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_are_opened_by_the_checkpoint_alone(source: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("transformers opens a weight file")

    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    monkeypatch.setattr("transformers.modeling_utils.load_state_dict", refuse)
    assert isinstance(load(source)[0].lm_head.weight, torch.nn.Parameter)


class TestSettingsInAFileOfTheirOwn:
    """AutoGPTQ before 0.5 wrote quantize_config.json and left config.json as it was."""

    @pytest.fixture
    def old(self, source: Path, tmp_path: Path) -> Path:
        quantize(source, {"scheme": "int4-g32", "format": "gptq"}, tmp_path / "old")
        for name in ("config.json", "quantize_config.json"):
            values = json.loads((tmp_path / "old" / name).read_text())
            for key in ("quantization_config", "quant_method", "checkpoint_format"):
                values.pop(key, None)
            (tmp_path / "old" / name).write_text(json.dumps(values))
        (tmp_path / "old" / "bitpress.json").unlink()
        return tmp_path / "old"

    def test_are_read(self, old: Path, source: Path, tmp_path: Path, logits: Callable[[Path], torch.Tensor]):
        quantize(source, {"scheme": "int4-g32", "format": "gptq"}, tmp_path / "new")
        assert torch.equal(logits(old), logits(tmp_path / "new"))
        assert describe(old)["quantized"] == "int4-g32"
        with pytest.raises(CheckpointError, match="is quantized already"):
            quantize(old, "int4-g32", tmp_path / "again")
        convert(old, "gptq-v2", tmp_path / "v2")
        assert torch.equal(logits(tmp_path / "v2"), logits(old))
        faults = diagnose(old).faults
        assert len(faults) == 1
        assert "config.json has no quantization_config, quantize_config.json has" in faults[0]

    def test_count_only_where_layers_are_quantized(self, source: Path):
        (source / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
        assert isinstance(load(source)[0].lm_head, torch.nn.Linear)

    def test_without_them_nothing_is_invented(self, old: Path):
        (old / "quantize_config.json").unlink()
        with pytest.raises(
            CheckpointError, match=r"tensors are not of that model, such as .*\n.*no tensor in the files"
        ):
            load(old)
