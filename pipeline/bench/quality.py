"""Quality against size: one model by our recipes and by other programs, on the same tokens, against the same logits.

Each row is kept as soon as it is measured, and the pages show it. The same command takes up what is finished.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

from bitpress.eval.report import quality_page
from bitpress.eval.report.quality_page import OWN, Row
from bitpress.eval.report.words import divergence, number
from bitpress.kernels.scheme import Scheme

from .. import api
from ..config.load import load_calibration, load_eval, load_recipe, load_typed_recipe
from ..config.schema import Calibrate
from ..data.calibration import Calibration
from ..data.text import read_text
from ..errors import ConfigError, nearest
from ..evaluate.conditions import Conditions
from ..evaluate.external import evaluate_external
from ..hub.download import Source, resolve
from ..models.loading import calibrate_on
from ..quantize.recipe import Recipe
from ..quantize.statistics import SHARED
from ..storage import files, journal
from ..storage.checkpoint import Checkpoint, read_json
from ..storage.fingerprint import Fingerprint, digest, stage
from ..system.device import pick_device
from ..system.machine import machine
from ..system.progress import progress
from ..system.unexpected import unexpected
from ..system.versions import releases, versions
from .programs import Program, request, run

RECIPES = (
    "gptq/int2-g64", "gptq/int3-g128", "gptq/int3-g32", "gptq/int4-g128", "gptq/int4-g32", "gptq/int8-g128",
)  # fmt: skip
PEER_SCHEMES = ("int2-g64", "int3-g128", "int4-g128", "int8-g128")
QUICK_RECIPES, QUICK_SCHEMES = ("gptq/int3-g128", "gptq/int4-g128"), ("int4-g128",)
_ROW, _TOKENS = "row.json", "tokens.safetensors"

News = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What all rows have in common.

    Attributes:
        source: the unquantized model. calibration: the tokens to calibrate on; settings: what they were made from.
        conditions: how all are measured. folder: of the results.
    """

    source: Source
    calibration: Calibration
    settings: Calibrate
    conditions: Conditions
    folder: Path

    @staticmethod
    def make(
        model: str,
        calibration: dict[str, Any],
        text: dict[str, Any],
        device: str,
        folder: Path | None,
        command: str = "",
    ) -> "Comparison":
        """A comparison from plain values, all of them checked before anything runs.

        Args:
            calibration, text: keys of a config's calibration and eval sections.
            folder: of the results; None for one of the model's name in runs/bench.
        Raises:
            BitpressError: which of them cannot be used, and why.
        """
        chosen = load_eval({"dtype": "float32", "speed": None, "output_errors": 0, **text})
        conditions = Conditions.make(chosen, device, read_text(chosen.text), command)
        source, settings = resolve(model), load_calibration(calibration)
        folder = folder or Path("runs", "bench", f"quality-{source.id.replace('/', '-').replace(':', '-')}")
        source.check_output(folder)
        tokens = calibrate_on(Checkpoint(source.folder), settings)
        return Comparison(source, tokens, settings, conditions, folder)

    def fingerprint(self) -> Fingerprint:
        """What the figures of every row depend on."""
        model = {f"model.{name}": value for name, value in Checkpoint(self.source.folder).identity().items()}
        tokens = {f"calibration.{name}": value for name, value in self.calibration.to_dict().items()}
        return {**model, **tokens, **stage(self.conditions.fingerprint({}), "quality")}

    @property
    def tokens(self) -> Path:
        """The calibration's tokens as a file, for other programs."""
        path = self.folder / _TOKENS
        files.write_safetensors(path, {"ids": self.calibration.ids.contiguous()})
        return path


class Entrant(Protocol):
    """One row to be measured. program, recipe: its names in the table."""

    @property
    def program(self) -> str: ...

    @property
    def recipe(self) -> str: ...

    def fingerprint(self) -> Fingerprint:
        """What its figures depend on, beside what they depend on in every row."""

    def measure(self, comparison: Comparison, folder: Path) -> Row:
        """The row. Called again in the same folder, it goes on where it was interrupted.

        Raises:
            BitpressError: why there is none.
        """


