"""Tied, odd and damaged tensors: kept by rule, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from bitpress.pipeline.api import load, quantize
from bitpress.pipeline.errors import ConfigError, NumericsError
from bitpress.pipeline.storage.checkpoint import SINGLE, Checkpoint, read_json

SCHEME = "int4-g32"


class TestTiedHead:
    @pytest.fixture
    def tied(self, tmp_path: Path, save_model: Any, llama_config: Callable[..., LlamaConfig]) -> Path:
        return save_model(llama_config(tie_word_embeddings=True), tmp_path / "tied")

    @staticmethod
    def check(folder: Path, logits: Callable[[Path], torch.Tensor]) -> None:
        """One copy is written, neither is quantized, and the artifact computes what the source's weights say."""
        out = folder.parent / "out"
        quantize(folder, "int8-dynamic", out)
        names = Checkpoint(out).tensors
        assert "lm_head.weight" not in names
        assert "model.embed_tokens.weight" in names
        model, _ = load(out)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.cosine_similarity(logits(out), logits(folder), dim=0) > 0.999

    def test_absent(self, tied: Path, logits: Callable[[Path], torch.Tensor]):
        assert "lm_head.weight" not in Checkpoint(tied).tensors
        self.check(tied, logits)

    def test_present_and_equal(self, tied: Path, edit_tensors: Any, logits: Callable[[Path], torch.Tensor]):
        def repeat(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        edit_tensors(tied / SINGLE, repeat)
        self.check(tied, logits)

    def test_present_and_different(self, tied: Path, edit_tensors: Any, refused_early: Callable[..., str]):
        def differ(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

        edit_tensors(tied / SINGLE, differ)
        assert "tie_word_embeddings" in refused_early(tied, "lm_head.weight differs from model.embed_tokens.weight")

    def test_present_and_of_another_shape(self, tied: Path, edit_tensors: Any, refused_early: Callable[..., str]):
        edit_tensors(tied / SINGLE, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 4)}))
        refused_early(tied, "lm_head.weight differs from")

    def test_config_says_untied_and_the_head_is_absent(
        self, tied: Path, refused_early: Callable[..., str], edit_json: Callable[..., None]
    ):
        edit_json(tied / "config.json", tie_word_embeddings=False)
        refused_early(tied, "lm_head.weight: no tensor in the files")

    def test_untied_keeps_both(self, source: Path, tmp_path: Path):
        quantize(source, SCHEME, tmp_path / "out")
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= Checkpoint(tmp_path / "out").tensors.keys()


