"""Kills any process of a batch at a random moment, then runs the same command: the bytes and the figures are the same.

    python tests/fuzz/kills.py --kills 60 --seed 1

A batch quantizes a tiny model, by one of two recipes in turn, checks, evaluates and reports it and its baseline, and
publishes it to a stand-in for the Hub. The victim is the command alone, one of the processes that it started, or all of
them. Each kill has its own generator of random numbers, so `--only 17` repeats the 17th. The exit code is 1 if there is
a finding.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

from checkpoints import save_tokenizer
from standin import CANARY, Hub

RECIPES: tuple[dict[str, str], ...] = (
    {"name": "rounded", "scheme": "int4-g32"},
    {"name": "calibrated", "scheme": "int4-g32", "method": "gptq"},
)
VICTIMS = ("command", "worker", "group")
DETERMINISTIC = ("protocol", "quality", "output_errors", "sample", "size", "reload")  # of metrics.json
PATIENCE = 60.0  # seconds in which what a dead command started must have ended
LONGEST = 900.0  # seconds of one run, on a machine that does much else


@dataclass(frozen=True)
class Batch:
    """A folder with a model, a text and a config for each run; and the Hub that they publish to."""

    folder: Path
    hub: Hub

    def make(self) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        config = LlamaConfig(**shape, **heads, bos_token_id=None, eos_token_id=255)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(self.folder / "model")
        save_tokenizer(self.folder / "model")
        (self.folder / "text.txt").write_text("".join(f"{n} green bottles on the wall\n" for n in range(200)))

    def command(self, name: str, recipe: dict[str, str]) -> list[str]:
        """The command of a run, whose config is written; it has an output and a repository of its own."""
        text = str(self.folder / "text.txt")
        config = {
            "name": "trial",
            "models": [{"id": str(self.folder / "model")}],
            "recipes": [recipe],
            "defaults": {"calibration": {"text": text, "windows": 8, "context": 64}} if "method" in recipe else {},
            "eval": {"text": text, "context": 64, "windows": 8, "speed": None, "dtype": "float32"},
            "output": str(self.folder / name),
            "device": "cpu",
            "publish": {"repo": f"user/{name}"},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(config))
        return [sys.executable, "-m", "bitpress.pipeline.cli", "run", str(path)]

    def start(self, command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        clean |= {"HF_ENDPOINT": self.hub.url, "HF_TOKEN": CANARY, "HF_HOME": str(self.folder / "home")}
        clean |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
        with log.open("ab") as file:
            return subprocess.Popen(
                command, env=clean, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def results(self, name: str, recipe: dict[str, str]) -> dict[str, Any]:
        """All that must be the same: figures, hashes of the artifact's files, and hashes of what is published."""
        results: dict[str, Any] = {}
        runs = self.folder / name / "trial"
        for run in (runs / "none", runs / recipe["name"]):
            metrics = json.loads((run / "metrics.json").read_text())
            results |= {f"{run.name}: {key}": metrics[key] for key in DETERMINISTIC}
        artifact = runs / recipe["name"] / "artifact"
        results |= {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in artifact.iterdir()}
        sent = self.hub.repos[f"user/{name}"].at("main")[1]
        names = sent.keys() & {path.name for path in artifact.iterdir()}
        # the card has the time that it took, and the manifest the card's hash
        results |= {f"on the Hub: {file}": sent[file].sha256 for file in names - {"README.md", "bitpress.json"}}
        return results


def ended(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that are still there after some patience."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def finish(process: "subprocess.Popen[bytes]") -> int:
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def kill(
    process: "subprocess.Popen[bytes]", victim: str, rng: random.Random, seconds: float
) -> tuple[str, list[psutil.Process]]:
    """Kill the victim at a random moment; says what was killed, and gives all processes that there were."""
    moment = time.monotonic() + rng.uniform(0, seconds)
    choice = rng.random()
    while process.poll() is None:
        tree: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(process.pid).children(recursive=True)
        if time.monotonic() >= moment and (tree or victim != "worker"):
            chosen = tree[int(choice * len(tree))].pid if victim == "worker" else process.pid
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if victim == "group" else os.kill)(chosen, signal.SIGKILL)
            return victim, [psutil.Process(process.pid), *tree] if process.poll() is None else tree
        time.sleep(0.002)
    return "nothing: it had ended", []


def try_once(batch: Batch, number: int, seed: int, unbroken: dict[str, tuple[float, dict[str, Any]]]) -> str | None:
    """One kill and one more run; returns what is wrong, None if nothing is.

    Args:
        unbroken: recipe -> seconds and results of an unbroken run.
    """
    rng = random.Random(f"{seed}-{number}")
    name, victim = f"kill{number}", rng.choice(VICTIMS)
    recipe = RECIPES[number % len(RECIPES)]
    seconds, expected = unbroken[recipe["name"]]
    command, log = batch.command(name, recipe), batch.folder / f"{name}.log"
    start = time.monotonic()
    process = batch.start(command, log)
    killed, tree = kill(process, victim, rng, seconds)
    moment = time.monotonic() - start
    if victim == "worker":
        finish(process)
    process.poll()
    run = batch.folder / name / "trial"
    stage = (
        ", ".join(sorted(str(path.relative_to(run)) for path in run.glob("*/*") if path.suffix == ".json")) or "nothing"
    )
    print(f"kill {number}: {killed} after {moment:.1f} s of {seconds:.1f}; there was {stage}", flush=True)
    code = finish(batch.start(command, log))
    process.wait()
    if code:
        return f"the same command ended with exit code {code}: {log.read_text()[-2000:]}"
    if alive := ended(tree):
        return f"still running: {alive}"
    if "Traceback" in (text := log.read_text()):
        return f"a traceback: {text[-2000:]}"
    results = batch.results(name, recipe)
    differing = sorted(key for key in {*expected, *results} if expected.get(key) != results.get(key))
    if differing:
        return f"not the same: {', '.join(differing)}"
    shutil.rmtree(batch.folder / name)
    return None


@contextlib.contextmanager
def no_process_left() -> Iterator[None]:
    try:
        yield
    finally:
        for child in psutil.Process().children(recursive=True):
            child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this kill alone")
    options = parser.parse_args()
    findings = 0
    hub = Hub()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # and what it started ends too, see below
    with tempfile.TemporaryDirectory(prefix="kills-") as folder, hub.serving(), no_process_left():
        batch = Batch(Path(folder), hub)
        batch.make()
        unbroken = {}
        for recipe in RECIPES:
            start, name = time.monotonic(), recipe["name"]
            if finish(batch.start(batch.command(name, recipe), batch.folder / f"{name}.log")):
                sys.exit(f"the unbroken run failed:\n{(batch.folder / f'{name}.log').read_text()}")
            unbroken[name] = time.monotonic() - start, batch.results(name, recipe)
            print(f"{name}, unbroken: {unbroken[name][0]:.1f} s, {len(unbroken[name][1])} results", flush=True)
        for number in range(options.kills) if options.only is None else [options.only]:
            if reason := try_once(batch, number, options.seed, unbroken):
                findings += 1
                print(
                    f"FINDING: {reason}\nrepeat it: python {__file__} --seed {options.seed} --only {number}", flush=True
                )
    print(f"{findings} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
