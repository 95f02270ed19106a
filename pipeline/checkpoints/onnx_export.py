"""ONNX for ONNX Runtime GenAI: written by its own builder, from the same integers, and run before it is called done.

The builder reads GPTQ's layout, in which the checkpoint is written aside. It makes a MatMulNBits of every quantized
layer (onnxruntime, docs/ContribOperators.md) and would round the head and the embeddings, too: it is told to leave
alone whatever is not quantized. Then onnxruntime-genai computes logits on the CPU, once with float inputs, which shows
that every weight is right, and once as the model is shipped, whose layers round their inputs to 8 bits.
"""

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from bitpress.kernels.packing import pack, unpack
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..data.text import PYDOC_TOPICS, read_text
from ..data.tokens import encode
from ..errors import BitpressError, ConfigError, NumericsError
from ..formats.act_order import scatter_codes, write_groups
from ..formats.base import integer_scheme, is_packed_integer, middle_code, some
from ..formats.gptq import GPTQ
from ..models.loading import CPU, load_model
from ..models.pretrained import load_tokenizer
from ..storage import files
from ..storage.checkpoint import Checkpoint, read_json
from ..storage.fingerprint import MANIFEST
from ..system import children
from ..system.packages import install
from ..system.progress import OnStep
from .conversion import Conversion, examine, origin_of, unfinished, write

NAME = "onnx"
_PACKAGES = {"onnxruntime_genai": "onnxruntime-genai", "onnx_ir": "onnx-ir"}  # module -> package
_LARGEST_GROUP, _SMALLEST_GROUP = 128, 16  # blocks of MatMulNBits are powers of two; the builder documents 16 to 256
_BITS = (2, 4, 8)
# what the builder of onnxruntime-genai 0.18 makes of text models whose weights lie as here (models/builder.py)
_ARCHITECTURES = (
    "Ernie4_5ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "GraniteForCausalLM", "InternLM2ForCausalLM",
    "LlamaForCausalLM", "MistralForCausalLM", "NemotronForCausalLM", "OlmoForCausalLM", "PhiForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM",
)  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "/model/embed_tokens/Gather", "lm_head": "/lm_head/MatMul"}  # the builder's nodes
_IN_A_BLOCK = re.compile(r"layers\.\d+\.(self_attn|mlp)\.[a-z_]+_proj\.weight$")
_TOKENS = 64  # of the comparison
# Cosines of the logits with those of our reference kernel. With float inputs the demo model reaches 1.0000000, a random
# Gemma 2 0.99998; embeddings that the builder rounded to 4 bits have 0.9996, zero points that are off by one -0.5.
_EXACT = 0.9999
_SHIPPED = 0.99


