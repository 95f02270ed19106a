"""Conversations: what is kept between turns changes no word, and nothing that goes wrong ends them."""

import io
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from bitpress.pipeline.api import load, quantize
from bitpress.pipeline.cli import app
from bitpress.pipeline.errors import CheckpointError, ConfigError
from bitpress.pipeline.models.conversation import HELP, Conversation, converse
from bitpress.pipeline.models.generation import Printer, Sampling

TEMPLATE = (
    "{%- for turn in messages %}{{ turn.role[0] }}:{{ turn.content }};{%- endfor %}"
    "{%- if add_generation_prompt %}a:{%- endif %}"
)
LAST_TURN_ONLY = "{{ messages[-1].content }};"
GREEDY = Sampling(temperature=0)
SAY = ["what is it", "and then", "why"]


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4-g32, its tokenizer with a chat template. Read only."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    quantize(tiny_llama, "int4-g32", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def talk(conversation: Conversation, *lines: str) -> list[str]:
    """Each answer, as it was written."""
    said = []
    for line in lines:
        words: list[str] = []
        conversation.answer(line, words.append)
        said.append("".join(words))
    return said


def from_scratch(model: PreTrainedModel, tokenizer: Any, tokens: int, *lines: str) -> list[str]:
    """Each answer, its whole conversation read anew."""
    turns: list[dict[str, str]] = []
    for line in lines:
        turns.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=255)[0, ids.shape[1] :]
        turns.append({"role": "assistant", "content": tokenizer.decode(made, skip_special_tokens=True)})
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def count_read(model: PreTrainedModel) -> list[int]:
    """Grows by the number of tokens of each forward."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: counts.append(args[0].shape[1]))
    return counts


@pytest.mark.parametrize("template", [TEMPLATE, LAST_TURN_ONLY])
def test_answers_are_those_of_reading_all_anew(artifact: Path, template: str) -> None:
    model, tokenizer = load(artifact, dtype="float32")
    tokenizer.chat_template = template
    expected = from_scratch(model, tokenizer, 6, *SAY)
    conversation = Conversation(model, tokenizer, tokens=6, sampling=GREEDY)
    assert talk(conversation, *SAY) == [printable(answer) for answer in expected]
    assert conversation.cache.get_seq_length() == len(conversation.read)


def printable(text: str) -> str:
    """Without control characters but line breaks and tabs, and without overrides of the direction of text."""
    overrides = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    return "".join(c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and ord(c) not in overrides))


def test_only_new_tokens_are_read(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    conversation = Conversation(model, tokenizer, tokens=4, sampling=GREEDY)
    talk(conversation, "a" * 100)
    before = len(conversation.read)
    read = count_read(model)
    talk(conversation, "b")
    assert before > 100
    assert read[0] < 20


def test_a_cache_that_cannot_go_back_is_left(tiny: Callable[..., Path], tmp_path: Path, artifact: Path) -> None:
    """Gemma 2's sliding windows forget; a template that rewrites earlier turns wants them back."""
    quantize(tiny("gemma2", vocab_size=256, max_position_embeddings=256), "int4-g32", tmp_path / "out")
    for file in artifact.glob("tokenizer*"):
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    model, tokenizer = load(tmp_path / "out")
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    expected = from_scratch(model, tokenizer, 6, *SAY)
    assert talk(Conversation(model, tokenizer, tokens=6, sampling=GREEDY), *SAY) == list(map(printable, expected))


