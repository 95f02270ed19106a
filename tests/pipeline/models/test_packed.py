"""Packed weights beside a checkpoint: the same logits to the bit, and nothing of a file that is stale or damaged."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitpress.kernels.cpu import native
from bitpress.kernels.cpu.library import Library, library
from bitpress.kernels.decoder_layer import NativeDecoder, NativeLayers
from bitpress.pipeline import api
from bitpress.pipeline.checkpoints.describe import describe
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.models import loading, modules, structure
from bitpress.pipeline.models.packed import Packing
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.storage.checkpoint import Checkpoint
from bitpress.pipeline.storage.packed_file import FOLDER, PackedFile, packed_files

from ..storage.test_packed_file import header_of, rewrite

Logits = Callable[..., torch.Tensor]
LAYER = "model.layers.0.mlp.down_proj"

pytestmark = pytest.mark.skipif(not isinstance(library(), Library), reason="no native library")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "int4"
    api.quantize(tiny_llama, "int4-g32", folder)
    api.optimize(folder)
    return folder


@pytest.fixture
def optimized(artifact: Path, copy_of: Callable[..., Path]) -> Path:
    return copy_of(artifact)  # with the times of its files


@pytest.fixture
def packed(optimized: Path) -> Path:
    (path,) = packed_files(optimized)
    return path


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], bool]:
    """mapped(folder): whether loading it, by bitpress or by transformers, reads no quantized layer."""

    def load(folder: Path, by: Callable[[Path], Any] = loading.load) -> bool:
        read: list[str] = []
        own = modules.read_layer

        def reading(*arguments: Any) -> Any:
            read.append(arguments[3])
            return own(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(modules, "read_layer", reading)
            by(folder)
        return not read

    return load


@pytest.fixture
def by_transformers(registered: None, mapped: Any) -> Callable[[Path], Any]:
    """by_transformers(folder): the model that from_pretrained makes of packed weights, and its logits as `logits`."""

    def load(folder: Path) -> tuple[Any, torch.Tensor]:
        models: list[Any] = []
        assert mapped(folder, lambda folder: models.append(AutoModelForCausalLM.from_pretrained(folder)))
        with torch.inference_mode():
            return models[0], models[0](torch.arange(32).unsqueeze(0)).logits.flatten().double()

    return load


@pytest.mark.parametrize("huge", [True, False])
def test_the_same_logits(
    huge: bool, optimized: Path, packed: Path, logits: Logits, mapped: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether weights are used where they are mapped, or copied into huge pages."""
    monkeypatch.setattr("bitpress.pipeline.models.packed.mapped_in_huge_pages", lambda whole: huge)
    assert mapped(optimized)
    assert not caplog.records
    for kernel in ("auto", "auto-int8", "auto-bf16", "reference") if huge else ("auto",):
        ours = logits(optimized, kernel)
        shutil.move(packed.parent, packed.parent.with_name("aside"))
        assert torch.equal(ours, logits(optimized, kernel)), kernel
        shutil.move(packed.parent.with_name("aside"), packed.parent)


def test_from_pretrained(optimized: Path, logits: Logits, by_transformers: Any, mapped: Any, caplog: Any) -> None:
    model, theirs = by_transformers(optimized)
    assert not caplog.records
    assert torch.equal(theirs, logits(optimized))
    assert (model.fusing.fused, model.fusing.around) == (2, None)
    os.utime(Checkpoint(optimized).files[0])
    assert not mapped(optimized, AutoModelForCausalLM.from_pretrained)
    assert "changed since" in caplog.text


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("gpt2", "int8-dynamic"),  # Conv1D, biases
        ("qwen3_moe", "nvfp4"),  # experts
        ("gemma2", {"scheme": "int4-g32", "layers": {"*.down_proj": "int8-g32", "*.o_proj": "none"}}),
    ],
)
def test_other_models(model: str, recipe: Any, tiny: Any, tmp_path: Path, logits: Logits, by_transformers: Any) -> None:
    folder = tmp_path / "artifact"
    api.quantize(tiny(model), recipe, folder)
    before = logits(folder)
    packing = api.optimize(folder)
    assert packing.left == {}
    assert packing.layers > 0
    assert torch.equal(logits(folder), before)
    assert torch.equal(by_transformers(folder)[1], before)


