"""Quantize an 8B-shaped random checkpoint and report the peak memory and the speed against the disk's.

    python tests/benchmarks/streaming.py FOLDER [--scheme int4-g128] [--layers 32]

Needs 21 GB in FOLDER; what it makes there is deleted at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from bitpress.pipeline import store

HIDDEN, INNER, VOCABULARY, KEYS = 4096, 14336, 128256, 1024
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def make_checkpoint(folder: Path, layers: int) -> int:
    """Random bfloat16 weights, a shard per block; returns their bytes. One stretch of noise serves all, shifted."""
    folder.mkdir(parents=True)
    noise = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)

    def weight(shape: tuple[int, ...], seed: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        repeats = -(-(count + seed) // noise.numel())
        return noise.repeat(repeats)[seed : seed + count].view(shape)

    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> int:
        file = f"model-{number:05d}-of-{layers + 2:05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, file))
        return store.write_safetensors(folder / file, tensors)["bytes"]

    total = save(1, {"model.embed_tokens.weight": weight((VOCABULARY, HIDDEN), 1)})
    total += save(2, {"lm_head.weight": weight((VOCABULARY, HIDDEN), 2), "model.norm.weight": weight((HIDDEN,), 3)})
    for layer in range(layers):
        block = {f"model.layers.{layer}.{n}.weight": weight(s, 7 * layer) for n, s in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"model.layers.{layer}.{norm}.weight"] = weight((HIDDEN,), layer)
        total += save(layer + 3, block)
    store.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return total


def read_speed(folder: Path) -> float:
    """Bytes per second of reading the checkpoint's files once, as the quantizer would find them."""
    start, total = time.perf_counter(), 0
    buffer = bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start)


_CHILD = """
import json, sys, time
from bitpress.eval.memory import peak_rss_bytes
from bitpress.pipeline import quantize
start = time.perf_counter()
quantize(sys.argv[1], sys.argv[2], sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_rss_bytes()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    work = options.folder / "bitpress-streaming"
    try:
        total = make_checkpoint(work / "source", options.layers)
        rate = read_speed(work / "source")
        command = [sys.executable, "-c", _CHILD, str(work / "source"), options.scheme, str(work / "out")]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        written = sum(path.stat().st_size for path in (work / "out").iterdir())
        print(f"source      {total / 1e9:.2f} GB, read alone at {rate / 1e9:.2f} GB/s: {total / rate:.1f} s")
        pace = total / found["seconds"] / 1e9
        print(f"{options.scheme:11} {written / 1e9:.2f} GB in {found['seconds']:.1f} s: {pace:.2f} GB/s of the source")
        print(f"peak RSS    {found['peak'] / 1e9:.2f} GB")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
