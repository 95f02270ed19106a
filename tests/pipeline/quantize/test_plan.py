"""What the plan decides for each tensor, from a recipe's rules and the files' headers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.quantize.plan import Plan, make_plan
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint

MAKE = Callable[..., Plan]


@pytest.fixture
def plan(tiny_llama: Path) -> MAKE:
    """plan("int4-g32", {pattern: spec}, key=value): the plan of a recipe for the tiny Llama."""

    def make(scheme: str, layers: dict[str, str] | None = None, folder: Path = tiny_llama, **settings: Any) -> Plan:
        return make_plan(Checkpoint(folder), Recipe.make({"scheme": scheme, "layers": layers or {}, **settings}))

    return make


def specs(plan: Plan) -> dict[str, str]:
    """layer -> its spec, of what is quantized."""
    return {tensor.module: tensor.spec.name for tensor in plan.tensors if tensor.spec}


class TestRules:
    def test_the_last_pattern_that_fits_wins(self, plan: MAKE):
        layers = {"*.down_proj": "int8-g32", "model.layers.0.*": "none", "model.layers.0.mlp.down_proj": "int2-g32"}
        found = specs(plan("int4-g32", layers, format="compressed-tensors"))
        assert found["model.layers.1.mlp.down_proj"] == "absmax/int8-g32"
        assert found["model.layers.0.mlp.down_proj"] == "absmax/int2-g32"
        assert found["model.layers.1.mlp.up_proj"] == "absmax/int4-g32"
        assert [name for name in found if ".layers.0." in name] == ["model.layers.0.mlp.down_proj"]

    def test_reasons_of_what_is_kept(self, plan: MAKE):
        made = plan("none", {"*.mlp.*": "int4-g32", "*.up_proj": "none", "*.gate_proj": "none"})
        reasons = {tensor.info.name: tensor.reason for tensor in made.tensors if not tensor.spec}
        assert reasons["model.layers.0.mlp.up_proj.weight"] == "kept by the rule *.up_proj: none"
        assert reasons["model.layers.0.self_attn.q_proj.weight"] == "no rule of the recipe names it"
        assert reasons["model.embed_tokens.weight"] == "outside the decoder blocks"

    def test_a_rule_takes_the_recipes_method_where_that_can_make_its_scheme(self, plan: MAKE):
        layers = {"*.down_proj": "int8-g32", "*.o_proj": "absmax/int4-g32"}
        found = specs(plan("int4-g32", layers, method="gptq"))
        names = {name.rpartition(".")[2]: spec for name, spec in found.items()}
        assert (names["up_proj"], names["down_proj"], names["o_proj"]) == (
            "gptq/int4-g32",
            "gptq/int8-g32",
            "absmax/int4-g32",
        )

    def test_a_head_is_quantized_where_a_rule_names_it_and_not_by_a_star(self, plan: MAKE):
        assert "lm_head" not in specs(plan("int4-g32", {"*": "int8-g32"}))
        assert specs(plan("int4-g32", {"lm_head": "int8-g32"}))["lm_head"] == "absmax/int8-g32"
        assert (
            specs(plan("int4-g32", {"*embed_tokens": "int8-g32"}, format="compressed-tensors"))["model.embed_tokens"]
            == "absmax/int8-g32"
        )

    def test_a_tied_head_is_refused(self, plan: MAKE, tiny: Callable[..., Path]):
        with pytest.raises(ConfigError, match=r"layers: lm_head names lm_head, which is tied to model\.embed_tokens"):
            plan("int8-g32", {"lm_head": "int8-g32"}, tiny("llama", tie_word_embeddings=True))

    def test_pattern_that_matches_nothing(self, plan: MAKE):
        with pytest.raises(ConfigError, match=r"layers: \*.dwn_proj matches no tensor"):
            plan("int4-g32", {"*.dwn_proj": "none"})


class TestFittedGroups:
    def test_the_largest_smaller_power_of_two(self, plan: MAKE):
        made = plan("int4-g128", fit_groups=True)
        found = specs(made)
        assert found["model.layers.0.mlp.down_proj"] == "absmax/int4-g128"
        assert found["model.layers.0.mlp.up_proj"] == "absmax/int4-g64"
        assert made.notes == [
            "fit_groups: int4-g64 in place of int4-g128 (12 layers, such as model.layers.0.mlp.gate_proj)"
        ]

    def test_without_it_the_refusal_stands(self, plan: MAKE):
        with pytest.raises(ConfigError, match=r"in_features 64 is not divisible by group_size 128.*12 layers"):
            plan("int4-g128")


class TestFusedUnits:
    @pytest.mark.parametrize(
        ("layers", "unit"),
        [
            ({"*.q_proj": "none"}, "qkv_proj"),
            ({"*.k_proj": "int8-g32"}, "qkv_proj"),
            ({"*.up_proj": "int2-g32"}, "gate_up_proj"),
        ],
    )
    def test_a_rule_that_splits_one_is_refused_or_allowed(self, plan: MAKE, layers: dict[str, str], unit: str):
        with pytest.raises(ConfigError, match=rf"(?s)fuse these parts.*allow_split_fused.*{unit}: "):
            plan("int4-g32", layers, format="compressed-tensors")
        assert plan("int4-g32", layers, format="compressed-tensors", allow_split_fused=True)

    def test_experts_of_a_block_are_one_unit(self, plan: MAKE, tiny: Callable[..., Path]):
        mixtral = tiny("mixtral")
        with pytest.raises(ConfigError, match=r"block_sparse_moe.experts: "):
            plan("int4-g32", {"*.experts.1.*": "none"}, mixtral)
        assert plan("int4-g32", {"model.layers.0.*.experts.*": "none"}, mixtral)

    def test_parts_that_agree_are_fine(self, plan: MAKE):
        layers = {"*.q_proj": "int8-g32", "*.k_proj": "int8-g32", "*.v_proj": "int8-g32"}
        assert plan("int4-g32", layers, format="compressed-tensors")


class TestFormat:
    def test_auto_is_the_first_that_fits_every_layer(
        self, plan: MAKE, tmp_path: Path, save_model: Any, llama_config: Any
    ):
        assert plan("int4-g32").format.name == "gptq"
        odd = save_model(llama_config(intermediate_size=176), tmp_path / "odd")
        made = plan("int4-g16", folder=odd)
        assert made.format.name == "compressed-tensors"
        assert any(
            note.startswith("saved as compressed-tensors, because gptq needs multiples of 32") and "4 layers" in note
            for note in made.notes
        ), made.notes

    def test_a_mixture_that_no_format_holds(self, plan: MAKE):
        with pytest.raises(ConfigError, match="no format can hold every layer together"):
            plan("int4-g32", {"*.down_proj": "nf4"})