def test_system_and_clear(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    conversation = Conversation(model, tokenizer, system="be brief", tokens=4, sampling=GREEDY)
    first = talk(conversation, "hello")
    assert tokenizer.decode(conversation.read).startswith("s:be brief;u:hello;a:")
    talk(conversation, "more")
    conversation.clear()
    assert conversation.cache is None
    assert talk(conversation, "hello") == first


def test_an_interrupted_answer_keeps_its_words(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    conversation = Conversation(model, tokenizer, tokens=50, sampling=GREEDY)
    heard: list[str] = []

    def write(words: str) -> None:
        heard.append(words)
        if len("".join(heard)) > 3:
            raise KeyboardInterrupt

    conversation.answer("hello", write)
    assert printable(conversation.turns[-1]["content"]) == "".join(heard)
    assert conversation.cache is None
    talk(conversation, "go on")
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"] * 2


def test_refusals(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    conversation = Conversation(model, tokenizer, tokens=4)
    with pytest.raises(ConfigError, match="more than the model's context"):
        conversation.answer("x" * 300, print)
    assert conversation.turns == []
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(CheckpointError, match="chat template fails"):
        conversation.answer("x", print)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        Conversation(model, tokenizer)


def test_what_could_steer_a_terminal_is_left_out(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    (red,) = tokenizer("\x1b[31m\x07\n", return_tensors="pt")["input_ids"]
    conversation = Conversation(model, tokenizer, tokens=4)
    model.generate = lambda ids, streamer, **given: (  # type: ignore[assignment]
        [streamer.put(token) for token in (ids[0], *red.unsqueeze(1))],
        streamer.end(),
        type("Made", (), {"past_key_values": DynamicCache(), "sequences": torch.cat([ids[0], red]).unsqueeze(0)}),
    )[-1]
    assert talk(conversation, "hello") == ["[31m\n"]


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian with a zero-width non-joiner
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",  # a family, joined
        "10\u202f000\u00a0\u20ac",  # narrow and unbreakable spaces
        "\u3000\u4f60\u597d",
        "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # the flag of England
    ],
)
def test_every_letter_is_written(artifact: Path, text: str) -> None:
    written: list[str] = []
    printer = Printer(AutoTokenizer.from_pretrained(artifact), written.append)
    printer.on_finalized_text(text)
    printer.on_finalized_text("\x1b[2J\x9b1m\r\u202e")
    assert "".join(written) == f"{text}[2J1m"


def test_a_line_that_the_template_refuses_is_no_end(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    no = "{{ raise_exception('not \x1b[2Jthat') }}"
    tokenizer.chat_template = f"{{% if 'no' in messages[-1].content %}}{no}{{% endif %}}{TEMPLATE}"
    conversation = Conversation(model, tokenizer, tokens=3, sampling=GREEDY)
    heard: list[str] = []
    converse(conversation, iter(["first", "no", "third"]), heard.append)
    assert r"not \u001b[2Jthat" in "".join(heard)
    assert [turn["content"] for turn in conversation.turns[::2]] == ["first", "third"]


def test_instructions_that_the_template_refuses(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    tokenizer.chat_template = (
        f"{{% if messages[0].role == 'system' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{TEMPLATE}"
    )
    with pytest.raises(CheckpointError, match=r"--system.*: no; leave them out"):
        Conversation(model, tokenizer, "be brief")


def test_generate_writes_nothing_that_steers_a_terminal(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bitpress", "generate", str(artifact), "\x1b[2Jhello", "--tokens", "2"])
    with pytest.raises(SystemExit) as stop:
        app.app()
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert shown.startswith("[2Jhello")
    assert shown.endswith("\n")
    assert "\x1b" not in shown


def test_lines(artifact: Path) -> None:
    model, tokenizer = load(artifact)
    conversation = Conversation(model, tokenizer, tokens=4, sampling=GREEDY)
    heard: list[str] = []
    lines = ["hello", "", "x" * 300, "/what", "/clear", "hello", "/exit", "never"]
    converse(conversation, iter(lines), heard.append)
    said = "".join(heard)
    assert said.count("more than the model's context") == 1
    assert HELP in said
    assert len(conversation.turns) == 2
    answer = printable(conversation.turns[1]["content"])
    assert said.startswith(f"{answer}\n")
    assert said.endswith(f"{answer}\n")


def test_chat_answers_standard_input(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nmore\n"))
    monkeypatch.setattr(sys, "argv", ["bitpress", "chat", str(artifact), "--tokens", "4", "--temperature", "0"])
    with pytest.raises(SystemExit) as stop:
        app.app()
    assert not stop.value.code
    expected = talk(Conversation(*load(artifact), tokens=4, sampling=GREEDY), "hello", "more")
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)
