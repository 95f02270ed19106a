"""llama.cpp's k-quants as entrants of the quality benchmark, with an importance matrix, by llama.cpp's own logits.

The model is written as a GGUF file as it is, and llama_model_quantize makes the others of it. The importance matrix is
that of `bitpress imatrix`, which is what llama.cpp's own tool makes: the mean square of each input of each layer in the
blocks, over the calibration tokens. What is measured is the text's windows, token by token the logits that llama.cpp
computes, against those of the unquantized model in bitpress. llama.cpp rounds inputs to 8 bits as it multiplies, and
that is in the figures.
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from bitpress.eval.measure import scores, statistics
from bitpress.eval.report.quality_page import Row

from ..data.text import read_text
from ..errors import ConfigError, listing, nearest
from ..evaluate.windows import windows
from ..formats import registry
from ..models.loading import load_model
from ..models.pretrained import load_tokenizer
from ..models.structure import skeleton
from ..quantize.imatrix import importances
from ..storage import files
from ..storage.checkpoint import Checkpoint
from ..storage.fingerprint import Fingerprint, digest
from ..storage.gguf.file import read_gguf
from ..system.device import pick_device
from ..system.progress import progress
from .llamacpp import NAME, Worker, find
from .programs import Program
from .quality import Comparison

TYPES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q6_K")
QUICK_TYPES = ("Q4_K_M",)
_FORMAT, _FILE = "gguf", "model.gguf"
_FIGURES = ("kl_mean", "kl_mean_se", "perplexity", "perplexity_ratio", "top1_agreement")


@dataclass(frozen=True)
class KQuant:
    """One type of llama.cpp's."""

    peer: Program
    recipe: str
    program: str = NAME

    def fingerprint(self) -> Fingerprint:
        return {"program": self.program, "type": self.recipe, "importance": "mean square of inputs, blocks alone"}

    def measure(self, comparison: Comparison, folder: Path) -> Row:
        with contextlib.ExitStack() as stack:
            worker = Worker(self.peer)
            stack.callback(worker.close)
            begun, output = _unquantized(comparison), folder / f"{self.recipe}.gguf"
            paths = {"source": str((begun / _FILE).resolve()), "output": str(output.resolve())}
            paths["importance"] = str(_importance(comparison, begun).resolve())
            options = {"type": self.recipe, "threads": torch.get_num_threads()}
            answer = worker.ask({"do": "quantize", **paths, **options})
            start = time.perf_counter()
            quality = _measured(comparison, worker, output, folder)
            whole = read_gguf(begun / _FILE)
            header = (begun / _FILE).stat().st_size - sum(tensor.nbytes for tensor in whole.tensors.values())
            nbytes = output.stat().st_size - header  # the header grows by the types' names, which counts as weights
            output.unlink()
        parameters = sum(prod(info.shape) for info in Checkpoint(comparison.source.folder).tensors.values())
        return Row(
            program=self.program,
            recipe=self.recipe,
            versions=answer["versions"],
            nbytes=nbytes,
            bits_per_weight=8 * nbytes / parameters,
            **{key: quality[key] for key in _FIGURES},
            seconds={"quantize": answer["seconds"], "measure": time.perf_counter() - start},
            notes=["llama.cpp's own logits, with an importance matrix; its rounding of inputs is in the KL"],
        )


def entrants(pythons: list[str], types: list[str]) -> list[KQuant]:
    """An entrant for each type; [] where llama.cpp is not installed and no Python is named that has it.

    Raises:
        ConfigError: a type that is none of TYPES; see find, too.
    """
    for name in types:
        if name not in TYPES:
            raise ConfigError(f"{NAME} {name}: expected one of {', '.join(TYPES)}{nearest(name, TYPES)}")
    program = find(pythons, "llamacpp_quantize_job.py")
    return [KQuant(program, name) for name in types] if program.installed() else []


def _unquantized(comparison: Comparison) -> Path:
    """The folder with the model as a GGUF file, as its files have it; written once.

    Raises:
        ConfigError: llama.cpp has no such model.
    """
    checkpoint = Checkpoint(comparison.source.folder)
    folder = comparison.folder / f"gguf-{digest(checkpoint.identity())[:8]}"
    if (folder / _FILE).exists():
        return folder
    format = registry()[_FORMAT]
    if problems := format.checkpoint_problems(checkpoint, {}):
        raise ConfigError(f"{checkpoint.folder.name} cannot be saved as {_FORMAT}:\n{listing(problems)}")
    files.make_folder(folder)
    writer = format.writer(folder, skeleton(checkpoint).dtype, 1)
    for name in checkpoint.tensors:
        writer.add(name, checkpoint.read(name))
    writer.adopt(writer.cut(0).write())
    writer.close(checkpoint.config, {}, checkpoint.other_files())
    return folder


def _importance(comparison: Comparison, folder: Path) -> Path:
    """The importance matrix, by llama.cpp's names of the layers, float32 [in] each; gathered once."""
    path = folder / f"importance-{digest(comparison.calibration.to_dict())[:8]}.npz"
    if path.exists():
        return path
    device = str(pick_device(comparison.conditions.device))
    with progress("the importance matrix") as step:
        every = importances(Checkpoint(comparison.source.folder), comparison.calibration.ids, device, step)
    arrays: dict[str, Any] = {name: own.means.ravel() for name, own in every.items()}  # experts one after the other
    temporary = path.with_suffix(".tmp.npz")
    numpy.savez(temporary, **arrays)
    temporary.replace(path)
    return path


class _LlamaCppModel(nn.Module):
    """A model in another process, which gives logits as a model of transformers does."""

    def __init__(self, worker: Worker, path: Path, context: int, scratch: Path):
        super().__init__()
        self.worker, self.scratch = worker, scratch
        options = {"threads": torch.get_num_threads(), "context": context}
        worker.ask({"do": "load", "path": str(path.resolve()), **options})

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        path = self.scratch / "logits.npy"
        self.worker.ask({"do": "logits", "ids": input_ids[0].tolist(), "output": str(path.resolve())})
        logits = torch.from_numpy(numpy.load(path)).to(input_ids.device)
        path.unlink()
        return SimpleNamespace(logits=logits.unsqueeze(0))


def _measured(comparison: Comparison, worker: Worker, path: Path, scratch: Path) -> Mapping[str, Any]:
    """The figures of a GGUF file, from llama.cpp's logits on the comparison's windows."""
    settings, checkpoint = comparison.conditions.settings, Checkpoint(comparison.source.folder)
    baseline = load_model(checkpoint, pick_device(comparison.conditions.device), settings.dtype)
    plan = windows(read_text(settings.text), load_tokenizer(checkpoint.folder), settings, baseline.config)
    text = [window.to(baseline.device) for window in plan.windows]
    model = _LlamaCppModel(worker, path, max(len(window.ids) for window in text), scratch)
    with progress("llama.cpp's divergence") as step:
        every = scores.compare(baseline, model, text, on_step=step)
    return statistics.summarize(every, plan.units)
