"""How one model is quantized, settled and checked before any weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.kv_cache import cache_examples, parse_cache

from ..config.budget import Budget
from ..config.load import load_recipe
from ..config.messages import Problem
from ..config.options import options_of
from ..config.schema import AUTO, Distill, RecipeSettings
from ..data.calibration import Calibration
from ..errors import ConfigError, nearest
from ..formats import cache_problem, scheme_name
from ..formats import registry as formats
from ..formats.base import Format, dtype_name
from ..methods import registry as methods
from ..methods import with_options
from ..storage.checkpoint import Checkpoint
from ..system.device import pick_devices
from ..system.versions import releases
from ..transforms import registry as transforms
from ..transforms.base import Transform
from .spec import KEPT, LayerSpec, Rules

FORMAT_VERSION = 2
DISTILL_VERSION = 1  # goes up whenever the same start would be trained to other bytes
CACHE_VERSION = 1  # goes up whenever the same keys and values would get other scales
BUDGET_VERSION = 3  # goes up whenever the same solutions would give other choices, or these would be solved otherwise
OBSERVER_VERSION = 3  # goes up whenever the same inputs would be given another range
KEEP_INPUTS_VERSION = 1  # goes up whenever the same errors would be measured or judged otherwise
# What a budget chooses from: 2.1 to 8 bits. Finer groups than 32 cost what the next width does.
CHOICES = (
    "int2-g128", "int2-g64", "int2-g32", "int3-g128", "int3-g32", "int4-g128", "int4-g32", "int8-channel",
)  # fmt: skip
NO_CALIBRATION = "no method of the recipe is calibrated: name one that is, such as gptq, or leave calibration out"


@dataclass(frozen=True)
class Recipe:
    """How one model is quantized: its names are resolved and fit together.

    rules: each layer's scheme and method. format: how the artifact is stored; None for the first format that can hold
    every layer. calibration: the tokens that calibrated methods are given; None where no method needs any.
    max_fallback_layers: the job fails where more layers than this fall back to rounding to nearest.
    fit_groups: a layer that its group size does not divide gets the largest smaller power of two that does.
    allow_split_fused: the parts of a unit that servers fuse, such as q, k and v, may differ.
    sequential: calibrated methods learn each block on what the quantized blocks before it put out; else on what the
    unquantized ones do, which recipes of a run share (see quantize/statistics.py).
    device: where calibrated methods do their work. more_devices: like it, among which batches of text and the layers of
    a block are divided; bytes are the same as with the first one alone.
    transform: what is done to each block before the methods; None for nothing.
    observer: how the range of static inputs is chosen; None for what is best for the block's outputs.
    keep_inputs: at most this share of the layers that quantize their inputs leave them alone; see quantize/inputs.py.
    budget: a size to meet; each layer that `rules.layers` does not name gets one of `choices`, None to keep it.
    cache: what keys and values are rounded to in the cache of attention; None to leave them.
    distill: how scales and norms are trained once all layers are quantized; None to leave them.
    dtype: what the checkpoint is read in, so that what is not quantized is stored in it; None for its own.
    """

    name: str
    rules: Rules
    format: Format | None = None
    calibration: Calibration | None = None
    max_fallback_layers: int = 0
    fit_groups: bool = False
    allow_split_fused: bool = False
    sequential: bool = True
    device: str = "cpu"
    more_devices: tuple[str, ...] = ()
    transform: Transform | None = None
    observer: str | None = None
    keep_inputs: float = 0.0
    budget: Budget | None = None
    choices: tuple[LayerSpec | None, ...] = ()
    distill: Distill | None = None
    cache: CacheType | None = None
    dtype: torch.dtype | None = None

    @staticmethod
    def make(settings: "str | Mapping[str, Any] | RecipeSettings", device: str = "auto", gpus: int = 1) -> "Recipe":
        """A recipe from its text, such as "gptq/int4-g128", or from its settings as a config has them.

        Args:
            device: "cpu", "cuda" or "auto", for calibrated methods; the others work on the CPU.
            gpus: among which calibrated methods divide their work.
        Raises:
            ConfigError: an unknown name, or things that do not go together; see also pick_devices.
        """
        if not isinstance(settings, RecipeSettings):
            settings = load_recipe(settings)
        if faults := problems(settings):
            raise ConfigError("; ".join(f"{'.'.join(map(str, path))}: {sentence}" for path, sentence in faults))
        method = None if settings.method == AUTO else with_options(methods()[settings.method], settings.options)
        choices: tuple[LayerSpec | None, ...] = ()
        if settings.budget:
            method = method or next(each for each in methods().values() if each.statistics)
            choices = tuple(LayerSpec.parse(text, method) for text in settings.choices or CHOICES)
        named = list(filter(None, choices))
        if settings.transform:  # it judges by the default, which the one in the middle stands for all others best as
            named = sorted(named, key=lambda spec: spec.scheme.bits)[max(0, len(named) - 1) // 2 :]
        devices = pick_devices(device, gpus)
        return Recipe(
            name=settings.label,
            rules=Rules(
                named[0] if settings.budget else LayerSpec.parse(settings.spec, method),
                {pattern: LayerSpec.parse(text, method) for pattern, text in settings.layers.items()},
            ),
            format=_format(settings),
            max_fallback_layers=settings.max_fallback_layers,
            fit_groups=settings.fit_groups,
            allow_split_fused=settings.allow_split_fused,
            sequential=settings.sequential,
            device=str(devices[0]),
            more_devices=tuple(map(str, devices[1:])),
            transform=transforms()[settings.transform] if settings.transform else None,
            observer=None if settings.observer == AUTO else settings.observer,
            keep_inputs=settings.keep_inputs,
            budget=Budget.parse(settings.budget) if settings.budget else None,
            choices=choices,
            distill=settings.distill,
            cache=parse_cache(settings.kv_cache) if settings.kv_cache else None,
            dtype=None if settings.dtype == AUTO else getattr(torch, settings.dtype),
        )

    @property
    def calibrated(self) -> bool:
        """Whether a step on the whole model, or some layer's method or inputs, need calibration."""
        whole = self.transform or self.budget or self.keep_inputs or self.distill or self.static_cache
        return bool(whole) or any(spec.needs_calibration for spec in self.rules.specs())

    @property
    def static_cache(self) -> bool:
        """Whether the scales of the cache are calibrated and stored."""
        return self.cache is not None and not self.cache.dynamic

    def specs(self) -> list[LayerSpec]:
        """Every spec that some layer may get."""
        return [*filter(None, self.choices), *self.rules.specs()]

    @property
    def scheme(self) -> str:
        """The scheme's name, "mixed" where layers may differ, or "none" where weights are left as they are."""
        return scheme_name(spec.scheme.name for spec in self.specs())

    @property
    def method(self) -> str:
        """The names of all methods."""
        return ", ".join(sorted({spec.method.name for spec in self.specs()}))

    def to_dict(self) -> dict[str, Any]:
        """Everything that the artifact's bytes depend on, in plain values, flat."""
        default = None if self.budget else self.rules.default
        described: dict[str, Any] = {
            "scheme": default.scheme.name if default else KEPT,
            "method": default.method.name if default else KEPT,
            "format": self.format.name if self.format else AUTO,
            "layers": self.rules.to_dict(),
            "fit_groups": self.fit_groups,
        }
        if self.budget:
            choices = [spec.name if spec else KEPT for spec in self.choices]
            described |= {
                "scheme": AUTO,
                "budget": self.budget.name,
                "budget.version": BUDGET_VERSION,
                "choices": choices,
            }
            described["method"] = ", ".join(sorted({spec.method.name for spec in self.choices if spec}))
        for method in {spec.method.name: spec.method for spec in self.specs()}.values():
            described[f"{method.name}.version"] = method.version
            described |= {f"{method.name}.{name}": value for name, value in options_of(method).items()}
        if self.format:
            described |= self.format.options
        if not self.sequential:
            described |= {"sequential": False}
        if self.transform:
            described |= {"transform": self.transform.name, "transform.version": self.transform.version}
        if self.observer:
            described |= {"observer": self.observer}
        elif any(spec.scheme.static for spec in self.specs()):
            described |= {"observer.version": OBSERVER_VERSION}
        if self.keep_inputs:
            described |= {"keep_inputs": self.keep_inputs, "keep_inputs.version": KEEP_INPUTS_VERSION}
        if self.cache:
            described |= {"kv_cache": self.cache.name, "kv_cache.version": CACHE_VERSION}
        if self.dtype:
            described |= {"dtype": dtype_name(self.dtype)}
        if self.distill:
            described |= {f"distill.{name}": value for name, value in self.distill.model_dump().items()}
            described |= {"distill.version": DISTILL_VERSION}
        if self.calibration:
            described |= {f"calibration.{name}": value for name, value in self.calibration.to_dict().items()}
        return described


