"""The library's functions, as small as the command line's."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoints.convert import convert as convert_checkpoint
from .config.load import calibration_of, load_eval, load_recipe
from .config.schema import RecipeSettings
from .errors import BitpressError, ConfigError
from .evaluate import process
from .formats import open_quantized
from .hub.download import resolve
from .models.loading import calibrate_on
from .models.loading import load as load_checkpoint
from .models.loading import optimize as pack_checkpoint
from .models.packed import Packing
from .objects import Artifact, Loaded, Measurements
from .publish.upload import Publication, prepare, send
from .quantize.artifact import quantize as quantize_checkpoint
from .quantize.budget import clean as clean_budgets
from .quantize.budget import search
from .quantize.imatrix import imatrix as write_imatrix
from .quantize.recipe import Recipe
from .storage import files, journal
from .storage.artifacts import require_tokenizer
from .storage.checkpoint import Checkpoint
from .storage.packed_file import remove_packed
from .system.device import pick_device
from .system.progress import OnStep, shown

__all__ = ["clean", "convert", "evaluate", "imatrix", "load", "optimize", "plan", "publish", "quantize"]


def quantize(
    model: str | Path,
    recipe: str | Mapping[str, Any] | RecipeSettings,
    output: str | Path,
    revision: str | None = None,
    device: str = "auto",
    on_step: OnStep | None = None,
    keep: str | Path | None = None,
    gpus: int = 1,
) -> Artifact:
    """Quantize a model into a folder that bitpress and other runtimes load; call again to go on after a crash.

    Args:
        model: a Hub id or a local folder.
        recipe: such as "int4-g128", "gptq/int3-channel", "int8-dynamic", "nf4", "4.25bits"; a Recipe; or the keys that
            a recipe has in a config: "scheme", or "budget" and "choices"; "method", "layers" ({"*.down_proj":
            "int8-g128", "model.layers.0.*": "none"}), "format", "options" (of the method), "calibration" ({"text":
            "wiki.txt", "windows": 64}), "max_fallback_layers", "fit_groups", "allow_split_fused".
        device: "cpu", "cuda" or "auto", for calibrated methods.
        on_step: called with (units done, units in all); by default a bar on a terminal and in a notebook.
        keep: a folder that keeps a budget's statistics and solutions, for other budgets; by default they are deleted.
        gpus: among which calibrated methods divide the layers of a block and batches of text; the bytes are the same.
    Returns:
        The artifact, with sentences on what happened on the way.
    Raises:
        BitpressError: what, got, expected, and what to do; nothing finished is lost.
    """
    _require_name(model)
    settings = load_recipe(recipe)
    chosen = Recipe.make(settings, device, gpus)
    source = resolve(str(model), revision)
    out = Path(output).expanduser()
    source.check_output(out)
    require_tokenizer(source.folder)
    work = out.with_name(f"{out.name}.partial")
    files.make_folder(work)
    with journal.locked(work):
        try:
            checkpoint, notes = Checkpoint(source.folder), []
            if chosen.calibrated:
                text = calibration_of(settings)
                tokens = calibrate_on(checkpoint, text)
                chosen, notes = replace(chosen, calibration=tokens), [f"calibrated on {tokens}"]
            shared = Path(keep).expanduser() if keep else None
            with shown(on_step, f"quantizing to {chosen.name}") as step:
                notes += quantize_checkpoint(checkpoint, source.to_dict(), chosen, out, work, step, shared)
        except BitpressError:
            files.remove_unused(work)
            raise
        files.remove_folder(work)
    return Artifact(out, chosen.name, notes)


def _require_name(model: Any) -> None:
    """Raises ConfigError for a model in memory, in place of the name of its files."""
    if isinstance(model, str | Path):
        return
    origin = getattr(model, "name_or_path", "")
    known = f"give {origin!r}, where it came from, or if it was changed since, " if origin else ""
    raise ConfigError(
        f"model is a {type(model).__name__}, expected a Hub id or a folder: weights are read from files, block by "
        f"block; {known}save it by model.save_pretrained(FOLDER) and tokenizer.save_pretrained(FOLDER), and give FOLDER"
    )


def load(
    model: str | Path,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernel: str = "auto",
    on_step: OnStep | None = None,
) -> Loaded:
    """A model of transformers and its tokenizer, from an artifact, a run's folder, any checkpoint or a Hub id.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        dtype: of activations and unquantized weights: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
        kernel: "auto", or the name of one kernel (see `bitpress list`), which then serves or raises.
        on_step: called with (quantized layers done, layers in all); by default a bar on a terminal and in a notebook.
    Raises:
        BitpressError: says what is wrong with the files, the options or the Hub.
    """
    _require_name(model)
    with shown(on_step, "loading") as step:
        return Loaded(*load_checkpoint(model, revision, device, dtype, kernel, step))


def optimize(
    model: str | Path,
    revision: str | None = None,
    dtype: str = "auto",
    user_cache: bool = False,
    on_step: OnStep | None = None,
) -> Packing:
    """Write a quantized checkpoint's packed weights beside it: `load` then maps them, on CPUs, and packs nothing.

    They are as large as the checkpoint, and no part of it: they are not published, and are not used any more once its
    files, this machine's instruction set or bitpress's layout change. `clean` deletes them.

    Args:
        model: a quantized checkpoint's folder, that of a run, or a Hub id.
        dtype: as for load, which uses them for that dtype.
        user_cache: write them into this user's cache, for a folder that cannot be written to.
        on_step: called with (quantized layers done, layers in all); by default a bar on a terminal and in a notebook.
    Raises:
        BitpressError: it is not quantized, no kernel here keeps packed weights, or the disk is full or read-only.
    """
    _require_name(model)
    with shown(on_step, "packing") as step:
        return pack_checkpoint(model, revision, dtype, user_cache, step)


def clean(folder: str | Path) -> list[Path]:
    """Delete what a run keeps for further budgets, and the packed weights of its artifacts, or of one checkpoint.

    Returns:
        The folders that were deleted.
    Raises:
        ConfigError: there is no such folder. LockedError: somebody is writing there.
    """
    run = Path(folder).expanduser()
    return clean_budgets(run) + remove_packed(run)


def plan(
    model: str | Path,
    recipe: str | Mapping[str, Any] | RecipeSettings,
    revision: str | None = None,
    device: str = "auto",
    on_step: OnStep = lambda done, total: None,
    keep: str | Path | None = None,
) -> dict[str, Any]:
    """What a budget would choose, and the curve of KL against bytes that it is of; no model is written.

    Args:
        recipe: as for quantize, with a budget. keep: as for quantize; a budget of the same folder then costs little.
        on_step: called with (steps done, steps in all).
    Returns:
        See quantize.budget.Choice.to_dict.
    Raises:
        BitpressError: as for quantize; or the recipe has no budget.
    """
    settings = load_recipe(recipe)
    chosen = Recipe.make(settings, device)
    if chosen.budget is None:
        raise ConfigError(f"{chosen.name} has no budget to plan for; give one, as in budget: 4.25 bits")
    source = resolve(str(model), revision)
    checkpoint = Checkpoint(source.folder)
    text = calibration_of(settings)
    tokens = calibrate_on(checkpoint, text)
    with tempfile.TemporaryDirectory(prefix="bitpress-") as folder:
        shared = Path(keep or folder).expanduser()
        return search(checkpoint, source.to_dict(), replace(chosen, calibration=tokens), shared, on_step).to_dict()


def evaluate(
    model: str | Path,
    revision: str | None = None,
    device: str = "auto",
    settings: dict[str, Any] | None = None,
    baseline: str | Path | None = None,
) -> Measurements:
    """Measure any checkpoint, quantized or not: perplexity, memory and speed, in a fresh process.

    Args:
        settings: the keys of a config's eval section, such as {"text": "wiki.txt", "context": 2048, "windows": 20}.
        baseline: the model that it was made from, a Hub id or a folder: how far it is from that is measured too.
    """
    _require_name(model)
    source = resolve(str(model), revision)
    original = resolve(str(baseline)).folder if baseline else None
    with tempfile.TemporaryDirectory(prefix="bitpress-") as folder:
        chosen = load_eval(settings or {})
        return Measurements(process.measure(source.folder, original, chosen, device, Path(folder)))


def convert(
    model: str | Path,
    to: str,
    output: str | Path,
    on_step: OnStep | None = None,
    template: str | Path | None = None,
) -> Artifact:
    """A quantized checkpoint in another format, its weights the same to the bit.

    Args:
        model: a folder, or a Hub id.
        to: a format, such as "compressed-tensors", "gptq" or "gptq-v2".
        template: to "gguf", a GGUF file of the unquantized model, for architectures that bitpress has no table of.
    Returns:
        The artifact, with sentences on what was done.
    Raises:
        BitpressError: why that format cannot hold it; nothing was written.
    """
    source = resolve(str(model))
    out = Path(output).expanduser()
    source.check_output(out)
    with shown(on_step, f"converting to {to}") as step:
        checkpoint, other = open_quantized(source.folder), Path(template).expanduser() if template else None
        return Artifact(out, to, convert_checkpoint(checkpoint, source.to_dict(), to, out, step, other))


def imatrix(
    model: str | Path,
    output: str | Path,
    calibration: Mapping[str, Any] | None = None,
    revision: str | None = None,
    device: str = "auto",
    on_step: OnStep | None = None,
) -> list[str]:
    """Write an importance matrix of a model for llama.cpp's own quantization (llama-quantize --imatrix).

    Args:
        model: a Hub id or a local folder, not quantized.
        output: the file; a name that ends in .dat gets the older form.
        calibration: {"text": "wiki.txt", "windows": 64, …}, as a recipe has it.
    Returns:
        Sentences on what was done.
    Raises:
        BitpressError: what, got, expected, and what to do; nothing was written.
    """
    source = resolve(str(model), revision)
    require_tokenizer(source.folder)
    checkpoint = Checkpoint(source.folder)
    settings = load_recipe({"method": "gptq", "scheme": "int4-g128", "calibration": dict(calibration or {})})
    tokens = calibrate_on(checkpoint, calibration_of(settings))
    with shown(on_step, "importance matrix") as step:
        notes = write_imatrix(checkpoint, tokens, Path(output).expanduser(), str(pick_device(device)), step)
    return [f"calibrated on {tokens}", *notes]


def publish(
    run: str | Path,
    repo: str,
    private: bool = False,
    dry_run: bool = False,
    override: bool = False,
    on_step: OnStep = lambda done, total: None,
) -> Publication:
    """Put a finished run on the Hub, with a model card; call again to go on after a failure.

    The token is the one in HF_TOKEN, or that of `hf auth login`. A receipt, publish.json, is left in the run's folder.

    Args:
        run: the folder of one recipe that `bitpress run` finished.
        repo: owner/name; made where there is none.
        private: of a repository that is made.
        dry_run: nothing is sent and nobody asked; the card is written to the run's folder.
        override: publish although a gate is missed; card and receipt say so.
        on_step: called with (files and tensors checked, all of them).
    Raises:
        BitpressError: what, got, expected, and what to do.
    """
    upload = prepare(Path(run).expanduser(), repo, override, on_step)
    return upload.publication("dry run") if dry_run else send(upload, private)
