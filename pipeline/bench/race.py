"""The same job by bitpress and by other programs, in turns: what each costs, and how good its result is."""

import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitpress.kernels.scheme import Scheme

from ..config.load import load_calibration, load_eval
from ..config.schema import Eval
from ..data.calibration import Calibration
from ..data.text import read_text
from ..errors import BitpressError, ConfigError
from ..evaluate.process import measure
from ..hub.download import resolve
from ..models.loading import calibrate_on
from ..storage import files
from ..storage.checkpoint import Checkpoint
from ..system.unexpected import unexpected
from .cost import Cost
from .programs import Program, request, run

News = Callable[[str], None]


@dataclass
class Result:
    """What one program needed, and how good its result is.

    costs: one for each run. seconds: for each run, the time of quantizing alone by the program's own clock.
    quality: as `bitpress eval` reports it; None where it was not asked for. error: why the program is out.
    """

    name: str
    versions: dict[str, str] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    error: str | None = None

    def median(self, key: str) -> float:
        """The median over all runs of one field of Cost."""
        return statistics.median(getattr(cost, key) for cost in self.costs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """What every program does. text: what to measure the results on; None for speed alone."""

    model: Path
    scheme: Scheme
    calibration: Calibration
    text: Eval | None = None
    seed: int = 0


def make_job(model: str, scheme: str, calibration: dict[str, Any], text: dict[str, Any] | None, seed: int = 0) -> Job:
    """A job from plain values, all of them checked before anything runs.

    Args:
        calibration, text: keys of a config's calibration and eval sections.
    Raises:
        BitpressError: which of them cannot be used, and why.
    """
    try:
        parsed = Scheme.parse(scheme)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if parsed.weight.description().type != "int" or parsed.activations:
        raise ConfigError(f"other programs quantize weights alone, to integers, not to {parsed.name}; try int4-g128")
    judge = load_eval({"dtype": "float32", "speed": None, **text}) if text else None
    if judge:
        read_text(judge.text)
    settings, folder = load_calibration(calibration), resolve(model).folder
    tokens = calibrate_on(Checkpoint(folder), settings)
    return Job(folder, parsed, tokens, judge, seed)


def race(programs: list[Program], job: Job, repeats: int, folder: Path, news: News) -> list[Result]:
    """Run every program `repeats` times, in turns, so that a machine that slows down slows them all.

    Another program that fails is out, and its error is in its result.

    Args:
        programs: a recipe of bitpress first, with which the others are compared.
        folder: for checkpoints and logs, a few times the model's size.
    Raises:
        BitpressError: bitpress itself failed, or measuring did.
    """
    tokens = folder / "tokens.safetensors"
    files.write_safetensors(tokens, {"ids": job.calibration.ids.contiguous()})
    results = {program.name: Result(program.name) for program in programs}
    for number in range(repeats):
        for program in programs:
            if not results[program.name].error:
                _once(program, job, tokens, results[program.name], f"run {number + 1} of {repeats}", news)
    if job.text:
        for program in programs:
            _judge(program, results[program.name], job, job.text, folder, news)
    return list(results.values())


def _once(program: Program, job: Job, tokens: Path, result: Result, label: str, news: News) -> None:
    output = tokens.parent / program.folder
    for leftover in (output, output.with_name(f"{output.name}.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        answer, cost = run(program, request(job.model, tokens, output, job.scheme, job.seed))
    except BitpressError as error:
        if not program.peer:
            raise
        result.error = str(error)
        news(f"{label}: {error}")
        return
    result.versions = answer["versions"]
    result.costs.append(cost)
    result.seconds.append(answer["seconds"])
    news(f"{label}: {program.name} took {cost.wall:.1f} s")


def _judge(program: Program, result: Result, job: Job, text: Eval, folder: Path, news: News) -> None:
    """Measure KL and perplexity of the last run's checkpoint, where bitpress can load it."""
    if result.error:
        return
    try:
        result.quality = measure(folder / program.folder, job.model, text, "auto", folder)["quality"]
    except Exception as error:  # whatever another program wrote: ours and the others are not to blame
        if not program.peer:
            raise
        reason = unexpected(error, folder)
        result.error = f"not measured: {reason}"
        news(f"{result.name}: {result.error}")


def rows(results: list[Result]) -> tuple[list[str], list[list[str]]]:
    """A table's header and cells; ratios are to the first one."""
    judged = any(result.quality for result in results)
    header = ["program", "wall s", "ratio", "quantizing s", "CPU s", "ratio", "peak RSS MB", "ratio"]
    header += ["mean KL", "perplexity"] if judged else []
    body, first = [], results[0]
    for result in results:
        if not result.costs:
            body.append([result.name, *["failed", *["–"] * (len(header) - 2)]])
            continue
        cells = [_named(result)]
        for key, digits, unit in (("wall", 1, 1.0), ("cpu", 1, 1.0), ("peak_rss_bytes", 0, 1e6)):
            value = result.median(key)
            cells += [f"{value / unit:.{digits}f}", f"{value / first.median(key):.2f}x" if first.median(key) else "–"]
            cells += [f"{statistics.median(result.seconds):.1f}"] if key == "wall" else []
        body.append(cells + (_qualities(result) if judged else []))
    return header, body


def _named(result: Result) -> str:
    """The program's name and version; its own version comes first in its answer."""
    version = next(iter(result.versions.values()), "")
    return f"{result.name} {version}".strip()


def _qualities(result: Result) -> list[str]:
    if not result.quality:
        return ["–", "–"]
    perplexity, base = result.quality["perplexity"], result.quality["baseline_perplexity"]
    kl = result.quality["kl_mean"]
    change = f" ({perplexity / base - 1:+.2%})" if base else ""
    return [f"{kl:.5f}" if kl is not None else "–", f"{perplexity:.3f}{change}"]
