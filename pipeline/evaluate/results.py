"""Measurements -> metrics.json, results.csv, report.md and report.html."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitpress.eval.report import report, results

from ..checkpoints.coverage import coverage_of
from ..config.options import options_of
from ..config.schema import BASELINE, Run
from ..formats import count_schemes, open_quantized, quantization_section, quantized_cache, scheme_name
from ..hub.download import Source
from ..models.dtypes import computing_dtype
from ..quantize.recipe import Recipe
from ..storage import files
from ..storage.checkpoint import Checkpoint, read_json
from ..storage.fingerprint import MANIFEST, digest
from ..system.versions import versions
from .conditions import Conditions
from .metrics import FORMAT_VERSION

RESULTS = "results.csv"
MIXED = "mixed"  # in place of a scheme, where layers have several
NO_COVERAGE: dict[str, Any] = {"decoder_bytes": 0, "quantized_bytes": 0, "share": 0.0, "layers": [], "kept": []}
Refused = tuple[str, str, str]
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
    layers = coverage["layers"]
    quantized, quantized_bytes = sum(prod(layer["shape"]) for layer in layers), sum(layer["bytes"] for layer in layers)
    inside = [entry for entry in (*layers, *coverage["kept"]) if entry["block"] is not None]
    decoder, decoder_bytes = sum(prod(entry["shape"]) for entry in inside), sum(entry["bytes"] for entry in inside)
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
class Origin:
    """How the model that is measured came about, in plain values as in metrics.json.

    recipe: its name and its rules. checkpoint: where it is, unless it is the run's own artifact or the model itself.
    budget: what a budget chose, and the curve that it is of, see quantize/budget.py.
    distill: how distillation went, see quantize.distill.Distilled.to_dict. transform: its name and what it did for each
    group of layers, see transforms.base.Transformed. inputs: see quantize.inputs.InputError.
    """

    name: str
    scheme: str
    method: str | None
    format: str | None
    parameters: int
    coverage: dict[str, Any]
    size: dict[str, Any]
    config: dict[str, Any]
    recipe: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    checkpoint: dict[str, Any] | None = None
    budget: dict[str, Any] | None = None
    distill: dict[str, Any] | None = None
    transform: dict[str, Any] | None = None
    inputs: list[dict[str, Any]] | None = None


def origin_of_run(run: Run, source: Source, recipe: Recipe | None, folder: Path) -> Origin:
    """The origin of the artifact in `folder`, or of the baseline where there is no recipe."""
    original = Checkpoint(source.folder)
    parameters, config = _parameters(original), run.model_dump(mode="json")
    if recipe is None:
        size = sizes(original, coverage_of(original), parameters)
        return Origin(run.name, BASELINE, None, None, parameters, NO_COVERAGE, size, config)
    artifact = open_quantized(folder / "artifact")
    manifest = read_json(artifact.folder / MANIFEST)
    layers = manifest["coverage"]["layers"]
    schemes, methods = ({layer[key] for layer in layers} for key in ("scheme", "method"))
    schemes |= {_scheme_of_cache(artifact)} if not layers else set()
    calibration = None
    if recipe.calibration:
        specs = [spec for spec in recipe.specs() if spec.method.needs_calibration]
        options = {name: value for spec in specs for name, value in options_of(spec.method).items()}
        names = ", ".join(sorted({spec.method.name for spec in specs}))
        calibration = {**recipe.calibration.to_dict(), "method": names, **options}
    return Origin(
        name=run.name,
        scheme=schemes.pop() if len(schemes) == 1 else MIXED,
        method=", ".join(sorted(methods)),
        format=manifest["recipe"]["format"],
        parameters=parameters,
        coverage=manifest["coverage"],
        size=sizes(artifact, manifest["coverage"], parameters),
        config=config,
        recipe={"name": recipe.name, "layers": manifest["recipe"]["layers"]},
        budget=manifest.get("budget"),
        distill=manifest.get("distill"),
        transform={"name": recipe.transform.name, "groups": manifest["transform"]} if recipe.transform else None,
        inputs=manifest.get("inputs"),
        calibration=calibration,
    )


def _scheme_of_cache(checkpoint: Checkpoint) -> str:
    """What stands for a scheme where the key-value cache alone is quantized."""
    cache = quantized_cache(checkpoint)
    return f"kv-{cache.name}" if cache else BASELINE


def origin_of_external(source: Source, baseline: Source | None, config: dict[str, Any]) -> Origin:
    """The origin of a checkpoint that no run of bitpress made, as far as its files say."""
    checkpoint = open_quantized(source.folder)
    coverage = coverage_of(checkpoint)
    tensors = [*coverage["layers"], *coverage["kept"]]
    parameters = _parameters(Checkpoint(baseline.folder)) if baseline else sum(prod(x["shape"]) for x in tensors)
    size = sizes(checkpoint, coverage, parameters)
    if baseline is None and not coverage["layers"] and quantized_cache(checkpoint) is None:
        return Origin(source.id, BASELINE, None, None, parameters, NO_COVERAGE, size, config)
    scheme, format = computing_dtype(checkpoint), None
    if quantization_section(checkpoint) is not None:
        stored_as, counts = count_schemes(checkpoint)
        scheme, format = scheme_name(counts or [_scheme_of_cache(checkpoint)]), stored_as.name
    return Origin(source.id, scheme, None, format, parameters, coverage, size, config, checkpoint=source.to_dict())


def identity_of(checkpoint: Checkpoint) -> str:
    """What a model is, whatever its folder is called: a hash over its weights, its config and what lies beside them."""
    return digest(checkpoint.identity())[:16]


def telling_name(source: Source) -> str:
    """The id on the Hub; the last two parts of a local folder's path: many are called checkpoint-1000."""
    folder = source.folder.resolve()
    return source.id if source.id != folder.name else "/".join(folder.parts[-2:]).lstrip("/")


def assemble(source: Source, origin: Origin, conditions: Conditions, measured: dict[str, Any]) -> dict[str, Any]:
    """metrics.json: what was measured, of what, how, and on what.

    Args:
        source: the unquantized model; where it is not known, the checkpoint that is measured.
        measured: the answer of measure_task, with "reload", "seconds" and "fingerprint".
    """
    checkpoint, described = Checkpoint(source.folder), asdict(origin)
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            **source.to_dict(),
            "name": telling_name(source),
            "identity": identity_of(checkpoint),
            "architecture": (checkpoint.config.get("architectures") or ["?"])[0],
            "parameters": described.pop("parameters"),
            "dtype": computing_dtype(checkpoint),
        },
        **described,
        "protocol": {
            "name": measured["protocol"]["name"],
            "text": conditions.text,
            "text_sha256": conditions.text_sha256,
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
        "reload": measured["reload"],
        "kernels": measured["kernels"] if origin.scheme != BASELINE else {},
        "sample": measured["sample"],
        "warnings": measured["warnings"],
        "machine": measured["machine"],
        "versions": versions(),
        "command": conditions.command,
        "seconds": measured["seconds"],
        "fingerprint": measured["fingerprint"],
    }


def write_report(folder: Path, runs: Sequence[dict[str, Any]], refused: Sequence[Refused] = ()) -> Path:
    """report.md, report.html and results.csv for these metrics; returns the HTML's path.

    Args:
        refused: model, recipe and the reason of jobs that did not finish.
    """
    files.write_text(folder / "report.md", report.markdown(runs, refused))
    files.write_text(folder / "report.html", report.html(runs, refused))
    files.write_text(folder / RESULTS, results.as_csv(results.rows(runs)))
    return folder / "report.html"
