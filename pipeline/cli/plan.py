"""What something will take, before it is done: the jobs of a config, or the layers of a budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..system.collector import collector_paused
from ..system.progress import progress, quiet_libraries
from .console import news, print_json, print_line, print_table
from .options import (
    BudgetText,
    Choices,
    Context,
    Device,
    Json,
    Keep,
    Revision,
    Windows,
    calibration_keys,
    recipe_keys,
)

_LOADS = {
    "yes": "loads in",
    "limited": "loads with limits in",
    "unknown": "not known to load in",
    "no": "does not load in",
}
_SHOWN = 3  # reasons, or names of tensors, of which the rest is counted


def plan(
    subject: Annotated[str, typer.Argument(help="A config; or, with --budget, a Hub id or a local folder.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", help="Of a config: override a key, eval.windows=10.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Of a config: measure this machine for ten seconds, for the times.")
    ] = False,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Of a config: what the jobs take on so many machines, by Ray.")
    ] = None,
    budget: BudgetText = None,
    method: Annotated[str | None, typer.Option(help="That solves each layer; gptq by default.")] = None,
    choice: Choices = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="'*.down_proj=int8-g128': what has no choice; may be repeated.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="auto, or one of `bitpress list`.")] = None,
    calibration: Annotated[str | None, typer.Option(help="The text: a file, or org/name:config:split.")] = None,
    windows: Windows = None,
    context: Context = None,
    seed: Annotated[str | None, typer.Option(help="Draws the windows; 0 by default.")] = None,
    keep: Keep = None,
    device: Device = "auto",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """What the jobs of a config will take, or what a budget would choose for each layer of a model.

    For a config, only headers are read. For a budget, layers are solved and weighed: that gives the curve of KL against
    size. No model is written.
    """
    settings: dict[str, Any] = {
        "--method": method,
        "--choice": choice,
        "--layer": layer,
        "--format": format,
        "--keep": keep,
    }
    settings |= {"--calibration": calibration, "--windows": windows, "--context": context, "--seed": seed}
    settings |= {"--revision": revision, "--device": None if device == "auto" else device}
    if budget is None:
        if named := [flag for flag, value in settings.items() if value]:
            raise ConfigError(
                f"{', '.join(named)}: of a budget, and {subject} is planned as a config; give --budget, as in "
                "--budget 4.25bits, or change the config by --set"
            )
        show_plans([Path(subject)], set, measure, as_json, nodes=nodes)
        return
    if set or measure or nodes:
        raise ConfigError("--set, --measure and --nodes are for a config, --budget is for a model; give one of the two")
    from bitpress.eval.report.tables import budget_tables

    from ..api import plan as plan_api
    from ..config.load import load_layers

    quiet_libraries()
    keys = {**recipe_keys(None, budget, choice), "format": format or "auto", "layers": load_layers(layer or [])}
    keys |= ({"method": method} if method else {}) | calibration_keys(calibration, windows, context, seed)
    with progress("solving and probing layers") as step:
        chosen = plan_api(subject, keys, revision, device, step, keep)
    if as_json:
        print_json(chosen)
        return
    for title, header, rows, note in budget_tables("", chosen):
        print_line(f"\n{title}")
        print_table(header, rows)
        print_line(f"\n{note}")


def recommend(
    model: Annotated[str, typer.Argument(help="A Hub id or a local folder.")],
    memory: Annotated[str, typer.Option(help="For weights, cache and the rest: 6GB, 8GiB.")],
    target: Annotated[str | None, typer.Option("--for", help="vllm, llama.cpp, mac or cpu; any by default.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 4096,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Which recipe to start with for so much memory, and why; and what is not known."""
    with collector_paused():
        from ..runs.recommend import recommend as choose

    quiet_libraries()
    recommendation = choose(model, memory, target, context, revision)
    if as_json:
        print_json(recommendation.to_dict())
        return
    from bitpress.eval.report.words import size, small

    chosen = recommendation.chosen
    print_line(f"{model}, {memory}: {chosen.recipe if chosen else 'no recipe'}")
    for sentence in recommendation.why:
        print_line(f"    {sentence}")
    if recommendation.command:
        print_line(f"\n    {recommendation.command}\n")
    rows = [
        [
            option.recipe,
            small(option.kl),
            size(option.nbytes),
            size(option.memory),
            option.format,
            option.unsupported or ("" if option.loads == "yes" else f"{option.runtime}: {'; '.join(option.notes)}"),
        ]
        for option in recommendation.options
    ]
    print_table(["recipe", "mean KL where measured", "weights", "memory", "format", "why not, or its limits"], rows)
    print_line("\nnot known:")
    for sentence in recommendation.unknown:
        print_line(f"    {sentence}")


