"""What the library's functions take and return: objects that say what they are, in a notebook as a table."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitpress.eval.report.words import facts_of, size, terms_html

from .checkpoints.describe import describe
from .config.load import load_recipe
from .config.schema import RecipeSettings
from .errors import ConfigError
from .formats import open_quantized, quantization_section
from .models.loading import kernels_used
from .quantize.recipe import problems


class Recipe(RecipeSettings):
    """How one model is quantized: `Recipe("gptq/int4-g128", layers={"*.down_proj": "int8-g128"})`.

    Args:
        text: [transform+][method/]scheme, or a budget such as "4.25bits"; None where the keys say it all.
        keys: those of a recipe in a config: scheme, method, layers, format, options, calibration, budget, choices, …
    Raises:
        ConfigError: everything that is wrong with it.
    """

    def __init__(self, text: str | None = None, /, **keys: Any):
        named = load_recipe(text).model_dump(exclude_unset=True) if text is not None else {}
        checked = load_recipe({**named, **keys})
        if faults := problems(checked):
            raise ConfigError("; ".join(sentence for _, sentence in faults))
        super().__init__(**checked.model_dump(exclude_unset=True))

    def __repr__(self) -> str:
        keys = self.model_dump(exclude_unset=True)
        return f"Recipe({', '.join(f'{key}={value!r}' for key, value in keys.items())})"

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return terms_html(f"Recipe {self.label}", self.model_dump(exclude_unset=True).items())


@dataclass(frozen=True)
class Artifact:
    """A quantized checkpoint.

    Attributes:
        folder: where it is. recipe: the name of how it was made. notes: sentences on what happened on the way.
    """

    folder: Path
    recipe: str
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What it is, from its headers: scheme, format, sizes in bytes; see checkpoints.describe."""
        return describe(self.folder)

    def section(self) -> dict[str, Any]:
        """The quantization_config of its config.json."""
        return quantization_section(open_quantized(self.folder))

    def _rows(self) -> list[tuple[str, str]]:
        facts = self.facts()
        rows = [("folder", str(self.folder)), ("scheme", facts["quantized"]), ("format", facts.get("format", "plain"))]
        layers = facts.get("quantized layers", 0)
        return [*rows, ("quantized layers", f"{layers:,}"), ("size", size(facts["bytes"]))]

    def __repr__(self) -> str:
        _, *rows = self._rows()
        words = ", ".join(f"{name} {value}" for name, value in rows)
        return f"Artifact({str(self.folder)!r}: {self.recipe}, {words})"

    def _repr_html_(self) -> str:
        return terms_html(f"Artifact {self.recipe}", [*self._rows(), *(("note", note) for note in self.notes)])


class Loaded(NamedTuple):
    """A model of transformers, and its tokenizer: `model, tokenizer = load(…)`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def _rows(self) -> list[tuple[str, str]]:
        kernels = kernels_used(self.model)["selected"]
        return [
            ("model", type(self.model).__name__),
            ("dtype", str(self.model.dtype).removeprefix("torch.")),
            ("device", str(self.model.device)),
            ("memory", size(self.model.get_memory_footprint())),
            ("kernels", ", ".join(f"{name} × {count}" for name, count in kernels.items()) or "none: not quantized"),
        ]

    def __repr__(self) -> str:
        return f"Loaded({', '.join(f'{name} {value}' for name, value in self._rows())})"

    def _repr_html_(self) -> str:
        return terms_html("Loaded", self._rows())


class Measurements(dict[str, Any]):
    """What was measured of a checkpoint: the keys and values of a metrics.json, as far as they were measured."""

    def __repr__(self) -> str:
        quality = self.get("quality") or {}
        known = ("perplexity", "kl_mean", "top1_agreement")
        words = [f"{key} {quality[key]:.4g}" for key in known if quality.get(key) is not None]
        nbytes = (self.get("size") or {}).get("file_bytes")
        words += [size(nbytes)] if nbytes is not None else []
        return f"Measurements({', '.join(words) or 'nothing measured'}; keys: {', '.join(self)})"

    def _repr_html_(self) -> str:
        return terms_html("Measurements", facts_of(self))
