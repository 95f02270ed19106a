"""The commands that make something: run, quantize, convert, publish."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..system.progress import progress, quiet_libraries
from .console import (
    command_line,
    news,
    out,
    print_json,
    print_line,
    print_table,
    protocol_sentence,
    show_traceback,
)
from .options import (
    DEFAULT_RECIPE,
    BudgetText,
    Choices,
    Context,
    Device,
    Dtype,
    Json,
    Keep,
    Revision,
    Seed,
    Windows,
    calibration_keys,
    recipe_keys,
)
from .plan import show_plans


class Redo(str, Enum):
    """Stages that a run can be told to do again, and with them what comes after."""

    quantize = "quantize"
    evaluate = "evaluate"


def _configs(typed: str) -> list[str]:
    """Names of shipped configs, and config files, that begin with what was typed."""
    from ..config.shipped import shipped

    here = [str(path) for path in Path().glob("*.yaml")]
    return [name for name in (*shipped(), *here) if name.startswith(typed)]


def run(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(help="Config files, or names of shipped ones; demo if none.", autocompletion=_configs),
    ] = None,
    set: Annotated[list[str] | None, typer.Option("--set", help="Override a key: eval.windows=10")] = None,
    override: Annotated[
        bool, typer.Option("--override", help="Accept what misses a gate; the report records it.")
    ] = False,
    redo: Annotated[
        Redo | None,
        typer.Option(
            help="evaluate: measure again, artifacts are kept; quantize: make the artifacts again too, as a changed "
            "recipe needs."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: few windows, little speed; into runs/NAME-quick.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the jobs will take, as `bitpress plan` does; do nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Quantize, save, reload, measure and report, for every model and recipe of the configs."""
    if dry_run:
        show_plans(configs or [Path("demo")], set, False, as_json, quick)
        return
    from ..config.load import load_config
    from ..quantize.recipe import problems
    from ..runs.folders import jobs_of
    from ..runs.plan import plan_run
    from ..runs.run import execute, summarize

    quiet_libraries()
    runs = [load_config(path, set, problems) for path in configs or [Path("demo")]]  # all are checked before any starts
    runs = [config.quick() for config in runs] if quick else runs
    plans = [plan_run(config, jobs_of(config)) for config in runs]
    for each in plans:
        each.check()
    everything = []
    for config, each in zip(runs, plans):
        outcomes = execute(config, command_line(), news, override, redo.value if redo else None, each)
        page = summarize(config, outcomes)
        everything += outcomes
        for outcome in outcomes:
            if outcome.error:
                show_traceback(outcome.error)
        if not as_json:
            _show_outcomes(outcomes, page)
    if as_json:
        print_json([_outcome_json(outcome) for outcome in everything])
    if codes := {outcome.error.exit_code for outcome in everything if outcome.error}:
        raise typer.Exit(codes.pop() if len(codes) == 1 else 1)


def _outcome_json(outcome: Any) -> dict[str, Any]:
    error = {"error": str(outcome.error)} if outcome.error else {}
    return {
        "model": outcome.model,
        "recipe": outcome.recipe,
        "folder": str(outcome.folder),
        **error,
        "artifact": str(outcome.artifact) if outcome.artifact else None,
        "published": outcome.published,
        "metrics": outcome.metrics,
    }


def _show_outcomes(outcomes: list[Any], page: Path | None) -> None:
    from bitpress.eval.report.report import summary_rows

    finished = [outcome.metrics for outcome in outcomes if outcome.metrics]
    if finished:
        out.print()
        print_table(*summary_rows(finished))
        for protocol in {protocol_sentence(metrics["protocol"]): None for metrics in finished}:
            print_line(f"\n{protocol}")
    warnings: dict[str, list[str]] = {}
    failures: dict[str, list[str]] = {}
    for outcome in outcomes:
        job = f"{outcome.model} {outcome.recipe}"
        for warning in (outcome.metrics or {}).get("warnings") or []:
            warnings.setdefault(warning, []).append(job)
        if outcome.error:
            failures.setdefault(str(outcome.error), []).append(job)
    for warning, jobs in warnings.items():
        print_line(f"\nwarning: {', '.join(jobs)}: {warning}")
    for reason, jobs in failures.items():
        sentence = escape(f"{', '.join(jobs)}: {reason}")
        out.print(f"\n[red]failed[/red]  {sentence}", highlight=False, soft_wrap=True)
    if artifacts := [outcome.artifact for outcome in outcomes if outcome.artifact]:
        print_line("\nartifacts, for `bitpress generate`, `chat`, `doctor`, `convert` and other programs:")
        for artifact in artifacts:
            print_line(f"  {artifact}")
    if page:
        print_line(f"\nreport: {page}")


