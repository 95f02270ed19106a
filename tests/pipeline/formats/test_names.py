"""Patterns of layers' names: as Python's re matches them, in bounded time, and written so that one group matches."""

import re
import time

import pytest

from bitpress.pipeline.formats.names import NameRules, exactly, fused_unit, name_pattern, patterns_of

NAMES = [
    "lm_head", "model.layers.0.mlp.down_proj", "model.layers.3.mlp.down_proj", "model.layers.13.mlp.down_proj",
    "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.12.w1", "mtp.fc", "visual.blocks.0.attn-qkv",
]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        r"^model\.layers\.(0|3)\.mlp\.down_proj$", r".*down_proj", r".*\.down_proj$", "lm_head", "^lm_head$", "mtp.*",
        r"re.*", r"model.layers.\d+.*(q_proj|k_proj)$", r"(?:mtp|visual)", r".*\.[0-9]+\.w[13]$", r"model\.lay", "",
        r".*layers\.\d\.", r"\w+$", r".*\d?3.mlp", "visual.blocks.0.attn-qkv", r"[^v].*proj",
    ],
)  # fmt: skip
def test_matches_as_re_does(text: str) -> None:
    assert [name for name in NAMES if name_pattern(text).match(name)] == [n for n in NAMES if re.match(text, n)]


@pytest.mark.parametrize(
    "text", ["(a+)+$", r"(.*a){30}", "(?i)a", "(?=a)", "[", "a|b", "a{2}", "(a|b)*", "[z-a]", r"\b"]
)
def test_other_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the pattern"):
        name_pattern(text)


def test_many_stars_take_no_time() -> None:
    """An engine that goes back over the name would try 200^40 ways."""
    pattern = name_pattern(".*a" * 40 + "b")
    before = time.process_time()
    assert not pattern.match("a" * 200)
    assert time.process_time() - before < 2  # milliseconds where nothing goes wrong


def test_exact_names() -> None:
    pattern = name_pattern(exactly("model.layers.0.attn-qkv"))
    assert pattern.literal == "model.layers.0.attn-qkv"
    assert not pattern.match("model.layers.0.attn-qkv2")
    assert name_pattern("lm_head").literal is None  # it matches all that begins so
    assert name_pattern(r"^a\.\d$").literal is None


def test_the_first_that_matches_counts() -> None:
    rules: NameRules[int] = NameRules(0)
    for value, text in enumerate([r"^a\.1$", r"^a\.\d$", r"^a\.2$", ".*"], 1):
        rules.add_pattern(text, value)
    assert [rules.get(name) for name in ("a.1", "a.2", "b")] == [1, 2, 4]


def test_too_many_patterns() -> None:
    rules: NameRules[int] = NameRules(0)
    for number in range(4096):
        rules.add_pattern(f"{number}.*", number)
    with pytest.raises(ValueError, match="more than 4096 patterns"):
        rules.add_pattern("one too many.*", 0)


def layers(count: int, *leaves: str) -> list[str]:
    return [f"model.layers.{number}.{leaf}" for number in range(count) for leaf in leaves]


class TestPatternsOf:
    def test_all_of_a_kind(self) -> None:
        assert patterns_of(layers(32, "mlp.down_proj"), layers(32, "mlp.up_proj")) == [
            r"^model\.layers\.\d+\.mlp\.down_proj$"
        ]

    def test_some_of_a_kind(self) -> None:
        names = layers(4, "mlp.down_proj")
        assert patterns_of(names[:2], names[2:]) == [r"^model\.layers\.(0|1)\.mlp\.down_proj$"]
        assert patterns_of(names[:1], names[1:]) == [r"^model\.layers\.0\.mlp\.down_proj$"]

    def test_experts(self) -> None:
        every = [f"model.layers.{block}.experts.{e}.w1" for block in range(3) for e in range(4)]
        some = [name for name in every if name[-4] in "13"]
        assert patterns_of(some, set(every) - set(some)) == [r"^model\.layers\.(0|1|2)\.experts\.(1|3)\.w1$"]

    def test_any_split_is_told_apart(self) -> None:
        every = [*layers(5, "a.0.x", "a.1.x", "b"), "lm_head", "odd#name.7", "a+b.1"]
        for step in (2, 3, 5):
            some = every[::step]
            others = [name for name in every if name not in some]
            patterns = patterns_of(some, others)
            assert all(sum(bool(re.match(pattern, name)) for pattern in patterns) == 1 for name in some)
            assert not any(re.match(pattern, name) for pattern in patterns for name in others)
            assert all(
                name_pattern(pattern).match(name) == bool(re.match(pattern, name))
                for pattern in patterns
                for name in every
            )


@pytest.mark.parametrize(
    ("layer", "unit"),
    [
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.qkv_proj"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"),
        ("model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts"),
        ("model.layers.0.block_sparse_moe.experts.3.w2", "model.layers.0.block_sparse_moe.experts"),
        ("model.layers.0.mlp.shared_experts.up_proj", "model.layers.0.mlp.shared_experts.gate_up_proj"),
        ("lm_head", "lm_head"),
        ("q_proj", "qkv_proj"),
    ],
)
def test_fused_units(layer: str, unit: str) -> None:
    assert fused_unit(layer) == unit
