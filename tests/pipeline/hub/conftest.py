"""Finished runs, and the stand-in for the Hub that they are published to, by huggingface_hub's real client."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download
from standin import CANARY, Hub

from bitpress.pipeline import worker
from bitpress.pipeline.config import Eval, Model, Run
from bitpress.pipeline.runner import execute
from bitpress.pipeline.stages import evaluate, measure, publish

SCHEMES = ["int4-g32", "int8-dynamic", "nf4"]
CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en]
tags: [not-carried-over]
---
# The source's own card
"""


def answer_here(task: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a fresh process would answer, sooner."""
    tasks = {"check": evaluate.check_task, "measure": measure.measure_task}
    return json.loads(json.dumps(tasks[task](json.loads(json.dumps(request)))))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs start no processes."""
    monkeypatch.setattr(worker, "call", answer_here)


@pytest.fixture(scope="session")
def source(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a licence, a card, a chat template, and what must not be published."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    shutil.copytree(tiny_llama, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return folder


@pytest.fixture(scope="session")
def make_run(source: Path) -> Callable[..., Run]:
    """make_run(output, key=value): a config of the tiny model by three schemes."""

    def make(output: Path, **settings: Any) -> Run:
        text = output / "text.txt"
        text.write_text("A hub is where spokes meet; 1 + 1 = 2. " * 40)
        how = Eval(text=str(text), context=32, windows=4, dtype="float32", speed=None, output_errors=0)
        chosen = {"schemes": SCHEMES, "models": [Model(id=str(source))], "eval": how, "device": "cpu", **settings}
        return Run(name="tiny", output=str(output), **chosen)

    return make


@pytest.fixture(scope="session")
def finished(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished runs. Read only; see runs."""
    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "call", answer_here)
        outcomes = execute(make_run(output), "bitpress run tiny.yaml", lambda line: None)
    assert not [outcome.error for outcome in outcomes if outcome.error]
    return output / "tiny"


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """The finished runs, to publish from."""
    return shutil.copytree(finished, tmp_path / "tiny")


@contextlib.contextmanager
def serving(cache: Path) -> Iterator[Hub]:
    """A stand-in; the client in this process is turned to it, with the canary for a token and an empty cache."""
    with Hub().serving() as server, pytest.MonkeyPatch.context() as patch:
        huggingface_hub.close_session()
        patch.setenv("HF_TOKEN", CANARY)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, new for each test."""
    with serving(tmp_path / "cache") as server:
        yield server


@pytest.fixture(scope="session")
def published(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A stand-in to which the finished runs were published, as user/tiny-SCHEME."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(finished, folder / "runs")
    with serving(folder / "cache") as server:
        for scheme in SCHEMES:
            publish.send(publish.prepare(folder / "runs" / scheme, f"user/tiny-{scheme}", override=False))
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits: the seconds that somebody would have."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited
