"""Recipes share what they learn of the unquantized model, work on several blocks at a time, and lose no byte by it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.kernels.activations.int8_tensor import InputCounts
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.methods.hessian import Hessian
from bitpress.pipeline.quantize import artifact
from bitpress.pipeline.quantize.block_runner import BlockRunner
from bitpress.pipeline.quantize.imatrix import SquareSums
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.transforms.scaling import InputRange

Learn = Callable[..., list[str]]
Digests = Callable[[Path], dict[str, str]]
KilledAt = Callable[[int], AbstractContextManager[None]]
RECIPES = {
    "experts": {"sequential": False},
    "static": {"sequential": False, "method": "auto", "scheme": "int8-static"},
    "nothing learned": {"method": "absmax", "calibration": None},
}


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many groups' statistics each pass gathered."""
    counts: list[int] = []
    original = BlockRunner.collect
    monkeypatch.setattr(BlockRunner, "collect", lambda *a: counts.append(len(a[1])) or original(*a))
    return counts


@pytest.mark.parametrize("kind", [Hessian, InputCounts, InputRange, SquareSums])
def test_what_is_loaded_is_what_was_counted(kind: Any) -> None:
    inputs = torch.randn(600, 300, generator=torch.Generator().manual_seed(0))
    inputs[3, 5] = torch.inf
    first, second = kind(300, torch.device("cpu")), kind(300, torch.device("cpu"))
    first.add(inputs)
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.add(inputs.flip(0))
    assert (first.tokens, first.dropped) == (second.tokens, second.dropped) == (1198, 2)
    for name, expected in first.state_dict().items():
        assert torch.equal(expected, second.state_dict()[name]), name
    if kind is Hessian:
        assert torch.equal(first.matrix(), second.matrix())


def test_sequential_recipes_share_the_first_block(
    tiny_llama: Path, tmp_path: Path, learn: Learn, digests: Digests, collected: list[int]
) -> None:
    for name, scheme in (("a", "int4-g32"), ("b", "int3-g32")):
        learn(tiny_llama, tmp_path / name, scheme=scheme, shared=tmp_path / "shared")
    assert collected == [7, 7, 7]  # the first block once, the second for each
    learn(tiny_llama, tmp_path / "alone", scheme="int3-g32")
    assert digests(tmp_path / "b") == digests(tmp_path / "alone")


def test_one_pass_serves_recipes(
    tiny_llama: Path, tmp_path: Path, learn: Learn, digests: Digests, collected: list[int]
) -> None:
    shared = tmp_path / "shared"
    learn(tiny_llama, tmp_path / "a", shared=shared, sequential=False)
    assert collected == [7, 7]
    learn(tiny_llama, tmp_path / "b", shared=shared, sequential=False, scheme="int3-g32")
    assert collected == [7, 7]
    learn(tiny_llama, tmp_path / "alone", sequential=False, scheme="int3-g32")
    assert digests(tmp_path / "b") == digests(tmp_path / "alone")
    learn(tiny_llama, tmp_path / "sequential", scheme="int3-g32")
    assert digests(tmp_path / "b") != digests(tmp_path / "sequential")
    next(shared.glob("statistics-*/00001-0.safetensors")).write_bytes(b"damaged")
    learn(tiny_llama, tmp_path / "d", shared=shared, sequential=False, scheme="int3-g32")
    assert digests(tmp_path / "d") == digests(tmp_path / "alone")


@pytest.mark.parametrize("name", RECIPES)
def test_how_many_blocks_are_worked_on_at_a_time_changes_no_byte(
    name: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    learn: Learn,
    digests: Digests,
    killed_at: KilledAt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed on the way, or not."""
    source = tiny("mixtral", num_hidden_layers=2) if name == "experts" else tiny("llama", num_hidden_layers=4)
    results = []
    for workers, kills in ((1, ()), (3, (4,))):
        monkeypatch.setattr(artifact, "blocks_at_a_time", lambda plan, workers=workers: workers)
        out = tmp_path / f"{workers}{len(kills)}"
        for kill in kills:
            with killed_at(kill):
                learn(source, out, **RECIPES[name])
        learn(source, out, **RECIPES[name])
        results.append(digests(out))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": "4 bits", "method": "tune"}, "tune works on whole blocks"),
        ({"scheme": "int8-dynamic", "transform": "smooth", "method": "gptq"}, "smooth changes blocks before"),
        ({"scheme": "int4-g32", "method": "tune"}, "tune works on whole blocks"),
        ({"scheme": "int4-g32", "method": "gptq", "options": {"true_sequential": True}}, "take it out"),
        ({"scheme": "int4-g32"}, "or leave sequential out"),
    ],
)
def test_refusals(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"sequential: .*{said}"):
        Recipe.make({**settings, "sequential": False})
