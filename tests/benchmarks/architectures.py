"""What bitpress does with every causal and every image-text model type of the installed transformers.

    python tests/benchmarks/architectures.py [TYPE …] [--jobs 2] [--json FILE] [--markdown docs/architectures.md]

Each type gets a tiny random checkpoint of float32, which is quantized by each of RECIPES and read back. The logits of
bitpress's own reader (reference kernel) are compared with those of a dense model of transformers whose weights are the
dequantized ones: the relative difference is 0, or within float32's rounding where a sum has another order. gptq's
artifact must also give the logits of the model that it was learned on. A type works where all of this holds for all
recipes. Each type runs in a process of its own, which has a time limit. All take about ten minutes on two cores.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT,
)

from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import BitpressError
from bitpress.pipeline.models.loading import load_model
from bitpress.pipeline.models.quantized import read_quantized
from bitpress.pipeline.models.stored_layer import read_layer
from bitpress.pipeline.models.structure import TensorNames, skeleton
from bitpress.pipeline.quantize.artifact import quantize
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.quantize.sequential import REFERENCE_LOGITS
from bitpress.pipeline.storage import files
from bitpress.pipeline.storage.checkpoint import Checkpoint

RECIPES = ("int4-g32", "gptq/int4-g32", "int8-dynamic", "nf4")
SECONDS = 120  # that a type may take
MOST = 30e6  # parameters of a tiny model
CLOSE = 1e-5  # relative, of logits in float32 whose sums may have another order
CPU = torch.device("cpu")
VOCABULARY = 320
TEXT_IDS = 128  # the ids below are text in every model; pictures' marks get ids from 200 on

KV_HEADS = r"(num_)?key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|swa_num_key_value_heads"
# What a tiny model has in place of a config's number: the first pattern that is all of the key's name decides.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"num_nextn_predict_layers|num_kv_shared_layers|num_mtp_.*|mtp_num_.*", 0),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r"n_group|topk_group|n_groups|.*mamba_n_?groups|moe_layer_start_index", 1),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_selected_experts|n_activated_experts", 2),
    (r"(moe_)?num(_local|_routed)?_experts|n_routed_experts|num_zero_experts|zero_expert_num", 4),
    (r"(num_|n_|encoder_|decoder_|num_hidden_|num_encoder_|num_decoder_|num_global_)*layers?|depth|num_blocks", 2),
    (KV_HEADS, 2),
    (r"(num_|n_|encoder_|decoder_)*(attention_|index_)?heads?|swa_num_attention_heads", 4),
    (r"mamba_(num|n)_heads|n_mamba_heads|mamba_num_heads", 8),
    (r"num_?heads|n_heads", 4),
    (r"(global_|swa_|mamba_)?(d_)?head(_dim|dim|_size)|d_kv|attention_head_dim|mamba_d_head|kv_channels", 16),
    (r"linear_num_(key|value)_heads|linear_num_heads", 4),
    (r"linear_(key|value)_head_dim|linear_head_dim|index_head_dim|(swa_)?v_head_dim|qk_nope_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 16),
    (r"qk_head_dim", 32),
    (r".*(q|kv|mlp|o|output)_lora_rank|laurel_rank|moe_latent_size", 32),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size|(mamba_)?(dt|time_step)_rank|(mamba_)?chunk_size", 16),
    (r".*moe.*intermediate_size|shared_expert_intermediate_size|expert_(ffn_hidden_size|dim|ff_dim)", 64),
    (r"(encoder_|decoder_)?ffn_(dim|hidden_size)|(.*_)?intermediate_(size|dim).*|n_inner", 128),
    (r"d_ff|dim_ff|block_ff_dim|mlp_hidden_size|mlp_dim|feed_forward_size|conv_dim|feedforward_size", 128),
    (r"(.*_)?hidden_(size|dim)|d_model|n_embd|dim|embed_dim|d_embed|(.*_)?embedding_size|lru_width|dim_model", 64),
    (r"word_embed_proj_dim|out_hidden_size|output_dim|projection_dim|text_embed_dim|projector_dim|proj_dim", 64),
    (r".*max_.*position.*|n_positions|max_seq(uence)?_len(gth)?|n_ctx|seq_length|context_length|model_max_length", 256),
    (r"max_(target|source)_positions|original_max_position_embeddings|max_seq_length", 256),
    (r"(attention_|local_)?(sliding_)?window(_attn)?(_size)?|sliding_window_size", 8),
    (r"index_topk|index_block_size|block_size", 16),
    (r"(input_)?image_size", 32),
    (r"patch_size", 8),
)  # fmt: skip
# Lists with an entry for each layer: the config makes its own from the number of layers.
PER_LAYER = re.compile(
    r"per_layer_config|.*layer_types|.*block_types?|layers_block_type|.*_pattern|.*_layers_list|no_rope_layers|attn_type.*"
)
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
PICTURE_ROPE = {**ROPE, "mrope_section": [2, 3, 3]}
NO_ROPE = {"qk_rope_head_dim": 0, "head_dim": 0, "qk_head_dim": 16, "qk_nope_head_dim": 16}
PICTURE_WORDS = {"<image>": 200, "IMGIMGA": 201, "<|image token|>": 202, "<|extra_200|>": 203}
WHOLE = {"partial_rotary_factor": 1.0}
# What types need beside that; a key may be a path, and "*.key" is meant at every level that has the key.
CHANGES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "chameleon": {"vocabulary_map": PICTURE_WORDS},
    "codegen": {"rotary_dim": 16},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "emu3": {"vocabulary_map": PICTURE_WORDS},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"intermediate_size": 128, "activation_sparsity_pattern": [0.0] * 4, "num_hidden_layers": 4},
    "glm5_next": {f"text_config.{key}": size for key, size in NO_ROPE.items()},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hunyuan_v1_dense": {"rope_parameters": ROPE, "head_dim": 16},
    "hunyuan_v1_moe": {"rope_parameters": ROPE, "head_dim": 16, "moe_topk": 2, "num_experts": 4},
    "hunyuan_vl": {
        "text_config.rope_parameters": ROPE
        | {"rope_type": "xdrope", "xdrope_section": [2, 2, 2, 2], "alpha": 1.0, "factor": 1.0},
        "text_config.head_dim": 16,
    },
    "kimi_linear": {"linear_attn_config.head_dim": 32},
    "axk2": {"*.gate_norm_rank": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"rope_parameters": ROPE, "head_dim": 16},
    "mistral4": {"*.head_dim": 32},
    "mllama": {"text_config.cross_attention_layers": [1, 3], "text_config.num_hidden_layers": 4},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "step3p7": {"text_config.sliding_window": 8},
    "xlm": {"emb_dim": 64, "causal": True},
    "xlnet": {"d_head": 16, "d_inner": 128},
    "xlstm": {"embedding_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
for _kind in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"):
    CHANGES[_kind] = {"text_config.rope_parameters": PICTURE_ROPE}
for _kind in ("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"):
    CHANGES[_kind] = {"text_config.rope_parameters": PICTURE_ROPE | WHOLE}


@dataclass
class Result:
    """What became of one model type.

    model: its class. recipes: recipe -> "0" or the relative difference of the logits; or the sentence of a refusal, or
    of a fault. share: of the decoder's weight bytes, quantized by the first recipe.
    kept: reasons why layers of the decoder stay as they are.
    """

    type: str
    model: str = ""
    error: str = ""
    share: float = 0.0
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "works", "works in part" (some recipes are refused), "refused", "FAULT", or "not tried" without a model."""
        if self.error:
            return "not tried"
        kinds = {entry["kind"] for entry in self.recipes.values()}
        if "FAULT" in kinds:
            return "FAULT"
        if "refused" in kinds:
            return "works in part" if "works" in kinds else "refused"
        return "works"

    @property
    def sentence(self) -> str:
        faults = [f"{entry['said']}" for entry in self.recipes.values() if entry["kind"] != "works"]
        return self.error or "; ".join(dict.fromkeys(faults))