def quantize(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="[transform+][method/]scheme: int4-g128 (by default), gptq/int3-channel, int8, 4.25bits, …; or "
            "its keys, as in a config: '{scheme: int4-g128, method: gptq}'. Other options are added to these."
        ),
    ] = None,
    budget: BudgetText = None,
    choice: Choices = None,
    keep: Keep = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="'*.down_proj=int8-g128' or 'model.layers.0.*=none' (kept); may be repeated, the last wins."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="auto: the first that holds every layer; or one of `bitpress list`.")
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float16, bfloat16 or float32, of what is not quantized, and of scales; auto: the model's own."
        ),
    ] = "auto",
    template: Annotated[
        Path | None, typer.Option(help="With --format gguf: a GGUF of the unquantized model, for what bitpress lacks.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="key=value, an option of the method; may be repeated.")
    ] = None,
    observer: Annotated[
        str,
        typer.Option(
            help="Of the range of int8-static's inputs: mse, percentile, minmax, or for each layer what is best."
        ),
    ] = "auto",
    kv_cache: Annotated[
        str | None,
        typer.Option(help="fp8, int8, int8-g64 or int4-g64: what keys and values are rounded to in attention's cache."),
    ] = None,
    keep_inputs: Annotated[
        str | None,
        typer.Option(help="5%: at most so many layers leave their inputs alone, those where rounding them costs most."),
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(min=1, help="Steps that train scales and norms, once all is quantized; the model is in memory."),
    ] = None,
    fit_groups: Annotated[
        bool, typer.Option("--fit-groups", help="Layers that the group size does not divide get a smaller one.")
    ] = False,
    allow_split_fused: Annotated[
        bool, typer.Option("--allow-split-fused", help="Parts of what servers fuse, such as q, k and v, may differ.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="The text for calibrated methods: a file, or org/name:config:split; wikitext-2 by default."),
    ] = None,
    windows: Windows = None,
    context: Context = None,
    seed: Seed = None,
    no_sequential: Annotated[
        bool,
        typer.Option(
            "--no-sequential",
            help="Calibrated methods learn from the unquantized model; a budget packs what it searched.",
        ),
    ] = False,
    max_fallback_layers: Annotated[
        int, typer.Option(min=0, help="Layers that may fall back to rounding to nearest.")
    ] = 0,
    device: Device = "auto",
    gpus: Annotated[
        int,
        typer.Option(min=1, help="GPUs among which calibrated methods divide a block's layers and batches of text."),
    ] = 1,
    revision: Revision = None,
) -> None:
    """Quantize one checkpoint into a folder that other runtimes load too."""
    from ..api import quantize as quantize_api
    from ..checkpoints.doctor import remember_headers
    from ..config.load import load_layers, load_options
    from ..config.schema import RecipeSettings

    quiet_libraries()
    settings = recipe_keys(recipe, budget, choice)
    typed = {
        "format": format, "dtype": dtype, "observer": observer, "sequential": not no_sequential,
        "max_fallback_layers": max_fallback_layers, "fit_groups": fit_groups, "allow_split_fused": allow_split_fused,
        "template": str(template) if template else None, "kv_cache": kv_cache, "distill": distill,
    }  # fmt: skip
    settings |= {key: value for key, value in typed.items() if value != RecipeSettings.model_fields[key].default}
    settings |= load_options([f"keep_inputs={keep_inputs}"] if keep_inputs else [])
    parts = {"layers": load_layers(layer or []), "options": load_options(option or [])}
    parts |= calibration_keys(calibration, windows, context, seed)
    settings |= {key: {**(settings.get(key) or {}), **values} for key, values in parts.items() if values}
    name = budget or settings.get("name") or recipe or DEFAULT_RECIPE
    name += f", key-value cache {kv_cache}" if kv_cache else ""
    with progress(f"quantizing to {name}") as step:
        artifact = quantize_api(model, settings, output, revision, device, step, keep, gpus)
    remember_headers(artifact.folder)
    for note in artifact.notes:
        news(note)
    print_line(f"{output}: {name}; try `bitpress eval {output}`")


def clean(
    run: Annotated[Path, typer.Argument(help="The folder of a run: runs/NAME; or of one checkpoint.")],
) -> None:
    """Delete what can be made again: a run's statistics, solutions and costs for further budgets, and packed weights.
    Artifacts and reports stay."""
    from ..api import clean as clean_api

    deleted = clean_api(run.expanduser())
    for folder in deleted:
        print_line(f"deleted {folder}")
    if not deleted:
        print_line(f"{run} keeps nothing for further budgets, and no packed weights")


def convert(
    model: Annotated[str, typer.Argument(help="A quantized folder, or a Hub id.")],
    to: Annotated[
        str,
        typer.Option(help="A format of `bitpress list`, such as gptq, compressed-tensors or gguf; or onnx."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    template: Annotated[
        Path | None, typer.Option(help="With --to gguf: a GGUF of the unquantized model, for what bitpress lacks.")
    ] = None,
) -> None:
    """A quantized checkpoint in another format, its weights the same to the bit, or a refusal that says why."""
    from ..api import convert as convert_api
    from ..formats import registry

    quiet_libraries()
    with progress(f"converting to {to}") as step:
        artifact = convert_api(model, to, output, step, template)
    for note in artifact.notes:
        news(note)
    print_line(f"{output}: {to}" + (f"; try `bitpress doctor {output}`" if to in registry() else ""))


def optimize(
    model: Annotated[str, typer.Argument(help="A quantized folder, that of a run, or a Hub id.")],
    dtype: Dtype = "auto",
    user_cache: Annotated[
        bool, typer.Option("--user-cache", help="Write into your own cache, for a folder that cannot be written to.")
    ] = False,
    revision: Revision = None,
) -> None:
    """Write a checkpoint's packed weights beside it, so that loading it on this CPU maps them, and packs nothing.

    They are as large as the checkpoint, and no part of it; clean deletes them.
    """
    from bitpress.eval.report.words import size

    from ..api import optimize as optimize_api

    quiet_libraries()
    with progress("packing") as step:
        packing = optimize_api(model, revision, dtype, user_cache, step)
    for layer, why in packing.left.items():
        news(f"read as before: {layer}, {why}")
    print_line(f"{packing.path}: {packing.layers} layers, {size(packing.nbytes)}")


def imatrix(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder, not quantized.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to make: .gguf, or .dat for the older form.")
    ],
    calibration: Annotated[
        str | None, typer.Option(help="The text: a file, or org/name:config:split; wikitext-2 by default.")
    ] = None,
    windows: Windows = None,
    context: Context = None,
    seed: Seed = None,
    device: Device = "auto",
    revision: Revision = None,
) -> None:
    """An importance matrix for llama.cpp's own quantization, from calibration text: llama-quantize --imatrix."""
    from ..api import imatrix as imatrix_api

    quiet_libraries()
    keys = calibration_keys(calibration, windows, context, seed)
    with progress("importance matrix") as step:
        notes = imatrix_api(model, output, keys.get("calibration"), revision, device, step)
    for note in notes:
        news(note)
    print_line(f"{output}: for llama-quantize --imatrix {output}")


def publish(
    run: Annotated[Path, typer.Argument(help="The folder of one finished recipe: runs/NAME/RECIPE.")],
    repo: Annotated[str, typer.Option(help="owner/name on the Hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go up, and write the card.")] = False,
    override: Annotated[bool, typer.Option("--override", help="Although it misses a gate; the card says so.")] = False,
) -> None:
    """Put a finished run on the Hugging Face Hub, with a model card; again, to go on where it broke off."""
    from bitpress.eval.report.words import size

    from ..api import publish as publish_api

    quiet_libraries()
    with progress("checking") as step:
        publication = publish_api(run, repo, private, dry_run, override, step)
    print_table(["file", "size"], [[name, size(nbytes)] for name, nbytes in publication.files.items()])
    for name, why in publication.left_out.items():
        news(f"stays here: {name}, {why}")
    for sentence in publication.missed:
        news(f"gate missed (overridden): {sentence}")
    where = f"{publication.repo}; its card is {publication.card}"
    if publication.url:
        where = f"{publication.url} at {publication.revision}"
    print_line(f"\n{publication.state}: {where}")