class _BuilderInput(GPTQ):
    """GPTQ version 1 as the builder reads it, which is more than others do.

    It adds one to each zero point by itself and keeps the low bits, so that a zero point of 0 may lie there as the
    highest code, and it takes scales of any dtype. It knows neither 3 bits nor groups that are no power of two: such
    layers are written with wider codes, or in smaller groups (see as_built).
    """

    name = NAME
    exact_scales = False
    holds_order = False

    def problems(self, scheme: Scheme, shape: tuple[int, ...]) -> list[str]:
        if not is_packed_integer(scheme):
            return [f"{self.name} holds weight-only integers, not {scheme.name}"]
        if (
            any(size % _SMALLEST_GROUP for size in shape)
            or (as_built(scheme, shape[-1]).group_size or 0) < _SMALLEST_GROUP
        ):
            return [f"{self.name} needs multiples of {_SMALLEST_GROUP}, got {scheme.name} of shape {list(shape)}"]
        return []

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def write(self, qtensor: QTensor, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = widened(qtensor)
        scheme, groups = wide.scheme, wide.scales.shape[1]
        zeros = wide.zeros
        if zeros is None:
            zeros = torch.full(wide.scales.shape, middle_code(scheme), dtype=torch.uint8)
        return {
            "qweight": scatter_codes(wide.codes, None, scheme.bits).t().contiguous(),
            "qzeros": pack((zeros.t() - self.offset) & scheme.max_code, scheme.bits),
            "scales": wide.scales.t().contiguous(),
            "g_idx": write_groups(None, wide.shape[1], groups),
        }

    def read(self, scheme: Scheme, tensors: dict[str, Tensor]) -> QTensor:
        return super().read(as_built(scheme, len(tensors["g_idx"])), tensors)

    def _zeros(self, qzeros: Tensor, bits: int, out_features: int) -> Tensor:
        return (unpack(qzeros, bits, out_features) + self.offset) & ((1 << bits) - 1)


def as_built(scheme: Scheme, in_features: int) -> Scheme:
    """The scheme by which the builder gets the weights of a layer, with these same values.

    3 bits become 4; groups become the largest power of two that divides them, at most 128.
    """
    width = scheme.weight.description().group_size or in_features
    bits = next(bits for bits in _BITS if bits >= scheme.bits)
    return integer_scheme(bits, min(width & -width, _LARGEST_GROUP), scheme.symmetric)


def widened(qtensor: QTensor) -> QTensor:
    """The same weights by the scheme that as_built says."""
    scheme, built = qtensor.scheme, as_built(qtensor.scheme, qtensor.shape[1])
    times = built.groups(qtensor.shape[1]) // qtensor.scales.shape[1]
    shift = middle_code(built) - middle_code(scheme) if scheme.symmetric else 0
    codes = pack(unpack(qtensor.codes, scheme.bits, qtensor.shape[1]) + shift, built.bits)
    zeros = None if qtensor.zeros is None else qtensor.zeros.repeat_interleave(times, 1)
    return replace(qtensor, scheme=built, codes=codes, scales=qtensor.scales.repeat_interleave(times, 1), zeros=zeros)


@dataclass(frozen=True)
class Agreement:
    """How the logits of a model compare with ours: their cosine, and the share of tokens with the same best token."""

    cosine: float
    same: float


def export(checkpoint: Checkpoint, source: dict[str, Any], out: Path, on_step: OnStep) -> list[str]:
    """Make `out`, a folder that onnxruntime-genai runs; nothing of that name appears before its logits are right.

    Returns:
        Sentences on what was done.
    Raises:
        ConfigError: a package is missing, or ONNX cannot hold this checkpoint. NumericsError: the logits are others.
        BitpressError: the builder cannot make it, with what it says.
    """
    if missing := [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise ConfigError(
            f"{NAME} is made by the packages {' and '.join(_PACKAGES.values())}, and {' and '.join(missing)} cannot be "
            f"imported: {'; '.join(map(install, missing))}"
        )
    if reason := unsupported(checkpoint.config):
        raise ConfigError(f"{checkpoint.folder} cannot become {NAME}: {reason}")
    conversion = examine(checkpoint, _BuilderInput())
    if unquantized := [name for name in conversion.contents.plain if _IN_A_BLOCK.search(name)]:
        raise ConfigError(
            f"{some(unquantized)}: not quantized, and the builder of onnxruntime-genai expects all layers of a block "
            "to be; quantize them, too, for example as int8-g32"
        )
    alone = [node for layer, node in _OUTSIDE.items() if layer not in conversion.contents.quantized]
    ids = encode(load_tokenizer(checkpoint.folder), read_text(PYDOC_TOPICS))[:_TOKENS]
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    with unfinished(out.absolute(), 4 * stored) as folder:  # aside, and with float32 for what is not quantized
        with children.private_folder() as private:
            aside = folder / "aside"
            files.make_folder(aside)
            write(conversion, source, aside, on_step)
            config = read_json(aside / "config.json") | {"quantization_config": _section(conversion)}
            files.write_json(aside / "config.json", config)
            _run(
                "onnxruntime_genai.models.builder",
                ["-i", str(aside), "-o", str(folder), "-c", str(private / "cache"), "-p", "int4", "-e", "cpu"],
                ["hf_token=false", f"nodes_to_exclude={','.join(alone)}"],
                private,
            )
            files.remove_folder(aside)
        checkpoint.check_unchanged()
        exact, shipped = _compare(checkpoint, folder, ids)
        for path in checkpoint.other_files():
            if not (folder / path.name).exists() and path.name != MANIFEST:
                files.copy_file(path, folder / path.name)
        written = {
            path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
            for path in sorted(folder.iterdir())
        }
        origin = origin_of(checkpoint, source, NAME)
        files.write_json(folder / MANIFEST, {"fingerprint": origin, "files": written})
    return [
        f"{len(conversion.contents.quantized)} layers became ONNX; onnxruntime-genai computed the logits of {len(ids)} "
        f"tokens from it on the CPU: with float inputs their cosine with bitpress's own is {exact.cosine:.7f}, with "
        f"inputs of 8 bits, as it is shipped, {shipped.cosine:.7f}, and {shipped.same:.1%} of the best tokens are the "
        "same",
        "what is not quantized is float32 there, the head and the embeddings among it",
    ]


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why the builder cannot make a model of this config.json; None where it can."""
    (architecture, *_) = config.get("architectures") or [None]
    if architecture == "Gemma3ForCausalLM":
        return (
            "the builder of onnxruntime-genai 0.18 asks Gemma 3's config for rope_local_base_freq, and transformers 5 "
            "has that under rope_parameters"
        )
    if architecture not in _ARCHITECTURES:
        return (
            f"the builder of onnxruntime-genai 0.18 does not know {architecture} with weights in GPTQ's layout, only "
            f"{', '.join(_ARCHITECTURES)}"
        )
    length, original = (config.get(f"{key}max_position_embeddings") for key in ("", "original_"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if architecture == "Phi3ForCausalLM" and original not in (None, length) and "long_factor" not in rope:
        return (
            f"max_position_embeddings is {length} and original_max_position_embeddings {original}: the builder takes "
            "that for a Phi-3 with the rotary embedding longrope, and the config has no long_factor"
        )
    return None


def _section(conversion: Conversion) -> dict[str, Any]:
    """The quantization_config that the builder reads: the settings of most layers, and those of each other layer.

    It tries the patterns of "dynamic" on the names of tensors, from their beginning.
    """
    contents = conversion.contents
    settings = {}
    for layer, scheme in contents.schemes.items():
        built = as_built(scheme, (contents.shapes[layer] or (0,))[-1])
        settings[layer] = (built.bits, built.group_size)
    (bits, group_size), _ = Counter(settings.values()).most_common(1)[0]
    others = {layer: own for layer, own in settings.items() if own != (bits, group_size)}
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "dynamic": {f"+:{re.escape(layer)}\\.": {"bits": b, "group_size": g} for layer, (b, g) in others.items()},
    }


def _compare(checkpoint: Checkpoint, folder: Path, ids: Tensor) -> tuple[Agreement, Agreement]:
    """How the logits of a built model agree with ours: with float inputs, and as it is shipped.

    Raises:
        NumericsError: they do not.
    """
    with children.private_folder() as private:
        save_file({"ids": ids.contiguous()}, private / "ids")
        room = max(len(ids) + 1, checkpoint.config.get("sliding_window") or 0)  # the cache holds a whole window
        room = min(room, checkpoint.config.get("max_position_embeddings", room))
        arguments = [str(folder), str(private / "ids"), str(private / "logits"), str(room)]
        _run("bitpress.pipeline.checkpoints.onnx_logits", arguments, [], private)
        theirs = load_file(private / "logits")
    model = load_model(checkpoint, CPU, "float32", "reference")
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    results = []
    for what, least in (("exact", _EXACT), ("shipped", _SHIPPED)):
        logits = theirs[what].reshape(ours.shape)
        cosine = F.cosine_similarity(logits.flatten().double(), ours.flatten().double(), dim=0).item()
        if not cosine >= least:  # NaN, too
            inputs = "float inputs" if what == "exact" else "inputs of 8 bits"
            raise NumericsError(
                f"{checkpoint.folder}: the ONNX model computes something else than bitpress: with {inputs} the cosine "
                f"of their logits is {cosine:.6f}, expected at least {least}; nothing was written, as the builder does "
                "not know this architecture or mixture of schemes well; keep the format that you have"
            )
        results.append(Agreement(cosine, (logits.argmax(-1) == ours.argmax(-1)).float().mean().item()))
    return results[0], results[1]


def _run(module: str, arguments: Sequence[str], options: Sequence[str], private: Path) -> None:
    """Run a module in a process of its own, offline.

    Raises:
        BitpressError: it failed, with the last lines of what it printed.
    """
    command = [sys.executable, "-m", module, *arguments, *(["--extra_options", *options] if options else [])]
    log = private / "log"
    with (
        log.open("wb") as output,
        children.start(
            command,
            private,
            environment={"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        ) as process,
    ):
        code = process.wait()
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise BitpressError(f"{module} {children.ending(code)}, and said last:\n" + "\n".join(lines[-3:])[-1000:])
