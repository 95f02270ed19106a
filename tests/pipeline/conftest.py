"""What the tests of refusals and of resuming share."""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import transformers
from pydantic import Field
from pydantic.dataclasses import dataclass
from transformers import AutoModelForCausalLM

from bitpress.pipeline import store
from bitpress.pipeline.api import load, quantize
from bitpress.pipeline.calibration import Calibration
from bitpress.pipeline.checkpoint import Checkpoint, read_json
from bitpress.pipeline.errors import BitpressError, CheckpointError
from bitpress.pipeline.methods import registry
from bitpress.pipeline.methods.absmax import Absmax
from bitpress.pipeline.recipe import Recipe
from bitpress.pipeline.stages.quantize import quantize as quantize_checkpoint

Refused = Callable[..., str]

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# all experts serve every token: choosing some would jump at a rounding error
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
GLOBAL_AND_LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2, "num_heads": 4}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt2": ("GPT2Config", GPT),
    "gpt_neo": ("GPTNeoConfig", GLOBAL_AND_LOCAL),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "falcon": ("FalconConfig", {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": True}),
    "mixtral": ("MixtralConfig", MOE),
    "qwen2_moe": ("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"head_dim": 16}),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Here and in fresh processes: the matrices are small, and threads would mostly wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(was)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn."""
    return request.param


def save_tiny(name: str, folder: Path, **changes: Any) -> Path:
    """A seeded random model of an architecture, saved as transformers saves it."""
    kind, extra = ARCHITECTURES[name]
    base = SMALL if "n_embd" not in extra else {"vocab_size": 96}
    config = getattr(transformers, kind)(**{**base, **extra, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config).to(torch.float32)
        for parameter in model.parameters():  # biases and norms start as constants, which hide mistakes
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(architecture, key=value): the folder of a float32 model, some keys of its config changed. Read only."""
    made: dict[str, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        key = f"{name} {changes}"
        if key not in made:
            made[key] = save_tiny(name, tmp_path_factory.mktemp(name), **changes)
        return made[key]

    return make


@dataclass(frozen=True)
class Student:
    """A method that needs calibration and has options."""

    name: ClassVar[str] = "student"
    version: ClassVar[int] = 1
    needs_calibration: ClassVar[bool] = True
    damping: float = Field(0.01, gt=0)
    order: Literal["plain", "activation"] = "plain"

    problems = Absmax.problems
    quantize = Absmax.quantize


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method "student" is registered."""
    for name in ("bitpress.pipeline.methods.registry", "bitpress.pipeline.recipe.methods"):
        monkeypatch.setattr(name, lambda: {**registry(), "student": Student()})


@pytest.fixture
def source(tiny_llama: Path, copy_of: Callable[..., Path]) -> Path:
    """A tiny Llama to damage."""
    return copy_of(tiny_llama, "source")


@pytest.fixture
def digests() -> Callable[[Path], dict[str, str]]:
    """digests(folder): file name -> sha256, of what is in a folder and not a folder itself."""
    return lambda folder: {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()
    }


@pytest.fixture
def learn() -> Callable[..., list[str]]:
    """learn(source, out, field=value): notes of the stage, by gptq from four windows of 16 tokens, some fields of the
    recipe changed; its work folder, <out>.partial, stays."""

    def press(source: Path, out: Path, on_step: Any = lambda done, total: None, **changes: Any) -> list[str]:
        ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(changes.pop("seed", 0)))
        recipe = Recipe.make(changes.pop("scheme", "int4-g32"), "gptq", algorithm=changes.pop("algorithm", None))
        recipe = replace(recipe, **{"calibration": Calibration("a text", ids, 0), **changes})
        work = out.with_name(f"{out.name}.partial")
        store.make_folder(work)
        return quantize_checkpoint(Checkpoint(source), {}, recipe, out, work, on_step)

    return press


@pytest.fixture
def refused() -> Refused:
    """refused(folder, said): the message, `said` in it, with which quantize refuses a checkpoint."""

    def check(folder: Path, said: str, kind: type[BitpressError] = CheckpointError, **options: Any) -> str:
        out = folder.parent / "refused"
        with pytest.raises(kind) as caught:
            quantize(folder, options.pop("scheme", "int4-g32"), out, **options)
        assert said in str(caught.value), str(caught.value)
        assert not out.exists()
        return str(caught.value)

    return check


@pytest.fixture
def refused_early(refused: Refused) -> Refused:
    """As refused, and before the first file of the output was made."""

    def check(folder: Path, said: str, *arguments: Any, **options: Any) -> str:
        message = refused(folder, said, *arguments, **options)
        assert not folder.with_name("refused.partial").exists()
        return message

    return check


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """edit_json(path, key=value): a JSON file with some keys changed."""
    return lambda path, **changes: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def kept() -> Callable[[Path], dict[str, str]]:
    """kept(artifact): tensor -> why the manifest says that it was kept."""
    return lambda folder: {e["name"]: e["reason"] for e in read_json(folder / "bitpress.json")["coverage"]["kept"]}


@pytest.fixture
def logits() -> Callable[[Path], torch.Tensor]:
    """logits(folder): float64, flat, of a model loaded from its folder and given the first 32 tokens."""

    @torch.inference_mode()
    def compute(folder: Path) -> torch.Tensor:
        return load(folder)[0](torch.arange(32).unsqueeze(0)).logits.flatten().double()

    return compute


@pytest.fixture
def die_at() -> Callable[[int], None]:
    """die_at(call), in a fork: SIGKILL at that write, fsync or rename; a write gets half of its bytes to the disk."""

    def die(call: int) -> None:
        count = 0

        def deadly(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any) -> Any:
                nonlocal count
                count += 1
                if count == call:
                    if name == "_write":
                        original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments)

            return step

        for name in ("_write", "_fsync", "_replace"):
            setattr(store, name, deadly(name, getattr(store, name)))

    return die
