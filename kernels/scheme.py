"""How a layer is quantized: the type of its weight, and what becomes of its inputs. Data only."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from .activations.base import Activations
from .discovery import discover
from .weights.base import Layout, WeightDescription, WeightType


def weight_types() -> tuple[type[WeightType], ...]:
    """Every type of kernels/weights/."""
    return discover("bitpress.kernels.weights")


def activation_types() -> tuple[type[Activations], ...]:
    """Every type of kernels/activations/."""
    return discover("bitpress.kernels.activations")


def examples() -> list[str]:
    """Common names of schemes: those that messages suggest and `bitpress list` shows."""
    dynamic = [name for kind in activation_types() for name in kind.schemes]
    joined = [f"int4-g128-{suffix}" for kind in activation_types() if (suffix := _suffix(kind))]
    return [*(name for kind in weight_types() for name in kind.examples), *dynamic, *joined]


def _suffix(kind: type[Activations]) -> str:
    """What the names of schemes with these inputs may end in; "" where such are only named one by one."""
    return getattr(kind, "suffix", "")


def _goes_with(kind: type[Activations], weight: WeightType) -> bool:
    return bool(_suffix(kind)) and cast(Any, kind).goes_with(weight.description().type, weight.bits)


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix [out_features, in_features] and its inputs are coded.

    Args:
        weight: the weight's type.
        activations: quantizes the layer's inputs; None leaves them alone.

    Raises:
        ValueError: these activations do not go with this weight.
    """

    weight: WeightType
    activations: Activations | None = None

    def __post_init__(self) -> None:
        inputs = self.activations
        if inputs and self.weight.name not in inputs.schemes.values() and not _goes_with(type(inputs), self.weight):
            own = " or ".join(inputs.schemes.values())
            raise ValueError(f"{inputs.name} activations go with {own} weights, not {self.weight.name}")

    @property
    def name(self) -> str:
        """The name that `parse` reads, such as "int4-g128"."""
        if self.activations is None:
            return self.weight.name
        joined = f"{self.weight.name}-{_suffix(type(self.activations))}"
        return next((name for name, own in self.activations.schemes.items() if own == self.weight.name), joined)

    @property
    def bits(self) -> int:
        """Bits of a weight's code."""
        return self.weight.bits

    @staticmethod
    def parse(name: str) -> "Scheme":
        """The scheme of this name: int4-g128, int3-channel-asym, int8-dynamic, int4-g128-int8-dynamic, nf4, nf4-dq.

        Raises:
            ValueError: no registered type has such names (the message lists their forms), or a value is impossible.
        """
        for kind in activation_types():
            if name in kind.schemes:
                return Scheme(Scheme.parse(kind.schemes[name]).weight, kind())
            if (suffix := _suffix(kind)) and name.endswith(f"-{suffix}"):
                return Scheme(Scheme.parse(name.removesuffix(f"-{suffix}")).weight, kind())
        forms = [
            *(kind.forms for kind in weight_types()),
            *(form for kind in activation_types() for form in kind.schemes),
            *(f"int4-gN-{suffix}" for kind in activation_types() if (suffix := _suffix(kind))),
        ]
        return Scheme(_ask(lambda kind: kind.parse(name), f"{name!r} is not a scheme; use {', '.join(forms)}"))

    @staticmethod
    def from_description(weights: WeightDescription, activations: Mapping[str, Any] | None = None) -> "Scheme":
        """The scheme of weights and inputs that are described in neutral terms.

        Args:
            activations: as compressed-tensors' `input_activations`; None where inputs are left alone.

        Raises:
            ValueError: no registered type is described so, or a value is impossible.
        """
        weight = _ask(lambda kind: kind.from_description(weights), f"weights of {weights} are not supported")
        if activations is None:
            return Scheme(weight)
        for kind in activation_types():
            if (inputs := kind.from_description(activations)) is not None:
                return Scheme(weight, inputs)
        raise ValueError(f"input activations of {dict(activations)} are not supported")

    @property
    def joined(self) -> bool:
        """Whether the name is the weight type's with the inputs' suffix; the weight is stored as without them."""
        return self.activations is not None and self.weight.name not in self.activations.schemes.values()

    @property
    def static(self) -> Activations | None:
        """The activations where they are static, so that something of them is calibrated and stored; else None."""
        return None if self.activations is None or self.activations.dynamic else self.activations

    @property
    def shifts_inputs(self) -> bool:
        """Whether inputs are rounded with zero points."""
        return self.activations is not None and not self.activations.description().get("symmetric", True)

    def layout(self, shape: tuple[int, int]) -> Layout:
        """The tensors of a weight of this shape, and of its inputs."""
        return {**self.weight.layout(shape), **(self.static.layout() if self.static else {})}

    def random(self, shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random tensors, on the CPU, of a layer whose weights and inputs are of the order of 1."""
        return self.weight.random(shape, generator) | (self.static.random(generator) if self.static else {})

    def problems(self, shape: tuple[int, ...]) -> list[str]:
        """Why a weight of this shape [out_features, in_features] cannot be coded; [] if it can."""
        if len(shape) != 2:
            return [f"has {len(shape)} dimensions {list(shape)}, expected 2"]
        if 0 in shape:
            return [f"is empty: shape {list(shape)}"]
        return self.weight.problems((shape[0], shape[1]))

    def fitted(self, shape: tuple[int, int]) -> "Scheme":
        """This scheme, or the same with a smaller group size that divides in_features (see WeightType.fitted)."""
        return replace(self, weight=self.weight.fitted(shape))

    def to_dict(self) -> dict[str, Any]:
        """The name and the descriptions, for JSON."""
        inputs = None if self.activations is None else self.activations.description()
        return {"name": self.name, "weights": asdict(self.weight.description()), "activations": inputs}

    # What integer types say about themselves, for code that knows that it has one. On others these raise.

    @property
    def group_size(self) -> int | None:
        """Elements that share a scale; None for one scale per channel."""
        return self.weight.description().group_size

    @property
    def symmetric(self) -> bool:
        """No zero points are stored."""
        return self.weight.description().symmetric

    @property
    def middle(self) -> int:
        """The zero point of a symmetric integer scheme."""
        return cast(Any, self.weight).middle

    @property
    def max_code(self) -> int:
        """The largest code of an integer scheme."""
        return cast(Any, self.weight).max_code

    def groups(self, in_features: int) -> int:
        """The number of scales per output channel of an integer scheme."""
        return cast(Any, self.weight).groups(in_features)


def _ask(question: Callable[[type[WeightType]], WeightType | None], otherwise: str) -> WeightType:
    """The first answer of a registered type.

    Raises:
        ValueError: there is none. A type that found the form right and a value impossible says so; else `otherwise`.
    """
    refusals: list[ValueError] = []
    for kind in weight_types():
        try:
            answer = question(kind)
        except ValueError as error:  # another type may have the same form with other values
            refusals.append(error)
            continue
        if answer is not None:
            return answer
    raise refusals[0] if refusals else ValueError(otherwise)
