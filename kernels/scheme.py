"""What the numbers of a quantized weight mean: data only."""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

INT_BITS = (2, 3, 4, 8)
NF4_BLOCK = 64

_INT = re.compile(r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<channel>channel))(?P<asym>-asym)?")


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix [out_features, in_features] is coded.

    Args:
        code: "int" (affine integers) or "nf4" (the 16 quantiles of QLoRA, arXiv 2305.14314, appendix E).
        bits: bits per code.
        group_size: input features that share a scale; None means one group per output channel.
            NF4 groups run over the flattened matrix, as bitsandbytes lays them out.
        symmetric: the zero point is the middle code, 2^(bits-1), and is not stored.
        activations: "int8-token" quantizes each row of the layer's input to INT8 as it comes; None leaves it alone.
        double_quant: NF4's scales are themselves quantized to 8 bits.
    """

    code: Literal["int", "nf4"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["int8-token"] | None = None
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.code == "int" and self.bits not in INT_BITS:
            raise ValueError(f"int{self.bits} is not a scheme: bits must be one of {', '.join(map(str, INT_BITS))}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size {self.group_size} is not a positive number")
        if self.activations and (self.code, self.bits, self.group_size, self.symmetric) != ("int", 8, None, True):
            raise ValueError("quantized activations go with symmetric 8-bit weights, one scale per channel")

    @property
    def name(self) -> str:
        """The name that `parse` reads, such as "int4-g128"."""
        if self.code == "nf4":
            return "nf4-dq" if self.double_quant else "nf4"
        if self.activations:
            return f"int{self.bits}-dynamic"
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")

    @staticmethod
    def parse(name: str) -> "Scheme":
        """Scheme from its name: int4-g128, int3-channel-asym, int8-dynamic, nf4, nf4-dq.

        Raises:
            ValueError: the name is none of these; the message lists the forms.
        """
        if name in ("nf4", "nf4-dq"):
            return Scheme("nf4", 4, NF4_BLOCK, double_quant=name == "nf4-dq")
        if name == "int8-dynamic":
            return Scheme("int", 8, activations="int8-token")
        if match := _INT.fullmatch(name):
            group = int(match["group"]) if match["group"] else None
            return Scheme("int", int(match["bits"]), group, symmetric=not match["asym"])
        raise ValueError(
            f"{name!r} is not a scheme; use int{{2,3,4,8}}-g{{group size}} or int{{2,3,4,8}}-channel "
            "(each with -asym if wanted), int8-dynamic, nf4 or nf4-dq"
        )

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def groups(self, in_features: int) -> int:
        """Number of scales per output channel of an integer scheme."""
        return in_features // self.group_size if self.group_size else 1

    def problems(self, shape: tuple[int, ...]) -> list[str]:
        """Why a weight of this shape [out_features, in_features] cannot be coded; [] if it can."""
        if len(shape) != 2:
            return [f"has {len(shape)} dimensions {list(shape)}, expected 2"]
        if 0 in shape:
            return [f"is empty: shape {list(shape)}"]
        if self.code == "int" and self.group_size and shape[1] % self.group_size:
            fitting = [g for g in (128, 64, 32) if shape[1] % g == 0]
            use = f"use {' or '.join(map(str, fitting))}" if fitting else f"use int{self.bits}-channel"
            return [f"in_features {shape[1]} is not divisible by group_size {self.group_size}; {use}"]
        return []

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