def problems(settings: RecipeSettings) -> list[Problem]:
    """Everything that is wrong with a recipe's settings: (path to the key, sentence) each."""
    faults: list[Problem] = []
    for key, known in (("method", methods()), ("format", formats())):
        value = getattr(settings, key)
        if value != AUTO and value not in known:
            hint = nearest(value, known) or f"; use auto or one of {', '.join(known)}"
            faults.append(((key,), f"{key} {value!r} is unknown{hint}"))
    if settings.transform and settings.transform not in transforms():
        hint = nearest(settings.transform, transforms()) or f"; use one of {', '.join(transforms())}"
        faults.append((("transform",), f"transform {settings.transform!r} is unknown{hint}"))
    if faults:
        return faults
    if settings.template and settings.format == AUTO:
        return [(("template",), "a template is for one format, and format is auto: name it, as in format: gguf")]
    if settings.options and settings.method == AUTO:
        sentence = "these are options of one method, and method is auto: name it, as in method: gptq"
        return [(("options",), sentence)]
    specs: list[LayerSpec] = []
    texts: dict[tuple[str | int, ...], str] = {("layers", p): text for p, text in settings.layers.items()}
    if settings.budget is None:
        texts = {(): settings.spec} | texts
        if settings.choices and not settings.inherits("choices"):
            faults.append((("choices",), "these are for a budget to choose from, as in budget: 4.25 bits"))
    else:
        prefix = "" if settings.method == AUTO else f"{settings.method}/"
        choices = enumerate(settings.choices or CHOICES)
        texts |= {("choices", n): text if "/" in text or text == KEPT else prefix + text for n, text in choices}
    for path, text in texts.items():
        try:
            specs += [spec] if (spec := LayerSpec.parse(text)) else []
        except ValueError as error:
            faults.append((path or ("scheme" if settings.method == AUTO else "method",), str(error)))
    if settings.observer != AUTO and specs and not faults:
        observers = dict.fromkeys(name for spec in specs if spec.scheme.static for name in spec.scheme.static.observers)
        if not observers and not settings.inherits("observer"):
            faults.append(
                (("observer",), "no scheme of the recipe has static inputs, such as int8-static: leave it out")
            )
        for spec in specs:
            if spec.scheme.static and settings.observer not in spec.scheme.static.observers:
                hint = nearest(settings.observer, observers) or f"; use one of {', '.join(observers)}"
                faults.append((("observer",), f"observer {settings.observer!r} is unknown to {spec.scheme.name}{hint}"))
    if settings.keep_inputs and specs and not faults:
        rounding = [spec for spec in specs if spec.scheme.activations]
        alone = [spec.with_inputs_alone() for spec in rounding]
        if not rounding and not settings.inherits("keep_inputs"):
            said = "no scheme of the recipe quantizes inputs, such as int8-dynamic: leave it out"
            faults.append((("keep_inputs",), said))
        faults += [(("keep_inputs",), said) for spec in alone for said in spec.method.problems(spec.scheme)]
        specs += alone
    integers = any(spec.scheme.weight.description().type == "int" for spec in specs)
    if settings.distill and specs and not integers and not faults and not settings.inherits("distill"):
        said = "distill trains the scales of integer weights, and no scheme of the recipe has any: leave it out"
        faults.append((("distill",), said))
    if settings.options and not faults:
        faults += _option_problems(settings)
    if settings.budget:
        faults += _budget_problems(settings)
    if not settings.sequential and not faults:
        faults += [(("sequential",), said) for said in _unsequential_problems(settings, specs)]
    cache: CacheType | None = None
    if settings.kv_cache:
        try:
            cache = parse_cache(settings.kv_cache)
        except ValueError as error:
            faults.append((("kv_cache",), f"{error}{nearest(settings.kv_cache, cache_examples())}"))
    if cache and settings.distill:
        said = "distill trains the model with a cache that is not rounded; take distill out, or kv_cache"
        faults.append((("kv_cache",), said))
    if not specs and not faults and not settings.baseline and not cache:
        faults.append((("scheme",), "the recipe quantizes nothing: its scheme is none, and so is every layer's"))
    unused = (
        settings.calibration
        and not (settings.transform or settings.budget or settings.keep_inputs or settings.distill)
        and not (cache and not cache.dynamic)
        and not any(spec.needs_calibration for spec in specs)
    )
    if unused and (specs or cache) and not faults and not settings.inherits("calibration"):
        faults.append((("calibration",), NO_CALIBRATION))
    if settings.format != AUTO and not faults:
        target = formats()[settings.format]
        if cache and (problem := cache_problem(target, cache)):
            faults.append((("format",), problem))
        for spec in specs:
            fitting = (1024, 32 * (spec.scheme.weight.description().group_size or 32))
            faults += [(("format",), problem) for problem in target.problems(spec.scheme, fitting)]
    return list(dict.fromkeys(faults))


