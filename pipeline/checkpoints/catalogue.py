"""What bitpress has, from its registries: schemes, methods, formats, and kernels with why one cannot run here."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any

import torch

from bitpress.kernels.base import Kernel
from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.kv_cache import bytes_per_token, cache_examples, parse_cache
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry as kernels
from bitpress.kernels.scheme import Scheme, examples

from ..config.schema import NAMED_RECIPES
from ..formats import registry as formats
from ..methods import registry as methods
from ..transforms import registry as transforms

_PROBE = (1024, 1024)


@dataclass(frozen=True)
class Entry:
    """What one plug-in serves, and what else is to be said of it; `schemes` is empty where it cannot run here."""

    about: str = ""
    schemes: tuple[str, ...] = ()

    def text(self) -> str:
        """One line: the schemes, those that differ in a part alone written as one, and the words."""
        return "; ".join(filter(None, [", ".join(_joined(self.schemes)), self.about]))

    def to_dict(self) -> dict[str, Any]:
        return {"schemes": list(self.schemes), "about": self.about}


def catalogue() -> dict[str, dict[str, Entry]]:
    """Kind ("recipes", "schemes", "kernels on cpu", …) -> name -> what it serves, or why it cannot run here."""
    schemes = [Scheme.parse(name) for name in examples()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = {name: [f"{key}: {value}" for key, value in keys.items()] for name, keys in NAMED_RECIPES.items()}
    return {
        "recipes": {name: Entry(", ".join(keys)) for name, keys in named.items()},
        "schemes": {scheme.name: Entry(_described(scheme)) for scheme in schemes},
        "key-value caches": {name: Entry(_cached(parse_cache(name))) for name in cache_examples()},
        "transforms": {name: Entry(transform.about) for name, transform in transforms().items()},
        "methods": {
            name: Entry(schemes=tuple(scheme.name for scheme in schemes if not method.problems(scheme)))
            for name, method in methods().items()
        },
        "formats": {
            name: Entry(
                "read, not written" if format.read_only else "",
                tuple(scheme.name for scheme in schemes if not format.problems(scheme, _PROBE)),
            )
            for name, format in formats().items()
        },
        f"kernels on {device.type}": {kernel.name: _serves(kernel, schemes, device) for kernel in kernels()},
    }


def _described(scheme: Scheme) -> str:
    """The facts of a scheme, and its bits per weight, scales and zero points included, in a layer of _PROBE's shape."""
    facts, (rows, columns) = scheme.weight.description(), _PROBE
    layout = scheme.weight.layout((rows, columns)).items()
    packed = {"codes": rows * columns * scheme.bits / 8}
    nbytes = sum(packed.get(name, prod(shape) * min(d.itemsize for d in dtypes)) for name, (shape, dtypes) in layout)
    words = f"{8 * nbytes / rows / columns:.2f} bits per weight: {facts.type}, a scale per {facts.strategy}"
    words += f" of {facts.group_size}" if facts.group_size else ""
    words += "" if facts.symmetric else ", with zero points"
    return words + (f"; inputs {scheme.activations.name}" if scheme.activations else "")


def _cached(cache: CacheType) -> str:
    """The bits of a key's or value's number, scales included, in heads of 64 features, or of the least that fits."""
    dim = next(dim for dim in (64 << power for power in range(8)) if not cache.problems(dim))
    facts = cache.description()
    words = f"{8 * bytes_per_token(cache, 1, dim) / dim:.2f} bits per number: {facts['type']}, "
    return words + ("a scale for each group of each token" if cache.dynamic else f"calibrated, by {facts['strategy']}")


def _serves(kernel: Kernel, schemes: list[Scheme], device: torch.device) -> Entry:
    """The schemes that a kernel serves for bfloat16 inputs, or what keeps it from those that it is made for."""
    meant = [scheme for scheme in schemes if kernel.last_resort or kernel.unserved(scheme) is None]
    if kernel.package:
        if find_spec(kernel.package) is None:
            return Entry(f"not here: {kernel.package} is not installed")
        names = tuple(scheme.name for scheme in meant)
        return Entry(f"bfloat16, through {kernel.package}, which is imported when a weight needs it", names)
    if pending := kernel.pending(device):  # to ask whether it runs here would do that now
        return Entry(f"bfloat16, {pending}", tuple(scheme.name for scheme in meant))
    reasons = {
        scheme.name: kernel.unsupported(QTensor.without_content(scheme, _PROBE), torch.bfloat16, device)
        for scheme in meant
    }
    if usable := tuple(name for name, reason in reasons.items() if reason is None):
        return Entry("; ".join(filter(None, ["bfloat16", kernel.about()])), usable)
    [(reason, _)] = Counter(reasons.values()).most_common(1) or [("it serves no scheme of this list", 0)]
    return Entry(f"not here: {reason}")


def _joined(names: Sequence[str]) -> list[str]:
    """Names that differ in one number or in their ends alone, written as one: int{2,3,4,8}-{g32,channel}."""
    ends: dict[str, list[str]] = {}
    for name in names:
        head, _, end = name.partition("-")
        ends.setdefault(head, []).append(end)
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for head, own in ends.items():
        word = head.rstrip("0123456789")
        groups.setdefault((word, tuple(own)), []).append(head.removeprefix(word))

    def braces(parts: Sequence[str]) -> str:
        return f"{{{','.join(parts)}}}" if len(parts) > 1 else "".join(parts)

    joined = []
    for (word, every), numbers in groups.items():
        plain, longer = [end for end in every if not end], [end for end in every if end]
        joined += [word + braces(numbers)] * bool(plain)
        joined += [f"{word}{braces(numbers)}-{braces(longer)}"] * bool(longer)
    return joined
