"""The publish section of a config: what it names, and what is refused in it."""

from pathlib import Path
from typing import Any

import pytest
from standin import CANARY

from bitpress.pipeline.config.load import load_config
from bitpress.pipeline.config.schema import Publish
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.system.redact import redact

CONFIG = """
name: x
models: [{{id: org/Base-1B}}, {{id: {second}}}]
recipes: [none, int4-g128, nf4]
publish: {publish}
"""


@pytest.fixture
def refused(tmp_path: Path) -> Any:
    """refused("repo: a/b"): the message with which a config of two models and two schemes is refused."""

    def load(publish: str, second: str = "builtin:demo") -> str:
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.format(publish=f"{{{publish}}}", second=second))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return str(caught.value)

    return load


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/Base-1B", "me/Base-1B-nf4"),
        ("builtin:demo", "me/demo-nf4"),
        ("/models/local", "me/local-nf4"),
        ("../x/local/", "me/local-nf4"),
    ],
)
def test_names(model: str, name: str) -> None:
    assert Publish(repo="me/{model}-{recipe}").name_of(model, "nf4") == name


def test_every_job_has_its_own(refused: Any) -> None:
    said = "line 5: publish.repo: several jobs would go to {}; tell them apart by {{model}} and {{recipe}}"
    assert said.format("me/Base-1B") in refused("repo: 'me/{model}'")
    assert said.format("me/nf4") in refused("repo: 'me/{recipe}'").replace("me/int4-g128", "me/nf4")
    assert said.format("me/Base-1B-int4-g128") in refused("repo: 'me/{model}-{recipe}'", second="other/Base-1B")


@pytest.mark.parametrize(
    "repo", ["x", "a/b/{model}{recipe}", "me/{modell}{recipe}{model}", "me/--{model}{recipe}", "/{model}"]
)
def test_what_the_hub_would_not_take(refused: Any, repo: str) -> None:
    assert "line 5: publish.repo: " in refused(f"repo: '{repo}'")


@pytest.mark.parametrize("key", ["token", "hf_token", "api_key", "password"])
def test_secrets_are_refused_by_name(refused: Any, key: str) -> None:
    said = refused(f"repo: 'me/{{model}}-{{recipe}}', {key}: {CANARY}")
    assert f"publish: {key} is never read from a config; take it out, and `hf auth login` or set HF_TOKEN" in said
    assert CANARY not in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("repoo: a/b", "publish.repoo: unknown key; did you mean repo?"),
        ("private: true", "publish.repo: is missing"),
        ("repo: '{model}/{recipe}', private: 1", "publish.private"),
        ("repo: 'a/{model}{recipe}', collection: ''", "publish.collection"),
        (f"repo: 'a/{{model}}{{recipe}}', collection: {'x' * 60}", "publish.collection"),
    ],
)
def test_other_mistakes(refused: Any, wrong: str, said: str) -> None:
    assert f"line 5: {said}" in refused(wrong)


def test_what_looks_like_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-another-kind")
    assert redact(f"a of-another-kind b {CANARY}, hf_hub") == "a <TOKEN> b <TOKEN>, hf_hub"