def test_orders_of_inputs(optimized: Path, packed: Path, logits: Logits, caplog: Any, monkeypatch: Any) -> None:
    """A permutation is kept and checked again: what is none never reaches a kernel, which reads memory by it."""
    shutil.rmtree(packed.parent)
    original, order = modules.read_layer, torch.randperm(64, generator=torch.Generator().manual_seed(0)).int()

    def ordered(*arguments: Any) -> Any:
        qtensor = original(*arguments)
        return replace(qtensor, order=order) if qtensor.shape[1] == 64 else qtensor

    monkeypatch.setattr(modules, "read_layer", ordered)
    before = logits(optimized)
    packing = api.optimize(optimized)
    assert torch.equal(logits(optimized), before)
    assert not caplog.records
    content = packing.path.read_bytes()
    for wrong in (order.flip(0).clone(), order + 1, order.clone().fill_(3), -order):
        at = content.index(order.numpy().tobytes())
        packing.path.write_bytes(content[:at] + wrong.numpy().tobytes() + content[at + 256 :])
        caplog.clear()
        loading.load(optimized)
        sound = torch.equal(wrong.sort().values, torch.arange(64, dtype=torch.int32))
        assert ["order" in record.message for record in caplog.records] == [True] * (not sound)


STALE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights rewritten": (lambda folder: [os.utime(file) for file in Checkpoint(folder).files], "changed since"),
    "another config": (lambda folder: edit(folder / "config.json", rope_theta=5e5), "changed since"),
    "another manifest": (lambda folder: edit(folder / "bitpress.json", note=1), "changed since"),
}


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("how", STALE)
def test_stale(how: str, optimized: Path, mapped: Any, caplog: Any) -> None:
    change, why = STALE[how]
    change(optimized)
    assert not mapped(optimized)
    assert [why in record.message and "bitpress optimize" in record.message for record in caplog.records] == [True]
    api.optimize(optimized)
    assert len(packed_files(optimized)) == 1  # in the place of the other
    assert mapped(optimized)


