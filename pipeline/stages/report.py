"""Measurements -> metrics.json, report.md and report.html."""

from math import prod
from pathlib import Path
from typing import Any

from bitpress.eval import report

from .. import store
from ..blocks import Names, skeleton
from ..checkpoint import Checkpoint, read_json
from ..config import Run
from ..methods import options_of
from ..metrics import FORMAT_VERSION
from ..recipe import MANIFEST, Recipe
from ..source import Source
from ..text import Text
from ..versions import versions

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


def sizes(source: Checkpoint, artifact: Checkpoint | None, coverage: dict[str, Any]) -> dict[str, Any]:
    """Bytes on disk, and bits per weight: of quantized weights, of all decoder blocks, of everything."""
    files = (artifact or source).files
    layers, kept = coverage["layers"], [entry for entry in coverage["kept"] if entry["block"] is not None]
    if artifact is None:
        names = Names(skeleton(source))
        infos = [i for i in source.tensors.values() if names.block(names.target(i.name).parameter) is not None]
        kept = [{"bytes": info.nbytes, "shape": info.shape} for info in infos]
    quantized = sum(prod(layer["shape"]) for layer in layers)
    quantized_bytes = sum(layer["bytes"] for layer in layers)
    decoder = quantized + sum(prod(entry["shape"]) for entry in kept)
    decoder_bytes = quantized_bytes + sum(entry["bytes"] for entry in kept)
    file_bytes = sum(file.stat().st_size for file in files)
    return {
        "file_bytes": file_bytes,
        "quantized_weights": quantized,
        "bits_per_weight": {
            "quantized": _bits(quantized_bytes, quantized),
            "decoder": _bits(decoder_bytes, decoder),
            "all": _bits(file_bytes, _parameters(source)),
        },
    }


def _learned(recipe: Recipe | None) -> dict[str, Any] | None:
    """The tokens that a method learned from, and its options."""
    if recipe is None or recipe.calibration is None:
        return None
    return {**recipe.calibration.to_dict(), "method": recipe.method.name, **options_of(recipe.method)}


def assemble(
    run: Run, source: Source, recipe: Recipe | None, text: Text, folder: Path, measured: dict[str, Any]
) -> dict[str, Any]:
    """metrics.json: what was measured, of what, how, and on what.

    Args:
        recipe: None for the baseline.
        measured: from stages.evaluate, with "check", "seconds" and "fingerprint".
    """
    checkpoint = Checkpoint(source.folder)
    artifact = Checkpoint(folder / "artifact") if recipe else None
    coverage = read_json(folder / "artifact" / MANIFEST)["coverage"] if recipe else NO_COVERAGE
    config = checkpoint.config
    return {
        "format_version": FORMAT_VERSION,
        "name": run.name,
        "model": {
            **source.to_dict(),
            "architecture": (config.get("architectures") or ["?"])[0],
            "parameters": _parameters(checkpoint),
            "dtype": str(config.get("dtype") or config.get("torch_dtype")),
        },
        "scheme": recipe.scheme.name if recipe else "none",
        "method": recipe.method.name if recipe else None,
        "calibration": _learned(recipe),
        "format": recipe.format.name if recipe else None,
        "protocol": {
            "name": measured["protocol"]["name"],
            "text": text.name,
            "text_sha256": text.sha256,
            **measured["protocol"],
            "dtype": measured["dtype"],
        },
        "quality": {**_NOT_COMPARED, **measured["quality"]},
        "gates": None,
        "size": sizes(checkpoint, artifact, coverage),
        "memory": measured["memory"],
        "speed": measured["speed"],
        "bandwidth": measured["bandwidth"],
        "energy_meter": measured["energy_meter"],
        "output_errors": measured["output_errors"],
        "tasks": measured["tasks"],
        "coverage": coverage,
        "reload": measured["check"],
        "kernels": measured["kernels"] if recipe else {},
        "sample": measured["sample"],
        "machine": measured["machine"],
        "versions": versions(),
        "config": run.model_dump(mode="json"),
        "command": measured["command"],
        "seconds": measured["seconds"],
        "fingerprint": measured["fingerprint"],
    }


def write_report(folder: Path, runs: list[dict[str, Any]]) -> Path:
    """report.md and report.html for these metrics; returns the HTML's path."""
    store.write_text(folder / "report.md", report.markdown(runs))
    store.write_text(folder / "report.html", report.html(runs))
    return folder / "report.html"
