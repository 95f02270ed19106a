"""YAML -> a checked Run; every problem is found at once and told with its line, its path and the nearest name."""

from collections.abc import Iterator
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from bitpress.kernels.scheme import INT_BITS, Scheme

from .destination import Publish
from .errors import ConfigError, listing, nearest
from .problems import Several, explained

NOTHING_LEARNS = "method auto learns from no text: name a method that does, such as gptq, or leave calibration out"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_COMMON_SCHEMES = [
    "none", "int8-dynamic", "nf4", "nf4-dq",
    *(f"int{bits}-{group}" for bits in INT_BITS for group in ("g32", "g64", "g128", "channel", "g128-asym")),
]  # fmt: skip


def _registered(kind: str, name: str) -> str:
    """`name`, if there is such a method, format or kernel. The registries bring torch along, so they are asked late."""
    if name == "auto":
        return name
    if kind == "kernel":
        from bitpress.kernels.select import AUTOMATIC
        from bitpress.kernels.select import registry as kernels

        known = [*AUTOMATIC[1:], *(kernel.name for kernel in kernels())]
    elif kind == "method":
        from .methods import registry as methods

        known = list(methods())
    else:
        from .formats import registry as formats

        known = list(formats())
    if name not in known:
        hint = nearest(name, known) or f"; use auto or one of {', '.join(known)}"
        raise ValueError(f"unknown {kind}{hint}")
    return name


def _misfits(method: str, options: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with a method's options: with each by itself, or else with them together."""
    from .methods import registry, with_options

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
        from .recipe import Recipe

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


_Section = TypeVar("_Section", bound=_Strict)


def shipped() -> dict[str, Path]:
    """The configs that come with bitpress, by name."""
    spec = find_spec("bitpress.configs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return {path.stem: path for folder in folders for path in sorted(Path(folder).glob("*.yaml"))}


def load_config(path: Path, overrides: list[str] | None = None) -> Run:
    """Read and check a config file.

    Args:
        path: a file, or the name of a shipped config such as "demo".
        overrides: "key.path=value", the value in YAML; lists by number, as in models.0.id=org/name.
    Raises:
        ConfigError: everything that is wrong with the file and the overrides, at once.
    """
    if not path.exists() and str(path) in shipped():
        path = shipped()[str(path)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; shipped configs are {', '.join(shipped())}") from error
    data, problems = _parse(text)
    if data is None:
        raise ConfigError(f"{path} cannot be used:\n{listing(problems)}")
    for override in overrides or []:
        problems += _override(data, override)
    try:
        run = Run.model_validate(_plain(data))
    except ValidationError as error:
        problems += explained(error, data, Run)
    except RecursionError:
        problems.append("nested too deeply, or an alias that holds itself")
    if problems:
        raise ConfigError(f"{path} cannot be used:\n{listing(problems)}")
    return run


def load_eval(settings: dict[str, Any]) -> Eval:
    """An eval section given as plain values.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    return _section(Eval, settings, ("eval",))


def load_calibration(settings: str | dict[str, Any]) -> Calibrate:
    """A quantize.calibration section given as plain values, or as its text alone.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    given = settings if isinstance(settings, dict) else {"text": settings}
    return _section(Calibrate, given, ("quantize", "calibration"))


def _section(kind: type[_Section], settings: dict[str, Any], path: tuple[str, ...]) -> _Section:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = explained(error, CommentedMap(), Run, path)
        raise ConfigError(f"these settings cannot be used:\n{listing(problems)}") from error


def load_options(assignments: list[str]) -> dict[str, Any]:
    """Options typed as "key=value", the values in YAML, such as "damping=1e-3".

    Raises:
        ConfigError: one is no such thing.
    """
    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        try:
            options[key] = YAML(typ="safe").load(value)
        except YAMLError as error:
            raise ConfigError(f"{assignment}: the value is not YAML") from error
        if not equals or not key:
            raise ConfigError(f"{assignment}: expected key=value, such as damping=1e-3")
    return options


def _parse(text: str) -> tuple[CommentedMap | None, list[str]]:
    problems: list[str] = []
    parser = YAML(typ="rt")
    try:
        try:
            data = parser.load(StringIO(text))
        except DuplicateKeyError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            problems.append(f"line {line}: {str(error.problem).split(' with value')[0]}")
            parser = YAML(typ="rt")
            parser.allow_duplicate_keys = True
            data = parser.load(StringIO(text))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        return None, [*problems, f"{where}not YAML: {getattr(error, 'problem', None) or error}"]
    except RecursionError:
        return None, [*problems, "nested too deeply"]
    if not isinstance(data, CommentedMap):
        return None, ["line 1: expected keys and values, such as 'name: demo'"]
    return data, problems


def _plain(value: Any) -> Any:
    """ruamel's annotated values as plain ones, which strict pydantic wants."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _override(data: CommentedMap, override: str) -> list[str]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        return [f"--set {override}: expected key=value, such as eval.windows=10"]
    node: Any = data
    *path, last = key.split(".")
    try:
        for part in path:
            if isinstance(node, CommentedMap) and part not in node:
                node[part] = CommentedMap()
            node = node[int(part)] if isinstance(node, CommentedSeq) else node[part]
        node[int(last) if isinstance(node, CommentedSeq) else last] = YAML(typ="safe").load(value)
    except (ValueError, IndexError, TypeError, KeyError, YAMLError):
        return [f"--set {override}: there is no {key} to set"]
    return []
