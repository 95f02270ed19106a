"""Few bytes of a checkpoint that ask for much time or memory: each ends within its budget, in a sentence."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitpress.pipeline.config.schema import Calibrate, Eval
from bitpress.pipeline.data import tokens
from bitpress.pipeline.data.calibration import calibrate
from bitpress.pipeline.data.text import Text
from bitpress.pipeline.data.tokens import BoundedTokenizer, encode
from bitpress.pipeline.errors import CheckpointError
from bitpress.pipeline.evaluate.windows import windows
from bitpress.pipeline.models.conversation import Conversation
from bitpress.pipeline.models.loading import load_tokenizer
from bitpress.pipeline.models.structure import skeleton
from bitpress.pipeline.storage.checkpoint import Checkpoint

ROOM = 1 << 24  # positions: the most that a config may ask for


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("llama", {"num_labels": 1 << 31}, "num_labels: 2147483648, but at most 65536"),
        ("gpt_neo", {"max_position_embeddings": ROOM}, "more than 1.1 GB of memory, which does not fit its weight"),
        ("gpt_neo", {"max_position_embeddings": 1 << 16}, "more than 1.1 GB of memory"),
        ("gptj", {"n_positions": ROOM}, "more than 1.1 GB of memory"),
    ],
)
def test_a_config(tiny: Callable[..., Path], copy_of: Any, edit_json: Any, name: str, changes: Any, sentence: str):
    folder = copy_of(tiny(name))
    edit_json(folder / "config.json", **changes)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as refusal:
        skeleton(Checkpoint(folder))
    assert sentence in str(refusal.value)
    assert time.monotonic() - start < 30


def test_positions_that_cost_nothing_are_fine(tiny: Callable[..., Path], copy_of: Any, edit_json: Any):
    folder = copy_of(tiny("llama"))
    edit_json(folder / "config.json", max_position_embeddings=ROOM)
    assert skeleton(Checkpoint(folder)).config.max_position_embeddings == ROOM


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second and 128 MiB for whatever a tokenizer does."""
    monkeypatch.setattr(tokens, "_SECONDS", 1)
    monkeypatch.setattr(tokens, "_BYTES", 1 << 27)


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "is long": "{{ 'x' * 2**31 }}",
    "counts": "{{ 9 ** (9 ** 9) % 7 }}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "raises": "{{ raise_exception('no') }}",
    "is wrong": "{% for %}",
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template(tiny_llama: Path, tmp_path: Path, template: str):
    """In a conversation, and where conversations are what a method calibrates on."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), skeleton(Checkpoint(tiny_llama))
    tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match=r"the model's chat template (fails|takes more than)"):
        Conversation(model, tokenizer).answer("hello", lambda words: None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with pytest.raises(CheckpointError, match=r"chat template (fails|takes more than)"):
        calibrate(Calibrate(text=str(rows), windows=1, context=2), tokenizer, model.config)


def with_pattern(tiny_llama: Path, pattern: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("pattern", [r"(a+)+b", r"(?:a|aa)+$|a(?=(?:a{1,20}){1,20}b)"])
def test_a_pattern_of_a_tokenizer(tiny_llama: Path, pattern: str):
    """One panics, after ten million steps; one goes on for ever."""
    tokenizer = with_pattern(tiny_llama, pattern)
    text = Text("text.txt", "a" * 3000 + "c")
    for use in (
        lambda: encode(tokenizer, text),
        lambda: windows(text, tokenizer, Eval(context=8), skeleton(Checkpoint(tiny_llama)).config),
    ):
        with pytest.raises(CheckpointError, match=r"the tokenizer (fails|takes more than)"):
            use()


def test_bounded_is_as_unbounded(tiny_llama: Path):
    tokenizer = load_tokenizer(tiny_llama)
    text = "It was the best of times. \u200d 你好 " * 50
    assert BoundedTokenizer(tokenizer)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert BoundedTokenizer(tokenizer).eos_token_id == tokenizer.eos_token_id
