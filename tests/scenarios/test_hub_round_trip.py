"""From the Hub back: what was published loads in fresh processes, and the code on its cards runs as it stands."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import snippets
import torch
from safetensors.torch import load_file
from standin import CANARY, Hub

from bitpress.pipeline.errors import HubError
from bitpress.pipeline.hub.download import resolve
from bitpress.pipeline.models.loading import load

SCHEMES = ["int4-g32", "int8-dynamic", "nf4"]
IDS = torch.arange(32).unsqueeze(0)
LOAD = """
import sys, torch
from safetensors.torch import save_file
from bitpress.pipeline import load
ids = torch.arange(32).unsqueeze(0)
save_file({name: load(f"user/tiny-{name}")[0](ids).logits.detach() for name in sys.argv[2:]}, sys.argv[1])
"""
OURS = ("bitpress", "bitpress, on the command line", "transformers, on bitpress's kernels")
NEEDS = {"int4-g32": "gptqmodel", "int8-dynamic": "compressed_tensors", "nf4": "bitsandbytes"}  # of transformers


@pytest.fixture(scope="module")
def outside(published: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of somebody who has the Hub's address, no token, and nothing in the cache."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    return clean | {"HF_ENDPOINT": published.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "NO_PROXY": "*"}


def run(command: list[str], env: dict[str, str], given: str = "") -> str:
    done = subprocess.run(command, env=env, input=given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded(outside: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Scheme -> logits, of what a fresh process loaded from the Hub."""
    file = tmp_path_factory.mktemp("logits") / "logits.safetensors"
    run(
        [sys.executable, "-c", f"import torch\nwith torch.inference_mode():\n exec({LOAD!r})", str(file), *SCHEMES],
        outside,
    )
    return load_file(file)


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_the_same_to_the_bit(scheme: str, loaded: dict[str, torch.Tensor], finished: Path) -> None:
    model, _ = load(finished / scheme / "artifact")
    assert torch.equal(loaded[scheme], model(IDS).logits)


def code_of(card: str) -> dict[str, dict[str, str]]:
    """Runtime -> {"language", "code"}, of a card's section on loading."""
    section = card.split("## Load it")[1].split("\n## ")[0]
    found = re.findall(r"^\*\*([^*\n]+)\*\* \(`pip.*?^```(\w+)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return {name: {"language": language, "code": code} for name, language, code in found}


def obstacle(scheme: str, way: str) -> str | None:
    """Why a snippet cannot run here; None if it can."""
    if way == "transformers":
        return None if find_spec(NEEDS[scheme]) else f"{NEEDS[scheme]} is not installed"
    return None if way in OURS else f"{way} is not installed"


@pytest.fixture(scope="module")
def cards(published: Hub) -> dict[str, dict[str, dict[str, str]]]:
    """Scheme -> runtime -> its code."""
    return {scheme: code_of(published.content(f"user/tiny-{scheme}", "README.md").decode()) for scheme in SCHEMES}


@pytest.fixture(scope="module")
def outcomes(cards: dict[str, Any], outside: dict[str, str]) -> dict[tuple[str, str], dict[str, str | None]]:
    """What each snippet said, in one fresh process; those that turn transformers to our kernels come last."""
    every = [(scheme, way) for scheme, code in cards.items() for way in code]
    keys = [(scheme, way) for scheme, way in every if not obstacle(scheme, way)]
    keys.sort(key=lambda key: "kernels" in key[1])
    given = json.dumps([cards[scheme][way] for scheme, way in keys])
    found = json.loads(run([sys.executable, snippets.__file__], outside, given).splitlines()[-1])
    return dict(zip(keys, found, strict=True))


@pytest.mark.parametrize("way", [*OURS, "transformers"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_code_on_a_card_runs(scheme: str, way: str, cards: dict[str, Any], outcomes: dict[Any, Any]) -> None:
    if reason := obstacle(scheme, way):
        pytest.skip(reason)
    found = outcomes[scheme, way]
    assert found["error"] is None, found["error"]
    assert "Once upon a time" in found["said"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_code_for_other_programs_can_be_read(scheme: str, cards: dict[str, Any]) -> None:
    assert set(OURS) <= set(cards[scheme])
    for snippet in cards[scheme].values():
        if snippet["language"] == "python":
            ast.parse(snippet["code"])
        else:
            subprocess.run(["bash", "-n"], input=snippet["code"], text=True, check=True)


def test_a_private_one_is_for_its_owner(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published.repos["user/tiny-nf4"], "private", True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="not on the Hub or private: check the spelling, or `hf auth login`"):
        resolve("user/tiny-nf4")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert resolve("user/tiny-nf4").revision == published.repos["user/tiny-nf4"].commits[-1][0]
