"""YAML -> a checked Run; every problem is found at once and told with its line, its path and the nearest name."""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bitpress.kernels.scheme import Scheme, examples

from ..errors import ConfigError, nearest
from .messages import Several

NOTHING_LEARNS = "method auto learns from no text: name a method that does, such as gptq, or leave calibration out"
_SECRETS = ("token", "hf_token", "api_key", "password")
_LONGEST_TITLE = 59  # characters; the Hub takes no longer ones
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_COMMON_SCHEMES = ["none", *examples()]


def _registered(kind: str, name: str) -> str:
    """`name`, if there is such a method, format or kernel. The registries bring torch along, so they are asked late."""
    if name == "auto":
        return name
    if kind == "kernel":
        from bitpress.kernels.registry import AUTOMATIC
        from bitpress.kernels.registry import registry as kernels

        known = [*AUTOMATIC[1:], *(kernel.name for kernel in kernels())]
    elif kind == "method":
        from ..methods import registry as methods

        known = list(methods())
    else:
        from ..formats import registry as formats

        known = list(formats())
    if name not in known:
        hint = nearest(name, known) or f"; use auto or one of {', '.join(known)}"
        raise ValueError(f"unknown {kind}{hint}")
    return name


def _misfits(method: str, options: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with a method's options: with each by itself, or else with them together."""
    from ..methods import registry, with_options

    def problem(some: dict[str, Any]) -> str | None:
        try:
            with_options(registry()[method], some)
        except ValueError as error:
            return str(error)
        return None

    single = {name: problem({name: value}) for name, value in options.items()}
    yield from (((name,), said.removeprefix(f"{name}: ")) for name, said in single.items() if said)
    if not any(single.values()) and (said := problem(options)):
        yield (), said


def _scheme(name: str) -> str:
    try:
        return name if name == "none" else Scheme.parse(name).name
    except ValueError as error:
        raise ValueError(f"{error}{nearest(name, _COMMON_SCHEMES)}") from error


MethodName = Annotated[str, AfterValidator(lambda name: _registered("method", name))]
FormatName = Annotated[str, AfterValidator(lambda name: _registered("format", name))]
KernelName = Annotated[str, AfterValidator(lambda name: _registered("kernel", name))]
SchemeName = Annotated[str, AfterValidator(_scheme)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(_Strict):
    """A checkpoint: a Hub id, a local folder, or builtin:demo."""

    id: str = Field(min_length=1)
    revision: str | None = None  # a branch, tag or commit of the Hub; resolved to a commit and recorded


class Dataset(_Strict):
    """A data set of the Hub."""

    dataset: str
    config: str | None = None
    split: str = "test"
    column: str = "text"
    revision: str | None = None


class TrainingSet(Dataset):
    """A data set to learn from."""

    split: str = "train"  # "train[:2000]" is a part of it
    column: str = "auto"  # "text", or of a chat "messages" or "conversations", whichever is there


class Calibrate(_Strict):
    """What a method such as gptq learns from; methods that need none leave it alone."""

    text: str | TrainingSet = TrainingSet(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1")
    windows: int = Field(128, ge=1)
    context: int = Field(2048, ge=2)  # cut to what the model can hold
    seed: int | None = Field(0, ge=0)  # None: the first windows of the text, in order


class Quantize(_Strict):
    method: MethodName = "auto"
    format: FormatName = "auto"
    skip: list[str] = []
    algorithm: dict[str, Any] = {}  # options of the method
    calibration: Calibrate | None = None  # None: the defaults above, where the method needs any
    max_fallback_layers: int = Field(0, ge=0)  # where more layers than that fall back to absmax, the job fails

    @field_validator("algorithm")
    @classmethod
    def _options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        method = info.data.get("method")  # missing where it was refused itself
        if value and method == "auto":
            raise ValueError("these are options of one method, and method is auto: name it, as in method: gptq")
        if value and method and (problems := list(_misfits(method, value))):
            raise Several(problems)
        return value


def _positive(value: int | list[int]) -> int | list[int]:
    if any(size < 1 for size in (value if isinstance(value, list) else [value])):
        raise ValueError("must be at least 1")
    return value


class Speed(_Strict):
    """Every batch size is measured with every prompt length."""

    prompt: Annotated[int | list[int], AfterValidator(_positive)] = 512
    generate: int = Field(128, ge=1)
    batch: list[int] = Field([1, 8], min_length=1)
    repeats: int = Field(3, ge=1, le=1000)

    @field_validator("batch")
    @classmethod
    def _batches(cls, value: list[int]) -> list[int]:
        if any(size < 1 for size in value):
            raise ValueError("batch sizes must be at least 1")
        return value


class Eval(_Strict):
    text: str | Dataset = "builtin:pydoc-topics"
    protocol: Literal["gptq", "sliding", "llama.cpp", "word"] = "gptq"
    context: int | None = Field(None, ge=2)  # None: the protocol's own; cut to what the model can hold
    stride: int = Field(512, ge=1)  # of the protocol sliding
    windows: int | None = Field(None, ge=1)  # None: the whole text; pages, of the protocol word
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kernel: KernelName = "auto"
    speed: Speed | None = Speed()  # type: ignore[call-arg]
    output_errors: int = Field(1, ge=0)  # windows on which each layer's outputs are compared; 0: none
    tasks: list[str] = []  # of lm-eval, such as arc_easy
    task_limit: int | None = Field(None, ge=1)  # documents of each task; None: all
    prompt: str = "The"  # what the sample in the report continues


class Cpu(_Strict):
    activations: Literal["int8", "bf16"] = "int8"  # what weight-only kernels make of a layer's inputs; bf16: nothing


def _share(value: Any) -> Any:
    """3% as 0.03."""
    if isinstance(value, str) and value.endswith("%"):
        return float(value[:-1]) / 100
    return value


class Gates(_Strict):
    """What a quantized model must reach; a run that misses one fails, once everything is written."""

    kl_mean: float | None = Field(None, ge=0)  # at most, in nats
    ppl_increase: Annotated[float | None, BeforeValidator(_share)] = None  # at most: 0.03, or 3%
    top1: Annotated[float | None, BeforeValidator(_share)] = Field(None, ge=0, le=1)  # at least: 0.9, or 90%
    fallback_layers: int | None = Field(None, ge=0)  # at most


class Publish(BaseModel):
    """Where a batch goes once it is finished; what misses a gate stays here."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    repo: str  # owner/name; {model} and {scheme} in it stand for what a job is on
    private: bool = False  # of repositories that do not exist yet
    collection: str | None = Field(None, min_length=1, max_length=_LONGEST_TITLE)  # the title of one for all of them

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        if isinstance(value, dict) and (found := [key for key in _SECRETS if key in value]):
            raise ValueError(
                f"{found[0]} is never read from a config; take it out, and `hf auth login` or set HF_TOKEN"
            )
        return value

    def name_of(self, model: str, scheme: str) -> str:
        """The repository of one job; see check_repo for what is raised."""
        short = re.split(r"[/:]", model.rstrip("/"))[-1]
        return check_repo(self.repo.replace("{model}", short).replace("{scheme}", scheme))

    def check(self, models: Sequence[str], schemes: Sequence[str]) -> None:
        """Raises Several if a job has no repository of its own."""
        jobs = [(model, scheme) for model in models for scheme in schemes if scheme != "none"]
        try:
            names = [self.name_of(*job) for job in jobs]
        except ValueError as error:
            raise Several([(("repo",), str(error))]) from error
        if twice := next((name for name in names if names.count(name) > 1), None):
            said = f"several jobs would go to {twice}; tell them apart by {{model}} and {{scheme}}"
            raise Several([(("repo",), said)])


def check_repo(name: str) -> str:
    """The name of a repository, unchanged.

    Raises:
        ValueError: the Hub would not take it.
    """
    from huggingface_hub.utils import validate_repo_id  # brings the client along

    if name.count("/") != 1:
        raise ValueError(f"{name!r} is no repository of the Hub; expected owner/name")
    validate_repo_id(name)
    return name


class Run(_Strict):
    """A whole config: every model is pressed by every scheme; the unquantized baseline is always measured."""

    name: str = Field(pattern=_NAME)
    models: list[Model] = Field(min_length=1)
    schemes: list[SchemeName] = Field(min_length=1)
    quantize: Quantize = Quantize()  # type: ignore[call-arg]
    eval: Eval = Eval()  # type: ignore[call-arg]
    cpu: Cpu = Cpu()
    gates: Gates = Gates()  # type: ignore[call-arg]
    publish: Publish | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: str = "runs"

    @field_validator("publish")
    @classmethod
    def _repositories(cls, value: Publish | None, info: ValidationInfo) -> Publish | None:
        if value:
            value.check([model.id for model in info.data.get("models", [])], info.data.get("schemes", []))
        return value

    @model_validator(mode="after")
    def _kernel_for_activations(self) -> "Run":
        if self.cpu.activations == "bf16" and self.eval.kernel == "auto":
            self.eval = self.eval.model_copy(update={"kernel": "auto-bf16"})
        return self

    @field_validator("schemes")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("a scheme is listed twice")
        return value

    @field_validator("quantize")
    @classmethod
    def _fitting(cls, value: Quantize, info: ValidationInfo) -> Quantize:
        """What is named must be able to make every scheme; what "auto" picks is."""
        schemes = [name for name in info.data.get("schemes", []) if name != "none"]
        if (value.method, value.format, value.calibration) == ("auto", "auto", None):
            return value
        from ..quantize.recipe import Recipe

        problems: list[tuple[tuple[str, ...], str]] = []
        learns = False
        for name in schemes:
            try:
                learns |= Recipe.make(name, value.method, value.format).method.needs_calibration
            except ConfigError as error:
                problems.append((("format" if value.method == "auto" else "method",), f"{name}: {error}"))
        if value.calibration and value.method == "auto" and schemes and not problems and not learns:
            problems.append((("calibration",), NOTHING_LEARNS))
        if problems:
            raise Several(problems)
        return value


Section = TypeVar("Section", bound=_Strict)