def test_another_instruction_set(optimized: Path, mapped: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in native.PLUGINS:
        monkeypatch.setattr(kernel, "instructions", "portable")
    assert not mapped(optimized)
    assert "another dtype, kernel or machine" in caplog.text
    api.optimize(optimized)
    assert mapped(optimized)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no layers": lambda header: header.pop("layers"),
    "layers in a list": lambda header: header.update(layers=[LAYER]),
    "a layer that is none": lambda header: header["layers"].update({"model.x": header["layers"][LAYER]}),
    "another form": lambda header: header["layers"].update({LAYER: ["other", ["data"]]}),
    "no data": lambda header: header["layers"].update({LAYER: [header["layers"][LAYER][0], []]}),
    "more data": lambda header: (
        header["tensors"].update({f"{LAYER}/order": header["tensors"]["plain model.norm.weight"]}),
        header["layers"][LAYER][1].append("order"),
    ),
    "another layer's data": lambda header: header["tensors"].update(
        {f"{LAYER}/data": header["tensors"]["model.layers.0.self_attn.q_proj/data"]}
    ),
    "less data": lambda header: header["tensors"][f"{LAYER}/data"].__setitem__(1, [256]),
    "data of another dtype": lambda header: header["tensors"][f"{LAYER}/data"].__setitem__(0, "torch.int8"),
    "data elsewhere": lambda header: header["tensors"][f"{LAYER}/data"].__setitem__(2, 256),
    "a norm of another shape": lambda header: header["tensors"]["plain model.norm.weight"].__setitem__(1, [8]),
    "a norm of another dtype": lambda header: header["tensors"]["plain model.norm.weight"].__setitem__(
        0, "torch.float16"
    ),
    "no norm": lambda header: header["tensors"].pop("plain model.norm.weight"),
    "a tensor that the model has not": lambda header: header["tensors"].update(
        {"plain model.x": header["tensors"]["plain model.norm.weight"]}
    ),
    "a quantized weight": lambda header: header["tensors"].update(
        {f"plain {LAYER}.weight": header["tensors"]["plain model.norm.weight"]}
    ),
    "trials of no sense": lambda header: header.update(trials=[1]),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_headers_that_somebody_made_up(how: str, optimized: Path, packed: Path, mapped: Any, caplog: Any) -> None:
    rewrite(packed, HOSTILE[how])
    assert not mapped(optimized)
    assert len(caplog.records) == 1


def test_any_bytes_are_safe(optimized: Path, packed: Path, caplog: Any, logits: Logits) -> None:
    """Bytes of the packed weights' own headers are compared; all others are numbers, and wrong ones at worst."""
    _, (size,), at = header_of(packed)["tensors"][f"{LAYER}/data"]
    content = packed.read_bytes()
    packed.write_bytes(content[: at + 8] + b"\x41" + content[at + 9 :])
    loading.load(optimized)
    assert f"{LAYER}: its header is that of another weight" in caplog.text
    noise = random.Random(0).randbytes(size - 128)
    packed.write_bytes(content[: at + 128] + noise + content[at + size :])
    caplog.clear()
    logits(optimized)
    assert not caplog.records
    assert any("are damaged" in note for note in diagnose(optimized).notes)


def test_trials_are_not_repeated(optimized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as bitpress, torch and transformers are the same, nothing runs; what trials showed stays what it was."""
    ran: list[str] = []
    for kind, name in ((NativeLayers, "step"), (NativeDecoder, "next"), (torch.nn.Linear, "forward")):
        own = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *given, own=own, name=name: ran.append(name) or own(*given))
    model: Any = loading.load(optimized)[0]
    fusing = model.fusing
    assert (fusing.fused, fusing.of, fusing.apart, fusing.around, ran) == (2, 2, None, None, [])
    model.generate(torch.tensor([[3, 5]]), max_new_tokens=3)
    assert ran.count("next") == 2
    monkeypatch.setattr("bitpress.pipeline.models.packed.programs", lambda: {"transformers": "99"})
    ran.clear()
    assert loading.load(optimized)[0].fusing == fusing
    assert set(ran) == {"step", "next", "forward"}


@pytest.mark.parametrize(
    ("model", "asked"), [("llama", "get_model_conversion_mapping"), ("mixtral", "rename_source_key")]
)
def test_names_are_worked_out_once(
    model: str, asked: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is not asked for them any more; another config is another question."""
    monkeypatch.setattr("bitpress.pipeline.system.remembered.folder", lambda: tmp_path / "answers")
    folder = tmp_path / "artifact"
    api.quantize(tiny(model), "int8-dynamic", folder)
    first = read_quantized(Checkpoint(folder))

    def ask(*arguments: Any, **named: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(structure, asked, ask)
    again = read_quantized(Checkpoint(folder))
    assert (again.plain, again.quantized, again.schemes) == (first.plain, first.quantized, first.schemes)
    edit(folder / "config.json", note=1)
    with pytest.raises(AssertionError):
        read_quantized(Checkpoint(folder))


def test_where_users_look(optimized: Path, packed: Path, artifact: Path) -> None:
    (line,) = describe(optimized)["packed weights"]
    assert line == f"{packed}: {len(PackedFile(packed).header['layers'])} layers, {packed.stat().st_size} bytes"
    assert all(FOLDER not in path.parts for path in Checkpoint(optimized).other_files())
    assert diagnose(optimized).sound
    packed.chmod(0o666)
    assert "not used: it is not this user's alone" in describe(optimized)["packed weights"][0]
    assert api.clean(optimized) == [optimized / FOLDER]
    assert "packed weights" not in describe(optimized)


def test_what_measures_reads_the_checkpoint(optimized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quality is the file's: what lies beside it is not looked at."""
    monkeypatch.setattr(loading, "Coming", None)
    assert loading.load_model(Checkpoint(optimized), torch.device("cpu"), "auto")


def test_in_the_users_cache(optimized: Path, packed: Path, mapped: Any, tmp_path: Path) -> None:
    api.clean(optimized)
    packing = api.optimize(optimized, user_cache=True)
    assert isinstance(packing, Packing)
    assert tmp_path / "cache" in packing.path.parents
    assert not (optimized / FOLDER).exists()
    assert mapped(optimized)


def test_nothing_to_pack(tiny_llama: Path, optimized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is not quantized"):
        api.optimize(tiny_llama)
    monkeypatch.setattr(native.NativeInt8, "unsupported", lambda *_: "not today")
    with pytest.raises(ConfigError, match="which keep no packed weights"):
        api.optimize(optimized)
