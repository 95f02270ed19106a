"""Windows to learn from: out of every kind of source, drawn by a seed of their own, refused before a weight is read."""

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from bitpress.pipeline.config.load import load_calibration
from bitpress.pipeline.config.schema import TrainingSet
from bitpress.pipeline.data.calibration import Calibration, calibrate, source_of
from bitpress.pipeline.data.tokens import encode
from bitpress.pipeline.errors import BitpressError, CheckpointError, ConfigError, HubError, NumericsError
from bitpress.pipeline.models.pretrained import load_tokenizer
from bitpress.pipeline.models.structure import skeleton
from bitpress.pipeline.storage.checkpoint import Checkpoint

TEXT = "".join(f"{number} bottles of beer" for number in range(100, 400))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
CHATS = [
    [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(100)
]
Calibrated = Callable[..., Calibration]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    """One token per byte, and a chat template."""
    made = load_tokenizer(tiny_llama)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def calibrated(tiny_llama: Path, tokenizer: PreTrainedTokenizerBase) -> Calibrated:
    """calibrated(text, key=value): four windows of 16 tokens, in order, unless other settings are given."""

    def make(text: Any, **settings: Any) -> Calibration:
        chosen = {"text": text, "windows": 4, "context": 16, "seed": None, **settings}
        return calibrate(load_calibration(chosen), tokenizer, skeleton(Checkpoint(tiny_llama)).config)

    return make


@pytest.fixture
def data_set(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """data_set(column=rows) or data_set(an error): what the Hub gives; returns the list of calls."""
    datasets = pytest.importorskip("datasets")

    def install(error: Exception | None = None, **columns: Any) -> list[Any]:
        calls = []

        def load_dataset(*arguments: Any, **settings: Any) -> Any:
            calls.append((*arguments, settings["split"]))
            if error:
                raise error
            return datasets.Dataset.from_dict(columns)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def json_lines(folder: Path, **columns: list[Any]) -> str:
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return write(folder, "data.jsonl", "\n".join(map(json.dumps, rows)))


def parquet(folder: Path, **columns: list[Any]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), folder / "data.parquet")
    return str(folder / "data.parquet")


def decoded(found: Calibration, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(found.ids.flatten()))


def as_read(chats: list[list[dict[str, str]]]) -> str:
    """By TEMPLATE; the end of a message is a byte that is no text."""
    return "".join(f"<{m['role']}>{m['content']}\ufffd" for chat in chats for m in chat)


class TestSources:
    @pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
    def test_a_file(self, tmp_path, calibrated, tokenizer, name):
        found = calibrated(write(tmp_path, name, TEXT))
        assert (found.name, found.ids.dtype, found.ids.shape) == (name, torch.int64, (4, 16))
        assert decoded(found, tokenizer) == TEXT[:64]

    @pytest.mark.parametrize("save", [json_lines, parquet])
    def test_documents_are_joined_by_a_blank_line(self, tmp_path, calibrated, tokenizer, save):
        found = calibrated(save(tmp_path, id=[1, 2, 3], text=["one", "", TEXT]))
        assert decoded(found, tokenizer) == ("one\n\n\n\n" + TEXT)[:64]

    @pytest.mark.parametrize("save", [json_lines, parquet])
    @pytest.mark.parametrize("column", ["messages", "conversations"])
    def test_chats_are_known_by_their_column(self, tmp_path, calibrated, tokenizer, save, column):
        found = calibrated(save(tmp_path, **{"id": list(range(100)), column: CHATS}))
        assert decoded(found, tokenizer) == as_read(CHATS)[:64]

    def test_text_comes_before_chats(self, tmp_path, calibrated, tokenizer):
        found = calibrated(json_lines(tmp_path, messages=CHATS, text=[TEXT] * 100))
        assert decoded(found, tokenizer) == TEXT[:64]

    def test_the_default_is_wikitext_2s_training_split(self, data_set, tokenizer, tiny_llama):
        calls = data_set(text=["", " = Title = \n", TEXT * 10])
        found = calibrate(load_calibration({}), tokenizer, skeleton(Checkpoint(tiny_llama)).config)
        assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]
        assert found.name == "Salesforce/wikitext/wikitext-2-raw-v1/train"
        assert (found.ids.shape, found.seed) == ((128, 256), 0), "windows of 2048, cut to the model's 256"

    @pytest.mark.parametrize(
        ("text", "call"),
        [
            ("org/name", ("org/name", None, "train")),
            ("org/name:big", ("org/name", "big", "train")),
            ("org/name:big:dev", ("org/name", "big", "dev")),
            ("org/name::train[:2000]", ("org/name", None, "train[:2000]")),
            ({"dataset": "name", "split": "dev"}, ("name", None, "dev")),
        ],
    )
    def test_the_hub(self, data_set, calibrated, tokenizer, text, call):
        calls = data_set(id=[1], text=[TEXT])
        assert decoded(calibrated(text), tokenizer) == TEXT[:64]
        assert calls == [call]

    def test_a_chat_of_the_hub_by_its_column(self, data_set, calibrated, tokenizer):
        data_set(text=[TEXT] * 100, turns=CHATS)
        found = calibrated({"dataset": "org/name", "column": "turns"})
        assert decoded(found, tokenizer) == as_read(CHATS)[:64]

    @pytest.mark.parametrize(
        "text", ["gone/away.txt", "data/a.jsonl", "./a/b", "../a", "~/a", "a/b/c", "a", "builtin:pydoc-topics", "/a/b"]
    )
    def test_what_is_no_data_set(self, text):
        assert source_of(text) == text

    def test_a_file_comes_before_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert source_of("org/name") == TrainingSet(dataset="org/name")
        Path("org").mkdir()
        Path("org/name").write_text(TEXT)
        assert source_of("org/name") == "org/name"


