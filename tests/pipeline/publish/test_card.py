"""The model card: what the Hub reads of it, what a reader does, and that no name breaks either."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from markdown_it import MarkdownIt

from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.checkpoints.runtimes import Facts, verdicts
from bitpress.pipeline.formats import registry
from bitpress.pipeline.publish.bundle import Item
from bitpress.pipeline.publish.card import Origin, origin_of, write_card
from bitpress.pipeline.publish.vocabulary import is_licence_file

REPO = "user/tiny-int4"
SHAPES = {"model.layers.0.mlp.down_proj": (128, 128)}
NASTY = [
    "---\nlicense: mit\n---",
    "a: b # c\n- d",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "```\n# out of the fence\n```",
    "| a | b |\n[x](javascript:alert(1)) ![y](https://example.org/z.png)",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "!!python/object/apply:os.system ['true']",
    "&a *a %TAG ? @ ` ' \" \\ \u2028 \u2029 \x85 \ufeff",
    "\x1b[31mred\x00\u202egnp.exe",
    "null",
    "1e3",
    "é" * 3000,
]
Write = Callable[..., str]


@pytest.fixture
def metrics(finished: Path) -> Callable[..., dict[str, Any]]:
    """metrics(run, key=value): of a finished run, some keys of it changed."""
    return lambda run, **changes: json.loads((finished / run / "metrics.json").read_text()) | changes


@pytest.fixture
def write(metrics: Callable[..., dict[str, Any]], finished: Path) -> Write:
    """write(run, key=value): a card, some keys of the run's metrics changed."""

    def card(run: str = "int4-g32", origin: Origin | None = None, repo: str = REPO, **changes: Any) -> str:
        own = metrics(run, **changes)
        schemes = dict.fromkeys(SHAPES, Scheme.parse(own["scheme"]))
        facts = Facts(registry()[own["format"]], schemes, False, SHAPES, None)
        origin = origin or origin_of(own, finished / run / "artifact" / "README.md", ["LICENSE"])
        files = [Item.of("LICENSE", b"Do what you like.\n"), Item.of("metrics.json", b"{}")]
        figures = {"figures/1.png": f"{own['scheme']} of {own['model']['id']}: errors"}
        return write_card(repo, [metrics("none"), own], origin, verdicts(facts), files, figures)

    return card


def metadata(card: str) -> dict[str, Any]:
    """Read as the Hub's own client reads it, and as plain YAML: both must find the same."""
    block = REGEX_YAML_BLOCK.search(card)
    assert block
    plain = yaml.safe_load(block[2])
    assert ModelCard(card).data.to_dict() == plain
    return plain


def body(card: str) -> str:
    return ModelCard(card).text


