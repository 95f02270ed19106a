"""How large a quantized model may become: so many bits per weight, or so many bytes in all."""

import re
from dataclasses import dataclass
from decimal import Decimal

_AMOUNT = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>bits?|[kmgt]i?b)", re.IGNORECASE)
_EXPECTED = "expected bits per weight, such as 4.25 bits, or the size of the whole artifact, such as 4.1 GB"


@dataclass(frozen=True)
class Budget:
    """A size that the artifact must not exceed.

    bits: per weight of the layers that are quantized, scales and zero points counted: int4-g128 takes 4.125 and a
        little; None where the budget is in bytes.
    nbytes: of the whole artifact, embeddings, head and companion files included; None where it is in bits.
    """

    name: str
    bits: float | None = None
    nbytes: int | None = None

    @staticmethod
    def parse(text: str) -> "Budget":
        """The budget that a text names: "4.25 bits", "4.1 GB", "900 MB", "3.8 GiB".

        Raises:
            ValueError: it names none, or one of nothing.
        """
        match = _AMOUNT.fullmatch(text.strip())
        if match is None:
            raise ValueError(_EXPECTED)
        number, unit = Decimal(match["number"]), match["unit"].lower()
        if not number:
            raise ValueError(f"{_EXPECTED}; 0 holds nothing")
        if unit.startswith("bit"):
            return Budget(f"{number}bits", bits=float(number))
        base = 1024 if "i" in unit else 1000
        prefix = unit[0].upper() if unit[0] != "k" or base == 1024 else "k"
        nbytes = int(number * base ** (1 + "kmgt".index(unit[0])))
        return Budget(f"{number}{prefix}{unit[1:-1]}B", nbytes=nbytes)

    def __str__(self) -> str:
        return self.name
