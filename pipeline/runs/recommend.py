"""Which recipe to start with, for a model and so much memory: by headers and measured tables; and what is not known.

Whether a runtime loads the result is asked of the formats. What a recipe loses is known from one small model only.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from bitpress.eval.report.words import size, small

from ..config.budget import Budget
from ..config.schema import BASELINE
from ..data.tokens import longest
from ..errors import ConfigError, nearest
from ..formats import misfits
from ..formats import registry as formats
from ..formats.base import LEVELS
from ..hub.download import local, resolve
from ..quantize.plan import Plan, make_plan
from ..quantize.recipe import Recipe
from ..storage.checkpoint import Checkpoint
from .estimate import runtimes_of
from .measured import MEASURED, MEASURED_ON, Measured

TARGETS: dict[str, tuple[str, ...]] = {  # what people call it -> runtimes, see checkpoints.runtimes
    "vllm": ("vLLM",),
    "llama.cpp": ("llama.cpp",),
    "mac": ("MLX", "llama.cpp"),
    "cpu": (),  # bitpress's own kernels, which read every format
}
_ROOM = 1.1  # times weights and cache: what activations and a runtime itself take beside them, roughly
_CACHE_BYTES = 2  # of each key and value, in 16 bits
_WORTH = 1.15  # times what the choice needs: from so much memory on, a budget may use the rest


@dataclass(frozen=True)
class Option:
    """One recipe for the model.

    recipe: as `--recipe` takes it; "none" for the unquantized model. kl: mean KL where it was measured, in nats.
    nbytes: of the artifact's weights. memory: bytes with the cache. loads: one of LEVELS, of the best runtime that is
    wanted, which is `runtime`; "" for bitpress itself. notes: its reasons. format: of the artifact. fitted: whether
    some layer gets smaller groups. unsupported: why it is no choice.
    """

    recipe: str
    kl: float
    nbytes: int = 0
    memory: int = 0
    format: str = ""
    runtime: str = ""
    loads: str = "yes"
    notes: tuple[str, ...] = ()
    fitted: bool = False
    unsupported: str | None = None


@dataclass(frozen=True)
class Recommendation:
    """The recipe to start with. chosen: None where none fits. why: sentences. command: what to type; "" for nothing.

    options: all that were looked at, the one that loses least first. unknown: what this does not know.
    """

    model: str
    chosen: Option | None
    why: list[str]
    command: str
    options: list[Option]
    unknown: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The recommendation in plain values."""
        return vars(self) | {
            "chosen": vars(self.chosen) if self.chosen else None,
            "options": [vars(option) for option in self.options],
        }


def recommend(
    model: str, memory: str, target: str | None = None, context: int = 4096, revision: str | None = None
) -> Recommendation:
    """The recipe of least measured loss that fits into the memory and that the target loads.

    Args:
        memory: for weights, cache and the rest, such as "6GB" or "8GiB".
        target: one of TARGETS; None for any runtime, bitpress's own among them.
        context: tokens in the cache.
    Raises:
        ConfigError: no such target, or no such amount. CheckpointError: the model is quantized already, or broken.
    """
    limit = _bytes(memory)
    if target is not None and target not in TARGETS:
        hint = nearest(target, TARGETS) or f"; use one of {', '.join(TARGETS)}"
        raise ConfigError(f"--for {target}: unknown{hint}")
    source = local(model, revision) or resolve(model, revision)
    checkpoint = Checkpoint(source.folder)
    dense = sum(info.nbytes for info in checkpoint.tensors.values())
    first = make_plan(checkpoint, replace(Recipe.make(MEASURED[-1].recipe, "cpu"), fit_groups=True))
    tokens = longest(first.model.config, context)
    cache = _cache_per_token(first.model.config)
    beside = tokens * (cache or 0)
    options = [Option(BASELINE, 0.0, dense, int(_ROOM * (dense + beside)))]
    options += [_option(first, measured, TARGETS[target] if target else (), beside) for measured in MEASURED]
    fitting = [option for option in options if option.unsupported is None and option.memory <= limit]
    chosen = min(fitting, key=lambda each: (LEVELS.index(each.loads), each.kl, each.memory), default=None)
    unknown = [
        f"what any recipe loses on this model: the figures are of {MEASURED_ON}; `bitpress run` measures yours",
        f"what activations and a runtime itself take: {_ROOM - 1:.0%} of weights and cache are left for them",
        "how fast each is: that is your machine's, and `bitpress run` measures it",
    ]
    if cache is None:
        unknown.insert(0, "what the cache takes: this architecture's config does not say how it is made")
    return _explained(model, chosen, options, limit, memory, target, tokens, cache, unknown)


