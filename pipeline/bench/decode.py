"""Tokens per second of a user's own model: a prompt, then one token at a time; beside transformers and llama.cpp.

All take turns, round by round, so that what else the machine does meets each of them; medians are compared. llama.cpp
runs in a process of its own (scripts/llamacpp_decode_job.py), on a GGUF of the same integers.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from bitpress.eval.measure.speed import once

from .. import api
from ..checkpoints.convert import convert
from ..errors import BitpressError
from ..formats import open_quantized, quantization_section
from ..hub.download import resolve
from ..models.loading import kernels_used, load_dense, load_model
from ..models.structure import skeleton
from ..storage.checkpoint import Checkpoint
from ..system.device import pick_device
from .llamacpp import NAME, Worker
from .programs import Program

DENSE = "transformers bfloat16"
PHASES = ("prefill", "decode")
_WARM_UP = (16, 2)  # tokens of a prompt, and after it, before anything is timed
_DEVIATION = 0.02  # of random weights: that of most models' own initialization

News = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What everybody does: for each batch size, prompts of so many tokens, then `generate` more; `rounds` times."""

    batches: tuple[int, ...]
    prompt: int
    generate: int
    rounds: int


@dataclass
class Row:
    """One contender with one batch size. prefill, decode: tokens per second over the whole batch, a value a round."""

    name: str
    batch: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    problem: str | None = None

    def median(self, phase: str) -> float | None:
        """Tokens per second of a phase; None where nothing was measured."""
        samples = getattr(self, phase)
        return statistics.median(samples) if samples else None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Contender(Protocol):
    """One that runs the model. about: what else is worth knowing, such as its kernel."""

    name: str
    about: dict[str, Any]

    def run(self, batch: int, prompt: int, generate: int) -> tuple[float, float]:
        """Seconds of the prompts, and of generating after them.

        Raises:
            BitpressError: it could not.
        """
        raise NotImplementedError


class TorchModel:
    """A model in this process, on the CPU or a GPU."""

    def __init__(self, name: str, model: PreTrainedModel, about: dict[str, Any]):
        self.name, self.model, self.about = name, model.eval(), about

    @torch.inference_mode()
    def run(self, batch: int, prompt: int, generate: int) -> tuple[float, float]:
        words = int(self.model.config.get_text_config().vocab_size)
        ids = torch.randint(words, (batch, prompt), generator=torch.Generator().manual_seed(0))
        first, rest = once(self.model, ids.to(self.model.device), generate, None)
        return first.seconds, rest.seconds


class LlamaCppModel:
    """A GGUF in llama.cpp."""

    def __init__(self, program: Program, name: str, path: Path, job: Job):
        self.worker, self.name = Worker(program), name
        shape = {"batch": max(job.batches), "prompt": job.prompt, "generate": job.generate}
        try:
            self.about = self.worker.ask({"do": "load", "path": str(path), "threads": torch.get_num_threads(), **shape})
        except BaseException:
            self.worker.close()
            raise

    def run(self, batch: int, prompt: int, generate: int) -> tuple[float, float]:
        answer = self.worker.ask({"do": "run", "batch": batch, "prompt": prompt, "generate": generate})
        return answer["prefill"], answer["decode"]

    def close(self) -> None:
        self.worker.close()


