"""Which recipe is recommended for so much memory, and for whom."""

from pathlib import Path

import pytest

from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.runs.measured import MEASURED
from bitpress.pipeline.runs.recommend import recommend


def test_the_recipe_of_least_loss_that_fits(tiny_llama: Path) -> None:
    """The memory is what each option says that it needs; a cache of 32 tokens."""
    every = {option.recipe: option for option in recommend(str(tiny_llama), "1GB", context=32).options}
    assert list(every) == ["none", *(measured.recipe for measured in MEASURED)]
    needs = {name: option.memory for name, option in every.items()}
    assert needs["none"] > needs["int8-g128"] > needs["gptq/int4-g128"] > needs["gptq/int3-g128"]
    for name in ("none", "smooth+int8-dynamic", "gptq/int4-g128", "gptq/int3-g128"):
        found = recommend(str(tiny_llama), f"{needs[name] / 1000 + 0.1:.1f}kB", context=32)
        assert found.chosen is not None
        assert found.chosen.recipe == name
        assert (f"--recipe {name}" in found.command) == (name != "none")
    nothing = recommend(str(tiny_llama), "1kB", context=32)
    assert nothing.chosen is None
    assert "nothing fits into 1kB: the smallest, gptq/int2-g64, needs" in nothing.why[0]


def test_what_the_target_loads_decides(tiny_llama: Path) -> None:
    """llama.cpp has no quantized inputs; the layers are 64 and 128 wide, so groups are fitted."""
    memory = f"{recommend(str(tiny_llama), '1GB', context=32).options[1].memory / 1000 + 1:.0f}kB"
    anywhere, server = (recommend(str(tiny_llama), memory, target, 32) for target in ("cpu", "vllm"))
    assert anywhere.chosen is not None
    assert server.chosen is not None
    assert (anywhere.chosen.recipe, anywhere.chosen.runtime) == ("smooth+int8-dynamic", "")
    assert (server.chosen.runtime, server.chosen.loads) == ("vLLM", "yes")
    assert f"--format {server.chosen.format}" in server.command
    options = {option.recipe: option for option in recommend(str(tiny_llama), memory, "llama.cpp", 32).options}
    assert options["gptq/int4-g128"].format in ("gguf", "gptq")
    assert (
        "--fit-groups"
        in recommend(str(tiny_llama), f"{options['gptq/int4-g128'].memory / 1000:.1f}kB", "cpu", 32).command
    )


def test_a_longer_cache_takes_more(tiny_llama: Path) -> None:
    """Two layers, two heads of 16 channels, keys and values of 2 bytes: 256 bytes a token."""
    short, long = (recommend(str(tiny_llama), "1GB", context=tokens).options[0].memory for tokens in (32, 132))
    assert long - short == pytest.approx(1.1 * 100 * 256, abs=2)


def test_what_is_not_known_is_said(tiny_llama: Path) -> None:
    unknown = " ".join(recommend(str(tiny_llama), "1GB").unknown)
    for part in ("loses on this model", "12.6 million weights", "how fast", "runtime itself"):
        assert part in unknown


@pytest.mark.parametrize(
    ("memory", "target", "said"),
    [("4bits", None, "--memory 4bits: expected an amount"), ("6GB", "vlm", "--for vlm: unknown; did you mean vllm")],
)
def test_what_cannot_be_read_is_refused(tiny_llama: Path, memory: str, target: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recommend(str(tiny_llama), memory, target)


def test_every_measured_recipe_can_be_made() -> None:
    for measured in MEASURED:
        assert Recipe.make(measured.recipe, "cpu").specs()
    assert [measured.kl for measured in MEASURED] == sorted(measured.kl for measured in MEASURED)
