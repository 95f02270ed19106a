"""transformers sees checked copies of what it opens and no key that names code; what it throws is one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from bitpress.eval.measure.sample import sample
from bitpress.pipeline.api import load, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import CheckpointError
from bitpress.pipeline.models.conversation import Conversation
from bitpress.pipeline.models.pretrained import load_config, load_tokenizer
from bitpress.pipeline.storage.checkpoint import INDEX, SINGLE, Checkpoint
from bitpress.pipeline.storage.config import CODE_KEYS
from bitpress.pipeline.system.library import library_errors

REPOSITORY = "evil/kernels@main:run"


def fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }


class TestConfig:
    @pytest.mark.parametrize("key", sorted(CODE_KEYS))
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_key_that_chooses_code_is_left_out(
        self, source: Path, edit_json: Callable[..., None], key: str, nested: bool
    ):
        before = fields(load_config(Checkpoint(source)))
        hostile = {key: REPOSITORY}
        edit_json(source / "config.json", **({"text_config": hostile} if nested else hostile))
        checkpoint = Checkpoint(source)
        config = load_config(checkpoint)
        assert checkpoint.left_out == [f"text_config.{key}" if nested else key]
        assert {k: v for k, v in fields(config).items() if k != "text_config"} == before
        assert not any(getattr(part, key, None) == REPOSITORY for part in (config, config.get_text_config()))
        assert key in str(diagnose(source).notes)

    @pytest.mark.parametrize("key", ["to_dict", "get_text_config", "__class__", "_private", "attribute_map"])
    def test_a_key_that_would_take_the_place_of_a_method_is_not_handed_on(
        self, source: Path, edit_json: Callable[..., None], key: str
    ):
        before = fields(load_config(Checkpoint(source)))
        edit_json(source / "config.json", **{key: {"hidden_size": "vocab_size"}})
        assert fields(load_config(Checkpoint(source))) == before

    @pytest.mark.parametrize("key", ["return_dict", "torchscript", "output_attentions", "output_hidden_states"])
    def test_a_key_that_changes_what_a_model_returns(self, source: Path, edit_json: Callable[..., None], key: str):
        edit_json(source / "config.json", **{key: key != "return_dict"})
        output = load(source)[0](torch.arange(3, 8)[None])
        assert output.logits.isfinite().all()
        assert (output.hidden_states, output.attentions) == (None, None)

    def test_a_kernel_of_the_hub_is_not_asked_for(self, source: Path, edit_json: Any, monkeypatch: pytest.MonkeyPatch):
        def refuse(*arguments: Any, **options: Any) -> None:
            raise AssertionError("asks for a kernel")

        monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", refuse)
        monkeypatch.setattr("transformers.integrations.hub_kernels.is_kernels_available", lambda: True)
        edit_json(source / "config.json", attn_implementation=REPOSITORY, _attn_implementation=REPOSITORY)
        assert load(source)[0].config._attn_implementation in ("sdpa", "eager")

    def test_auto_map_of_an_architecture_that_transformers_has(self, source: Path, tmp_path: Path, edit_json: Any):
        edit_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
        notes = quantize(source, "int4-g32", tmp_path / "out").notes
        assert "auto_map left out" in str(notes)
        assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
        assert type(load(tmp_path / "out")[0]).__module__ == "transformers.models.llama.modeling_llama"

    @pytest.mark.parametrize("section", [None, {}])
    def test_an_empty_section_on_quantization_is_none(self, source: Path, edit_json: Any, section: Any):
        edit_json(source / "config.json", quantization_config=section)
        assert isinstance(load(source)[0].lm_head, torch.nn.Linear)
        assert diagnose(source).sound

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"architectures": [1]}, "architectures: [1], expected a list of names"),
            ({"architectures": "Llama"}, "architectures: 'Llama', expected a list of names"),
            ({"note": "\ud800"}, "is half of a character"),
            ({"\udfff": 1}, "is half of a character"),
            ({"dtype": "load"}, "none of floating-point numbers"),
            ({"dtype": "int8"}, "none of floating-point numbers"),
            ({"dtype": "nonesuch"}, "none of floating-point numbers"),
            ({"num_attention_heads": 3}, "transformers builds no language model from it (llama)"),
            ({"rope_parameters": 7}, "transformers builds no language model from it (llama)"),
            ({"vision_config": {"architecture": "hf-hub:evil/model"}}, "names a download"),
            # the file says nothing of the experts for each token: mixtral's default is 2
            ({"model_type": "mixtral", "num_local_experts": 1}, "num_experts_per_tok is 2, expected at most num_local"),
            ({"model_type": "mixtral", "sliding_window": 0}, "sliding_window is 0, expected at least 1 token, or null"),
        ],
        ids=str,
    )
    def test_is_refused_in_one_sentence_before_a_weight_is_read(
        self, source: Path, edit_json: Any, changes: Any, said: str, refused_early: Callable[..., str]
    ):
        edit_json(source / "config.json", **changes)
        message = refused_early(source, said)
        assert message.startswith(str(source / "config.json"))
        with pytest.raises(CheckpointError) as caught:
            load(source)
        assert str(caught.value) == message

    def test_infinite_floats_are_written_as_transformers_writes_them(
        self, source: Path, tmp_path: Path, edit_json: Any
    ):
        edit_json(source / "config.json", time_step_limit=[0.0, float("inf")], odd=float("nan"))
        quantize(source, "int4-g32", tmp_path / "out")
        assert AutoConfig.from_pretrained(tmp_path / "out").time_step_limit == [0.0, float("inf")]
        load(tmp_path / "out")


class TestTokenizer:
    def test_is_the_one_of_transformers(self, source: Path):
        ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(source)
        assert type(ours) is type(theirs)
        assert ours("Ein Satz.")["input_ids"] == theirs("Ein Satz.")["input_ids"]
        assert (ours.name_or_path, ours.special_tokens_map) == (theirs.name_or_path, theirs.special_tokens_map)

    @pytest.mark.parametrize(
        "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    )
    def test_a_link_that_leaves_the_folder_is_not_followed(self, source: Path, name: str):
        elsewhere = source.parent / "elsewhere"
        elsewhere.write_text((source / name).read_text() if (source / name).exists() else "{}")
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match="is a link that leads out of its folder"):
            load_tokenizer(source)

    @pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
    def test_a_pipe_is_not_waited_for(self, source: Path, name: str):
        (source / name).unlink(missing_ok=True)
        os.mkfifo(source / name)
        with pytest.raises(CheckpointError, match="is not a regular file"):
            load_tokenizer(source)

    def test_more_templates_come_along_and_are_checked(self, source: Path):
        folder = source / "additional_chat_templates"
        folder.mkdir()
        (folder / "tool.jinja").write_text("{{ messages }}")
        assert load_tokenizer(source).chat_template == {"tool": "{{ messages }}"}
        (folder / "more.jinja").symlink_to("/etc/hostname")
        with pytest.raises(CheckpointError, match="is a link that leads out"):
            load_tokenizer(source)

    @pytest.mark.parametrize(
        "settings",
        [
            {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
            {"vocab_file": "/etc/passwd", "merges_file": "/etc/passwd", "tokenizer_file": "/etc/passwd"},
            {"fast_tokenizer_files": ["../tokenizer.4.0.json"]},
            {"init_inputs": ["/etc/passwd"]},
            {"gguf_file": "../model.gguf"},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings_that_name_code_or_files_change_nothing(self, source: Path, edit_json: Any, settings: Any):
        before = load_tokenizer(source)
        edit_json(source / "tokenizer_config.json", **settings)
        after = load_tokenizer(source)
        assert after("Ein Satz.")["input_ids"] == before("Ein Satz.")["input_ids"]
        assert "/etc/passwd" not in str(after.init_kwargs)

    @pytest.mark.parametrize("name", ["AutoModelForCausalLM", "RagRetriever", "pipeline", 7, ["LlamaTokenizer"]])
    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_a_class_that_is_no_tokenizer(self, source: Path, edit_json: Any, name: Any, file: str):
        edit_json(source / file, tokenizer_class=name)
        with pytest.raises(CheckpointError, match="is no tokenizer of transformers"):
            load_tokenizer(source)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("tokenizer.json", "{"),
            ("tokenizer.json", '{"model": {"type": "BPE"}, "added_tokens": []}'),
            ("tokenizer.json", '{"added_tokens": 7}'),
            ("tokenizer_config.json", "[]"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"0": 7}}'),
            ("tokenizer_config.json", '{"eos_token": {"content": 7}}'),
            ("tokenizer_config.json", '{"note": "\\ud800"}'),
            ("tokenizer_config.json", '{"a":' * 100_000),
            ("special_tokens_map.json", "\xff"),
            ("chat_template.jinja", None),
        ],
    )
    def test_whatever_is_thrown_is_one_sentence(self, source: Path, name: str, text: str | None):
        (source / name).write_bytes(text.encode("latin-1") if text is not None else b"\xff\xfe")
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(source)
        assert str(caught.value).startswith(str(source))
        assert "/tmp/bitpress-" not in str(caught.value)
        assert "\n  " in str(caught.value) or "\n" not in str(caught.value)

    def test_a_panic_is_one_sentence_and_its_cause_is_kept(self, source: Path, monkeypatch: pytest.MonkeyPatch):
        class Panic(BaseException):
            pass

        def panic(*arguments: Any, **options: Any) -> None:
            raise Panic("the regular expression explodes, hf_" + "a" * 30)

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
        with pytest.raises(
            CheckpointError, match="the regular expression explodes, <TOKEN>; get the file again"
        ) as caught:
            load_tokenizer(source)
        assert isinstance(caught.value.__cause__, Panic)

    def test_a_library_prints_nothing_itself(self, source: Path, edit_json: Any, capfd: pytest.CaptureFixture[str]):
        """tokenizers prints an unknown key of a token to stdout, whatever it holds."""
        tokens = {"255": {"content": "x", "special": True, "\x1b[2J": 1}}
        edit_json(source / "tokenizer_config.json", added_tokens_decoder=tokens)
        print("before", end="")
        load_tokenizer(source)
        print(" after", end="")
        assert tuple(capfd.readouterr()) == ("before after", "")

    def test_an_interrupt_passes(self):
        with pytest.raises(KeyboardInterrupt), library_errors("a file", "do something"):
            raise KeyboardInterrupt

    def test_no_tokenizer_is_said_at_once(self, source: Path, tmp_path: Path):
        (source / "tokenizer.json").unlink()
        for use in (lambda: quantize(source, "int4-g32", tmp_path / "out"), lambda: load(source)):
            with pytest.raises(CheckpointError, match="has no tokenizer: none of"):
                use()
        assert not list(tmp_path.glob("out*"))


GENERATION = {
    "stop_strings": ["\n"], "num_beams": 4, "num_return_sequences": 3, "token_healing": True, "penalty_alpha": 0.6,
    "cache_implementation": "quantized", "return_dict_in_generate": True, "repetition_penalty": 1.3, "max_length": 4,
    "eos_token_id": "x", "pad_token_id": -1, "custom_generate": "evil/generate", "prompt_lookup_num_tokens": 3,
    "watermarking_config": {"bias": 2}, "temperature": float("nan"), "top_k": "many", "do_sample": 7,
    "suppress_tokens": list(range(256)), "forced_eos_token_id": 3, "constraints": [1], "bad_words_ids": [[1]],
}  # fmt: skip


class TestGenerationConfig:
    @pytest.mark.parametrize("key", GENERATION)
    def test_never_keeps_a_model_from_being_measured(self, source: Path, key: str):
        model, tokenizer = load(source)
        expected = sample(model, tokenizer, "Ein Satz")
        settings = {"do_sample": True, "top_k": 4, "eos_token_id": 255, key: GENERATION[key]}
        (source / "generation_config.json").write_text(json.dumps(settings))
        model, tokenizer = load(source)
        assert sample(model, tokenizer, "Ein Satz") == expected
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        Conversation(model, tokenizer, None, 2).answer("hello", lambda words: None)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"eos_token_id": [300, -1]}'])
    def test_a_file_that_is_none(self, source: Path, text: str):
        (source / "generation_config.json").write_text(text)
        model, tokenizer = load(source)
        assert model.generation_config.eos_token_id == 255  # config.json's
        sample(model, tokenizer, "Ein Satz")

    def test_chat_takes_its_sampling(self, source: Path):
        (source / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.9}')
        config = load(source)[0].generation_config
        assert (config.do_sample, config.temperature, config.top_p, config.eos_token_id) == (True, 0.6, 0.9, 255)


class TestEmptyPrompt:
    def test_begins_with_the_token_that_ends_a_text(self, source: Path):
        model, tokenizer = load(source)
        assert sample(model, tokenizer, "") == sample(model, tokenizer, tokenizer.eos_token)

    def test_without_such_a_token(self, source: Path):
        model, tokenizer = load(source)
        model.generation_config.eos_token_id = tokenizer.eos_token = None
        with pytest.raises(ValueError, match="the prompt is empty"):
            sample(model, tokenizer, "")


class TestNames:
    def test_a_shard_of_more_bytes_than_a_name_may_have(self, source: Path):
        name = "ä" * 200 + ".safetensors"
        (source / SINGLE).unlink()
        (source / INDEX).write_text(json.dumps({"weight_map": {"w": name, "v": "\ud800.safetensors"}}))
        with pytest.raises(CheckpointError, match="is not a file name") as caught:
            Checkpoint(source)
        str(caught.value).encode()

    def test_a_companion_whose_name_is_no_utf8(self, source: Path, refused_early: Callable[..., str]):
        with open(os.fsencode(source) + b"/licence\xff.txt", "wb") as file:
            file.write(b"Do what you like.")
        refused_early(source, r"'licence\udcff.txt' is not the name of a file in UTF-8").encode()


def test_an_adapter_is_said_when_a_model_is_loaded(source: Path, caplog: pytest.LogCaptureFixture):
    (source / "adapter_config.json").write_text("{}")
    load(source)
    assert "the adapter is ignored" in caplog.text


def test_what_an_earlier_run_left_is_not_copied(source: Path, tmp_path: Path):
    names = ["metrics.json", "run.json", "bitpress.json", "report.md", "report.html", "adapter_config.json"]
    for name in names:
        (source / name).write_text("{}")
    for name in ("Licence.TXT", "COPYING"):
        (source / name).write_text("Do what you like.")
    notes = quantize(source, "int4-g32", tmp_path / "out").notes
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not written & (set(names) - {"bitpress.json"})
    assert {"Licence.TXT", "COPYING", "LICENSE"} <= written
    assert json.loads((tmp_path / "out" / "bitpress.json").read_text())["fingerprint"]
    assert "the adapter is ignored" in str(notes)