@contextlib.contextmanager
def contenders(
    model: str, recipes: list[str], kernel: str, device: str, peer: Program | None, job: Job, folder: Path, news: News
) -> Iterator[list[Contender]]:
    """Those who take part: transformers first, then for each recipe bitpress, and llama.cpp where it is asked for.

    Args:
        model: a Hub id or a folder. An unquantized one is quantized to `recipes`; what is quantized runs as it is, and
            transformers runs a model of its shapes with random weights.
        peer: llama.cpp, with scripts/llamacpp_decode_job.py. It is left out, with news, where there is no GGUF of it.
        folder: for what is quantized and converted.
    Raises:
        BitpressError: the model, a recipe or the kernel cannot be used.
    """
    where = pick_device(device)
    checkpoint = open_quantized(resolve(model).folder)
    checkpoint.fetch()
    if quantization_section(checkpoint) is None:
        dense = load_dense(checkpoint, where, torch.bfloat16)
        artifacts = {}
        for number, recipe in enumerate(recipes):
            news(f"quantizing to {recipe}")
            artifacts[recipe] = api.quantize(model, recipe, folder / f"artifact-{number}", device=device).folder
    else:
        dense, artifacts = random_model(checkpoint, where), {checkpoint.folder.name: checkpoint.folder}
    with contextlib.ExitStack() as stack:
        everyone: list[Contender] = [TorchModel(DENSE, dense, {})]
        for number, (name, artifact) in enumerate(artifacts.items()):
            own = load_model(open_quantized(artifact), where, "bfloat16", kernel)
            everyone.append(TorchModel(f"bitpress {name}", own, kernels_used(own)))
            if peer is None:
                continue
            try:
                news(f"making a GGUF of {name}")
                gguf = folder / f"gguf-{number}"
                convert(open_quantized(artifact), {"id": model, "revision": None}, "gguf", gguf)
                contender = LlamaCppModel(peer, f"{NAME} {name}", gguf / "model.gguf", job)
            except BitpressError as error:
                news(f"{NAME} {name} is out: {error}")
            else:
                stack.callback(contender.close)
                everyone.append(contender)
        yield everyone


def random_model(checkpoint: Checkpoint, device: torch.device) -> PreTrainedModel:
    """The model of a checkpoint with random weights in bfloat16: as fast as the one that was quantized."""
    model = skeleton(checkpoint, torch.bfloat16)
    noise = torch.Generator().manual_seed(0)
    for path, parameter in list(model.named_parameters()):
        parent, _, name = path.rpartition(".")
        values = torch.randn(parameter.shape, generator=noise).mul_(_DEVIATION).to(parameter.dtype)
        setattr(model.get_submodule(parent), name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model.to(device)  # type: ignore[arg-type]


def measure(everyone: list[Contender], job: Job, news: News) -> Iterator[tuple[list[Row], bool]]:
    """After each measurement, the rows of its batch size so far, and whether these are complete.

    A contender that fails is out for that batch size; its row says why.
    """
    for batch in job.batches:
        rows = [Row(contender.name, batch) for contender in everyone]
        for number in range(job.rounds + 1):
            for contender, row in zip(everyone, rows):
                if row.problem:
                    continue
                prompt, generate = (job.prompt, job.generate) if number else (min(job.prompt, _WARM_UP[0]), _WARM_UP[1])
                try:
                    seconds = contender.run(batch, prompt, generate)
                except BitpressError as error:
                    row.problem = str(error)
                    news(f"batch {batch}: {row.problem}")
                    continue
                if not number:
                    continue
                for phase, tokens, each in zip(PHASES, (prompt, generate), seconds):
                    getattr(row, phase).append(batch * tokens / each)
                news(
                    f"batch {batch}, round {number} of {job.rounds}: {row.name}: prefill {row.prefill[-1]:.1f}, decode "
                    f"{row.decode[-1]:.1f} tokens/s"
                )
                last = number == job.rounds and all(len(each.decode) == number or each.problem for each in rows)
                yield rows, last


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """A header, and cells of the rows of one batch size: medians, lowest to highest, and ratios to the others.

    A ratio above 1 says that the row is the faster one.
    """
    others = [row for row in rows if not row.name.startswith("bitpress ")]
    header = ["tokens/s", "batch", *PHASES]
    header += [f"{phase} x {row.name.split()[0]}" for phase in PHASES for row in others]
    body = []
    for row in rows:
        cells = [row.name, str(row.batch)]
        for phase in PHASES:
            samples = getattr(row, phase)
            spread = f"{row.median(phase):.1f} ({min(samples):.1f}–{max(samples):.1f})" if samples else "–"
            cells.append("failed" if row.problem else spread)
        for phase in PHASES:
            for other in others:
                own, base = row.median(phase), other.median(phase)
                cells.append(f"{own / base:.2f}" if own and base and other is not row else "–")
        body.append(cells)
    return header, body