def _format(settings: RecipeSettings) -> Format | None:
    """The format that settings name, with its template; None for the first that fits."""
    if settings.format == AUTO:
        return None
    format = formats()[settings.format]
    return format.with_template(Path(settings.template).expanduser()) if settings.template else format


def _budget_problems(settings: RecipeSettings) -> list[Problem]:
    """What does not go together with a budget, which chooses the scheme of each unit that servers fuse."""
    faults: list[Problem] = []
    if settings.keep_inputs and not settings.inherits("keep_inputs"):
        said = "a budget chooses the scheme of each layer; take keep_inputs out, or the budget"
        faults.append((("keep_inputs",), said))
    if settings.choices and not any(text != KEPT for text in settings.choices):
        faults.append((("choices",), "all are none, so there is nothing to choose; name schemes, such as int4-g128"))
    if settings.allow_split_fused:
        said = "a budget chooses one scheme for what servers fuse; take allow_split_fused out, or the budget"
        faults.append((("allow_split_fused",), said))
    return faults


def _unsequential_problems(settings: RecipeSettings, specs: Sequence[LayerSpec]) -> list[str]:
    """Why a recipe cannot learn from the statistics of the unquantized model alone."""
    after = "leave sequential at true, its default"
    if settings.transform and not settings.budget:  # all of whose solutions are of transformed blocks
        return [f"{settings.transform} changes blocks before their statistics are gathered; {after}"]
    if settings.options.get("true_sequential"):
        return [f"true_sequential learns from quantized layers; take it out, or {after}"]
    if changing := [spec.method for spec in specs if spec.method.learns or spec.method.transforms]:
        return [f"{changing[0].name} works on whole blocks as the quantized ones before them feed them; {after}"]
    calibrated = bool(settings.budget) or any(spec.needs_calibration for spec in specs)
    if specs and not calibrated and not settings.inherits("sequential"):
        return [NO_CALIBRATION.replace("calibration out", "sequential out")]
    return []