def tiny_config(kind: str) -> Any:
    """The config of a tiny model of a type: its defaults, with sizes from SIZES and CHANGES."""

    def shrink(values: dict[str, Any]) -> dict[str, Any]:
        small: dict[str, Any] = {}
        for key, value in values.items():
            if not isinstance(key, str):
                small[key] = value
                continue
            number = isinstance(value, int) and not isinstance(value, bool)
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), None)
            if key in ("architectures", "transformers_version", "model_type", "dtype", "id2label", "label2id"):
                continue
            if PER_LAYER.fullmatch(key) and isinstance(value, list | dict):
                if isinstance(value, dict):
                    small[key] = {}  # else the config fills it in for its usual number of layers
                continue
            if isinstance(value, dict) and key.startswith("rope"):
                small[key] = value | ({"mrope_section": [2, 3, 3], **WHOLE} if "mrope_section" in value else {})
            elif value is None and re.fullmatch(KV_HEADS, key):
                small[key] = 2
            elif isinstance(value, dict):
                small[key] = shrink(value)
                if "model_type" in value:
                    small[key]["model_type"] = value["model_type"]
            elif isinstance(value, list) and len(value) == values.get("num_hidden_layers"):
                small[key] = value[:2]
            elif re.fullmatch(r".*token_(id|index)", key) and number:
                known = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
                small[key] = known.get(key, 200 + sum(map(ord, key)) % 100)
            elif key.endswith("token_id") and isinstance(value, list):
                small[key] = [2]
            elif size is not None and number:
                small[key] = size
            else:
                small[key] = value
        if "kv_lora_rank" in values:  # such attention has as many keys as queries
            small["num_key_value_heads"] = small["num_attention_heads"]
        return small

    def change(values: dict[str, Any], key: str, value: Any) -> None:
        first, _, rest = key.partition(".")
        if first == "*":
            for section in [values, *(each for each in values.values() if isinstance(each, dict))]:
                if rest in section:
                    change(section, rest, value)
        elif rest:
            change(values.setdefault(first, {}), rest, value)
        elif value is None:
            values.pop(first, None)
        else:
            values[first] = value

    config_class = CONFIG_MAPPING[kind]
    values = shrink(config_class().to_dict())
    for key, value in CHANGES.get(kind, {}).items():
        change(values, key, value)
    return config_class(**values)


