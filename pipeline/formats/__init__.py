"""On-disk formats of quantized checkpoints: one file each, registered here by name."""

from collections.abc import Iterable
from typing import Any

from bitpress.kernels.scheme import Scheme

from .base import Format


def registry() -> dict[str, Format]:
    """Formats by name, in the order in which they are preferred."""
    from .bitsandbytes import BitsAndBytes
    from .compressed_tensors import IntQuantized, PackQuantized
    from .gptq import GPTQ, GPTQv2

    formats: tuple[Format, ...] = (GPTQ(), PackQuantized(), IntQuantized(), BitsAndBytes(), GPTQv2())
    return {fmt.name: fmt for fmt in formats}


def default_format(scheme: Scheme) -> Format:
    """The format that most runtimes load for a scheme: GPTQ where it can hold it."""
    probe = (1024, scheme.group_size * 32 if scheme.group_size else 1024)
    return next(fmt for fmt in registry().values() if not fmt.problems(scheme, probe))


def detect(config: dict[str, Any], names: Iterable[str]) -> Format:
    """The format of a checkpoint from its quantization_config and tensor names.

    Raises:
        ValueError: none of ours.
    """
    method, names = config.get("quant_method", config.get("method")), list(names)  # GPTQModel writes either name
    tag = config.get("checkpoint_format", config.get("format"))
    candidates = [fmt for fmt in registry().values() if fmt.quant_method == method]
    declared = [fmt for fmt in candidates if tag in fmt.tags]
    for fmt in [*declared, *candidates]:
        if any(name.endswith(f".{fmt.marker}") for name in names):
            return fmt
    if candidates:
        raise ValueError(f"says {method}, but no tensor name ends in {' or '.join(f'.{f.marker}' for f in candidates)}")
    known = sorted({fmt.quant_method for fmt in registry().values()})
    raise ValueError(f"quant_method is {method!r}; bitpress reads {', '.join(known)}")


def readable(config: dict[str, Any]) -> bool:
    """Whether a quantization_config, by itself, describes what one of the formats reads."""
    tag = config.get("checkpoint_format", config.get("format"))
    for fmt in registry().values():
        if fmt.quant_method == config.get("quant_method") and (tag is None or tag in fmt.tags):
            try:
                fmt.scheme(config)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            return True
    return False
