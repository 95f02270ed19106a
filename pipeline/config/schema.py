"""What a config may hold: its keys, their types and ranges, and their defaults."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from huggingface_hub.utils import validate_repo_id
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bitpress.kernels.registry import AUTOMATIC
from bitpress.kernels.registry import registry as kernels

from ..errors import nearest
from .budget import Budget
from .messages import Several

AUTO: Final = "auto"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
BASELINE = "none"  # the unquantized model: the name of its run, and the scheme of a layer that is kept
_SECRETS = ("token", "hf_token", "api_key", "password")
_LONGEST_TITLE = 59  # characters; the Hub takes no longer ones
_QUICK = 4  # windows, and documents of a task, of a quick evaluation; 30 seconds of the demo on two cores
_QUICK_CALIBRATION = 16  # windows
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _known_kernel(name: str) -> str:
    """`name`, if there is such a kernel."""
    known = [*AUTOMATIC, *(kernel.name for kernel in kernels())]
    if name not in known:
        hint = nearest(name, known) or f"; use auto or one of {', '.join(known[1:])}"
        raise ValueError(f"unknown kernel{hint}")
    return name


KernelName = Annotated[str, AfterValidator(_known_kernel)]


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


def _share(value: Any) -> Any:
    """3% as 0.03."""
    if isinstance(value, str) and value.endswith("%"):
        return float(value[:-1]) / 100
    return value


Share = Annotated[float, BeforeValidator(_share)]


class Distill(_Strict):
    """How a quantized model's scales and norms are trained to say what the unquantized one says; as a number: steps."""

    steps: int = Field(100, ge=1, le=100_000)
    windows: int = Field(4, ge=1)  # of the calibration text, that a step learns from
    rate: float = Field(0.004, gt=0, le=1)  # of the scales, as a fraction of each; it falls to 0 along a cosine
    norm_rate: float = Field(0.001, gt=0, le=1)  # of the norms' weights