@dataclass(frozen=True)
class OwnRecipe:
    """A recipe of bitpress. text: in a word, as `bitpress quantize --recipe` takes it, or with its keys.

    Budgets share their statistics and solutions, which stay in the comparison's folder.
    """

    text: str
    program: str = OWN

    @property
    def recipe(self) -> str:
        return load_typed_recipe(self.text).name or self.text

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys and values.

        Raises:
            ConfigError: there is no such recipe.
        """
        return {**load_typed_recipe(self.text).model_dump(exclude_unset=True), "fit_groups": True}

    def fingerprint(self) -> Fingerprint:
        described = Recipe.make(load_recipe(self.settings)).to_dict()
        return {**described, **{name: releases().get(name) for name in ("bitpress", "torch", "transformers")}}

    def measure(self, comparison: Comparison, folder: Path) -> Row:
        settings, output = self.settings, folder / "artifact"
        if Recipe.make(load_recipe(settings)).calibrated:
            settings |= {"calibration": comparison.settings.model_dump(exclude_unset=True)}
        start = time.perf_counter()
        with progress(f"quantizing to {self.recipe}") as step:
            model, kept = comparison.source.folder, comparison.folder / SHARED
            api.quantize(model, settings, output, device=comparison.conditions.device, on_step=step, keep=kept)
        seconds = time.perf_counter() - start
        used = {name: version for name, version in versions().items() if name in ("bitpress", "torch", "transformers")}
        return replace(_measured(self, comparison, output, folder, seconds), versions=used)


@dataclass(frozen=True)
class PeerScheme:
    """Another program that quantizes to a scheme of integers, by its own default way."""

    peer: Program
    scheme: Scheme

    @property
    def program(self) -> str:
        return self.peer.name

    @property
    def recipe(self) -> str:
        return self.scheme.name

    def fingerprint(self) -> Fingerprint:
        return {"program": self.peer.name, "scheme": self.scheme.name, **self.peer.options}

    def measure(self, comparison: Comparison, folder: Path) -> Row:
        output = folder / "artifact"
        if output.exists():  # of a process that was interrupted, or whose measuring was
            files.remove_folder(output)
        asked = request(comparison.source.folder, comparison.tokens, output, self.scheme)
        answer, _ = run(self.peer, asked)
        row = _measured(self, comparison, output, folder, answer["seconds"])
        return replace(row, versions=answer["versions"])


def _measured(entrant: Entrant, comparison: Comparison, artifact: Path, folder: Path, seconds: float) -> Row:
    """A checkpoint's row: all that bitpress loads is measured in the same way, in a process of its own."""
    start = time.perf_counter()
    metrics = evaluate_external(resolve(str(artifact)), comparison.source, comparison.conditions, folder / "measured")
    quality, rounded = metrics["quality"], (metrics["kernels"] or {}).get("rounded_inputs") or {}
    files.remove_folder(artifact)  # its figures stay; another run of the same command does not need it
    return Row(
        program=entrant.program,
        recipe=entrant.recipe,
        nbytes=metrics["size"]["file_bytes"],
        bits_per_weight=metrics["size"]["bits_per_weight"]["all"],
        **{key: quality[key] for key in ("kl_mean", "kl_mean_se", "perplexity", "perplexity_ratio", "top1_agreement")},
        kernel_kl_mean=rounded.get("kl_mean"),
        kernel_kl_mean_se=rounded.get("kl_mean_se"),
        seconds={"quantize": seconds, "measure": time.perf_counter() - start},
    )


def peer_schemes(programs: Sequence[Program], schemes: Sequence[str]) -> list[PeerScheme]:
    """An entrant for each program and scheme.

    Raises:
        ConfigError: a scheme that no other program has.
    """
    parsed = []
    for name in schemes:
        try:
            scheme = Scheme.parse(name)
        except ValueError as error:
            raise ConfigError(f"--peer-scheme {name}: {error}") from error
        if scheme.weight.description().type != "int" or scheme.activations:
            hint = nearest(name, PEER_SCHEMES) or "; try int4-g128"
            raise ConfigError(f"--peer-scheme {name}: other programs quantize weights alone, to integers{hint}")
        parsed.append(scheme)
    return [PeerScheme(program, scheme) for program in programs for scheme in parsed]


