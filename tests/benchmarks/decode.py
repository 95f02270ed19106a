"""Tokens per second on the CPU of a 1.04B Llama shape: transformers, bitpress without and with fused layers, llama.cpp.

    python tests/benchmarks/decode.py FOLDER
    python tests/benchmarks/decode.py FOLDER --llama-cpp PYTHON MODEL.gguf   # a Python with llama-cpp-python

Makes random weights in FOLDER/source and quantizes them to FOLDER/<scheme> where these are not there yet (3 GB in all).
All take turns, so that what else the machine does meets each of them; medians, with the least and the most.
"""

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bitpress.eval.measure.speed import Load, measure
from bitpress.pipeline import quantize
from bitpress.pipeline.api import load
from bitpress.pipeline.models import optimize

Measure = Callable[[], tuple[float, float]]  # tokens per second of prefill and of decode

SHAPE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip

# As llama.cpp's own benchmark: llama_decode of random tokens, the prompt as one batch, then one token at a time.
LLAMA_CPP = """
import ctypes, json, random, sys, time
import llama_cpp as L
path, threads, prompt, generate = sys.argv[1], *map(int, sys.argv[2:])
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
options = L.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_ubatch = prompt + generate + 16, prompt, prompt
options.n_threads = options.n_threads_batch = threads
context = L.llama_init_from_model(model, options)
vocabulary = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
def decode(count):
    tokens = (L.llama_token * count)(*[random.randrange(vocabulary) for _ in range(count)])
    assert L.llama_decode(context, L.llama_batch_get_one(tokens, count)) == 0
    L.llama_synchronize(context)
def once():
    L.llama_memory_clear(L.llama_get_memory(context), False)
    start = time.perf_counter()
    decode(prompt)
    middle = time.perf_counter()
    for _ in range(generate):
        decode(1)
    return prompt / (middle - start), generate / (time.perf_counter() - middle)
once()
print(json.dumps(once()))
"""


def make_checkpoint(folder: Path) -> None:
    """Random bfloat16 weights, and a tokenizer of words without meaning."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).save_pretrained(folder)
    words = {f"w{number}": number for number in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def in_torch(folder: Path, prompt: int, generate: int) -> dict[str, Measure]:
    """Of a folder with `source` and a quantized checkpoint."""
    ids = torch.randint(SHAPE["vocab_size"], (prompt,), generator=torch.Generator().manual_seed(0))

    def speed(model: torch.nn.Module) -> tuple[float, float]:
        found = measure(model, ids, Load(1, prompt, generate, 1), None)
        return found["prefill"]["median"], found["decode"]["median"]

    def plain() -> tuple[float, float]:
        optimize.unfuse(quantized)
        return speed(quantized)

    def fused() -> tuple[float, float]:
        assert optimize.fuse(quantized).fused == SHAPE["num_hidden_layers"]
        return speed(quantized)

    dense, quantized = (load(path, device="cpu")[0] for path in (folder.parent / "source", folder))
    return {"transformers bf16": lambda: speed(dense), "bitpress": plain, "bitpress, fused": fused}


def in_llama_cpp(python: str, gguf: str, prompt: int, generate: int) -> Measure:
    def speed() -> tuple[float, float]:
        job = [python, "-c", LLAMA_CPP, gguf, str(torch.get_num_threads()), str(prompt), str(generate)]
        prefill, decode = json.loads(subprocess.run(job, check=True, capture_output=True, text=True).stdout)
        return prefill, decode

    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "GGUF"))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    source, folder = options.folder / "source", options.folder / options.scheme
    if not source.exists():
        make_checkpoint(source)
    if not folder.exists():
        quantize(source, options.scheme, folder)
    runs = in_torch(folder, options.prompt, options.generate)
    if options.llama_cpp:
        runs["llama.cpp"] = in_llama_cpp(*options.llama_cpp, options.prompt, options.generate)
    results = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            results[name].append(run())
    print(f"tokens per second, {torch.get_num_threads()} threads: prompt {options.prompt}, then {options.generate}")
    for name, found in results.items():
        columns = [f"{median(v):7.1f} ({min(v):.1f} to {max(v):.1f})" for v in zip(*found)]
        print(f"{name:18} prefill {columns[0]:26} decode {columns[1]}")


if __name__ == "__main__":
    main()