class RecipeDefaults(_Strict):
    """What all recipes of a config have in common, where they do not say otherwise."""

    transform: str | None = None  # of each block before its layers are quantized: smooth or awq
    method: str = AUTO  # the scheme's default; or one of `bitpress list`
    format: str = AUTO  # the first that can hold every layer
    dtype: Dtype = AUTO  # of what is not quantized, and of scales; auto: the model's own
    choices: list[str] = []  # of a budget: the schemes to choose from, none for unquantized; [] for 2 to 8 bits
    options: dict[str, Any] = {}  # of the method, such as {damping: 1e-3} of gptq
    layers: dict[str, str] = {}  # shell pattern on the names in the files -> [method/]scheme, or none; the last wins
    keep_inputs: Share = Field(
        0.0, ge=0, le=1
    )  # of the layers that quantize inputs, 5% at most leave them alone: the worst
    # how static inputs get a range: mse, percentile or minmax; auto: for each layer what suits its block's outputs
    observer: str = AUTO
    kv_cache: str | None = None  # fp8, int8, int8-g64, int4-g64: keys and values are rounded to it; None: as they are
    calibration: Calibrate | None = None  # None: the defaults above, where a method needs any
    sequential: bool = True  # each block learns on what the quantized ones before it put out; false: unquantized ones
    distill: Distill | None = None  # the whole model is trained, once it is quantized; a number is that of its steps
    max_fallback_layers: int = Field(0, ge=0)  # where more layers fall back to rounding to nearest, the job fails
    fit_groups: bool = False  # a group size that does not divide a layer is made smaller, in powers of two
    allow_split_fused: bool = False  # parts of what servers fuse (q, k and v; gate and up; experts) may differ

    @field_validator("calibration", mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value

    @field_validator("distill", mode="before")
    @classmethod
    def _steps_alone(cls, value: Any) -> Any:
        return {"steps": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("layers", mode="before")
    @classmethod
    def _kept(cls, value: Any) -> Any:
        """An empty value keeps a layer, as none does."""
        if not isinstance(value, dict):
            return value
        return {pattern: BASELINE if text is None else text for pattern, text in value.items()}


def _budget(value: Any) -> str:
    """The budget, as it is named."""
    return Budget.parse(str(value)).name


BudgetName = Annotated[str, BeforeValidator(_budget)]


# Recipes that are known by one word. The figures behind int8 are in docs/transforms.md, under INT8.
NAMED_RECIPES: dict[str, dict[str, Any]] = {
    "int8": {"transform": "smooth", "method": "gptq", "scheme": "int8-dynamic-asym", "keep_inputs": 0.05},
}


def recipe_parts(text: str) -> dict[str, Any]:
    """What a recipe's text, [transform+][method/]scheme, names of "scheme", "method" and "transform".

    An amount, such as 4.25bits, is a "budget" in place of a scheme; a word of NAMED_RECIPES stands for its keys.
    """
    if text in NAMED_RECIPES:
        return {"name": text, **NAMED_RECIPES[text]}
    transform, plus, rest = text.rpartition("+")
    method, slash, scheme = rest.rpartition("/")
    try:
        named = {"budget": Budget.parse(scheme).name}
    except ValueError:
        named = {"scheme": scheme}
    return named | ({"method": method} if slash else {}) | ({"transform": transform} if plus else {})


class RecipeSettings(RecipeDefaults):
    """How one model is quantized; as text, [transform+][method/]scheme: "int4-g128", "smooth+gptq/int8-dynamic"."""

    name: str | None = Field(None, pattern=_NAME)
    scheme: str = Field(min_length=1)  # of every layer that no rule names; none keeps them; auto, of a budget
    budget: BudgetName | None = None  # 4.25 bits, 4.1 GB: each layer gets one of the choices
    template: str | None = None  # of format: gguf, a GGUF file of the unquantized model, where bitpress has no table
    _inherited: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = recipe_parts(value)
        if not isinstance(value, dict) or value.get("budget") is None:
            return value
        if "scheme" in value and value["scheme"] != AUTO:
            said = "a budget chooses the schemes itself: take scheme out, or name those to choose from under choices"
            raise Several([(("scheme",), said)])
        return {**value, "scheme": AUTO}

    @property
    def spec(self) -> str:
        """[method/]scheme of the layers that no rule names."""
        return self.scheme if self.method == AUTO or self.scheme == BASELINE else f"{self.method}/{self.scheme}"

    @property
    def label(self) -> str:
        """The recipe's name, and that of its run's folder."""
        spec = self.spec if self.budget is None else f"{'' if self.method == AUTO else f'{self.method}-'}{self.budget}"
        text = f"{self.transform}-{spec}" if self.transform else spec
        text = text.replace("/", "-") + ("-mixed" if self.layers else "")
        text += f"-kv-{self.kv_cache}" if self.kv_cache else ""
        text += f"-{self.dtype}" if self.dtype != AUTO else ""
        return self.name or text + ("-distilled" if self.distill else "")

    @property
    def baseline(self) -> bool:
        """Whether this is the unquantized model."""
        return self.scheme == BASELINE and not self.layers and self.kv_cache is None

    def with_defaults(self, defaults: RecipeDefaults) -> "RecipeSettings":
        """These settings, and what they do not say from the defaults; options come along with their method only."""
        if self.baseline:
            return self
        missing = defaults.model_fields_set - self.model_fields_set
        merged = self.model_copy(update={key: getattr(defaults, key) for key in missing})
        if "options" in missing and merged.method != defaults.method:
            merged = merged.model_copy(update={"options": {}})
        merged._inherited = frozenset(missing)
        return merged

    def inherits(self, key: str) -> bool:
        """Whether a key's value is that of the defaults, which a recipe may have no use for."""
        return key in self._inherited


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
    """How a model is measured: on which text, by which protocol, and what besides quality."""

    text: str | Dataset = "builtin:pydoc-topics"
    protocol: Literal["gptq", "sliding", "llama.cpp", "word"] = "gptq"
    context: int | None = Field(None, ge=2)  # None: the protocol's own; cut to what the model can hold
    stride: int = Field(512, ge=1)  # of the protocol sliding
    windows: int | None = Field(None, ge=1)  # None: the whole text; pages, of the protocol word
    bos: Literal["auto", "first", "every"] = (
        "auto"  # which windows of gptq and sliding begin with BOS, see protocols.py
    )
    dtype: Dtype = AUTO
    kernel: KernelName = "auto"
    speed: Speed | None = Speed()  # type: ignore[call-arg]
    output_errors: int = Field(1, ge=0)  # windows on which each layer's outputs are compared; 0: none
    tasks: list[str] = []  # of lm-eval, such as arc_easy
    task_limit: int | None = Field(None, ge=1)  # documents of each task; None: all
    task_fewshot: int | None = Field(None, ge=0)  # solved examples before each document; None: the task's own number
    task_chat: bool = False  # whether documents are put as a user's turn, by the tokenizer's chat template
    prompt: str = "The"  # what the sample in the report continues

    def quick(self) -> "Eval":
        """These settings with as little measured as shows that all works; the figures are rough."""
        speed = self.speed and self.speed.model_copy(
            update={"batch": self.speed.batch[:1], "repeats": 1, "generate": 16}
        )
        few = {"windows": min(self.windows or _QUICK, _QUICK), "task_limit": min(self.task_limit or _QUICK, _QUICK)}
        return self.model_copy(update={**few, "speed": speed, "output_errors": 0})


class Cpu(_Strict):
    # what weight-only kernels round inputs to; mixed: to 8 bits and outliers to 16; bf16: nothing
    activations: Literal["mixed", "int16", "int8", "bf16"] = "mixed"


class Gates(_Strict):
    """What a quantized model must reach; a run that misses one fails, once everything is written."""

    kl_mean: float | None = Field(None, ge=0)  # at most, in nats
    ppl_increase: Annotated[float | None, BeforeValidator(_share)] = None  # at most: 0.03, or 3%
    top1: Annotated[float | None, BeforeValidator(_share)] = Field(None, ge=0, le=1)  # at least: 0.9, or 90%
    fallback_layers: int | None = Field(None, ge=0)  # at most


class Publish(_Strict):
    """Where a batch goes once it is finished; what misses a gate stays here."""

    repo: str  # owner/name; {model} and {recipe} in it stand for what a job is on
    private: bool = False  # of repositories that do not exist yet
    collection: str | None = Field(None, min_length=1, max_length=_LONGEST_TITLE)  # the title of one for all of them

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, value: Any) -> Any:
        if isinstance(value, dict) and (secrets := [key for key in _SECRETS if key in value]):
            raise ValueError(
                f"{secrets[0]} is never read from a config; take it out, and `hf auth login` or set HF_TOKEN"
            )
        return value

    def name_of(self, model: str, recipe: str) -> str:
        """The repository of one job; see check_repo for what is raised."""
        short = re.split(r"[/:]", model.rstrip("/"))[-1]
        return check_repo(self.repo.replace("{model}", short).replace("{recipe}", recipe))

    def check(self, models: Sequence[str], recipes: Sequence[str]) -> None:
        """Raises Several if a job has no repository of its own."""
        jobs = [(model, recipe) for model in models for recipe in recipes]
        try:
            names = [self.name_of(*job) for job in jobs]
        except ValueError as error:
            raise Several([(("repo",), str(error))]) from error
        if twice := next((name for name in names if names.count(name) > 1), None):
            said = f"several jobs would go to {twice}; tell them apart by {{model}} and {{recipe}}"
            raise Several([(("repo",), said)])


def check_repo(name: str) -> str:
    """The name of a repository, unchanged.

    Raises:
        ValueError: the Hub would not take it.
    """
    if name.count("/") != 1:
        raise ValueError(f"{name!r} is no repository of the Hub; expected owner/name")
    validate_repo_id(name)
    return name


def _one_or_more(value: Any) -> Any:
    """One name alone as a list of it."""
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_one_or_more)]