def _option_problems(settings: RecipeSettings) -> list[Problem]:
    """What is wrong with a method's options: with each by itself, or else with them together."""

    def problem(options: Mapping[str, Any]) -> str | None:
        try:
            with_options(methods()[settings.method], dict(options))
        except ValueError as error:
            return str(error)
        return None

    single = {name: problem({name: value}) for name, value in settings.options.items()}
    wrong: list[Problem] = [
        (("options", name), said.removeprefix(f"{name}: ")) for name, said in single.items() if said
    ]
    if not wrong and (said := problem(settings.options)):
        wrong.append((("options",), said))
    return wrong


def fingerprint(checkpoint: Checkpoint, source: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Everything that the artifact's bytes depend on, flat: compared field by field when a run is repeated.

    The release of a version counts (see releases). safetensors is not among them: bitpress writes its files itself.
    """
    fields: dict[str, Any] = {f"quantize.{key}": value for key, value in recipe.to_dict().items()}
    fields |= {f"source.{key}": value for key, value in source.items()}
    fields |= {f"files.{name}": value for name, value in checkpoint.identity().items()}
    used = {"bitpress", "torch", "transformers"}
    for spec in recipe.specs():
        used |= set(spec.method.packages)
    fields |= {f"versions.{name}": value for name, value in releases().items() if name in used}
    return fields | {"format_version": FORMAT_VERSION}


def order_of_sums(recipe: Recipe) -> dict[str, Any]:
    """What the last bit of a float sum, and with it a code now and then, may depend on where a method is calibrated.

    A finished artifact is as good on another machine: it is recorded there and not compared. Unfinished work, whose
    blocks read what the quantized blocks before them put out, must end in the bytes of an unbroken run: it is compared.
    """
    kind = torch.device(recipe.device).type  # which one, and how many of them, makes no difference
    return {"device": kind, "threads": torch.get_num_threads()} if recipe.calibration else {}
