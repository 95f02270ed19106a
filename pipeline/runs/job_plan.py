"""What one job will take: files, bytes, memory, disk, work, and who will load the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitpress.kernels.scheme import Scheme

from ..quantize.spec import LayerSpec
from .rates import Rates, Shape

_NAMING = ("model", "recipe", "folder", "state")
NOT_BEGUN, HALF_DONE, FINISHED = "to do", "half done", "finished"


@dataclass(frozen=True)
class Work:
    """What a stage does, in the units of Rates.

    products: floating-point operations. statistics: multiplications of inputs by inputs. read, written, moved: bytes,
    the last from memory. rounded: spec's name -> its spec and how many weights. starts: of fresh processes.
    """

    products: float = 0.0
    statistics: float = 0.0
    read: float = 0.0
    written: float = 0.0
    moved: float = 0.0
    rounded: dict[str, tuple[LayerSpec, float]] = field(default_factory=dict)
    starts: int = 0

    def seconds(self, rates: Rates) -> float:
        """What it takes on a machine, one part after the other."""
        rounding = sum(weights / rates.weights_per_second(spec) for spec, weights in self.rounded.values())
        return (
            self.products / rates.products
            + self.statistics / rates.statistics
            + self.read / rates.read
            + self.written / rates.write
            + self.moved / rates.memory
            + self.starts * rates.start
            + rounding
        )


@dataclass(frozen=True)
class JobPlan:
    """What one job will take.

    recipe: its name, BASELINE for the unquantized model. folder: of its own. state: NOT_BEGUN, HALF_DONE or FINISHED.
    problem: why it cannot be done; None if it can. Then the rest is empty.
    files: file of the artifact -> about how many bytes. format: of the artifact. weights: how many are quantized.
    memory: stage -> bytes at the peak, on the device that does the work. least: bytes without which it cannot run.
    disk: bytes that it adds to its folder at most. work: stage -> what it does; a stage that is done is left out. A
    budget has one more, "search", which comes before "quantize".
    unknown: sentences on what no plan can tell. kept: reason -> names of tensors that stay as they are.
    runtimes: see checkpoints.runtimes.verdicts. notes: what the recipe left open and the plan decided.
    cache: of a quantized key-value cache, type, and "unquantized" -> number of tokens -> bytes of one sequence.
    layers: for each spec its largest layer. search: whether it takes part in a search that budgets share.
    gathering: floating-point operations of a pass of the unquantized model, which other jobs may take up.
    """

    model: str
    recipe: str
    folder: Path
    state: str = NOT_BEGUN
    problem: str | None = None
    format: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    weights: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    least: int = 0
    disk: int = 0
    work: dict[str, Work] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)
    runtimes: dict[str, dict[str, Any]] = field(default_factory=dict)
    cache: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: list[tuple[LayerSpec, Shape]] = field(default_factory=list)
    search: bool = False
    gathering: float = 0.0

    @property
    def nbytes(self) -> int:
        """The bytes of the artifact."""
        return sum(self.files.values())

    def seconds(self, rates: Rates) -> float | None:
        """What it takes on a machine; None where that cannot be told."""
        return None if self.problem or self.unknown else sum(work.seconds(rates) for work in self.work.values())

    def to_dict(self, rates: Rates) -> dict[str, Any]:
        """The plan in plain values."""
        plain = {key: value for key, value in vars(self).items() if key not in ("work", "layers", "folder")}
        stages = {stage: work.seconds(rates) for stage, work in self.work.items()}
        return plain | {"folder": str(self.folder), "bytes": self.nbytes, "seconds": stages}

    def estimates(self) -> dict[str, Any]:
        """What was estimated, in plain values that `with_estimates` reads: all but the job's name, folder and state."""

        def spec(one: LayerSpec) -> list[str]:
            return [one.method.name, one.scheme.name]

        plain = {key: value for key, value in vars(self).items() if key not in _NAMING}
        plain["layers"] = [[spec(one), list(shape)] for one, shape in self.layers]
        plain["work"] = {
            stage: vars(work) | {"rounded": [[spec(one), weights] for one, weights in work.rounded.values()]}
            for stage, work in self.work.items()
        }
        return plain

    def with_estimates(self, plain: Mapping[str, Any], specs: Sequence[LayerSpec]) -> "JobPlan":
        """This job with what was estimated. specs: of its recipe, whose methods the layers' specs have."""
        methods = {one.method.name: one.method for one in specs}

        def spec(names: Sequence[str]) -> LayerSpec:
            return LayerSpec(Scheme.parse(names[1]), methods[names[0]])

        def rounded(entries: Sequence[Any]) -> dict[str, tuple[LayerSpec, float]]:
            return {(one := spec(names)).name: (one, weights) for names, weights in entries}

        work = {stage: Work(**{**own, "rounded": rounded(own["rounded"])}) for stage, own in plain["work"].items()}
        layers = [(spec(names), (shape[0], shape[1])) for names, shape in plain["layers"]]
        return replace(self, **{**plain, "work": work, "layers": layers})
