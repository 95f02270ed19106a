"""Which runtimes load a quantized checkpoint, over how many GPUs, and why not: what their documents and sources say.

Each format's file has what is about that format. Here is what is about the shapes of layers, and about layers that
servers fuse. RUNTIMES has the versions whose sources and documents were read in autumn 2026; transformers (with
compressed-tensors 0.20), ONNX Runtime GenAI, mlx-lm and, on a CPU, vLLM 0.32 were tried, too: see tests/interop/.
Nothing here runs them. What is not documented is called unknown.
"""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ..formats.base import GENAI_BUILDER, LEVELS, Facts, Loading, Reason, counted
from ..formats.names import fused_unit

RUNTIMES = {  # the version that its verdicts are true for
    "transformers": "5.23",
    "GPTQModel": "7",
    "vLLM": "0.33",
    "SGLang": "0.5.10",
    "llama.cpp": "of llama-cpp-python 0.3.36",
    "MLX": "mlx-lm 0.32.2",
    "ORT GenAI": "0.18",
    "TensorRT-LLM": "1.3",
}
SERVE = {  # the command that serves a checkpoint; {model} stands for a folder or a Hub id, {folder} for a folder
    "vLLM": "vllm serve {model}",
    "SGLang": "python -m sglang.launch_server --model-path {model}",
    "llama.cpp": "python convert_hf_to_gguf.py {folder} --outfile {folder}/model.gguf\n"
    "llama-server -m {folder}/model.gguf",
    "MLX": "mlx_lm.server --model {model}",
    "ORT GenAI": GENAI_BUILDER.format(device="cpu"),  # makes its model: it brings no server
}
SERVERS = ("vLLM", "SGLang")  # they fuse layers, and cut them for several GPUs
GPUS = (1, 2, 4, 8)
_MARLIN_GROUPS, _MARLIN_OUT, _MARLIN_IN, _MARLIN_EXPERT_IN = (None, 32, 64, 128), 64, 128, 64

_JOINED = (
    "it knows the experts of this architecture in one tensor only and, with a warning, gives them random numbers; with "
    "`import bitpress.pipeline.hf` it reads them"
)
_VLLM_JOINED = {
    "gpt_oss": "its gpt-oss reads all experts of a block from one tensor, unquantized or MXFP4",
    "dbrx": "its DBRX reads all experts of a block from one tensor",
    "jetmoe": "it has no JetMoE",
}  # model type -> why; vLLM 0.33 reads experts one by one in the other architectures that were looked up


def verdicts(facts: Facts) -> dict[str, dict[str, Any]]:
    """Runtime -> {"version": that this is true for (None where it is not known), "loads": one of LEVELS, "needs":
    packages, "why": sentences, "arguments", "imports", "serve": see Loading, "class": transformers' auto class}."""
    loadings = facts.format.runtimes(facts)
    unknown = Loading([("unknown", f"it is not known here to read {facts.format.name}")])
    table = {}
    for name in dict.fromkeys((*RUNTIMES, *loadings)):
        loading = loadings.get(name, unknown)
        reasons = list(loading.reasons)
        single = not facts.format.joins_experts
        if name == "transformers" and single and facts.joined_experts:
            reasons.append(("no", _JOINED))
        if name == "vLLM" and single and facts.experts and (why := _VLLM_JOINED.get(facts.model_type)):
            reasons.append(("no", why))
        if name in SERVERS:
            reasons += [*_split_units(facts), *_marlin(facts)]
        worst = max((LEVELS.index(level) for level, _ in reasons), default=0)
        table[name] = {
            "version": RUNTIMES.get(name),
            "loads": LEVELS[worst],
            "needs": loading.needs,
            "why": [why for _, why in reasons if why],
            "arguments": loading.arguments,
            "imports": loading.imports,
            "serve": loading.serve or SERVE.get(name, ""),
            "class": facts.auto_class,
        }
    return table


def serve_command(verdict: Mapping[str, Any], folder: str, repo: str | None = None) -> str:
    """The lines that serve a checkpoint in a runtime, for a shell; "" where it does not load it, or serves nothing.

    Args:
        verdict: the runtime's, see verdicts. folder: where the checkpoint lies, or is to lie.
        repo: owner/name on the Hub, where it is to come from there.
    """
    if verdict["loads"] not in ("yes", "limited") or not verdict["serve"]:
        return ""
    local = shlex.quote(folder)
    command = verdict["serve"].replace("{model}", repo or local).replace("{folder}", local)
    download = repo and "{folder}" in verdict["serve"]
    return f"hf download {repo} --local-dir {local}\n{command}" if download else command


