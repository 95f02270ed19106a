"""On-disk formats of quantized checkpoints: one file each, which registers itself by PLUGINS."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bitpress.kernels.caches.base import CacheType
from bitpress.kernels.discovery import discover
from bitpress.kernels.kv_cache import described_cache
from bitpress.kernels.scheme import Scheme

from ..errors import CheckpointError, ConfigError, listing
from ..storage.checkpoint import Checkpoint, read_json
from .base import Format, SchemeRules, counted


def registry() -> dict[str, Format]:
    """Formats by name, in the order in which they are preferred."""
    return {format.name: format for format in discover(__name__)}


def first_fitting(
    layers: Mapping[str, tuple[Scheme, tuple[int, ...]]],
    embeddings: Collection[str] = (),
    cache: CacheType | None = None,
) -> tuple[Format, list[str]]:
    """The first format, by rank, that holds every layer; and sentences on why those before it do not.

    Args:
        layers: name -> (scheme, [out_features, in_features]).
        embeddings: those of them that are embeddings. cache: what keys and values are rounded to.
    Raises:
        ConfigError: none does; it says why, format by format.
    """
    reasons: list[str] = []
    for format in registry().values():
        if not (problems := misfits(format, layers, embeddings, cache)):
            return format, reasons
        reasons += problems
    raise ConfigError(f"no format can hold every layer together:\n{listing(reasons)}")


def misfits(
    format: Format,
    layers: Mapping[str, tuple[Scheme, tuple[int, ...]]],
    embeddings: Collection[str] = (),
    cache: CacheType | None = None,
) -> list[str]:
    """Why a format cannot hold these layers, each reason once, with how many layers it is about; [] if it can.

    Args:
        cache: what keys and values are rounded to, which it must say, too.
    """
    problems: dict[str, list[str]] = {}
    for layer, (scheme, shape) in layers.items():
        for problem in format.problems(scheme, shape):
            problems.setdefault(problem, []).append(layer)
    if embeddings and not format.holds_embeddings:
        problems[f"{format.name} has no place for quantized embeddings"] = list(embeddings)
    if cache and (why := cache_problem(format, cache)):
        problems[why] = []
    mixture = format.mixture_problems({layer: scheme for layer, (scheme, _) in layers.items()}) if not problems else []
    return [*(counted(problem, names) for problem, names in problems.items()), *mixture]


def quantized_cache(checkpoint: Checkpoint) -> CacheType | None:
    """What a checkpoint's config says keys and values are rounded to; None for nothing, or for what bitpress knows not.

    Raises:
        CheckpointError: see read_config.
    """
    config = quantization_section(checkpoint)
    if config is None:
        return None
    format, _ = read_config(checkpoint)
    scheme = format.cache_scheme(config)
    return described_cache(scheme) if scheme else None


def cache_problem(format: Format, cache: CacheType) -> str | None:
    """Why a format cannot say what keys and values are rounded to; None if it can."""
    if format.cache_section(cache.description()) is not None:
        return None
    return f"{format.name} has no place for a quantized key-value cache ({cache.name})"


def detect(config: dict[str, Any], names: Iterable[str]) -> Format:
    """The format of a checkpoint from its quantization_config and tensor names.

    Raises:
        ValueError: none of ours.
    """
    method, names = config.get("quant_method", config.get("method")), list(names)  # GPTQModel writes either name
    tag = config.get("checkpoint_format", config.get("format"))
    candidates = [format for format in registry().values() if format.quant_method == method]
    declared = [format for format in candidates if tag in format.tags]
    for format in [*declared, *candidates]:
        if format.layers(names):
            return format
    for format in candidates:
        if format.only_cache(config):
            return format
    if candidates:
        raise ValueError(f"says {method}, but no tensor name ends in {' or '.join(f'.{f.marker}' for f in candidates)}")
    known = sorted({format.quant_method for format in registry().values()})
    raise ValueError(f"quant_method is {method!r}; bitpress reads {', '.join(known)}")


def open_quantized(folder: Path) -> Checkpoint:
    """A checkpoint as whoever runs, examines or converts it sees it.

    FP8 and FP4 are both: formats of quantized checkpoints, and codings that models are published in. Here the weights
    are quantized if a format reads them. To quantize them again, `Checkpoint(folder)` dequantizes them.

    Raises:
        CheckpointError: see Checkpoint.
    """
    checkpoint = Checkpoint(folder)
    stored = checkpoint.as_stored()
    section = quantization_section(stored)
    if not isinstance(section, dict) or not readable(section):
        return checkpoint
    formats = [format for format in registry().values() if format.quant_method == section.get("quant_method")]
    if any(format.unsupported(section, stored.tensors) for format in formats):
        return checkpoint
    for format in formats:
        stored = format.view(stored)
    return stored


def quantization_section(checkpoint: Checkpoint) -> Any:
    """What a checkpoint says of how it is quantized; None where it is not.

    That is the quantization_config of config.json, which may hold anything. Some programs once wrote it to a file of
    its own alone, which counts where the files hold quantized layers.
    """
    for format in registry().values():
        if (section := format.section_of(checkpoint.config)) is not None:
            return section
    if "quantization_config" in checkpoint.config:
        return checkpoint.config["quantization_config"]
    for format in registry().values():
        others = [name for name in (*format.config_copies, format.side_config) if name]
        if not others or not format.layers(checkpoint.tensors):
            continue
        for name in others:
            if (checkpoint.folder / name).exists():
                return {"quant_method": format.quant_method, **read_json(checkpoint.folder / name)}
    return None


def read_config(checkpoint: Checkpoint) -> tuple[Format, SchemeRules]:
    """The format of a quantized checkpoint, and which layer has which scheme, as its config says.

    Raises:
        CheckpointError: nothing that bitpress reads.
    """
    config = quantization_section(checkpoint)
    try:
        format = detect(config, checkpoint.tensors)
        return format, format.scheme_rules(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: quantization_config: {error}") from error


def count_schemes(checkpoint: Checkpoint) -> tuple[Format, dict[str, int]]:
    """The format of a quantized checkpoint, and scheme -> number of layers, from config.json and tensor names alone.

    Raises:
        CheckpointError: nothing that bitpress reads.
    """
    format, rules = read_config(checkpoint)
    counts: dict[str, int] = {}
    for layer in format.layers(checkpoint.tensors):
        scheme = rules.get(layer)
        counts[scheme.name if scheme else "unknown"] = counts.get(scheme.name if scheme else "unknown", 0) + 1
    return format, counts


def scheme_name(names: Iterable[str]) -> str:
    """The name of the scheme that all layers have, or "mixed"; "none" where there is no layer."""
    distinct = set(names) or {"none"}
    return distinct.pop() if len(distinct) == 1 else "mixed"


def readable(config: dict[str, Any]) -> bool:
    """Whether a quantization_config, by itself, describes what one of the formats reads."""
    tag = config.get("checkpoint_format", config.get("format"))
    for format in registry().values():
        if format.quant_method == config.get("quant_method") and (tag is None or tag in format.tags):
            try:
                format.scheme_rules(config)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            return True
    return False
