"""Text from every kind of source, joined as the protocol says, and refused with a sentence where there is none."""

import hashlib
import json
import sys

import pytest
from transformers import AutoTokenizer, BloomConfig, GPT2Config, LlamaConfig

from bitpress.pipeline.config.schema import Dataset, Eval
from bitpress.pipeline.data.text import PYDOC_TOPICS, Text, read_text
from bitpress.pipeline.data.tokens import encode, longest
from bitpress.pipeline.errors import CheckpointError, ConfigError, HubError, NumericsError
from bitpress.pipeline.evaluate.windows import windows

WIKITEXT = Dataset(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1", split="test")


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(rows or an error): what `datasets.load_dataset` gives; returns the list of calls to it."""
    datasets = pytest.importorskip("datasets")

    def install(answer):
        calls = []

        def load_dataset(*args, **settings):
            calls.append((args, settings))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a"])
def test_a_file_is_taken_whole(tmp_path, name):
    content = "Grüße, 世界 🌍\n\n  second\n"
    text = read_text(write(tmp_path, name, content))
    assert (text.name, text.content) == (name, content)
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read_text(write(tmp_path, "a.txt", b"\xef\xbb\xbfabc")).content == "abc"
    assert read_text(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "abc"}')).content == "abc"


def test_json_lines_are_joined_by_a_blank_line(tmp_path):
    lines = [json.dumps({"text": value, "id": 1}) for value in ("one", "", "two\nthree")]
    assert read_text(write(tmp_path, "a.jsonl", "\n".join(lines) + "\n\n")).content == "one\n\n\n\ntwo\nthree"


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_json_lines_end_at_newlines_only(tmp_path, inside):
    """U+2028 and its like stand unescaped in JSON that others wrote, and str.splitlines splits there."""
    line = json.dumps({"text": f"a{inside}b"}, ensure_ascii=ord(inside) < 32)
    assert read_text(write(tmp_path, "a.jsonl", line + "\r\n" + line)).content == f"a{inside}b\n\na{inside}b"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting"),
        ('{"words": "a"}', "'text'"),
        ('["text"]', "list indices"),
        ("3", "subscriptable"),
        ("[" * 100_000, "recursion|nested|Expecting"),
    ],
)
def test_broken_json_lines_are_named(tmp_path, line, reason):
    path = write(tmp_path, "a.jsonl", '{"text": "fine"}\n' + line)
    with pytest.raises(NumericsError, match=rf"a\.jsonl, line 2: expected a JSON object.*({reason})"):
        read_text(path)


LINES = '{"text": "one", "url": "x"}\n{"text": "two\\nlines"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4.json", LINES),
        ("c4.ndjson", LINES),
        ("c4.JSONL", LINES),
        ("a.json", '[{"id": 1, "text": "one"},\n {"text": "two\\nlines"}]'),
        ("a.json", '["one", "two\\nlines"]'),
        ("a.json", '{"id": [1, 2], "text": ["one", "two\\nlines"]}'),
        ("a.csv", 'id,text\r\n1,one\r\n\r\n2,"two\r\nlines"\r\n'),
        ("a.CSV", 'text;id\none;1\n"two\nlines";2'),
        ("a.tsv", 'id\ttext\n1\tone\n2\t"two\nlines"\n'),
    ],
)
def test_rows_under_other_names(tmp_path, name, content):
    assert read_text(write(tmp_path, name, content)).content == "one\n\ntwo\nlines"


def test_a_cell_may_be_long(tmp_path):
    assert len(read_text(write(tmp_path, "a.csv", "text\n" + "a" * 200_000)).content) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "kind", "said"),
    [
        ("a.json", '{"version": 1, "data": []}', NumericsError, 'its only row: expected a JSON object with a "text"'),
        ("a.json", '[{"text": "a"}, 3]', NumericsError, 'row 2: expected a JSON object with a "text"'),
        ("a.json", '[{"text": "a"},', NumericsError, "not a JSON list of rows"),
        ("a.json", "3", NumericsError, "expected a JSON object"),
        ("a.json", "[" * 100_000, NumericsError, "nested|not a JSON list"),
        ("a.json", '[{"messages": []}]', NumericsError, 'expected a JSON object with a "text"'),
        ("a.csv", "id,words\n1,a", NumericsError, "the first line names no column \"text\", it is 'id,words'"),
        ("a.csv", "", NumericsError, "names no column"),
        (
            "a.csv",
            "id,text\n1,one, two",
            NumericsError,
            "row 1: 3 cells, the first line names 2; text that holds a ','",
        ),
        ("a.csv", 'text\n"open', NumericsError, "not a table"),
        ("a.txt", LINES, NumericsError, "holds rows of JSON.*name it .jsonl"),
        ("a", '[\n {"messages": []}]', NumericsError, "holds rows of JSON"),
        ("a.txt", b"\x1f\x8b\x08abc", NumericsError, "holds gzip, expected UTF-8 text; unpack"),
        ("a.jsonl", b"PK\x03\x04", NumericsError, "holds a zip archive"),
        ("a.txt", "abc\0def", NumericsError, "no text, it holds bytes of zero .*byte 3"),
        ("a.txt", "abc".encode("utf-16"), NumericsError, r"not UTF-8 text \(byte 0\)"),
        ("c4.json.gz", b"", ConfigError, r"a \.gz file is not read; give a \.txt.*; unpack it first"),
        ("a.docx", b"", ConfigError, r"a \.docx file is not read; give a \.txt"),
        ("a.html", "<p>words</p>", ConfigError, r"a \.html file is not read"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, kind, said):
    with pytest.raises(kind, match=said):
        read_text(write(tmp_path, name, content))


def test_json_that_is_no_rows_may_stand_in_a_text(tmp_path):
    for content in ('{"a": 1}\n', "[see below]\n", "[\n{]\n", '{"text" is no JSON}'):
        assert read_text(write(tmp_path, "a.md", content)).content == content


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": "b"}])
def test_what_is_not_text_is_not_turned_into_it(tmp_path, value):
    lines = "\n".join(json.dumps({"text": v}) for v in ("fine", value))
    with pytest.raises(NumericsError, match=r"a\.jsonl: row 2 holds .*, expected text"):
        read_text(write(tmp_path, "a.jsonl", lines))


def test_half_a_surrogate_pair(tmp_path):
    with pytest.raises(NumericsError, match=r"a\.jsonl: half a surrogate pair \(U\+D83D\)"):
        read_text(write(tmp_path, "a.jsonl", '{"text": "\\ud83d"}'))
    assert read_text(write(tmp_path, "b.jsonl", '{"text": "\\ud83c\\udf0d"}')).content == "🌍"


class TestParquet:
    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self):
        self.pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet")

    def save(self, tmp_path, **columns):
        path = tmp_path / "a.parquet"
        self.pyarrow.parquet.write_table(self.pyarrow.table(columns), path)
        return str(path)

    def test_rows_are_joined_by_a_blank_line(self, tmp_path):
        path = self.save(tmp_path, id=[1, 2, 3], text=["one", "", "zwei ü"])
        assert read_text(path) == Text("a.parquet", "one\n\n\n\nzwei ü")

    def test_another_column(self, tmp_path):
        with pytest.raises(NumericsError, match='not a parquet file with a column "text"'):
            read_text(self.save(tmp_path, words=["one"]))

    def test_null(self, tmp_path):
        with pytest.raises(NumericsError, match="row 2 holds None, expected text"):
            read_text(self.save(tmp_path, text=["one", None]))

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"not parquet"])
    def test_broken(self, tmp_path, content):
        with pytest.raises(NumericsError, match=r"a\.parquet: not a parquet file"):
            read_text(write(tmp_path, "a.parquet", content))

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        path = self.save(tmp_path, text=["one"])
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ConfigError, match=r"pip install '?(pyarrow|datasets)"):
            read_text(path)


def test_builtin_is_the_language_reference():
    text = read_text(PYDOC_TOPICS)
    assert text.name == PYDOC_TOPICS
    assert text.content.count("\n\n") > 70
    assert len(text.content) > 300_000
    assert text.sha256 == read_text(PYDOC_TOPICS).sha256


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\t\u00a0\n"), ("a.jsonl", ""), ("a.jsonl", '{"text": " "}\n{"text": ""}')],
)
def test_no_text_stops(tmp_path, name, content):
    with pytest.raises(NumericsError, match=f"{name} holds no text") as caught:
        read_text(write(tmp_path, name, content))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8(tmp_path, name):
    with pytest.raises(NumericsError, match=r"not UTF-8 text \(byte 3\)") as caught:
        read_text(write(tmp_path, name, "abcü".encode("latin-1")))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["gone.txt", "", "a folder", "a" * 5000])
def test_no_such_file(tmp_path, name):
    (tmp_path / "a folder").mkdir()
    with pytest.raises(ConfigError, match=f"no such text file; give .* or {PYDOC_TOPICS}") as caught:
        read_text(str(tmp_path / name))
    assert caught.value.exit_code == 2


def test_no_such_user():
    with pytest.raises(ConfigError, match="no such text file"):
        read_text("~nobody-here/a.txt")


class TestDataset:
    def test_its_column_is_joined_by_a_blank_line(self, stand_in):
        calls = stand_in({"text": ["", " = Title = \n", "words"]})
        text = read_text(WIKITEXT)
        assert text == Text("Salesforce/wikitext/wikitext-2-raw-v1/test", "\n\n = Title = \n\n\nwords")
        assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "revision": None})]

    def test_another_column_and_revision(self, stand_in):
        calls = stand_in({"body": ["a"]})
        source = Dataset(dataset="org/name", split="train[:1]", column="body", revision="abc")
        assert read_text(source) == Text("org/name/train[:1]", "a")
        assert calls == [(("org/name", None), {"split": "train[:1]", "revision": "abc"})]

    def test_a_real_one_from_disk(self, tmp_path, monkeypatch):
        """datasets' own loading, columns and errors, of a local folder of JSON lines."""
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        (tmp_path / "data").mkdir()
        write(tmp_path / "data", "a.jsonl", '{"text": "one"}\n{"text": "two"}')
        folder = str(tmp_path / "data")
        assert read_text(Dataset(dataset=folder, split="train")).content == "one\n\ntwo"
        for wrong, reason in (({"split": "nope"}, "split"), ({"config": "zz"}, "zz"), ({"column": "body"}, "body")):
            with pytest.raises(ConfigError, match=f"data set .*{reason}"):
                read_text(Dataset(dataset=folder, **{"split": "train", **wrong}))

    def test_a_null_row(self, stand_in):
        stand_in({"text": ["a", None]})
        with pytest.raises(NumericsError, match="test: row 2 holds None"):
            read_text(WIKITEXT)

    def test_without_rows(self, stand_in):
        stand_in({"text": []})
        with pytest.raises(NumericsError, match="holds no text"):
            read_text(WIKITEXT)

    def test_without_the_datasets_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ConfigError, match=r"needs the datasets package; pip install '?datasets"):
            read_text(WIKITEXT)

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionError("Couldn't reach it (OfflineModeIsEnabled)"),
            RuntimeError("Dataset scripts are no longer supported"),
        ],
    )
    def test_what_the_hub_refuses(self, stand_in, error):
        stand_in(error)
        with pytest.raises(
            HubError, match=r"data set Salesforce/wikitext: (Couldn't reach it|Dataset scripts)"
        ) as caught:
            read_text(WIKITEXT)
        assert caught.value.exit_code == 6

    def test_datasets_own_errors(self, stand_in):
        exceptions = pytest.importorskip("datasets.exceptions")
        for kind in (exceptions.DatasetNotFoundError, exceptions.DatasetGenerationError):
            stand_in(kind("Dataset 'x' doesn't exist on the Hub or cannot be accessed.\nmore"))
            with pytest.raises(HubError, match=r"cannot be accessed\.; check name"):
                read_text(WIKITEXT)


