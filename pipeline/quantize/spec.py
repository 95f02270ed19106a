"""How each layer is quantized: a spec for a layer, and rules that give every layer its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from bitpress.kernels.scheme import Scheme

from ..errors import nearest
from ..methods import default_method, with_options
from ..methods import registry as methods
from ..methods.base import Method

KEPT = "none"  # in place of a spec: the layer stays as it is


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized.

    scheme: how its weight and its inputs are coded. method: the algorithm that chooses the codes.
    """

    scheme: Scheme
    method: Method

    @property
    def name(self) -> str:
        """The text that `parse` reads, such as "gptq/int4-g128"."""
        return f"{self.method.name}/{self.scheme.name}"

    @staticmethod
    def parse(text: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> "LayerSpec | None":
        """The spec that a text names: "int4-g128" (by the scheme's default method), "gptq/int4-g128", None for "none".

        Args:
            options: method name -> its options, where its defaults are not wanted.
        Raises:
            ValueError: an unknown scheme or method, a method that cannot make the scheme, or options it does not have.
        """
        method_name, slash, scheme_name = text.rpartition("/")
        if scheme_name == KEPT and not slash:
            return None
        scheme = Scheme.parse(scheme_name)
        if slash and method_name not in methods():
            hint = nearest(method_name, methods()) or f"; use one of {', '.join(methods())}"
            raise ValueError(f"method {method_name!r} is unknown{hint}")
        method = methods()[method_name] if slash else default_method(scheme)
        method = with_options(method, dict((options or {}).get(method.name, {})))
        if problems := method.problems(scheme):
            raise ValueError("; ".join(problems))
        return LayerSpec(scheme, method)

    def fitted(self, shape: tuple[int, ...]) -> "LayerSpec":
        """The same spec, its group size made to divide the weight's inputs (see Scheme.fitted)."""
        return replace(self, scheme=self.scheme.fitted(shape))


@dataclass(frozen=True)
class Rules:
    """A spec for every layer.

    default: for layers that no pattern fits; None keeps them as they are.
    layers: shell pattern on the names in the files -> spec, or None to keep; the last pattern that fits wins.
    """

    default: LayerSpec | None
    layers: Mapping[str, LayerSpec | None] = field(default_factory=dict)

    def pattern(self, name: str) -> str | None:
        """The pattern that decides on a tensor or a layer of this name; None where the default does."""
        layer = name.removesuffix(".weight")
        fitting = [each for each in self.layers if fnmatchcase(layer, each) or fnmatchcase(name, each)]
        return fitting[-1] if fitting else None

    def spec(self, name: str) -> LayerSpec | None:
        """How the layer of this name is quantized; None where it is kept."""
        pattern = self.pattern(name)
        return self.default if pattern is None else self.layers[pattern]

    def specs(self) -> Iterator[LayerSpec]:
        """Every spec that some layer may get."""
        yield from (spec for spec in (self.default, *self.layers.values()) if spec)

    def to_dict(self) -> dict[str, str]:
        """pattern -> the text of its spec."""
        return {pattern: spec.name if spec else KEPT for pattern, spec in self.layers.items()}
