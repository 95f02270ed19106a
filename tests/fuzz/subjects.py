"""What is damaged: small folders of every format that bitpress reads, and what is done with each."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    GPTNeoConfig,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from bitpress.pipeline.api import convert, load, quantize
from bitpress.pipeline.cli import inspect
from bitpress.pipeline.config.load import load_eval
from bitpress.pipeline.data.text import read_text
from bitpress.pipeline.evaluate import worker
from bitpress.pipeline.evaluate.compare import compare
from bitpress.pipeline.evaluate.conditions import Conditions
from bitpress.pipeline.evaluate.external import evaluate_external
from bitpress.pipeline.evaluate.measure import measure_task
from bitpress.pipeline.hub.download import resolve
from bitpress.pipeline.models.generation import Printer, Sampling, generate

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_IDS = torch.tensor([[_ALPHABET.index("Ġ" if letter == " " else letter) for letter in TEXT[:24]]])
RECIPES = {
    "gptq": {"scheme": "int4-g32", "format": "gptq"},
    "gptq-v2": {"scheme": "int4-g32-asym", "format": "gptq-v2"},
    "compressed": {"scheme": "int8-dynamic", "format": "compressed-tensors", "layers": {"*.down_proj": "int4-g32"}},
    "nf4": {"scheme": "nf4"},
    "gguf": {"scheme": "int4-g32", "format": "gguf"},
    "mlx": {"scheme": "int4-g32-asym", "format": "mlx"},
    "awq": {"scheme": "int4-g32-asym", "format": "awq"},
    "fp8 artifact": {"scheme": "fp8-block", "format": "fp8"},
    "modelopt": {"scheme": "nvfp4", "format": "modelopt"},
}


CHEAP = 3  # steps of a subject that each case takes: the first ones; of the others it takes one
Step = Callable[[Path, Path], None]
Coder = Callable[[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A folder to damage, and the steps that are taken with it: name -> a function of the folder and a free one."""

    name: str
    folder: Path
    steps: dict[str, Step]


