"""How long loading a quantized checkpoint takes, and how much memory, beside reading its bytes into memory.

    python tests/benchmarks/loading.py FOLDER [--rounds 5]

Where `bitpress optimize FOLDER` was called before, loading is measured without its packed weights ("load") and with
them ("map"). Each in a fresh process whose imports are done, in turns; medians, with the least and the most. "Cold":
the files' pages are dropped before (Linux). Peak memory is what the process holds at most beyond what it held before.
Before each turn, several times as much memory is touched and given back: a virtual machine may have to get it from its
host first, which takes longer than all else.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from bitpress.pipeline.storage.packed_file import packed_files

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import psutil, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from bitpress.kernels.cpu.library import library
from bitpress.pipeline.api import load
from bitpress.pipeline.models import loading

def read(folder):
    kept = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        kept.append(torch.empty(file.stat().st_size, dtype=torch.uint8))
        view, filled = kept[-1].numpy().data, 0
        with file.open("rb", buffering=0) as handle:
            while filled < len(view):
                filled += handle.readinto(view[filled:])
    return sum(tensor.nbytes for tensor in kept), kept

def loaded(folder, mapped=False):
    if not mapped:
        loading.Coming = lambda folder: None
    model, tokenizer = load(folder, device="cpu")
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()]), model

def watch():
    global peak
    while True:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

library()
touched = torch.ones(int(sys.argv[3]), dtype=torch.uint8)
del touched
process = psutil.Process()
before = peak = process.memory_info().rss
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
size, kept = {"read": read, "load": loaded, "map": lambda folder: loaded(folder, True)}[sys.argv[1]](sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - start, "peak": (peak - before) / size}))
"""


def drop(folder: Path) -> None:
    """Let the system forget what it has read of the files."""
    for file in [*folder.glob("*.safetensors"), *packed_files(folder)]:
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(what: str, folder: Path, cold: bool) -> dict[str, float]:
    if cold:
        drop(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    call = [sys.executable, "-c", MEASURE, what, str(folder), str(4 * size)]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ways = ("read", "load", *(["map"] if packed_files(given.folder) else []))
    measure("read", given.folder, cold=False)
    for cold in (False, True):
        rounds = [[measure(what, given.folder, cold) for what in ways] for _ in range(given.rounds)]
        for number, what in enumerate(ways):
            seconds = [found[number]["seconds"] for found in rounds]
            peak = max(found[number]["peak"] for found in rounds)
            shown = f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
            print(f"{'cold' if cold else 'warm'}  {what}  {shown}, peak {peak:.2f} of what it keeps")
        for number, what in enumerate(ways[1:], 1):
            print(f"      {what}/read: {median(each[number]['seconds'] / each[0]['seconds'] for each in rounds):.2f}")


if __name__ == "__main__":
    main()