def auto_class(kind: str) -> Any:
    return AutoModelForImageTextToText if kind in IMAGE_TEXT else AutoModelForCausalLM


def save_tiny(kind: str, folder: Path) -> str:
    """Save a seeded random model of a type; returns the name of its class."""
    config = tiny_config(kind)
    with torch.device("meta"):
        parameters = dict(auto_class(kind).from_config(config).named_parameters())
    if sum(each.numel() for each in parameters.values()) > MOST:
        largest = sorted(parameters, key=lambda name: -parameters[name].numel())[:4]
        raise ValueError(f"too large: {', '.join(f'{name} {list(parameters[name].shape)}' for name in largest)}")
    torch.manual_seed(7)
    model = auto_class(kind).from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    if not config.is_encoder_decoder:
        finite = logits_of(model).isfinite().all()
        assert finite, "its logits are not finite"
    model.save_pretrained(folder)
    return type(model).__name__


def text(*shape: int) -> Tensor:
    return torch.randint(3, TEXT_IDS, shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=text(1, 24) if ids is None else ids, use_cache=False).logits[0]


class _RoundedInputs(TorchFunctionMode):
    """Meanwhile, what is multiplied by one of some weights is rounded to INT8 by tokens first."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.places = [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in weights]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        products = {F.linear: 1, torch.addmm: 2, torch.bmm: 1, torch.matmul: 1, Tensor.matmul: 1, Tensor.__matmul__: 1}
        weight = products.get(func)
        if weight is None or not any(a <= args[weight].data_ptr() < b for a, b in self.places):
            return func(*args, **(kwargs or {}))
        inputs = list(args)
        x = inputs[weight - 1]
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        inputs[weight - 1] = (x / scale).round() * scale
        return func(*inputs, **(kwargs or {}))


@torch.inference_mode()
def dense_logits(kind: str, source: Path, artifact: Checkpoint) -> Tensor:
    """Logits of transformers' own dense model, loaded from files that have the dequantized weights."""
    contents = read_quantized(artifact, torch.float32)
    original = Checkpoint(source)
    names = TensorNames(skeleton(original))
    parts = [names.slices(name, names.target(name), info.shape) for name, info in original.tensors.items()]
    experts = {name: part for each in parts for name, part in each.items()}
    tensors = {name: original.read(name) for name in original.tensors}
    rounded = []
    for layer, scheme in contents.schemes.items():
        weight = read_layer(artifact, contents.format, scheme, layer).dequantize(torch.float32)
        weight = weight.t().contiguous() if contents.kinds[layer] == "conv1d" else weight
        if part := experts.get(f"{layer}.weight"):  # the source holds all experts in one tensor
            whole = tensors[part.source]
            expert = whole.view(part.layout.experts, *part.layout.expert_shape(whole.shape))[part.expert]
            part.layout.split(expert)[part.piece].copy_(weight)
        else:
            assert tensors[f"{layer}.weight"].shape == weight.shape, layer
            tensors[f"{layer}.weight"] = weight
        if scheme.activations:
            rounded.append(contents.quantized[layer].parameter)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        for path in original.other_files():
            shutil.copy(path, folder)
        shutil.copy(source / "config.json", folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        model = auto_class(kind).from_pretrained(folder, dtype=torch.float32).eval()
    with contextlib.suppress(ValueError, AttributeError):
        model.set_experts_implementation("eager")
    weights = [model.get_parameter(name) for name in rounded]
    with _RoundedInputs(weights) if weights else contextlib.nullcontext():
        return logits_of(model)


def try_recipe(kind: str, source: Path, text_of_recipe: str, out: Path) -> dict[str, Any]:
    """{"kind": "works", "said": relative difference} or {"kind": "refused" or "FAULT", "said": the sentence}."""
    recipe = Recipe.make(text_of_recipe, "cpu")
    if recipe.calibrated:
        recipe = replace(recipe, calibration=Calibration("random ids", text(16, 32), 0))
    work = out.with_name(f"{out.name}.partial")
    files.make_folder(work)
    try:
        quantize(Checkpoint(source), {}, recipe, out, work)
    except BitpressError as error:
        return {"kind": "refused", "said": str(error)}
    try:
        artifact = Checkpoint(out)
        model = load_model(artifact, CPU, "float32", "reference")
        own, dense = logits_of(model), dense_logits(kind, source, artifact)
        difference = ((own - dense).norm() / dense.norm()).item()
        if recipe.calibrated:
            reference = Checkpoint.single(work / REFERENCE_LOGITS)
            learned = reference.read("logits")
            again = logits_of(model, reference.read("ids")[None])
            difference = max(difference, ((again - learned).norm() / learned.norm()).item())
    except BitpressError as error:
        return {"kind": "FAULT", "said": f"after exit 0: {error}"}
    works = difference <= CLOSE
    return {"kind": "works" if works else "FAULT", "said": f"{difference:.1g}" if difference else "0"}


def try_type(kind: str, folder: Path) -> Result:
    result = Result(kind)
    try:
        result.model = save_tiny(kind, folder / "source")
    except Exception as error:
        result.error = f"no tiny model: {_one_line(error)}"
        return result
    for recipe in RECIPES:
        out = folder / recipe.replace("/", "-")
        try:
            result.recipes[recipe] = try_recipe(kind, folder / "source", recipe, out)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{_one_line(error)} ({Path(where.filename).name}:{where.lineno})"
            result.recipes[recipe] = {"kind": "FAULT", "said": said}
        if recipe == RECIPES[0] and (out / "bitpress.json").exists():
            coverage = json.loads((out / "bitpress.json").read_text())["coverage"]
            result.share = coverage["share"]
            inside = [entry for entry in coverage["kept"] if entry["block"] is not None]
            result.kept = sorted({entry["reason"] for entry in inside} - {"a vector"})
    return result


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _child(kind: str, folder: Path, sender: Any) -> None:
    torch.set_num_threads(1)
    with open(folder / "log", "w") as log:  # transformers says much
        sys.stdout = sys.stderr = log
        sender.send(try_type(kind, folder))


def run_type(kind: str) -> Result:
    """The result of a type, from a process of its own."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix=f"architectures-{kind}-") as folder:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=_child, args=(kind, Path(folder), sender))
        process.start()
        sender.close()
        try:
            if not receiver.poll(SECONDS):
                return Result(kind, error=f"took longer than {SECONDS} s")
            return receiver.recv()
        except EOFError:
            process.join()
            return Result(kind, error=f"its process ended with {process.exitcode}")
        finally:
            process.kill()
            process.join()


def results(kinds: list[str], jobs: int) -> Iterator[Result]:
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(run_type, kinds)


def markdown(gathered: list[Result]) -> str:
    """The table of docs/architectures.md."""
    tried = [result for result in gathered if result.verdict != "not tried"]
    works = sum(result.verdict == "works" for result in tried)
    lines = [
        "# Architectures",
        "",
        f"{works} of {len(tried)} model types of transformers {transformers.__version__} work end to end, as "
        "`tests/benchmarks/architectures.py` tries them: a tiny random checkpoint of each causal and each image-text "
        f"type is quantized by {', '.join(RECIPES)}, read back, and gives the logits of a dense model of transformers "
        "whose weights are the dequantized ones, in float32. The figure of a recipe is the relative difference.",
        "",
        "| type | result | of the decoder | " + " | ".join(RECIPES) + " | kept, or why not |",
        "| --- | --- | --: | " + "--: | " * len(RECIPES) + "--- |",
    ]
    for result in tried:
        cells = [entry["said"] if entry["kind"] == "works" else entry["kind"] for entry in result.recipes.values()]
        said = [re.sub(r"/\S*/(?=source)", "", result.sentence), *result.kept]
        note = "; ".join(" ".join(each.split())[:300] for each in said if each).replace("|", "/").replace("<", "&lt;")
        lines.append(f"| {result.type} | {result.verdict} | {result.share:.0%} | {' | '.join(cells)} | {note} |")
    rest = [result for result in gathered if result.verdict == "not tried"]
    lines += ["", f"Not tried, for no tiny model of them reads text alone here ({len(rest)}):", ""]
    lines += [f"- {result.type}: {result.error.removeprefix('no tiny model: ')[:160]}" for result in rest]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=sorted(CAUSAL.keys() | IMAGE_TEXT.keys()))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    importlib.import_module("bitsandbytes")  # once, before the forks: that takes as long as a whole type
    transformers.logging.set_verbosity_error()
    gathered = []
    for result in results(options.types, options.jobs):
        gathered.append(result)
        if options.json:
            table = [asdict(each) | {"verdict": each.verdict} for each in gathered]
            options.json.write_text(json.dumps(table, indent=1))
        shown = " ".join(f"{e['said'] if e['kind'] == 'works' else e['kind']}" for e in result.recipes.values())
        print(f"{result.type:28} {result.verdict:14} {result.share:4.0%}  {shown}", flush=True)
        if result.verdict != "works":
            print(f"{'':28} {' '.join(result.sentence.split())[:600]}", flush=True)
    if options.markdown:
        options.markdown.write_text(markdown(gathered))
    verdicts = [result.verdict for result in gathered]
    print(", ".join(f"{verdict}: {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts)))


if __name__ == "__main__":
    main()