def structure(text: str) -> list[str]:
    """What a Markdown reader makes of a text: everything but its words."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    found = [kind for token in tokens for kind in (token.type, *(child.type for child in token.children or []))]
    return [kind for kind in found if kind != "text"]


class TestMetadata:
    def test_of_a_model_of_the_hub(self, write: Write) -> None:
        origin = Origin("org/base", "c0ffee", {"license": "apache-2.0", "language": ["en", "fr"]}, ["LICENSE"])
        found = metadata(write(origin=origin))
        assert (found["base_model"], found["base_model_relation"]) == ("org/base", "quantized")
        assert (found["license"], found["language"]) == ("apache-2.0", ["en", "fr"])
        assert "license_name" not in found
        assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")
        assert found["tags"] == ["bitpress", "gptq", "int4-g32", "4-bit"]

    def test_of_a_folder(self, write: Write) -> None:
        found = metadata(write())
        assert "base_model" not in found
        assert "base_model_relation" not in found
        assert [found[f"license{key}"] for key in ("", "_name", "_link")] == ["other", "tiny-licence", "LICENSE"]

    @pytest.mark.parametrize(
        ("carried", "files", "expected"),
        [
            ({"license": "Apache 2.0"}, [], {"license": "apache-2.0"}),
            ({"license": "MIT"}, ["LICENSE"], {"license": "mit"}),
            ({"license": "gpl-2.0-or-later"}, [], {"license": "other", "license_name": "gpl-2.0-or-later"}),
            (
                {"license": "My Own Licence!", "license_link": "https://example.org/l"},
                ["licence.txt"],
                {"license": "other", "license_name": "my-own-licence", "license_link": "https://example.org/l"},
            ),
            (
                {"license": "other", "license_name": "Tiny 1", "license_link": "gone.md"},
                ["Copying"],
                {"license": "other", "license_name": "tiny-1", "license_link": "Copying"},
            ),
            ({"license": ["mit", "Foo"]}, [], {"license": "other", "license_name": "mit-foo"}),
            ({"language": "English"}, [], {}),
            (
                {"language": ["EN", "English", "zh-CN", "jp", "yue", "code", "en"]},
                [],
                {"language": ["en", "yue", "code"]},
            ),
            ({"language": "fr"}, [], {"language": "fr"}),
        ],
    )
    def test_words_that_the_hub_does_not_take(
        self, write: Write, carried: dict[str, Any], files: list[str], expected: dict[str, Any]
    ) -> None:
        found = metadata(write(origin=Origin("x", None, carried, files)))
        assert {key: found[key] for key in found if key.startswith(("license", "language"))} == expected

    @pytest.mark.parametrize(
        "name", ["LICENSE", "licence.txt", "License-MIT.md", "COPYING", "UNLICENSE", "notice", "USE_POLICY.md"]
    )
    def test_licence_files_in_any_spelling(self, name: str) -> None:
        assert is_licence_file(name)
        assert not is_licence_file("thesis.tex")

    def test_a_licence_that_is_a_file_only(self, write: Write) -> None:
        found = metadata(write(origin=Origin("x", None, {}, ["LICENSE"])))
        assert (found["license"], found["license_link"]) == ("other", "LICENSE")

    def test_no_licence(self, write: Write) -> None:
        card = write(origin=Origin("x", None, {}, []))
        assert "license" not in metadata(card)
        assert "It came with none; ask whoever published it" in body(card)

    @pytest.mark.parametrize(("scheme", "tags"), [("int8-dynamic", "compressed-tensors"), ("nf4", "bitsandbytes")])
    def test_formats_by_the_names_that_the_hub_filters_by(self, write: Write, scheme: str, tags: str) -> None:
        assert tags in metadata(write(scheme))["tags"]

    def test_results(self, write: Write, metrics: Callable[..., dict[str, Any]]) -> None:
        own = metrics("int4-g32")
        text = {"dataset": "org/text", "config": "raw", "split": "test", "column": "text", "revision": None}
        config = own["config"] | {"eval": own["config"]["eval"] | {"text": text}}
        tasks = [{"task": "arc_easy", "metric": "acc", "value": 0.5}]
        card = write(config=config, tasks=tasks)
        results = {found.metric_type: found for found in ModelCard(card).data.eval_results}
        assert results["perplexity"].metric_value == own["quality"]["perplexity"]
        assert results["kl_divergence"].metric_value == own["quality"]["kl_mean"]
        assert results["top1_agreement"].metric_value == own["quality"]["top1_agreement"]
        assert (results["acc"].dataset_name, results["acc"].metric_value) == ("arc_easy", 0.5)
        of = results["perplexity"]
        assert (of.dataset_type, of.dataset_config, of.dataset_split) == ("org/text", "raw", "test")

    def test_the_calibration_set(self, write: Write, metrics: Callable[..., dict[str, Any]]) -> None:
        learned = {"text": "Salesforce/wikitext/wikitext-2-raw-v1/train", "windows": 128, "method": "gptq"}
        card = write(calibration=learned, method="gptq")
        assert metadata(card)["datasets"] == ["Salesforce/wikitext"]  # the default, where the config names none
        assert "calibrated on Salesforce/wikitext/wikitext-2-raw-v1/train" in body(card)
        assert "datasets" not in metadata(write())
        config = metrics("int4-g32")["config"]
        for text, names in (("org/set:raw:train", ["org/set"]), ("mine.txt", None)):
            calibration = {"text": text, "windows": 4, "context": 32, "seed": 0}
            recipes = [recipe | {"calibration": calibration} for recipe in config["recipes"]]
            card = metadata(write(calibration=learned, config=config | {"recipes": recipes}))
            assert card.get("datasets") == names


class TestOrigin:
    @pytest.mark.parametrize(
        ("text", "carried"),
        [
            ("---\nlicense: mit\ntags: [a]\n---\n# x", {"license": "mit"}),
            ("\ufeff---\r\nlicense: [mit, apache-2.0]\r\n---\r\n", {"license": ["mit", "apache-2.0"]}),
            ("---\nlicense: {a: b}\nlanguage: [1, 2]\n---\n", {}),
            ("---\nlicense: " + "x" * 201 + "\n---\n", {}),
            ("---\nlicense: |\n  two\n  lines\n---\n", {}),
            ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
            ("---\n" + "[" * 2000 + "\n---\n", {}),
            ("---\n- a\n---\n", {}),
            ("---\nlicense: mit\nlicense: x\n---\n", {}),
            ("no front matter", {}),
            ("", {}),
        ],
    )
    def test_what_a_card_carries(self, text: str, carried: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "README.md").write_bytes(text.encode())
        found = origin_of({"model": {"id": "x", "revision": None}}, tmp_path / "README.md", [])
        assert found.carried == carried

    def test_without_a_card(self, tmp_path: Path) -> None:
        assert origin_of({"model": {"id": "x"}}, tmp_path / "README.md", ["NOTICE.txt", "a"]).files == ["NOTICE.txt"]


class TestBody:
    def test_says_what_it_is_and_what_it_costs(self, write: Write, metrics: Callable[..., dict[str, Any]]) -> None:
        text = body(write())
        quality = metrics("int4-g32")["quality"]
        assert "tiny, its weights quantized to int4-g32 by absmax, stored in the format gptq (5.07 bits" in text
        assert f"| {quality['perplexity']:,.1f} (" in text
        for words in ("bitpress run tiny.yaml", "outside the decoder blocks", "48a34e121967139e", "torch 2."):
            assert words in text

    def test_ways_to_load_it(self, write: Write) -> None:
        gptq, dynamic, nf4 = (body(write(run)) for run in ("int4-g32", "int8-dynamic", "nf4"))
        assert "**transformers** (`pip install transformers optimum gptqmodel`)" in gptq
        assert "**transformers** (`pip install transformers compressed-tensors`)" in dynamic
        assert "**transformers** (`pip install transformers bitsandbytes`)" in nf4
        assert f"vllm serve {REPO}" in gptq
        assert "**ORT GenAI** (`pip install onnxruntime-genai torch onnx-ir`)" in gptq
        assert "GPTQModel: is not known to load it" in nf4

    def test_the_file_and_the_kernel_are_told_apart(self, write: Write, metrics: Callable[..., dict[str, Any]]) -> None:
        text, quality = body(write()), metrics("int4-g32")["quality"]
        assert f"- **Quality of the file**: perplexity {quality['perplexity']:,.1f} (" in text
        assert "- **Of the kernel**: " in text

    def test_bitpress_is_installed_from_its_repository(self, write: Write) -> None:
        """Nobody knows whose a name on the index is."""
        assert "`pip install git+https://github.com/bitpress/bitpress@v" in body(write())
        assert not re.search(r"pip install '?bitpress", body(write()))

    def test_zero_points_are_unpacked_by_transformers(self, write: Write) -> None:
        unpacked = '("user/tiny-int4", quantization_config=CompressedTensorsConfig(dequantize=True))'
        assert unpacked in body(write(format="compressed-tensors", scheme="int4-g32-asym"))
        assert unpacked not in body(write(format="compressed-tensors", scheme="int4-g32"))

    @pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
    def test_hostile_names(self, nasty: str, write: Write, metrics: Callable[..., dict[str, Any]]) -> None:
        """Wherever a checkpoint, a data set, a task or a config puts one, the card is built as with a harmless one."""
        own = metrics("int4-g32")

        def card(name: str) -> str:
            changes = {
                "model": own["model"] | {"id": name, "revision": name, "architecture": name},
                "protocol": own["protocol"] | {"text": name},
                "coverage": own["coverage"] | {"kept": [own["coverage"]["kept"][0] | {"name": name, "reason": name}]},
                "calibration": {"text": name, "windows": 1},
                "tasks": [{"task": name, "metric": name, "value": 0.5}],
                "command": name,
                "config": own["config"] | {"name": name, "eval": own["config"]["eval"] | {"prompt": name}},
            }
            return write(origin=Origin(name, name, {"license": name, "language": [name]}, [name]), **changes)

        harmless, hostile = card("harmless"), card(nasty)
        assert structure(body(hostile)) == structure(body(harmless))
        assert metadata(hostile).keys() == metadata(harmless).keys()
        assert list(map(type, metadata(hostile).values())) == list(map(type, metadata(harmless).values()))
        assert metadata(hostile)["pipeline_tag"] == "text-generation"
        for character in "\x00\x1b\u202e":
            assert character not in hostile

    @pytest.mark.parametrize("repo", ["user/a`b", 'user/a"b', "user/a\nb", "user/../x", "user", "u/s/r", "user/<b>"])
    def test_hostile_repositories_are_refused(self, repo: str, write: Write) -> None:
        """Their names stand in code."""
        with pytest.raises(ValueError, match=r"repo|Repo"):
            write(repo=repo)
