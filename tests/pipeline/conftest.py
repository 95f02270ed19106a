"""What the tests of refusals and of resuming share."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from bitpress.pipeline.api import load, quantize
from bitpress.pipeline.checkpoint import read_json
from bitpress.pipeline.errors import BitpressError, CheckpointError
from bitpress.pipeline.methods import registry
from bitpress.pipeline.methods.absmax import Absmax

Refused = Callable[..., str]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Here and in fresh processes: the matrices are small, and threads would mostly wait for each other."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(was)


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
    """digests(folder): file name -> sha256."""
    return lambda folder: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


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
