"""What all tests share: no network, and seeded tiny checkpoints."""

import gc
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)

pytest_plugins = ("checkpoints", "dropped", "published_runs", "report_pages")  # of tests/fixtures

SaveModel = Callable[..., Path]
Edit = Callable[[Path, Callable[[dict[str, Tensor]], Any]], None]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets reach this machine only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the tests stay offline; refused to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test worked out of headers is worked out again by the next, and the user's cache is left alone."""
    monkeypatch.setattr("bitpress.pipeline.system.remembered.folder", lambda: None)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Every test begins as a program in a terminal does, and what the command line arranges ends with the test.

    Whoever runs the tests in the background may have Ctrl-C ignored.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook
    gc.unfreeze()


@pytest.fixture(scope="session")
def save_model() -> SaveModel:
    """save_model(config, folder): a seeded random model and a tokenizer of bytes, as transformers saves them."""

    from checkpoints import save_tokenizer  # of tests/fixtures, which pytest imports itself

    def save(
        config: PreTrainedConfig,
        folder: Path,
        dtype: torch.dtype = torch.bfloat16,
        max_shard_size: str = "5GB",
        seed: int = 0,
    ) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).to(dtype)
            for parameter in model.parameters():  # norms and biases start as constants, which hide mistakes
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        save_tokenizer(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_config() -> Callable[..., LlamaConfig]:
    """llama_config(key=value): the tiny Llama's config, some keys changed."""

    def make(**changes: Any) -> LlamaConfig:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
        return LlamaConfig(**{**shape, **heads, "bos_token_id": None, "eos_token_id": 255, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_llama(
    tmp_path_factory: pytest.TempPathFactory, save_model: SaveModel, llama_config: Callable[..., LlamaConfig]
) -> Path:
    """A whole checkpoint folder: bfloat16 Llama, tokenizer, generation config, licence. Read only; see copy_of."""
    folder = save_model(llama_config(), tmp_path_factory.mktemp("models") / "tiny-llama")
    GenerationConfig(max_new_tokens=8, eos_token_id=255).save_pretrained(folder)
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


@pytest.fixture(scope="session")
def sharded_llama(
    tmp_path_factory: pytest.TempPathFactory, save_model: SaveModel, llama_config: Callable[..., LlamaConfig]
) -> Path:
    """The same weights in several shards with an index. Read only; see copy_of."""
    folder = tmp_path_factory.mktemp("models") / "sharded-llama"
    return save_model(llama_config(), folder, max_shard_size="80KB")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """copy_of(folder): a copy to write in."""

    def copy(folder: Path, name: str | None = None) -> Path:
        return shutil.copytree(folder, tmp_path / (name or folder.name))

    return copy


@pytest.fixture(scope="session")
def edit_tensors() -> Edit:
    """edit_tensors(file, change): a safetensors file rewritten after `change` worked on its dict of tensors."""

    def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return edit