class TestOddTensors:
    def test_biases_are_kept_and_used(
        self,
        tmp_path: Path,
        save_model: Any,
        llama_config: Any,
        kept: Callable[[Path], dict[str, str]],
        logits: Callable[[Path], torch.Tensor],
    ):
        source = save_model(llama_config(attention_bias=True, mlp_bias=True), tmp_path / "biased")
        quantize(source, "int8-dynamic", tmp_path / "out")
        assert kept(tmp_path / "out")["model.layers.1.mlp.down_proj.bias"] == "a vector"
        assert torch.cosine_similarity(logits(tmp_path / "out"), logits(source), dim=0) > 0.999

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool])
    def test_a_weight_of_an_odd_dtype_is_refused_by_name(
        self, source: Path, edit_tensors: Any, dtype: torch.dtype, refused_early: Callable[..., str]
    ):
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(source / SINGLE, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
        if dtype.is_floating_point:
            assert f"{name}: dtype {dtype}" in refused_early(source, "keep such layers by a rule", ConfigError)
        else:
            assert f"{name}: dtype {dtype}" in refused_early(source, "does not match its config.json")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_mixed_floats(
        self,
        source: Path,
        tmp_path: Path,
        edit_tensors: Any,
        dtype: torch.dtype,
        logits: Callable[[Path], torch.Tensor],
    ):
        norm = "model.layers.0.input_layernorm.weight"
        weight = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(source / SINGLE, lambda t: t.update({norm: t[norm].to(dtype), weight: t[weight].to(dtype)}))
        quantize(source, SCHEME, tmp_path / "out")
        assert Checkpoint(tmp_path / "out").tensors[norm].dtype == dtype  # kept as it was
        logits(tmp_path / "out")

    def test_scales_have_the_dtype_of_most_weights(self, source: Path, tmp_path: Path, edit_tensors: Any):
        first = "model.layers.0.mlp.down_proj.weight"
        edit_tensors(source / SINGLE, lambda tensors: tensors.update({first: tensors[first].float()}))
        quantize(source, {"scheme": "int4-g32", "format": "compressed-tensors"}, tmp_path / "out")
        tensors = Checkpoint(tmp_path / "out").tensors
        assert {t.dtype for name, t in tensors.items() if name.endswith(".weight_scale")} == {torch.bfloat16}

    def test_a_config_without_a_dtype_means_that_of_the_weights(
        self, source: Path, tmp_path: Path, edit_json: Callable[..., None]
    ):
        edit_json(source / "config.json", dtype=None)
        assert load(source)[0].dtype == torch.bfloat16
        quantize(source, SCHEME, tmp_path / "out")
        assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
        edit_json(tmp_path / "out" / "config.json", dtype=None)  # as other programs leave it
        assert load(tmp_path / "out")[0].dtype == torch.bfloat16

    def test_scales_that_float16_cannot_express(self, source: Path, tmp_path: Path, edit_tensors: Any):
        """A few are raised, and that is said; a layer that would be lost is refused, or held by another format."""
        layer = "model.layers.0.mlp.down_proj"
        recipe = {"scheme": "int4-g32", "format": "gptq"}
        edit_tensors(source / SINGLE, lambda tensors: tensors[f"{layer}.weight"][:3].mul_(1e-6))
        notes = quantize(source, recipe, tmp_path / "few").notes
        assert f"{layer}: 12 of 256 scales are too small for torch.float16" in "".join(notes)
        edit_tensors(source / SINGLE, lambda tensors: tensors[f"{layer}.weight"][3:].mul_(1e-6))
        with pytest.raises(
            NumericsError, match=rf"{layer}\.weight: 256 of 256 scales are too small.*compressed-tensors"
        ):
            quantize(source, recipe, tmp_path / "all")
        assert not quantize(source, recipe | {"format": "compressed-tensors"}, tmp_path / "other").notes

    def test_tensors_that_the_model_does_not_have_come_along(
        self, source: Path, tmp_path: Path, edit_tensors: Any, kept: Callable[[Path], dict[str, str]]
    ):
        extra = {
            "extra.empty.weight": torch.zeros(0, 64),
            "extra.vector.weight": torch.ones(7),
            "extra.scalar": torch.tensor(3),
            "model.layers.0.extra.inv_freq": torch.ones(8),
        }
        edit_tensors(source / SINGLE, lambda tensors: tensors.update(extra))
        quantize(source, SCHEME, tmp_path / "out")
        reasons, artifact = kept(tmp_path / "out"), Checkpoint(tmp_path / "out")
        for name, tensor in extra.items():
            assert reasons[name] == "not a weight of the model as transformers builds it"
            assert torch.equal(artifact.read(name), tensor)

    def test_a_linear_weight_without_elements(self, source: Path, edit_tensors: Any, refused_early: Callable[..., str]):
        name = "model.layers.1.mlp.up_proj.weight"
        edit_tensors(source / SINGLE, lambda tensors: tensors.update({name: torch.zeros(0, 64, dtype=torch.bfloat16)}))
        refused_early(source, f"{name}: shape [0, 64] in the file, [128, 64] by config.json")

    def test_companions_come_along_and_code_does_not(self, source: Path, tmp_path: Path):
        (source / "README.md").write_text("read me")
        (source / "modeling.py").write_text("raise SystemExit")
        (source / ".env").write_text("TOKEN=1")
        (source / "old.gguf").write_text("x")
        quantize(source, SCHEME, tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"LICENSE", "README.md", "tokenizer.json", "generation_config.json"} <= names
        assert not {"modeling.py", ".env", "old.gguf"} & names


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize(
        "name",
        [
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.1.mlp.down_proj.bias",
            "model.norm.weight",
            "lm_head.weight",
        ],
    )
    def test_names_tensor_count_and_first_index(
        self,
        tmp_path: Path,
        save_model: Any,
        llama_config: Any,
        edit_tensors: Any,
        name: str,
        value: float,
        refused: Callable[..., str],
    ):
        from bitpress.pipeline.errors import NumericsError

        folder = save_model(llama_config(mlp_bias=True), tmp_path / "source")

        def plant(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name].view(-1)[[5, 9]] = value

        edit_tensors(folder / SINGLE, plant)
        numel = Checkpoint(folder).tensors[name].nbytes // 2
        where = "[5]" if len(Checkpoint(folder).tensors[name].shape) == 1 else "[0, 5]"
        said = f"{name}: 2 of {numel} values are NaN or infinite, the first at {where}"
        refused(folder, said, NumericsError)
        assert NumericsError.exit_code == 4


class TestGroups:
    def test_layers_that_do_not_divide_are_told_once_and_counted(self, source: Path, refused_early: Callable[..., str]):
        message = refused_early(source, "does not fit every weight", ConfigError, scheme="int4-g128")
        said = "in_features 64 is not divisible by group_size 128; use 64 or 32 (12 layers, such as model.layers.0."
        assert message.count("in_features 64") == message.count(said) == 1
        assert "set fit_groups: true (--fit-groups)" in message
        assert "down_proj" not in message
        assert "keep such layers by a rule" in message

    def test_a_rule_resolves_it(
        self,
        source: Path,
        tmp_path: Path,
        kept: Callable[[Path], dict[str, str]],
        logits: Callable[[Path], torch.Tensor],
    ):
        layers = {"*.self_attn.*": "none", "*.gate_proj": "none", "*.up_proj": "none"}
        quantize(source, {"scheme": "int4-g128", "layers": layers}, tmp_path / "out")
        reasons = kept(tmp_path / "out")
        assert reasons["model.layers.0.mlp.up_proj.weight"] == "kept by the rule *.up_proj: none"
        logits(tmp_path / "out")

    def test_rule_that_matches_nothing(self, source: Path, refused_early: Callable[..., str]):
        refused_early(source, "layers: *.nothing matches no tensor", ConfigError, layers={"*.nothing": "none"})

    def test_rule_that_keeps_everything(self, source: Path, refused_early: Callable[..., str]):
        refused_early(source, "nothing to quantize", ConfigError, layers={"*": "none"})
