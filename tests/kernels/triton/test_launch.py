"""Which configuration a kernel is launched with, and why Triton cannot be used."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from bitpress.kernels.triton import launch
from bitpress.kernels.triton.launch import Choices, Config, choose, row_bucket, unsupported_device, unsupported_machine

CONFIGS = [Config(16, 64, 128), Config(16, 64, 128, split=4), Config(16, 128, 128, stages=3)]
CUDA = torch.device("cuda")


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As on a GPU on which the last of CONFIGS is the fastest, and the second does not fit."""
    path = tmp_path / "bitpress" / "triton-nvidia-h200-3.7.1.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "triton", type("Triton", (), {"__version__": "3.7.1"}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seconds = dict(zip(CONFIGS, (2.0, float("inf"), 1.0)))
    monkeypatch.setattr(launch, "_time", lambda run, config: run(config) or seconds[config])
    launch._choices.cache_clear()
    yield path
    launch._choices.cache_clear()


def test_the_fastest_is_chosen_and_found_again(on_a_gpu: Path):
    tried = []
    for _ in range(2):
        assert choose("int4", "4096x4096x1", CONFIGS, tried.append, CUDA) == CONFIGS[2]
    assert tried == CONFIGS
    launch._choices.cache_clear()  # as in another process
    assert choose("int4", "4096x4096x1", CONFIGS, tried.append, CUDA) == CONFIGS[2]
    assert tried == CONFIGS
    assert choose("int4", "4096x4096x2", CONFIGS, tried.append, CUDA) == CONFIGS[2]
    assert tried == 2 * CONFIGS
    buckets = {"4096x4096x1": list(CONFIGS[2]), "4096x4096x2": list(CONFIGS[2])}
    assert json.loads(on_a_gpu.read_text()) == {"int4": buckets}
    assert [path.name for path in on_a_gpu.parent.iterdir()] == [on_a_gpu.name]


def test_nothing_is_timed_within_a_graph_nor_on_a_cpu(on_a_gpu: Path, monkeypatch: pytest.MonkeyPatch):
    def never(config: Config) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose("int4", "4096x4096x1", CONFIGS, never, CUDA) == CONFIGS[0]
    assert choose("int4", "4096x4096x1", CONFIGS, never, torch.device("cpu")) == CONFIGS[0]
    assert choose("int4", "4096x4096x1", CONFIGS[2:], never, CUDA) == CONFIGS[2]
    assert not on_a_gpu.exists()


@pytest.mark.parametrize("numbers", [[16, 64, 999, 1, 4, 1], [16], "16", None, {"rows": 16}])
def test_what_is_no_configuration_is_timed_again(on_a_gpu: Path, numbers: object):
    on_a_gpu.parent.mkdir()
    on_a_gpu.write_text(json.dumps({"int4": {"1x1x1": numbers}}))
    tried = []
    assert choose("int4", "1x1x1", CONFIGS, tried.append, CUDA) == CONFIGS[2]
    assert tried == CONFIGS
    assert json.loads(on_a_gpu.read_text()) == {"int4": {"1x1x1": list(CONFIGS[2])}}


@pytest.mark.parametrize("text", ["{", "", "[]", '{"int4": []}', "\udcff"])
def test_another_kind_of_file_gets_a_warning(on_a_gpu: Path, text: str):
    on_a_gpu.parent.mkdir()
    on_a_gpu.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="triton-nvidia-h200-3.7.1.json is not read: "):
        assert choose("int4", "1x1x1", CONFIGS, lambda config: None, CUDA) == CONFIGS[2]
    assert json.loads(on_a_gpu.read_text()) == {"int4": {"1x1x1": list(CONFIGS[2])}}


def test_two_processes_keep_each_others_choices(tmp_path: Path):
    path = tmp_path / "choices.json"
    one, other = Choices(path), Choices(path)
    one.put("int4", "a", CONFIGS[0])
    other.put("int4", "b", CONFIGS[1])
    other.put("nf4", "a", CONFIGS[2])
    found = Choices(path)
    assert [found.get("int4", "a", CONFIGS), found.get("int4", "b", CONFIGS)] == CONFIGS[:2]
    assert found.get("nf4", "a", CONFIGS) == CONFIGS[2]
    assert found.get("nf4", "b", CONFIGS) is None


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choices = Choices(tmp_path / "file" / "choices.json")
    with pytest.warns(UserWarning, match="cannot keep which kernels are fastest"):
        choices.put("int4", "a", CONFIGS[1])
    assert choices.get("int4", "a", CONFIGS) == CONFIGS[1]


def test_row_buckets():
    assert [row_bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 2048, 2049)] == [1, 2, 4, 4, 8, 8, 16, 2048, 4096]


def test_reasons(monkeypatch: pytest.MonkeyPatch):
    assert unsupported_device(torch.device("cpu")) == "runs on NVIDIA GPUs, not on cpu"
    monkeypatch.setattr(launch, "unsupported_machine", unsupported_machine.__wrapped__)
    monkeypatch.setattr(launch, "triton", None)
    assert unsupported_device(CUDA) == "Triton is not installed"
    monkeypatch.setattr(launch, "triton", object())
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch.sysconfig, "get_paths", lambda: {"include": "nowhere"})
    assert "no Python.h" in unsupported_device(CUDA)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert unsupported_device(CUDA) == "Triton finds no C compiler"
    monkeypatch.setattr(launch, "unsupported_machine", lambda: None)
    assert unsupported_device(CUDA) == "PyTorch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert unsupported_device(CUDA) == "needs a GPU of compute capability 8.0 or higher"