class TestChats:
    def test_one_after_the_other_without_a_second_set_of_special_tokens(self, tmp_path, calibrated, tokenizer):
        """`tokenizer(text)` would add what the template has put in already."""
        from tokenizers.processors import TemplateProcessing

        eos = (tokenizer.eos_token, tokenizer.eos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{eos[0]} $A", special_tokens=[eos])
        assert tokenizer("a")["input_ids"][0] == eos[1]
        found = calibrated(json_lines(tmp_path, messages=CHATS))
        assert decoded(found, tokenizer) == as_read(CHATS)[:64]

    def test_share_gpts_form(self, tmp_path, calibrated, tokenizer):
        roles = {"user": "human", "assistant": "gpt"}
        rows = [[{"from": roles[m["role"]], "value": m["content"], "weight": None} for m in chat] for chat in CHATS]
        found = calibrated(json_lines(tmp_path, conversations=rows))
        assert decoded(found, tokenizer) == as_read(CHATS)[:64]

    def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(self, tmp_path, calibrated, tokenizer):
        tokenizer.chat_template = "{{- strftime_now('%d %b %Y') }} or {{ strftime_now('%Y-%m-%d') }}" + TEMPLATE
        found = calibrated(json_lines(tmp_path, messages=CHATS))
        assert decoded(found, tokenizer).startswith("01 Jan 2025 or 2025-01-01<user>")

    @pytest.mark.parametrize(
        "start", ["", "\n", "\n\n  ", "  {% if true %}x{% endif %}", "{%- set x = 1 %}\n", "{{ 1 }}"]
    )
    def test_nothing_else_of_the_template_changes(self, tmp_path, calibrated, tokenizer, start):
        tokenizer.chat_template = start + TEMPLATE
        plain = tokenizer.apply_chat_template(CHATS[0], tokenize=False).replace(tokenizer.eos_token, "\ufffd")
        assert decoded(calibrated(json_lines(tmp_path, messages=CHATS)), tokenizer).startswith(plain)

    def test_without_a_template(self, tmp_path, calibrated, tokenizer):
        tokenizer.chat_template = None
        said = r"data\.jsonl holds conversations \(messages\), and the model's tokenizer has no chat template"
        with pytest.raises(ConfigError, match=said):
            calibrated(json_lines(tmp_path, messages=CHATS))

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            ("{% if %}", "Expected an expression"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ messages[7].content }}", "has no element 7"),
            ("{{ 1 / 0 }}", "division by zero"),
            ("{% for i in range(1000000) %}x{% endfor %}", "Range too big"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__' of 'str' .* is unsafe"),
            ("{{ strftime_now.__init__.__globals__ }}", "unsafe"),
            ("{% include 'tokenizer.json' %}", "no loader"),
        ],
    )
    def test_a_template_that_fails_or_is_hostile(self, tmp_path, calibrated, tokenizer, template, said):
        tokenizer.chat_template = template
        with pytest.raises(CheckpointError, match=rf"data\.jsonl: row 1: the tokenizer's chat template fails.*{said}"):
            calibrated(json_lines(tmp_path, messages=CHATS))

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            ([], r"row 2 holds \[\], expected a list of messages"),
            ("words", "row 2 holds 'words', expected a list of messages"),
            (None, "row 2 holds None, expected a list of messages"),
            (["words"], "row 2 holds the message 'words', expected role and content"),
            ([{"role": "user"}], "row 2 holds the message {'role': 'user'}, expected role and content"),
            ([{"role": "user", "content": [{"type": "image"}]}], r"holds the content {'type': 'image'}, expected text"),
            ([{"role": "user", "content": 3}], "holds the content 3, expected text"),
        ],
    )
    def test_what_is_no_conversation(self, tmp_path, calibrated, row, said):
        with pytest.raises(NumericsError, match=said):
            calibrated(json_lines(tmp_path, messages=[CHATS[0], row]))

    def test_content_in_parts_or_null(self, tmp_path, calibrated, tokenizer):
        parts = [[{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat] for chat in CHATS]
        assert decoded(calibrated(json_lines(tmp_path, messages=parts)), tokenizer) == as_read(CHATS)[:64]
        calls = [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]
        tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
        row = [
            {"role": "user", "content": ["one", {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": None, "content": None, "from": "human", "value": "three", "tool_calls": None},
        ]
        text = decoded(calibrated(json_lines(tmp_path, messages=[row] * 9)), tokenizer)
        assert text.startswith(f"<user>one\ntwo\ufffd<assistant>{calls}"[:64])

    @pytest.mark.parametrize("name", ["a.json", "a.csv"])
    def test_in_other_files(self, tmp_path, calibrated, tokenizer, name):
        cells = "".join('"' + json.dumps(chat).replace('"', '""') + '"\n' for chat in CHATS)
        rows = [{"id": number, "messages": chat} for number, chat in enumerate(CHATS)]
        path = write(tmp_path, name, json.dumps(rows) if name == "a.json" else f"messages\n{cells}")
        assert decoded(calibrated(path), tokenizer) == as_read(CHATS)[:64]

    def test_half_a_surrogate_pair(self, tmp_path, calibrated):
        with pytest.raises(NumericsError, match=r"row 1: half a surrogate pair \(U\+D83D\)"):
            calibrated(json_lines(tmp_path, messages=[[{"role": "user", "content": "\ud83d"}]]))


class TestSeeds:
    def test_windows_are_drawn_from_the_whole_text_without_replacement(self, tmp_path, calibrated, tokenizer):
        everything = "".join(f"{number:15} " for number in range(200))
        drawn = calibrated(write(tmp_path, "a.txt", everything), windows=40, seed=0)
        numbers = [int(number) for number in decoded(drawn, tokenizer).split()]
        assert len(set(numbers)) == 40
        assert numbers == sorted(numbers)
        assert numbers[0] < 50
        assert numbers[-1] >= 150

    def test_the_same_seed_gives_the_same_tokens_and_another_others(self, tmp_path, calibrated):
        path = write(tmp_path, "a.txt", TEXT)
        found = [calibrated(path, seed=seed) for seed in (0, 0, 1, None)]
        hashes = [calibration.to_dict()["sha256"] for calibration in found]
        assert hashes[0] == hashes[1]
        assert len(set(hashes)) == 3
        assert [calibration.seed for calibration in found] == [0, 0, 1, None]

    def test_the_global_generators_are_left_alone(self, tmp_path, calibrated):
        path = write(tmp_path, "a.txt", TEXT)
        before = (torch.get_rng_state(), random.getstate())
        first = calibrated(path, seed=3).ids
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        random.seed(99)
        assert torch.equal(calibrated(path, seed=3).ids, first)

    def test_chats_are_shuffled_and_no_more_are_read_than_needed(self, tmp_path, calibrated, tokenizer):
        path = json_lines(tmp_path, messages=[*CHATS[:50], [], *CHATS[50:]])
        found = [decoded(calibrated(path, seed=seed), tokenizer) for seed in (0, 0, 1, None)]
        assert found[0] == found[1]
        assert len(set(found)) == 3
        assert found[3] == as_read(CHATS)[:64]
        with pytest.raises(NumericsError, match=r"row 51 holds \[\], expected a list of messages"):
            calibrated(path, seed=0, windows=200)

    def test_of_a_long_text_only_parts_are_tokenized(self, tmp_path, calibrated, tokenizer, monkeypatch):
        """Parts from everywhere; all of it where they hold fewer tokens than expected."""
        monkeypatch.setattr("bitpress.pipeline.data.calibration._BLOCK", 64)
        everything = "".join(f"{number:<8}bottles " for number in range(1000))
        path = write(tmp_path, "a.txt", everything)
        seen: list[int] = []
        monkeypatch.setattr(
            "bitpress.pipeline.data.calibration.encode",
            lambda tokenizer, text: seen.append(len(text.content)) or encode(tokenizer, text),
        )
        assert decoded(calibrated(path), tokenizer) == everything[:64]
        numbers = [int(n) for n in decoded(calibrated(path, windows=10, seed=0), tokenizer).split()[::2]]
        assert seen == [8 * 64, 8 * 160]
        assert numbers == sorted(set(numbers))
        assert numbers[-1] - numbers[0] > 500
        monkeypatch.setattr("bitpress.pipeline.data.calibration._CHARACTERS", 1)
        assert decoded(calibrated(path), tokenizer) == everything[:64]
        assert seen[2:] == [64, len(everything)]

    def test_what_is_recorded(self, tmp_path, calibrated):
        found = calibrated(write(tmp_path, "a.txt", TEXT))
        digest = hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
        assert found.to_dict() == {
            "text": "a.txt", "windows": 4, "context": 16, "tokens": 64, "seed": None, "sha256": digest,
        }  # fmt: skip
        assert str(found) == "a.txt: 4 windows of 16 tokens"

    def test_context_is_cut_to_what_the_model_can_hold(self, tmp_path, calibrated):
        path = write(tmp_path, "a.txt", TEXT)
        assert calibrated(path, context=256).ids.shape == calibrated(path, context=257).ids.shape == (4, 256)


class TestRefusals:
    @pytest.mark.parametrize("seed", [0, None])
    def test_too_little_text(self, tmp_path, calibrated, seed):
        """Have and need in tokens, and what to set; one token less than enough, and just enough."""
        path = write(tmp_path, "a.txt", TEXT[:63])
        said = r"a\.txt has 63 tokens, calibration needs 64: 4 windows of 16; .* windows \(--windows\) to 3 or less"
        with pytest.raises(NumericsError, match=said) as caught:
            calibrated(path, seed=seed)
        assert caught.value.exit_code == 4
        assert calibrated(path, seed=seed, windows=3).ids.shape == (3, 16)
        assert calibrated(write(tmp_path, "b.txt", TEXT[:64]), seed=seed).ids.shape == (4, 16)

    def test_not_even_one_window(self, tmp_path, calibrated):
        said = r"a\.txt has 15 tokens, calibration needs 64: .* windows and context lower"
        with pytest.raises(NumericsError, match=said):
            calibrated(write(tmp_path, "a.txt", TEXT[:15]))

    def test_too_few_chats(self, tmp_path, calibrated):
        have = len(as_read(CHATS[:1]))
        with pytest.raises(NumericsError, match=f"has {have} tokens, calibration needs 64"):
            calibrated(json_lines(tmp_path, messages=CHATS[:1]))

    @pytest.mark.parametrize(
        ("name", "content", "said", "code"),
        [
            ("a.txt", "", "a.txt holds no text", 4),
            ("a.txt", " \n\t\u00a0\n" * 99, "a.txt holds no text", 4),
            ("a.txt", "abcü".encode("latin-1"), "not UTF-8 text", 4),
            ("a.jsonl", "", "a.jsonl holds no text", 4),
            ("a.jsonl", '{"words": 1}', '"text" or "messages" or "conversations"', 4),
            ("a.jsonl", '{"messages": []}\n{"text": "b"}', 'line 2: expected a JSON object with a "messages"', 4),
            ("a.parquet", "PAR1", 'not a parquet file with a column "text" or "messages"', 4),
            (None, "", "no such text file", 2),
        ],
    )
    def test_unusable_text(self, tmp_path, calibrated, name, content, said, code):
        with pytest.raises(BitpressError) as caught:
            calibrated(write(tmp_path, name, content) if name else str(tmp_path / "gone.txt"))
        assert said in str(caught.value)
        assert caught.value.exit_code == code

    @pytest.mark.parametrize("content", ["a" * 999, "b" + "a" * 999, "ab" + "a" * 50 + "c" + "a" * 99])
    def test_one_token_over_and_over(self, tmp_path, calibrated, content):
        with pytest.raises(NumericsError, match=r"of 64 tokens are one and the same \('a'\)"):
            calibrated(write(tmp_path, "a.txt", content))

    def test_a_small_alphabet_is_no_such_thing(self, tmp_path, calibrated):
        assert calibrated(write(tmp_path, "a.txt", "ACGT" * 99)).ids.unique().numel() == 4

    def test_a_token_that_the_model_does_not_have(self, tmp_path, calibrated, tokenizer):
        tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
        said = r"a\.txt: the tokenizer gives token 256 \('<\|im_start\|>'\), the model has 256"
        with pytest.raises(CheckpointError, match=said):
            calibrated(write(tmp_path, "a.txt", "<|im_start|>" + TEXT))
        assert calibrated(write(tmp_path, "a.txt", TEXT)).ids.max() < 256

    @pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it"), RuntimeError("scripts are not supported")])
    def test_no_hub(self, data_set, calibrated, error):
        data_set(error)
        said = r"data set Salesforce/wikitext: .*; or calibrate on a file: a recipe's calibration or --calibration"
        with pytest.raises(HubError, match=said) as caught:
            calibrated(load_calibration({}).text.model_dump())
        assert caught.value.exit_code == 6

    def test_no_datasets_package(self, calibrated, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ConfigError, match=r"pip install '?datasets\S*; or calibrate on a file"):
            calibrated("org/name")
