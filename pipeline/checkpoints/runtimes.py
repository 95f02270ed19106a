"""Which runtimes load a quantized checkpoint, over how many GPUs, and why not: what their documents and sources say.

Looked up in autumn 2026: transformers 5.23 with compressed-tensors 0.20 (tried), GPTQModel 7, vLLM (auto_gptq, the
compressed-tensors schemes, Marlin's shape checks; pull request 26092), SGLang (gptq, pull request 25292). Nothing here
runs them. What is not documented is called unknown.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bitpress.kernels.scheme import Scheme

LEVELS = ("yes", "limited", "unknown", "no")  # the worst of what is found counts
WAYS = (1, 2, 4, 8)
_MARLIN_BITS, _MARLIN_GROUPS, _MARLIN_OUT, _MARLIN_IN, _MARLIN_EXPERT_IN = (4, 8), (None, 32, 64, 128), 64, 128, 64
_PER_WORD = 32
_FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
Reason = tuple[str, str]  # of LEVELS, and a sentence


@dataclass(frozen=True)
class Facts:
    """What the verdicts depend on.

    format: as bitpress names it. ordered: whether some layer has act-order. shapes: layer -> (out, in features).
    split: layer -> "column" or "row" as tensor parallelism cuts it, None for a layer that is whole on every GPU; None
    in all where no plan is known for the architecture. experts: the layers that are experts. heads: attention heads,
    and key-value heads.
    """

    format: str
    scheme: Scheme
    ordered: bool
    shapes: dict[str, tuple[int, int]]
    split: dict[str, str | None] | None
    experts: frozenset[str] = frozenset()
    heads: tuple[int, int] = (1, 1)

    @property
    def gptq(self) -> bool:
        return self.format in ("gptq", "gptq-v2")


def verdicts(facts: Facts) -> dict[str, dict[str, Any]]:
    """Runtime -> {"loads": one of LEVELS, "needs": packages, "why": sentences}."""
    rules = {"transformers": _transformers, "GPTQModel": _gptqmodel, "vLLM": _vllm, "SGLang": _sglang}
    found = {}
    for name, rule in rules.items():
        reasons = list(rule(facts))
        worst = max((LEVELS.index(level) for level, _ in reasons), default=0)
        found[name] = {"loads": LEVELS[worst], "needs": _needs(name, facts), "why": [why for _, why in reasons if why]}
    return found


def _needs(runtime: str, facts: Facts) -> str:
    if facts.format == "bitsandbytes":
        return "" if runtime == "GPTQModel" else "bitsandbytes"
    if runtime != "transformers":
        return ""
    return "optimum, gptqmodel" if facts.gptq else "compressed-tensors"


def _transformers(facts: Facts) -> Iterator[Reason]:
    if facts.gptq:
        yield from _gptqmodel(facts)
    elif facts.format == "int-quantized":
        yield "yes", "its weights become floats at the first forward, so memory is not saved"
    elif facts.format == "compressed-tensors" and facts.ordered:
        yield "no", "compressed-tensors 0.20 removed actorder 'group'; `bitpress convert` to gptq keeps the weights"
    elif facts.format == "compressed-tensors" and not facts.scheme.symmetric:
        yield (
            "limited",
            "asymmetric: it loads with quantization_config=CompressedTensorsConfig(dequantize=True) only; "
            "without it from_pretrained stops at the shape of the zero points",
        )


def _gptqmodel(facts: Facts) -> Iterator[Reason]:
    if not facts.gptq:
        yield "unknown", f"it is not known here to read {facts.format}"
        return
    odd = [layer for layer, shape in facts.shapes.items() if any(size % _PER_WORD for size in shape)]
    if odd:
        yield "limited", _counted(f"features are no multiples of {_PER_WORD}, as many of its kernels need", odd)


def _vllm(facts: Facts) -> Iterator[Reason]:
    scheme = facts.scheme
    if facts.ordered:
        yield "yes", "act-order: over several GPUs, layers that are cut along their inputs keep all scales on each"
    if facts.gptq:
        if not scheme.symmetric and facts.format == "gptq":
            yield (
                "no",
                "it reads version 1's zero points code by code, and a zero point of 0 has borrowed from the next one; "
                "`bitpress convert` to gptq-v2 or compressed-tensors mends that",
            )
        elif not scheme.symmetric or scheme.bits not in _MARLIN_BITS:
            yield (
                "limited",
                "only its plain GPTQ kernel runs this (version 2 since pull request 26092); releases whose GPTQ "
                "loader is Marlin's take symmetric layers of 4 and 8 bits",
            )
    elif facts.format == "compressed-tensors":
        if scheme.bits not in _MARLIN_BITS:
            yield "limited", f"{scheme.bits} bits are in the list of its newest releases only"
        if not scheme.symmetric and facts.experts:
            yield "no", "its experts must be symmetric (issue 39980)"
        elif not scheme.symmetric and scheme.bits == 8:
            yield "limited", "Marlin has zero points for 4 bits, not for 8"
        if facts.ordered:
            yield "limited", "actorder 'group' is for releases from before compressed-tensors 0.20"
    yield from _marlin(facts)


def _sglang(facts: Facts) -> Iterator[Reason]:
    scheme = facts.scheme
    if facts.gptq:
        if not scheme.symmetric and facts.format == "gptq":
            yield "unknown", "whether it undoes the borrow of version 1's zero points is not documented"
        elif not scheme.symmetric or scheme.bits not in _MARLIN_BITS:
            yield "limited", "only its plain GPTQ kernel runs this, in float16; Marlin's takes symmetric 4 and 8 bits"
        if facts.experts and (not scheme.symmetric or scheme.bits not in _MARLIN_BITS):
            yield "no", "its plain GPTQ kernel has no experts"
    elif facts.format == "compressed-tensors":
        if scheme.bits not in _MARLIN_BITS:
            yield "unknown", f"{scheme.bits} bits are not documented"
        if not scheme.symmetric:
            yield "limited", "asymmetric: releases since pull request 25292 (May 2026)"
        if facts.ordered:
            yield "unknown", "actorder 'group' is not documented"
    yield from _marlin(facts)


def _marlin(facts: Facts) -> Iterator[Reason]:
    """What keeps vLLM and SGLang from their fast kernel on a single GPU."""
    if not _for_marlin(facts):
        return
    if facts.scheme.group_size not in _MARLIN_GROUPS:
        yield "limited", f"Marlin takes groups of 32, 64 or 128 or whole channels, not of {facts.scheme.group_size}"
    if reasons := shard_problems(facts, 1):
        yield "limited", f"Marlin does not take every layer, and other kernels are slower: {'; '.join(reasons)}"


def _for_marlin(facts: Facts) -> bool:
    scheme = facts.scheme
    if scheme.bits not in _MARLIN_BITS or facts.format not in ("gptq", "gptq-v2", "compressed-tensors"):
        return False
    return scheme.symmetric or (facts.format == "compressed-tensors" and scheme.bits == 4)


def tensor_parallel(facts: Facts) -> dict[str, dict[str, Any]]:
    """Number of GPUs -> {"loads": "yes" or "no", "why": sentences}, of vLLM and SGLang with their fast kernels, which
    cut every layer in as many pieces."""
    found = {}
    for ways in WAYS:
        reasons = shard_problems(facts, ways)
        found[str(ways)] = {"loads": "no" if reasons else "yes", "why": reasons}
    return found


def shard_problems(facts: Facts, ways: int) -> list[str]:
    """Why the layers cannot be cut for so many GPUs; for one, why the fast kernel does not take them whole."""
    if ways > 1 and facts.split is None:
        return ["transformers has no tensor-parallel plan for this architecture, so where it is cut is not known here"]
    if ways > 1 and facts.format == "bitsandbytes":
        return ["how runtimes cut bitsandbytes' blocks is not documented"]
    found: dict[str, list[str]] = {}
    if facts.heads[0] % ways:
        found[f"{facts.heads[0]} attention heads do not divide among {ways} GPUs"] = []
    fused: dict[str, list[int]] = {}  # runtimes join these layers before they are multiplied by
    for layer, (out_features, in_features) in facts.shapes.items():
        cut = facts.split.get(layer) if facts.split and ways > 1 else None
        leaf = layer.rpartition(".")[2]
        pieces = min(ways, facts.heads[1]) if leaf in ("k_proj", "v_proj") else ways  # fewer heads are repeated
        pieces_out, pieces_in = (pieces if cut == "column" else 1), (ways if cut == "row" else 1)
        if out_features % pieces_out or in_features % pieces_in:
            features = out_features if cut == "column" else in_features
            found.setdefault(f"{features} features do not divide among {ways} GPUs", []).append(layer)
            continue
        inputs = in_features // pieces_in
        for reason in _input_problems(facts, layer, inputs, whole=pieces_in == 1):
            found.setdefault(reason, []).append(layer)
        key = layer if layer in facts.experts or leaf not in _FUSED else f"{layer[: -len(leaf)]}{_FUSED[leaf]}"
        fused.setdefault(key, []).append(out_features // pieces_out)
    for key, sizes in fused.items():
        step = _MARLIN_OUT if _for_marlin(facts) else _PER_WORD if facts.gptq else 1
        if sum(sizes) % step:
            found.setdefault(f"a piece has {sum(sizes)} output features, no multiple of {step}", []).append(key)
    return [_counted(reason, layers) for reason, layers in found.items()]


def _input_problems(facts: Facts, layer: str, inputs: int, whole: bool) -> Iterator[str]:
    """Of one piece of a layer."""
    group = facts.scheme.group_size
    if facts.scheme.code == "int" and group and inputs % group:
        yield f"a piece has {inputs} input features, which are no whole groups of {group}"
    step = 1
    if _for_marlin(facts):
        step = _MARLIN_EXPERT_IN if layer in facts.experts else _MARLIN_IN
    elif facts.gptq or (facts.format == "compressed-tensors" and not whole):
        step = _PER_WORD
    if inputs % step:
        yield f"a piece has {inputs} input features, no multiple of {step}"


def _counted(reason: str, layers: list[str]) -> str:
    if not layers:
        return reason
    return f"{reason} ({layers[0]})" if len(layers) == 1 else f"{reason} ({len(layers)} layers, such as {layers[0]})"