def _split_units(facts: Facts) -> Iterator[Reason]:
    """Servers fuse q, k and v, gate and up, and all experts of a block: each of these needs one scheme."""
    units: dict[str, set[str]] = {}
    for layer in (*facts.schemes, *facts.kept):
        scheme = facts.schemes.get(layer)
        units.setdefault(fused_unit(layer), set()).add(scheme.name if scheme else "unquantized")
    if split := [unit for unit, parts in units.items() if len(parts) > 1]:
        parts = " and ".join(sorted(units[split[0]]))
        yield "no", counted(f"it fuses layers that have different schemes here, {parts}, and takes one for all", split)


def _marlin(facts: Facts) -> Iterator[Reason]:
    """What keeps vLLM and SGLang from their fast kernel on a single GPU."""
    fast = {layer: scheme for layer, scheme in facts.schemes.items() if facts.format.fast_kernel(scheme)}
    if not fast:
        return
    odd = {scheme.group_size for scheme in fast.values()} - set(_MARLIN_GROUPS)
    for size in sorted(size for size in odd if size):
        yield "limited", f"Marlin takes groups of 32, 64 or 128 or whole channels, not of {size}"
    if reasons := shard_problems(facts, 1):
        yield "limited", f"Marlin does not take every layer, and other kernels are slower: {'; '.join(reasons)}"


def tensor_parallel(facts: Facts) -> dict[str, dict[str, Any]]:
    """Number of GPUs -> {"loads": "yes" or "no", "why": sentences}, of vLLM and SGLang with their fast kernels, which
    cut every layer in as many pieces."""
    table = {}
    for gpus in GPUS:
        reasons = shard_problems(facts, gpus)
        table[str(gpus)] = {"loads": "no" if reasons else "yes", "why": reasons}
    return table


def shard_problems(facts: Facts, gpus: int) -> list[str]:
    """Why the layers cannot be cut for so many GPUs; for one, why the fast kernel does not take them whole."""
    format = facts.format
    if gpus > 1 and facts.split is None:
        return ["transformers has no tensor-parallel plan for this architecture, so where it is cut is not known here"]
    if gpus > 1 and format.uncuttable:
        return [format.uncuttable]
    problems: dict[str, list[str]] = {}
    if facts.heads[0] % gpus:
        problems[f"{facts.heads[0]} attention heads do not divide among {gpus} GPUs"] = []
    fused: dict[str, list[int]] = {}  # runtimes join these layers before they are multiplied by
    steps: dict[str, int] = {}
    for layer, (out_features, in_features) in facts.shapes.items():
        fast, expert = format.fast_kernel(facts.schemes[layer]), layer in facts.experts
        cut = facts.split.get(layer) if facts.split and gpus > 1 else None
        few_heads = layer.rpartition(".")[2] in ("k_proj", "v_proj")  # these are repeated where there are more GPUs
        pieces_out = (min(gpus, facts.heads[1]) if few_heads else gpus) if cut == "column" else 1
        pieces_in = gpus if cut == "row" else 1
        if out_features % pieces_out or in_features % pieces_in:
            features = out_features if cut == "column" else in_features
            problems.setdefault(f"{features} features do not divide among {gpus} GPUs", []).append(layer)
            continue
        inputs = in_features // pieces_in
        described = facts.schemes[layer].weight.description()
        if described.strategy == "group" and described.group_size and inputs % described.group_size:
            reason = f"a piece has {inputs} input features, which are no whole groups of {described.group_size}"
            problems.setdefault(reason, []).append(layer)
        step = format.input_multiple(facts.schemes[layer], cut=pieces_in > 1)
        if fast:
            step = _MARLIN_EXPERT_IN if expert else _MARLIN_IN
        if inputs % step:
            problems.setdefault(f"a piece has {inputs} input features, no multiple of {step}", []).append(layer)
        unit = layer if expert else fused_unit(layer)
        fused.setdefault(unit, []).append(out_features // pieces_out)
        steps[unit] = max(steps.get(unit, 1), _MARLIN_OUT if fast else format.output_multiple)
    for unit, sizes in fused.items():
        if sum(sizes) % steps[unit]:
            reason = f"a piece has {sum(sizes)} output features, no multiple of {steps[unit]}"
            problems.setdefault(reason, []).append(unit)
    return [counted(reason, layers) for reason, layers in problems.items()]