def _bytes(memory: str) -> int:
    """The bytes of an amount of memory.

    Raises:
        ConfigError: it is none.
    """
    try:
        nbytes = Budget.parse(memory).nbytes
    except ValueError:
        nbytes = None
    if nbytes is None:
        raise ConfigError(f"--memory {memory}: expected an amount such as 6GB or 8GiB")
    return nbytes


def _cache_per_token(config: Any) -> int | None:
    """Bytes of keys and values for a token, by the config; None where it does not have these numbers."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    keys = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else None)
    layers = getattr(text, "num_hidden_layers", None)
    if not (isinstance(keys, int) and isinstance(width, int) and isinstance(layers, int)):
        return None
    return 2 * _CACHE_BYTES * keys * width * layers


def _option(first: Plan, measured: Measured, runtimes: tuple[str, ...], beside: int) -> Option:
    """What a recipe makes of a model, in the format that the wanted runtimes load best.

    Args:
        first: the plan of another recipe, which quantizes the same layers. beside: bytes of the cache.
    """
    spec = Recipe.make(measured.recipe, "cpu").rules.default
    assert spec
    tensors = [replace(each, spec=spec.fitted(each.shape)) if each.spec else each for each in first.tensors]
    layers = {each.module: (each.spec.scheme, each.shape) for each in tensors if each.spec}
    option = Option(measured.recipe, measured.kl)
    why = [problem for scheme, shape in layers.values() for problem in scheme.problems(shape)]
    if why:
        return replace(option, unsupported=why[0])
    fitted = any(scheme != spec.scheme for scheme, _ in layers.values())
    best: Option | None = None
    for format in formats().values():
        schemes = {layer: scheme for layer, (scheme, _) in layers.items()}
        if problems := misfits(format, layers) or format.checkpoint_problems(first.checkpoint, schemes):
            why += problems
            continue
        plan = replace(first, tensors=tensors, format=format)
        nbytes = sum(plan.stored_bytes(tensor) for tensor in tensors)
        own = replace(option, nbytes=nbytes, memory=int(_ROOM * (nbytes + beside)), format=format.name, fitted=fitted)
        if not runtimes:
            return own
        table = runtimes_of(plan)
        for name in runtimes:
            level, reasons = table[name]["loads"], tuple(table[name]["why"])
            if best is None or LEVELS.index(level) < LEVELS.index(best.loads):
                best = replace(own, runtime=name, loads=level, notes=reasons)
    if best is None:
        return replace(option, unsupported=why[0])
    if best.loads in ("no", "unknown"):
        words = "does not load it" if best.loads == "no" else "is not known to load it"
        return replace(
            best, unsupported=f"{best.runtime} {words}: {best.notes[0] if best.notes else 'no reason is known'}"
        )
    return best


def _explained(
    model: str,
    chosen: Option | None,
    options: list[Option],
    limit: int,
    memory: str,
    target: str | None,
    tokens: int,
    cache: int | None,
    unknown: list[str],
) -> Recommendation:
    """The recommendation, with its reasons and the command that makes it."""
    possible = [option for option in options if option.unsupported is None]
    with_cache = f"with a cache of {tokens:,} tokens" if cache else "without a cache, which is not known"
    if chosen is None:
        least = min(possible, key=lambda option: option.memory, default=None)
        why = (
            [f"nothing fits into {memory}: the smallest, {least.recipe}, needs {size(least.memory)} {with_cache}"]
            if least
            else [f"nothing that was measured can be made of this model for {target}"]
        )
        return Recommendation(model, None, why, "", options, unknown)
    why = [f"it needs {size(chosen.memory)} {with_cache}, and {memory} are there"]
    if chosen.recipe == BASELINE:
        why.insert(0, "the model fits unquantized, and nothing is lost")
        return Recommendation(model, chosen, why, "", options, unknown)
    why.append(f"of what fits, it lost least where it was measured: a mean KL of {small(chosen.kl)}")
    for other in possible:
        name = "unquantized it" if other.recipe == BASELINE else f"{other.recipe} lost {small(other.kl)}, but"
        if other.kl < chosen.kl:
            limits = other.memory <= limit
            why.append(
                f"{name} {f'loads in {other.runtime} with limits only' if limits else f'needs {size(other.memory)}'}"
            )
    if chosen.runtime:
        why.append(f"{chosen.runtime} loads it{' with limits' if chosen.loads == 'limited' else ''} as {chosen.format}")
    why += chosen.notes
    if limit > _WORTH * chosen.memory:
        room = int(limit / _ROOM) - tokens * (cache or 0)
        why.append(
            f"there is room left: --budget {room / 1e9:.1f}GB gives each layer as many bits as that allows, and takes "
            "longer to make"
        )
    fitted = " --fit-groups" if chosen.fitted else ""
    form = f" --format {chosen.format}" if chosen.runtime else ""
    command = f"bitpress quantize {model} --recipe {chosen.recipe}{form}{fitted} -o DIR"
    return Recommendation(model, chosen, why, command, options, unknown)