class Run(_Strict):
    """A whole config: every model is quantized by every recipe; the unquantized baseline is always measured."""

    name: str = Field(pattern=_NAME)
    models: list[Model] = Field(min_length=1)
    defaults: RecipeDefaults = RecipeDefaults()  # type: ignore[call-arg]
    recipes: list[RecipeSettings] = Field(min_length=1)
    eval: Eval = Eval()  # type: ignore[call-arg]
    cpu: Cpu = Cpu()
    gates: Gates = Gates()  # type: ignore[call-arg]
    publish: Publish | None = None
    track: Names = []  # experiment trackers that figures are sent to, see trackers/: mlflow, wandb, tensorboard
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: int = Field(1, ge=1)  # among which calibrated methods divide a block's layers and batches of text; same bytes
    executor: str = "serial"  # how the jobs are carried out, see runs/executors
    executor_options: dict[str, Any] = {}  # of the executor, such as {address: auto} of ray
    output: str = "runs"  # a folder, or a URL that fsspec knows: s3://bucket/runs

    @field_validator("publish")
    @classmethod
    def _repositories(cls, value: Publish | None, info: ValidationInfo) -> Publish | None:
        if value:
            value.check(
                [model.id for model in info.data.get("models", [])],
                [r.label for r in info.data.get("recipes", []) if not r.baseline],
            )
        return value

    @model_validator(mode="after")
    def _kernel_for_activations(self) -> "Run":
        if self.cpu.activations != "mixed" and self.eval.kernel == AUTO:
            self.eval = self.eval.model_copy(update={"kernel": f"auto-{self.cpu.activations}"})
        return self

    @field_validator("recipes")
    @classmethod
    def _with_defaults(cls, value: list[RecipeSettings], info: ValidationInfo) -> list[RecipeSettings]:
        """Recipes with the defaults in them, each with a name of its own."""
        recipes = (
            [recipe.with_defaults(info.data["defaults"]) for recipe in value] if "defaults" in info.data else value
        )
        names = [recipe.label for recipe in recipes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several recipes are called {', '.join(twice)}; give each a name of its own")
        return recipes

    def quick(self) -> "Run":
        """A run of the same jobs by another name, with little calibrated on and little measured; nothing leaves it.

        It has a folder of its own: an artifact of a quick run is not taken for one of the whole.
        """
        recipes = []
        for recipe in self.recipes:
            calibration = recipe.calibration or Calibrate()  # type: ignore[call-arg]
            windows = min(calibration.windows, _QUICK_CALIBRATION)
            fewer = recipe.model_copy(update={"calibration": calibration.model_copy(update={"windows": windows})})
            fewer._inherited = recipe._inherited | {"calibration"}
            recipes.append(recipe if recipe.baseline else fewer)
        changes = {"name": f"{self.name}-quick", "eval": self.eval.quick(), "recipes": recipes}
        return self.model_copy(update={**changes, "publish": None, "track": []})
