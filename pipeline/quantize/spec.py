"""How each layer is quantized: a spec for a layer, and rules that give every layer its own."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from bitpress.kernels.scheme import Scheme, examples

from ..errors import nearest
from ..methods import default_method
from ..methods import registry as methods
from ..methods.base import Method, Statistic

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

    @property
    def needs_calibration(self) -> bool:
        """Whether the method, or the scheme for its inputs, must see what the model does with calibration text."""
        return self.method.needs_calibration or self.scheme.static is not None

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """What has to be gathered of the layer's inputs: for the method, and for what is stored of the inputs."""
        return *self.method.statistics, *(self.scheme.static.statistics if self.scheme.static else ())

    @staticmethod
    def parse(text: str, preferred: Method | None = None) -> "LayerSpec | None":
        """The spec that a text names: "int4-g128", "gptq/int4-g128"; None for "none".

        Args:
            preferred: the method where the text names none and this one can make the scheme, or where the text names
                it, with its options; otherwise it is the scheme's default method.
        Raises:
            ValueError: an unknown scheme or method, or a method that cannot make the scheme.
        """
        method_name, slash, scheme_name = text.rpartition("/")
        if scheme_name == KEPT and not slash:
            return None
        try:
            scheme = Scheme.parse(scheme_name)
        except ValueError as error:
            raise ValueError(f"{error}{nearest(scheme_name, [KEPT, *examples()])}") from error
        if slash and method_name not in methods():
            hint = nearest(method_name, methods()) or f"; use one of {', '.join(methods())}"
            raise ValueError(f"method {method_name!r} is unknown{hint}")
        if preferred and (preferred.name == method_name or not (slash or preferred.problems(scheme))):
            method = preferred
        else:
            method = methods()[method_name] if slash else default_method(scheme)
        if problems := method.problems(scheme):
            raise ValueError("; ".join(problems))
        return LayerSpec(scheme, method)

    def with_inputs_alone(self) -> "LayerSpec":
        """The same weights, and inputs that are left as they are."""
        return replace(self, scheme=replace(self.scheme, activations=None))

    def fitted(self, shape: tuple[int, ...]) -> "LayerSpec":
        """The same spec, its group size made to divide the weight's inputs (see Scheme.fitted)."""
        return replace(self, scheme=self.scheme.fitted((shape[0], shape[1])))


@dataclass(frozen=True)
class Rules:
    """A spec for every layer.

    default: for layers that no pattern fits; None keeps them as they are.
    layers: shell pattern on the names in the files -> spec, or None to keep; the last pattern that fits wins.
    """

    default: LayerSpec | None
    layers: Mapping[str, LayerSpec | None] = field(default_factory=dict)

    def pattern(self, *names: str) -> str | None:
        """The pattern that decides on a tensor or a layer of this name, or of these; None where the default does."""
        names += tuple(name.removesuffix(".weight") for name in names)
        fitting = [each for each in self.layers if any(fnmatchcase(name, each) for name in names)]
        return fitting[-1] if fitting else None

    def spec(self, *names: str) -> LayerSpec | None:
        """How the layer of this name, or of these, is quantized; None where it is kept."""
        pattern = self.pattern(*names)
        return self.default if pattern is None else self.layers[pattern]

    def specs(self) -> Iterator[LayerSpec]:
        """Every spec that some layer may get."""
        yield from (spec for spec in (self.default, *self.layers.values()) if spec)

    def to_dict(self) -> dict[str, str]:
        """pattern -> the text of its spec."""
        return {pattern: spec.name if spec else KEPT for pattern, spec in self.layers.items()}
