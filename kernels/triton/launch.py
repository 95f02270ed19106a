"""What the Triton kernels share: whether Triton works here, and which of a kernel's configurations suits a GPU."""

import functools
import json
import os
import re
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import triton
except ImportError:  # it comes with torch's CUDA builds, not with its CPU ones
    triton = None

_LEAST_CAPABILITY = (8, 0)  # bfloat16 tensor cores, and copies to shared memory that run beside the work
_WARM_UP, _TIMED = 5, 40  # milliseconds of each configuration


class Config(NamedTuple):
    """What a program is compiled with: its tile of the product, and two options of the compiler.

    rows: of x. outs: output features. depth: input features that one step of the loop takes. split: how many programs
    share the input features of one tile. stages: of the software pipeline, 1 for none.
    """

    rows: int
    outs: int
    depth: int
    split: int = 1
    warps: int = 4
    stages: int = 1


def unsupported_device(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on this device, in a few words; None if they can."""
    if device.type != "cuda" or torch.version.hip:
        return f"runs on NVIDIA GPUs, not on {'AMD ones' if device.type == 'cuda' else device.type}"
    if reason := unsupported_machine():
        return reason
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "needs a GPU of compute capability {}.{} or higher".format(*_LEAST_CAPABILITY)
    return None


@functools.cache
def unsupported_machine() -> str | None:
    """What Triton lacks on this machine; None if nothing. It compiles a piece of C for every kernel's launch."""
    if triton is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Triton finds no Python.h, which comes with Python's development package"
    return None


def row_bucket(rows: int) -> int:
    """The next power of two: row counts that share a configuration."""
    return 1 << max(0, rows - 1).bit_length()


def choose(
    kernel: str, bucket: str, configs: Sequence[Config], run: Callable[[Config], object], device: torch.device
) -> Config:
    """The fastest of a kernel's configurations for shapes of this bucket on this GPU: timed the first time that they
    are met, and read from the user's cache by later processes. The first configuration is the default, for CPUs
    (Triton's interpreter) and where nothing can be timed: while a CUDA graph is captured.

    Args:
        run: launches the kernel on `device` with a configuration, as often as it is called.
    """
    if device.type != "cuda" or len(configs) == 1:
        return configs[0]
    choices = _choices(torch.cuda.get_device_name(device))
    if best := choices.get(kernel, bucket, configs):
        return best
    if torch.cuda.is_current_stream_capturing():
        return configs[0]
    seconds = {config: _time(run, config) for config in configs}
    fastest = min(configs, key=seconds.__getitem__)
    choices.put(kernel, bucket, fastest)
    return fastest


def _time(run: Callable[[Config], object], config: Config) -> float:
    """Median milliseconds, the level-2 cache emptied before each run; infinite where the GPU is too small for it."""
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=_WARM_UP, rep=_TIMED, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


@functools.cache
def _choices(gpu: str) -> "Choices":
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitpress"
    name = re.sub(r"[^a-z0-9.]+", "-", f"{gpu}-{triton.__version__}".lower())
    return Choices(cache / f"triton-{name}.json")


class Choices:
    """The configurations that were found best, in memory and in a JSON file: {kernel: {bucket: Config's numbers}}."""

    def __init__(self, path: Path):
        self.path = path
        self._best = self._read()

    def get(self, kernel: str, bucket: str, configs: Sequence[Config]) -> Config | None:
        """The best of `configs`; None where nothing was timed, or what the file says is none of them (any more)."""
        numbers = self._best.get(kernel, {}).get(bucket)
        return next((config for config in configs if list(config) == numbers), None)

    def put(self, kernel: str, bucket: str, config: Config) -> None:
        """Keep the choice, in the file too, beside what other processes put there meanwhile. Warns where that fails."""
        others = self._read()
        for name in {*others, *self._best}:
            self._best[name] = {**others.get(name, {}), **self._best.get(name, {})}
        self._best.setdefault(kernel, {})[bucket] = list(config)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                file = Path(folder) / self.path.name
                file.write_text(json.dumps(self._best, indent=1, sort_keys=True))
                os.replace(file, self.path)
        except OSError as error:
            warnings.warn(f"{self.path}: cannot keep which kernels are fastest: {error}", stacklevel=2)

    def _read(self) -> dict[str, dict[str, list[int]]]:
        """{} where there is no file yet, or it is not one that `put` wrote; in the second case it warns."""
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"{self.path} is not read: {error}; kernels are timed again", stacklevel=2)
            return {}
        if isinstance(content, dict) and all(isinstance(buckets, dict) for buckets in content.values()):
            return content
        warnings.warn(f"{self.path} is not read: it holds something else; kernels are timed again", stacklevel=2)
        return {}