def in_turns(entrants: Sequence[Entrant]) -> list[Entrant]:
    """The entrants, one of each program in turn, so that whatever ends the work, every program has rows."""
    by_program: dict[str, list[Entrant]] = {}
    for entrant in entrants:
        by_program.setdefault(entrant.program, []).append(entrant)
    return [entrant for turn in zip_longest(*by_program.values()) for entrant in turn if entrant]


def compare(comparison: Comparison, entrants: Sequence[Entrant], seconds: float | None, news: News) -> list[Row]:
    """Measure every entrant; the pages in the comparison's folder show each row as soon as it is there.

    An entrant that fails has a row that says why, and is tried again by the next call.

    Args:
        seconds: no row begins that would probably end later; None for no limit.
    """
    files.make_folder(comparison.folder)
    with journal.locked(comparison.folder):
        start, rows, ordered = time.monotonic(), list[Row](), in_turns(entrants)
        common, took = comparison.fingerprint(), dict[str, list[float]]()
        folders, kept = list[Path](), dict[int, Row]()
        for place, entrant in enumerate(ordered):
            own = digest({**common, **entrant.fingerprint(), "program": entrant.program})[:8]
            folders.append(comparison.folder / "rows" / f"{entrant.program}-{entrant.recipe}-{own}".replace("/", "-"))
            if (folders[place] / _ROW).exists():
                kept[place] = Row(**read_json(folders[place] / _ROW))
                took.setdefault(entrant.program, []).append(sum(kept[place].seconds.values()))
        for place, (entrant, folder) in enumerate(zip(ordered, folders)):
            begun, spent = time.monotonic(), time.monotonic() - start
            remaining = ""
            if place in kept:
                rows.append(kept[place])
                remaining = "; measured before"
            elif seconds is not None and spent + _expected(took, entrant.program) > seconds:
                rows.append(Row(entrant.program, entrant.recipe, problem="no time left for it (--minutes)"))
            else:
                rows.append(_row(entrant, comparison, folder))
                if not rows[-1].problem:
                    files.write_json(folder / _ROW, asdict(rows[-1]))
                took.setdefault(entrant.program, []).append(time.monotonic() - begun)
                if later := [ordered[other].program for other in range(place + 1, len(ordered)) if other not in kept]:
                    left = round(sum(_expected(took, program) for program in later) / 60)
                    remaining = f"; about {max(1, left)} min left"
            news(f"{place + 1} of {len(ordered)}: {_said(rows[-1])}{remaining}")
            write_pages(comparison, rows)
    return rows


def _expected(took: dict[str, list[float]], program: str) -> float:
    """Seconds that a program's next row will take: as its others did, or those of all where it has none yet."""
    known = took.get(program) or [seconds for some in took.values() for seconds in some]
    return statistics.mean(known) if known else 0.0


def _row(entrant: Entrant, comparison: Comparison, folder: Path) -> Row:
    files.make_folder(folder)
    try:
        return entrant.measure(comparison, folder)
    except Exception as error:  # one row without figures must not cost the others
        return Row(entrant.program, entrant.recipe, problem=str(unexpected(error, comparison.folder)))


def _said(row: Row) -> str:
    """One line on a row."""
    if row.problem:
        return f"{row.name}: {row.problem.splitlines()[-1]}"  # the page has all of it
    return f"{row.name}: KL {divergence(row.kl_mean, row.kl_mean_se)} at {number(row.bits_per_weight)} bits per weight"


def write_pages(comparison: Comparison, rows: Sequence[Row]) -> Path:
    """Write quality.json, quality.md and quality.html; returns the last one's path."""
    settings = comparison.conditions.settings
    about = {
        "model": comparison.source.to_dict(),
        "calibration": comparison.calibration.to_dict(),
        "protocol": {
            "name": settings.protocol,
            "text": comparison.conditions.text,
            "text_sha256": comparison.conditions.text_sha256,
            "context": settings.context,
            "windows": settings.windows,
            "dtype": settings.dtype,
        },
        "machine": machine(pick_device(comparison.conditions.device)),
        "command": comparison.conditions.command,
    }
    files.write_text(comparison.folder / "quality.json", json.dumps(quality_page.plain(about, rows), indent=2) + "\n")
    files.write_text(comparison.folder / "quality.md", quality_page.markdown(about, rows))
    files.write_text(comparison.folder / "quality.html", quality_page.html(about, rows))
    return comparison.folder / "quality.html"