def show_plans(
    configs: Sequence[Path],
    overrides: list[str] | None,
    measured: bool,
    as_json: bool,
    quick: bool = False,
    nodes: int | None = None,
) -> None:
    """Print what the jobs of each config will take.

    Args:
        measured: times are those of this machine, which is measured for ten seconds.
        quick: of the short form of each config. nodes: how many machines to simulate; None for none.
    Raises:
        BitpressError: the first config with which `bitpress run` would not begin, once all are printed.
    """
    with collector_paused():
        from ..config.load import load_config
        from ..quantize.recipe import problems
        from ..runs.folders import jobs_of
        from ..runs.plan import ASSUMPTIONS, measure_rates, plan_run
        from ..runs.rates import STATED

    quiet_libraries(weights=False)
    runs = [load_config(path, overrides, problems) for path in configs]
    runs = [run.quick() for run in runs] if quick else runs
    plans = [plan_run(run, jobs_of(run)) for run in runs]
    if measured:
        news("measuring this machine for about ten seconds")
    rates = measure_rates(plans) if measured else STATED
    if as_json:
        print_json([plan.to_dict(rates, nodes) for plan in plans])
    else:
        for plan in plans:
            _show(plan, rates)
            if nodes:
                _show_nodes(plan, rates, nodes)
        print_line(f"\ntimes are estimates: {rates.machine}; {'; '.join(ASSUMPTIONS)}")
        if not measured:
            print_line("--measure takes ten seconds and uses this machine's own figures")
    for plan in plans:
        plan.check()


def _show_nodes(plan: Any, rates: Any, nodes: int) -> None:
    from bitpress.eval.report.words import percent, seconds

    from ..runs.plan import NODE_ASSUMPTIONS, simulate

    schedule = simulate(plan.jobs, rates, nodes)
    if schedule is None:
        print_line("\non several machines: not known, as the time of some job is not")
        return
    print_line(
        f"\non {nodes} machines: {seconds(schedule.seconds)}, in place of {seconds(schedule.serial)} on one; they work "
        f"{percent(schedule.busy, 0)} of the time; {schedule.last} ends last"
    )
    print_line(f"a simulation: {'; '.join(NODE_ASSUMPTIONS)}")


def _show(plan: Any, rates: Any) -> None:
    from bitpress.eval.report.words import seconds, size

    print_line(f"{plan.run.name}: {len(plan.jobs)} jobs in {plan.folder}\n")
    rows = []
    for job in plan.jobs:
        took = job.seconds(rates)
        rows.append(
            [
                f"{job.model}  {job.recipe}",
                "cannot be done" if job.problem else job.state,
                job.format or "",
                str(len(job.files)) if job.files else "",
                size(job.nbytes) if job.files else "",
                size(max(job.memory.values())) if job.memory else "",
                size(job.disk) if job.disk else "",
                "?" if took is None else seconds(took),
            ]
        )
    print_table(["job", "state", "format", "files", "artifact", "peak memory", "disk", "time"], rows)
    details = {f"{job.model}  {job.recipe}": _details(job) for job in plan.jobs}
    many = [lines for lines in details.values() if lines]
    common = [line for line in many[0] if all(line in lines for lines in many)] if len(many) > 1 else []
    for heading, lines in {"every recipe": common, **details}.items():
        if own := [line for line in lines if line not in common or lines is common]:
            print_line(f"\n{heading}")
            for line in own:
                print_line(f"    {line}")
    for model in plan.absent:
        print_line(
            f"\n{model} is not on this machine, so nothing is known of its jobs; `bitpress run` downloads it first"
        )
    for fault in plan.problems():
        print_line(f"\nwanting: {fault}")


def _details(job: Any) -> list[str]:
    """Sentences on a job: who loads its artifact, what its cache takes, what is kept and why."""
    from bitpress.eval.report.words import size

    lines = [f"cannot be done: {job.problem}"] if job.problem else []
    lines += [f"not known: {sentence}" for sentence in job.unknown]
    loading: dict[str, list[str]] = {level: [] for level in _LOADS}
    for name, verdict in job.runtimes.items():
        loading[verdict["loads"]].append(name)
    lines += [f"{_LOADS[level]}: {', '.join(names)}" for level, names in loading.items() if names]
    lines += [
        f"key-value cache, {name}: {', '.join(f'{size(n)} at {int(tokens):,} tokens' for tokens, n in sizes.items())}"
        for name, sizes in job.cache.items()
    ]
    for reason, names in job.kept.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"kept, {reason}: {', '.join(names[:_SHOWN])}{more}")
    return lines + job.notes
