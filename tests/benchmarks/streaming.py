"""Quantize an 8B-shaped random checkpoint and report memory, and the speed against the disk's.

    python tests/benchmarks/streaming.py FOLDER [--scheme int4-g128] [--layers 32]
    python tests/benchmarks/streaming.py FOLDER --method gptq --windows 16 --context 512 --layers 2
    python tests/benchmarks/streaming.py FOLDER --method gptq --small --layers 32  # does memory grow with the blocks?

Needs 21 GB in FOLDER for 32 layers; what it makes there is deleted at the end.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from bitpress.pipeline.storage import files


@dataclass(frozen=True)
class Size:
    hidden: int = 4096
    inner: int = 14336
    vocabulary: int = 128256
    heads: int = 32
    key_heads: int = 8

    def shapes(self) -> dict[str, tuple[int, int]]:
        keys = self.hidden * self.key_heads // self.heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


SMALL = Size(512, 1536, 4096, 8, 2)


def make_checkpoint(folder: Path, size: Size, layers: int) -> int:
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
        return files.write_safetensors(folder / file, tensors)["bytes"]

    total = save(1, {"model.embed_tokens.weight": weight((size.vocabulary, size.hidden), 1)})
    total += save(
        2, {"lm_head.weight": weight((size.vocabulary, size.hidden), 2), "model.norm.weight": weight((size.hidden,), 3)}
    )
    for layer in range(layers):
        block = {f"model.layers.{layer}.{n}.weight": weight(s, 7 * layer) for n, s in size.shapes().items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block[f"model.layers.{layer}.{norm}.weight"] = weight((size.hidden,), layer)
        total += save(layer + 3, block)
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=layers,
        num_attention_heads=size.heads, num_key_value_heads=size.key_heads, tie_word_embeddings=False, dtype="bfloat16",
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
import dataclasses, json, pathlib, sys, time
import psutil, torch
from bitpress.eval.measure.memory import peak_rss_bytes
from bitpress.pipeline.storage import files as store
from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.storage.checkpoint import Checkpoint
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.quantize.artifact import quantize

source, scheme, method, windows, context, out = sys.argv[1:]
start, resident = time.perf_counter(), []
recipe = Recipe.make(scheme if method == "auto" else f"{method}/{scheme}")
if recipe.calibrated:
    ids = torch.randint(4096, (int(windows), int(context)), generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(recipe, calibration=Calibration("random", ids, 0))
work = pathlib.Path(out + ".partial")
store.make_folder(work)
note = lambda done, total: resident.append(psutil.Process().memory_info().rss)
quantize(Checkpoint(pathlib.Path(source)), {"id": "random"}, recipe, pathlib.Path(out), work, note)
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_rss_bytes(), "resident": resident}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="blocks of 3.1M weights in place of 8B's 218M")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    work = options.folder / "bitpress-streaming"
    try:
        total = make_checkpoint(work / "source", SMALL if options.small else Size(), options.layers)
        rate = read_speed(work / "source")
        tokens = [str(options.windows), str(options.context)]
        job = [str(work / "source"), options.scheme, options.method, *tokens, str(work / "out")]
        found = json.loads(subprocess.run([sys.executable, "-c", _CHILD, *job], check=True, capture_output=True).stdout)
        written = sum(path.stat().st_size for path in (work / "out").iterdir())
        print(f"source      {total / 1e9:.2f} GB, read alone at {rate / 1e9:.2f} GB/s: {total / rate:.1f} s")
        pace = total / found["seconds"] / 1e9
        print(f"{options.scheme:11} {written / 1e9:.2f} GB in {found['seconds']:.1f} s: {pace:.2f} GB/s of the source")
        print(f"peak RSS    {found['peak'] / 1e9:.2f} GB")
        print("RSS, MB     " + " ".join(f"{value / 1e6:.0f}" for value in found["resident"]) + " (before each shard)")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
