"""Faults of docs/faults.md that have no other test, and those that every path has to notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.cli import app
from bitpress.pipeline.config.load import load_eval
from bitpress.pipeline.errors import BitpressError, CheckpointError, HubError
from bitpress.pipeline.evaluate.measure import measure_task
from bitpress.pipeline.models.conversation import Conversation
from bitpress.pipeline.quantize import artifact
from bitpress.pipeline.storage.checkpoint import SINGLE, Checkpoint

LAYER = "model.layers.1.mlp.up_proj"
UP = f"{LAYER}.weight"
TOKEN = "hf_" + "q" * 34


def measured(folder: Path) -> None:
    """What the measuring process does."""
    text = folder.parent / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 4)
    settings = load_eval({"text": str(text), "context": 32, "windows": 1, "speed": None})
    request = {"artifact": str(folder), "baseline": None, "eval": settings.model_dump(), "device": "cpu"}
    measure_task(request | {"folder": str(folder.parent), "resume": None, "speed_only": False})


def examined(folder: Path) -> None:
    diagnosis = diagnose(folder)
    if not diagnosis.sound:
        raise CheckpointError("\n".join(diagnosis.faults))


# fault -> (a change of the tensors, a change of config.json, what the sentence names)
DENSE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any] | None, dict[str, Any], str]] = {
    "20 width": (None, {"hidden_size": 1 << 40}, "hidden_size"),
    "20 labels": (None, {"num_labels": 1 << 31}, "num_labels"),
    "20 layers": (None, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "22 tied, different": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), {"tie_word_embeddings": True},
        "lm_head.weight differs from",
    ),
    "22 untied, absent": (lambda t: t.pop("lm_head.weight", None), {"tie_word_embeddings": False}, "lm_head.weight"),
    "23 twice": (lambda t: t.update({f"{UP}_copy": t.pop(UP)}), {}, UP),
    "24 integers": (lambda t: t.update({UP: t[UP].to(torch.int8)}), {}, UP),
    "24 bool": (lambda t: t.update({UP: t[UP] > 0}), {}, UP),
    "24 empty": (lambda t: t.update({UP: t[UP][:0]}), {}, UP),
    "24 one dimension": (lambda t: t.update({UP: t[UP].flatten()}), {}, UP),
    "25 NaN": (lambda t: t[UP].view(-1)[7:8].fill_(torch.nan), {}, UP),
    "25 infinite": (lambda t: t["model.norm.weight"].fill_(-torch.inf), {}, "model.norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "config", "name"), DENSE.values(), ids=DENSE)
def test_every_path_that_loads_notices(
    source: Path, tmp_path: Path, edit_tensors: Any, edit_json: Any, change: Any, config: dict[str, Any], name: str
):
    if change:
        edit_tensors(source / SINGLE, change)
    edit_json(source / "config.json", **config)
    for path in (load, examined, measured, lambda folder: quantize(folder, "int4-g32", tmp_path / "out")):
        with pytest.raises(BitpressError) as refusal:
            path(source)
        assert name in str(refusal.value)
    assert not (tmp_path / "out").exists()


# fault 21: our own artifact, tampered with
QUANTIZED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "missing": lambda t: t.pop(UP.replace("weight", "qweight")),
    "short": lambda t: t.update({(n := UP.replace("weight", "qweight")): t[n][:-1].contiguous()}),
    "NaN": lambda t: t[UP.replace("weight", "scales")].view(-1)[3:4].fill_(torch.nan),
    "another dtype": lambda t: t.update({(n := UP.replace("weight", "scales")): t[n].int()}),
    "groups": lambda t: t.update({(n := UP.replace("weight", "scales")): t[n][:1].contiguous()}),
}


@pytest.fixture(scope="module")
def untouched(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "artifact"
    quantize(tiny_llama, {"scheme": "int4-g32", "format": "gptq"}, folder)
    return folder


@pytest.mark.parametrize("change", QUANTIZED.values(), ids=QUANTIZED)
def test_every_path_that_loads_notices_a_tampered_artifact(
    untouched: Path, copy_of: Any, tmp_path: Path, edit_tensors: Any, change: Callable[..., Any]
):
    folder = copy_of(untouched)
    edit_tensors(
        next(file for file in folder.glob("*.safetensors") if LAYER in "".join(Checkpoint.names_in(file))), change
    )
    to_other = lambda folder: convert(folder, "compressed-tensors", tmp_path / "out")  # noqa: E731
    for path in (load, examined, measured, to_other):
        with pytest.raises(BitpressError, match=r"up_proj"):
            path(folder)


@pytest.fixture
def bitpress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """bitpress("inspect", folder): the command's exit code, and all that it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["bitpress", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, "".join(capfd.readouterr())

    return call


def test_a_gpu_without_memory(
    bitpress: Any, tiny_llama: Path, untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digests: Any
):
    """Fault 10: one sentence with advice; the same command goes on, to the same bytes."""
    command = ("quantize", tiny_llama, "--recipe", "int4-g32", "--format", "gptq", "-o", tmp_path / "out")
    count, write = 0, artifact._write_units

    def run_out(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB. {TOKEN}")

    monkeypatch.setattr(artifact, "_write_units", run_out)
    code, said = bitpress(*command)
    assert (code, count) == (1, 1)
    assert "the GPU's memory is full: CUDA out of memory. Tried to allocate 2.00 GiB." in said
    assert "use --device cpu" in said
    assert TOKEN not in said
    monkeypatch.setattr(artifact, "_write_units", write)
    assert bitpress(*command)[0] == 0
    assert digests(tmp_path / "out") == digests(untouched)


@pytest.mark.parametrize("error", [HubError, RuntimeError])
def test_a_token_is_never_printed(bitpress: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type):
    """Fault 41: neither what looks like one nor the one in use, in sentences, tracebacks and the log of errors."""
    monkeypatch.setenv("HF_TOKEN", "of-another-kind-0123456789")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        raise error(f"the server says {TOKEN} of-another-kind-0123456789") from ValueError(TOKEN)

    monkeypatch.setattr("bitpress.pipeline.checkpoints.describe.describe", fail)
    code, said = bitpress("--debug", "inspect", tmp_path)
    assert code == error.exit_code if issubclass(error, BitpressError) else 1
    assert "<TOKEN>" in said
    logged = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert TOKEN not in said + logged
    assert "of-another-kind" not in said + logged


def test_a_token_that_the_model_does_not_have(tiny_llama: Path):
    """Fault 33, where a model talks: its embedding has no such row."""
    model, tokenizer = load(tiny_llama)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(CheckpointError, match="the tokenizer gives token 256"):
        Conversation(model, tokenizer).answer("a <more>", lambda words: None)
