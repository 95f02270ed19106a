"""What a metrics.json holds, as others may rely on it: its types, and the JSON schema made of them.

Sizes are bytes, speeds tokens per second, divergences nats. What was not measured is null. Fields may be added within
a format_version; none is removed, and none changes its meaning.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import CheckpointError, ConfigError, listing
from ..storage.artifacts import ARTIFACT
from ..storage.artifacts import METRICS as METRICS
from ..storage.checkpoint import read_json, regular_file
from ..storage.files import sha256_file
from ..storage.fingerprint import MANIFEST, digest

FORMAT_VERSION = 2

Number = Annotated[float, Field(allow_inf_nan=False)] | None
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
Count = Annotated[int, Field(ge=0)] | None
Sums = list[Annotated[float, Field(allow_inf_nan=False)]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Model(_Part):
    """The unquantized model. identity: a hash of its files; name: what tells local folders of one id apart."""

    id: str
    revision: str | None = None
    name: str | None = None
    identity: str | None = None
    architecture: str | None = None
    parameters: Count = None


class Protocol(_Part):
    """How perplexity and divergence were measured; figures compare only where all of it is the same."""

    name: str
    text: str | None = None
    text_sha256: str | None = None
    context: Count = None
    windows: Count = None
    tokens: Count = None
    dtype: str | None = None
    bos: str | None = None  # what begins with the tokenizer's BOS; None where the tokenizer puts none before a text


class WindowSums(_Part):
    """Sums over the scored tokens of each window of text: what paired tests between runs need."""

    tokens: list[Annotated[int, Field(gt=0)]]
    nll: Sums
    baseline_nll: Sums | None = None
    kl: Sums | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "WindowSums":
        if any(sums is not None and len(sums) != len(self.tokens) for sums in (self.nll, self.baseline_nll, self.kl)):
            raise ValueError("its lists are not of one length")
        return self


class Quality(_Part):
    """Quality of the files: inputs are left as the scheme has them. Errors (_se) are standard errors over windows; what
    compares with the baseline is paired, token by token."""

    perplexity: Positive = None
    perplexity_se: Positive = None
    baseline_perplexity: Positive = None
    perplexity_ratio: Positive = None
    perplexity_ratio_se: Positive = None
    kl_mean: Number = None
    kl_mean_se: Positive = None
    kl_median: Number = None
    kl_p99: Number = None
    kl_max: Number = None
    top1_agreement: Positive = None
    top1_agreement_se: Positive = None
    windows: WindowSums | None = None


class Judged(_Part):
    gate: str
    passed: bool


class Gates(_Part):
    passed: bool
    overridden: bool = False
    judged: list[Judged] = []


class Bits(_Part):
    """Per weight: of quantized layers, of the decoder's blocks, of everything."""

    quantized: Positive = None
    decoder: Positive = None
    all: Positive = None


class Size(_Part):
    file_bytes: Count = None
    bits_per_weight: Bits | None = None


class Fit(_Part):
    card_gib: Count = None
    context: Count = None


class CacheWindow(_Part):
    """Layers that keep the last tokens only: how many, and the bytes of each."""

    tokens: Positive = None
    bytes_per_token: Positive = None


class QuantizedCache(_Part):
    """A quantized cache: its type, and what the same keys and values take as they are."""

    type: str | None = None
    kv_cache_bytes_per_token: Positive = None
    kv_cache_windows: list[CacheWindow] | None = None


class Memory(_Part):
    resident_bytes: Count = None
    prompt: Count = None
    kv_cache_bytes_per_token: Positive = None  # of each further token, however many there are
    kv_cache_windows: list[CacheWindow] | None = None
    kv_cache: QuantizedCache | None = None  # the two above are then those of a runtime that keeps its codes
    activation_peak_bytes: Count = None
    peak_rss_bytes: Count = None
    peak_cuda_bytes: Count = None
    fits: list[Fit] | None = None


class Rate(_Part):
    median: Positive = None
    min: Positive = None
    max: Positive = None


class Speed(_Part):
    batch: Count = None
    prompt: Count = None
    generate: Count = None
    prefill: Rate | None = None
    decode: Rate | None = None


class ConfigModel(_Part):
    id: str
    revision: str | None = None


class Config(_Part):
    """As much of the config as it takes to measure another checkpoint in the same way."""

    models: list[ConfigModel] = []
    eval: dict[str, Any] = {}
    device: str = "auto"


class Recipe(_Part):
    """layers: pattern on the names of layers -> [method/]scheme, or none."""

    name: str
    layers: dict[str, str] = {}


class RoundedInputs(_Part):
    """What kernels lose that round the inputs of weight-only layers: the model's KL from itself without that."""

    layers: Count = None
    windows: Count = None
    kl_mean: Number = None
    kl_mean_se: Positive = None


class Kernels(_Part):
    selected: dict[str, int] = {}
    rounded_inputs: RoundedInputs | None = None


class BudgetPoint(_Part):
    """A point of the curve of KL against size: bits per weight of the layers that have a choice, the bytes of the whole
    artifact, and the divergence that the sum of the layers' costs predicts."""

    bits: Positive = None
    nbytes: Count = None
    predicted_kl: Number = None


class Budget(BudgetPoint):
    """What a budget chose. solutions_kl: of the model with all the solutions that were weighed, on the tokens that the
    prediction is of. measured_kl: of the artifact, on the same."""

    budget: str
    tokens: Count = None
    solutions_kl: Number = None
    measured_kl: Number = None
    curve: list[BudgetPoint] = []


class Metrics(_Part):
    """A metrics.json of bitpress: what was measured of one run, of what, how, and on what machine."""

    format_version: Literal[2]
    model: Model
    scheme: str
    method: str | None = None
    format: str | None = None
    recipe: Recipe | None = None
    budget: Budget | None = None
    checkpoint: dict[str, Any] | None = None
    protocol: Protocol
    quality: Quality
    gates: Gates | None = None
    size: Size
    memory: Memory | None = None
    speed: list[Speed] | None = None
    kernels: Kernels | None = None
    warnings: list[str] | None = None  # what makes the figures other than they seem
    machine: dict[str, Any] | None = None
    versions: dict[str, str | None] | None = None
    config: Config | None = None
    command: str | None = None
    seal: str | None = None


def sealed(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with a hash of all that they say, as they are written: read_metrics takes no others."""
    plain = json.loads(json.dumps({key: value for key, value in metrics.items() if key != "seal"}))
    return metrics | {"seal": digest(plain)}


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12), as in metrics.schema.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Metrics.model_json_schema()}


def read_metrics(path: Path) -> dict[str, Any]:
    """A metrics.json, checked: figures count as they were written, and beside the artifact that they are of.

    Raises:
        CheckpointError: of another version of the format, not of its types, or changed since it was written.
        ConfigError: the artifact beside it is another one.
    """
    metrics = read_json(path)
    if (version := metrics.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version!r}, expected {FORMAT_VERSION}; run it again by this version of bitpress"
        )
    try:
        Metrics.model_validate(metrics)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise CheckpointError(f"{path}: not the metrics of a run:\n{listing(problems)}") from error
    if metrics.get("seal") != sealed(metrics)["seal"]:
        raise CheckpointError(f"{path}: not as bitpress wrote it, so its figures do not count; move it and run again")
    manifest = path.parent / ARTIFACT / MANIFEST
    artifact = (metrics.get("fingerprint") or {}).get("artifact.sha256")
    if manifest.exists() and artifact != sha256_file(regular_file(manifest)):
        raise ConfigError(f"{path} is of another artifact than the one beside it; run its config again")
    return metrics
