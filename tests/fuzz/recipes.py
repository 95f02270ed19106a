"""Draws recipes at random for tiny models of every architecture: each is refused in a sentence, or comes out right.

    python tests/fuzz/recipes.py [--count 100] [--minutes 1] [--seed 0]
    python tests/fuzz/recipes.py --seed 0 --case 17      one case again, with its traceback

A recipe that is not refused must quantize; its artifact, reloaded, must give the logits of the model in memory. A
finding is anything else that happens, an exception that is no BitpressError above all. The exit code is 1 if there is
one.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fixtures"))

import torch
from checkpoints import ARCHITECTURES, OTHERS, save_tiny

from bitpress.pipeline.data.calibration import Calibration
from bitpress.pipeline.errors import BitpressError
from bitpress.pipeline.evaluate import worker
from bitpress.pipeline.evaluate.verify import verify_artifact, verify_task
from bitpress.pipeline.quantize.artifact import quantize
from bitpress.pipeline.quantize.recipe import Recipe
from bitpress.pipeline.storage.checkpoint import Checkpoint
from bitpress.pipeline.system.progress import quiet_libraries

IDS = torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(1))
INTEGERS = (
    "int2-g32",
    "int3-g32",
    "int3-g64-asym",
    "int4-g32",
    "int4-g32-asym",
    "int4-channel",
    "int8-g32",
    "int8-channel",
)
FLOATS = ("nvfp4", "mxfp4", "fp8-block", "fp8", "nf4")
ROUNDED_INPUTS = (
    "int8-dynamic",
    "int8-dynamic-asym",
    "int8-static",
    "int8-static-asym",
    "fp8-dynamic",
    "fp8-static",
    "int4-g32-int8-dynamic",
)
SCHEMES = (*INTEGERS, *INTEGERS, *FLOATS, *ROUNDED_INPUTS)
PATTERNS = ("lm_head", "*embed*", "*.0.*", "*down*", "*q_proj*", "*mlp*")
FORMATS = ("gptq", "gptq-v2", "compressed-tensors", "gguf", "mlx", "awq", "fp8", "modelopt")


def draw(generator: random.Random) -> dict[str, Any]:
    """The settings of a recipe."""
    chance, choice = lambda share: generator.random() < share, generator.choice
    settings: dict[str, Any] = {}
    if chance(0.4):
        settings["budget"] = choice(["3 bits", "4.5 bits", "6 bits", "8.5 bits"])
        if chance(0.7):
            methods = ("", "", "absmax/", "gptq/")
            settings["choices"] = [choice(methods) + own for own in generator.sample(SCHEMES, generator.randint(2, 4))]
    else:
        settings["scheme"] = choice(SCHEMES)
    optional: list[tuple[str, float, tuple[Any, ...]]] = [
        ("method", 0.7, ("absmax", "gptq", "gptq", "gptq", "tune")),
        ("transform", 0.4, ("smooth", "awq")),
        ("keep_inputs", 0.1, (0.05, 0.3)),
        ("distill", 0.25, ({"steps": 2, "windows": 2},)),
        ("kv_cache", 0.15, ("fp8", "int8", "int8-g16", "int4-g16")),
        ("sequential", 0.2, (False,)),
        ("fit_groups", 0.4, (True,)),
        ("allow_split_fused", 0.2, (True,)),
        ("dtype", 0.3, ("bfloat16", "float16", "float32")),
        ("format", 0.1, FORMATS),
        ("observer", 0.05, ("mse", "minmax", "percentile")),
        ("layers", 0.3, tuple({choice(PATTERNS): choice((*SCHEMES, "none"))} for _ in range(2))),
    ]
    for key, share, values in optional:
        if chance(share):
            settings[key] = choice(values)
    return settings


def attempt(source: Path, settings: dict[str, Any], folder: Path) -> None:
    """Quantize a model, and prove the artifact.

    Raises:
        BitpressError: the recipe is refused; or, from the proof, the artifact is not what was in memory.
    """
    recipe = Recipe.make(settings)
    if recipe.calibrated:
        recipe = replace(recipe, calibration=Calibration("random tokens", IDS, 0))
    artifact = folder / "artifact"
    quantize(Checkpoint(source), {}, recipe, artifact, folder, lambda done, total: None)
    try:
        verify_artifact(Checkpoint(source), recipe, artifact, IDS[0], "cpu", "float32")
    except BitpressError as error:
        raise AssertionError(str(error)) from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1 << 62)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    worker.call = lambda task, request: verify_task(request)  # here, not in a fresh process
    root = Path(tempfile.mkdtemp(prefix="bitpress-recipes-"))
    models: dict[str, Path] = {}
    outcomes: Counter[str] = Counter()
    findings, start = 0, time.monotonic()
    first = 0 if options.case is None else options.case
    for number in range(first, first + (options.count if options.case is None else 1)):
        if time.monotonic() - start > 60 * options.minutes and options.case is None:
            break
        generator = random.Random(f"{options.seed} {number}")
        name, settings = generator.choice([*ARCHITECTURES, *OTHERS]), draw(generator)
        if name not in models:
            models[name] = save_tiny(name, root / name)
        folder = root / str(number)
        folder.mkdir()
        try:
            attempt(models[name], settings, folder)
            outcomes["done"] += 1
        except BitpressError as error:
            outcomes["refused"] += 1
            if options.case is not None:
                print(f"refused: {error}")
        except Exception as error:
            findings += 1
            print(f"case {number}: {name} {settings}\n  {type(error).__name__}: {error}", flush=True)
            if options.case is not None:
                traceback.print_exc()
        shutil.rmtree(folder)
    shutil.rmtree(root)
    seconds, done, refused = time.monotonic() - start, outcomes["done"], outcomes["refused"]
    print(f"seed {options.seed}: {done} done, {refused} refused, {findings} findings; {seconds:.0f} s")
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