class Letters:
    """One token for each letter: its code."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text, **settings):
        return {"input_ids": [ord(letter) for letter in text]}

    def convert_ids_to_tokens(self, number):
        return chr(number)


def cut(text, config=None, **settings):
    return windows(text, Letters(), Eval(**settings), config or LlamaConfig(vocab_size=200))


class TestWindows:
    def test_documents_are_joined_as_the_protocol_says(self):
        text = Text("a", "ab\n\ncd", ("ab", "cd"))
        assert [w.ids.tolist() for w in cut(text, context=6).windows] == [[ord(letter) for letter in "ab\n\ncd"]]
        llama_cpp = cut(text, protocol="llama.cpp", context=6)
        assert [w.ids.tolist() for w in llama_cpp.windows] == [[ord(letter) for letter in "ab\ncd\n"]]
        assert cut(Text("a", "ab\n\ncd"), context=6).tokens == 5

    def test_one_tokenization_of_the_whole(self, tiny_llama):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        content = "Grüße " * 50
        ids = encode(tokenizer, Text("a.txt", content))
        assert str(ids.dtype) == "torch.int64"
        assert tokenizer.decode(ids) == content

    @pytest.mark.parametrize(
        ("protocol", "name"),
        [("gptq", "gptq-8"), ("sliding", "sliding-8/8"), ("llama.cpp", "llama.cpp-8"), ("word", "word-8")],
    )
    def test_the_context_is_cut_to_what_the_model_holds(self, protocol, name):
        config = LlamaConfig(vocab_size=200, max_position_embeddings=8)
        assert cut(Text("a", "b" * 20), config, protocol=protocol).name == name

    def test_by_whatever_name_its_config_calls_that(self):
        config = GPT2Config(vocab_size=200, n_positions=8)
        assert cut(Text("a", "b" * 20), config).name == "gptq-8"
        assert longest(config, 5) == 5
        assert longest(BloomConfig(), 10**6) == 10**6  # alibi: any length

    @pytest.mark.parametrize(("protocol", "context"), [("gptq", 2048), ("llama.cpp", 512)])
    def test_a_protocols_own_context(self, protocol, context):
        plan = cut(Text("a", "b" * 5000), LlamaConfig(vocab_size=200, max_position_embeddings=9999), protocol=protocol)
        assert plan.name == f"{protocol}-{context}"

    def test_too_few_tokens(self):
        with pytest.raises(
            NumericsError, match=r"a\.txt has 3 tokens, at least one window of 4 is needed; .*eval\.context lower"
        ) as caught:
            cut(Text("a.txt", "abc"), context=4)
        assert caught.value.exit_code == 4

    def test_a_token_that_the_model_does_not_have(self):
        assert cut(Text("a.txt", "abcdefgh"), LlamaConfig(vocab_size=ord("h") + 1), context=8).highest == ord("h")
        with pytest.raises(CheckpointError, match=r"a\.txt: the tokenizer gives token 104 \('h'\), the model has 104"):
            cut(Text("a.txt", "abcdefgh"), LlamaConfig(vocab_size=ord("h")), context=8)
