"""Measurements -> metrics.json, report.md and report.html."""

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitpress.eval.report import report

from ..checkpoints.coverage import coverage_of
from ..config.schema import Run
from ..data.text import Text
from ..formats import count_schemes, scheme_name
from ..hub.download import Source
from ..methods import options_of
from ..quantize.recipe import Recipe
from ..storage import files
from ..storage.checkpoint import Checkpoint, read_json
from ..storage.fingerprint import MANIFEST
from ..system.versions import versions
from .metrics import FORMAT_VERSION

BASELINE = "none"
NO_COVERAGE: dict[str, Any] = {"decoder_bytes": 0, "quantized_bytes": 0, "share": 0.0, "layers": [], "kept": []}
_NOT_COMPARED: dict[str, Any] = dict.fromkeys(
    (
        "baseline_perplexity", "baseline_perplexity_se", "perplexity_ratio", "perplexity_ratio_se", "kl_mean",
        "kl_mean_se", "kl_median", "kl_p99", "kl_max", "kl_mean_bound", "kl_token_bound", "top1_agreement",
        "top1_agreement_se", "rms_dp", "rms_dp_se",
    )
)  # fmt: skip


def _bits(nbytes: int, weights: int) -> float | None:
    return 8 * nbytes / weights if weights else None


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(prod(info.shape) for info in checkpoint.tensors.values())


def sizes(checkpoint: Checkpoint, coverage: dict[str, Any], parameters: int) -> dict[str, Any]:
    """Bytes on disk, and bits per weight: of quantized weights, of all decoder blocks, of everything.

    Args:
        coverage: of this checkpoint's files. parameters: of the model before it was quantized.
    """
    layers, kept = coverage["layers"], [entry for entry in coverage["kept"] if entry["block"] is not None]
    quantized = sum(prod(layer["shape"]) for layer in layers)
    quantized_bytes = sum(layer["bytes"] for layer in layers)
    decoder = quantized + sum(prod(entry["shape"]) for entry in kept)
    decoder_bytes = quantized_bytes + sum(entry["bytes"] for entry in kept)
    file_bytes = sum(file.stat().st_size for file in checkpoint.files)
    return {
        "file_bytes": file_bytes,
        "quantized_weights": quantized,
        "bits_per_weight": {
            "quantized": _bits(quantized_bytes, quantized),
            "decoder": _bits(decoder_bytes, decoder),
            "all": _bits(file_bytes, parameters),
        },
    }


@dataclass(frozen=True)
class Made:
    """How what is measured came about, in plain values as in metrics.json.

    checkpoint: where it is, unless it is the run's own artifact or the model itself.
    """

    name: str
    scheme: str
    method: str | None
    format: str | None
    parameters: int
    coverage: dict[str, Any]
    size: dict[str, Any]
    config: dict[str, Any]
    calibration: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None


def made_here(run: Run, source: Source, recipe: Recipe | None, folder: Path) -> Made:
    """Of a run: the artifact in `folder`, or the baseline where there is no recipe."""
    original = Checkpoint(source.folder)
    parameters, config = _parameters(original), run.model_dump(mode="json")
    if recipe is None:
        size = sizes(original, coverage_of(original), parameters)
        return Made(run.name, BASELINE, None, None, parameters, NO_COVERAGE, size, config)
    coverage = read_json(folder / "artifact" / MANIFEST)["coverage"]
    size = sizes(Checkpoint(folder / "artifact"), coverage, parameters)
    how = (recipe.scheme.name, recipe.method.name, recipe.format.name)
    return Made(run.name, *how, parameters, coverage, size, config, _learned(recipe))


def made_elsewhere(source: Source, baseline: Source | None, config: dict[str, Any]) -> Made:
    """Of a checkpoint, whoever made it: what its files tell."""
    checkpoint = Checkpoint(source.folder)
    coverage = coverage_of(checkpoint)
    entries = [*coverage["layers"], *coverage["kept"]]
    parameters = _parameters(Checkpoint(baseline.folder)) if baseline else sum(prod(x["shape"]) for x in entries)
    size = sizes(checkpoint, coverage, parameters)
    if baseline is None and not coverage["layers"]:
        return Made(source.id, BASELINE, None, None, parameters, NO_COVERAGE, size, config)
    scheme, format = _dtype(checkpoint), None
    if "quantization_config" in checkpoint.config:
        stored_as, counts = count_schemes(checkpoint)
        scheme, format = scheme_name(counts), stored_as.name
    return Made(source.id, scheme, None, format, parameters, coverage, size, config, checkpoint=source.to_dict())


def _dtype(checkpoint: Checkpoint) -> str:
    return str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))


def _learned(recipe: Recipe) -> dict[str, Any] | None:
    """The tokens that a method learned from, and its options."""
    if recipe.calibration is None:
        return None
    return {**recipe.calibration.to_dict(), "method": recipe.method.name, **options_of(recipe.method)}


def assemble(source: Source, text: Text, made: Made, measured: dict[str, Any]) -> dict[str, Any]:
    """metrics.json: what was measured, of what, how, and on what.

    Args:
        source: the unquantized model; where it is not known, what is measured itself.
        measured: from stages.evaluate, with "check", "seconds", "fingerprint" and "command".
    """
    checkpoint, told = Checkpoint(source.folder), asdict(made)
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            **source.to_dict(),
            "architecture": (checkpoint.config.get("architectures") or ["?"])[0],
            "parameters": told.pop("parameters"),
            "dtype": _dtype(checkpoint),
        },
        **told,
        "protocol": {
            "name": measured["protocol"]["name"],
            "text": text.name,
            "text_sha256": text.sha256,
            **measured["protocol"],
            "dtype": measured["dtype"],
        },
        "quality": {**_NOT_COMPARED, **measured["quality"]},
        "gates": None,
        "memory": measured["memory"],
        "speed": measured["speed"],
        "bandwidth": measured["bandwidth"],
        "energy_meter": measured["energy_meter"],
        "output_errors": measured["output_errors"],
        "tasks": measured["tasks"],
        "reload": measured["check"],
        "kernels": measured["kernels"] if made.scheme != BASELINE else {},
        "sample": measured["sample"],
        "machine": measured["machine"],
        "versions": versions(),
        "command": measured["command"],
        "seconds": measured["seconds"],
        "fingerprint": measured["fingerprint"],
    }


def write_report(folder: Path, runs: list[dict[str, Any]]) -> Path:
    """report.md and report.html for these metrics; returns the HTML's path."""
    files.write_text(folder / "report.md", report.markdown(runs))
    files.write_text(folder / "report.html", report.html(runs))
    return folder / "report.html"