def _save(config: PreTrainedConfig, folder: Path, shard: str = "1GB") -> Path:
    """A seeded random model with a tokenizer of bytes, a chat template and a generation config."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        has_images = getattr(config, "vision_config", None) is not None
        model = (AutoModelForImageTextToText if has_images else AutoModelForCausalLM).from_config(config)
    model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    vocabulary = {letter: number for number, letter in enumerate([*_ALPHABET[:254], "Ġt", _ALPHABET[255]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_ALPHABET[-1])
    fast.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    fast.save_pretrained(folder)
    GenerationConfig(max_new_tokens=8, eos_token_id=255).save_pretrained(folder)
    return folder


def _coded(config: PreTrainedConfig, folder: Path, section: dict[str, Any], code: Coder) -> Path:
    """A model whose weights are coded: `code` makes some tensors of a weight, or keeps it by returning nothing."""
    file = _save(config, folder) / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        tensors |= code(name, tensor) or {name: tensor}
    save_file(tensors, file, {"format": "pt"})
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"quantization_config": section}))
    return folder


def fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """E4M3 with a scale for each 48 x 48, so that the last block is cut."""
    if not name.endswith("_proj.weight"):
        return {}
    grid = torch.Size(-(-size // 48) for size in weight.shape)
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full(grid, 0.5)}


def nvfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Two E2M1 codes to a byte, an E4M3 scale for 16 of them, a factor for all."""
    if not name.endswith("_proj.weight"):
        return {}
    rows, columns = weight.shape
    codes = (torch.arange(rows * columns // 2) * 37 % 256).to(torch.uint8).view(rows, -1)
    scales = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scales, f"{name}_scale_2": torch.tensor(0.02)}


def mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The experts of gpt-oss: E2M1 codes and E8M0 scales, of `weight` [experts, in, out]."""
    if not name.endswith(("up_proj", "down_proj")):
        return {}
    experts, inputs, outputs = weight.shape
    codes = (torch.arange(weight.numel() // 2) * 37 % 256).to(torch.uint8).view(experts, outputs, inputs // 32, 16)
    scales = torch.full((experts, outputs, inputs // 32), 121, dtype=torch.uint8)
    return {f"{name}_blocks": codes, f"{name}_scales": scales}


def subjects(base: Path) -> Iterator[Subject]:
    """Each subject, made anew in `base`; all are small: 64 wide, two blocks, 256 tokens."""
    size: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "bos_token_id": None}
    size |= {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 255}
    size |= {"max_position_embeddings": 128}
    neo = {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2, "num_heads": 4}
    (base / "text.txt").write_text(TEXT)
    llama = _save(LlamaConfig(**size), base / "llama")
    dense = {"inspect": inspected, "doctor": diagnosed, "load": loaded, "quantize": quantized, "eval": measured}
    yield Subject("dense", llama, dense)
    yield Subject("sharded", _save(LlamaConfig(**size), base / "sharded", "40KB"), dense)
    yield Subject("experts", _save(MixtralConfig(**size, num_local_experts=2), base / "experts"), dense)
    yield Subject("gpt-neo", _save(GPTNeoConfig(**size, **neo), base / "gpt-neo"), dense)
    section: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 48]}
    yield Subject("fp8", _coded(LlamaConfig(**size), base / "fp8", section, fp8), dense)
    section = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    yield Subject("nvfp4", _coded(LlamaConfig(**size), base / "nvfp4", section, nvfp4), dense)
    moe = GptOssConfig(**size, head_dim=16, num_local_experts=2, num_experts_per_tok=2)
    yield Subject("mxfp4", _coded(moe, base / "mxfp4", {"quant_method": "mxfp4"}, mxfp4), dense)
    tower: dict[str, Any] = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32}
    images = LlavaConfig(text_config=LlamaConfig(**size), vision_config=tower, image_token_index=90)
    yield Subject("images", _save(images, base / "images"), dense)
    steps = {"inspect": inspected, "doctor": diagnosed, "load": loaded, "convert": converted, "eval": measured}
    for name, recipe in RECIPES.items():
        quantize(llama, recipe, base / name)
        kept = {key: step for key, step in steps.items() if key != "convert" or name != "nf4"}  # nothing else holds NF4
        yield Subject(name, base / name, kept)
    yield Subject("unfinished", _unfinished(llama, base), {"resume": _Resumed(llama, base / "gptq")})
    yield Subject("run", _run(base), {"compare": compared})


def _unfinished(source: Path, base: Path) -> Path:
    """A folder `out.partial` of quantizing that was interrupted after the first shards."""

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    folder = base / "unfinished"
    folder.mkdir()
    with contextlib.suppress(KeyboardInterrupt):
        quantize(source, RECIPES["gptq"], folder / "out", on_step=interrupt)
    return folder


def _run(base: Path) -> Path:
    """Two finished evaluations beside each other, as `bitpress eval -o` leaves them."""
    worker.call = lambda task, request: measure_task(request)  # a fresh process takes seconds to import
    settings = load_eval({"text": str(base / "text.txt"), "context": 32, "windows": 2, "speed": None})
    conditions = Conditions.make(settings, "cpu", read_text(settings.text), "bitpress eval")
    folder = base / "run"
    for name in ("gptq", "nf4"):
        evaluate_external(resolve(str(base / name)), resolve(str(base / "llama")), conditions, folder / name)
    return folder


def inspected(folder: Path, free: Path) -> None:
    inspect.inspect(folder)


def diagnosed(folder: Path, free: Path) -> None:
    with contextlib.suppress(typer.Exit):  # unsound
        inspect.doctor(folder)


def loaded(folder: Path, free: Path) -> None:
    """Load, and predict once. Numbers that are not finite are no fault where writing on from them is refused."""
    model, tokenizer = load(folder, device="cpu")
    ids = _IDS % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    if not logits[:, -1].isfinite().all():
        generate(model, ids, 1, Sampling(temperature=0), Printer(tokenizer, lambda words: None))
        raise AssertionError("logits that are not finite, and a token follows from them")


def quantized(folder: Path, free: Path) -> None:
    quantize(folder, RECIPES["gptq"], free / "quantized", device="cpu")
    loaded(free / "quantized", free)


def converted(folder: Path, free: Path) -> None:
    convert(folder, "compressed-tensors", free / "converted")
    loaded(free / "converted", free)


def measured(folder: Path, free: Path) -> None:
    """What the measuring process does, on two windows."""
    text = free / "text.txt"
    text.write_text(TEXT)
    settings = load_eval({"text": str(text), "context": 32, "windows": 2, "speed": None})
    request = {"artifact": str(folder), "baseline": None, "eval": settings.model_dump(), "device": "cpu"}
    measure_task(request | {"folder": str(free), "resume": None, "speed_only": False})


def compared(folder: Path, free: Path) -> None:
    compare([folder], free / "comparison")


class _Resumed:
    """Quantizes on from an unfinished folder: the result is what an unbroken run makes, or a refusal."""

    def __init__(self, source: Path, whole: Path):
        self.source, self.expected = source, digests(whole)

    def __call__(self, folder: Path, free: Path) -> None:
        quantize(self.source, RECIPES["gptq"], folder / "out", device="cpu")
        assert digests(folder / "out") == self.expected, "the resumed artifact differs"


def digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
