"""Other programs that quantize, and the one job that they and bitpress are given, each in a process of its own.

A peer may live in another virtual environment: its script imports nothing of bitpress and is run by that environment's
Python as `python SCRIPT REQUEST.json`. The request's keys:

    model       folder of the checkpoint
    tokens      safetensors file; its "ids", int64 [windows, context], are what to calibrate on
    output      folder to make: the quantized checkpoint with its tokenizer
    answer      JSON file to write: {"seconds": of quantizing without the imports, "versions": {package: version}}
    bits, group_size (null: one group per output channel), symmetric, seed
    batch       windows per forward pass, where the program lets one choose
    options     what one program alone knows
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitpress.kernels.scheme import Scheme

from ..errors import BitpressError, ConfigError, nearest
from ..storage import files
from .cost import Cost, measured

_HERE = Path(__file__).parent / "scripts"
_TAIL = 30  # lines of a failed program's last words
_ASK = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


@dataclass(frozen=True)
class Program:
    """name: as --peer calls it. module: what its Python must be able to import. script: what that Python runs."""

    name: str
    module: str
    script: Path
    python: str = sys.executable
    options: dict[str, Any] = field(default_factory=dict)

    def installed(self) -> bool:
        """Whether `python` finds the program; it is not imported.

        Raises:
            ConfigError: there is no such Python.
        """
        if self.python == sys.executable:
            return importlib.util.find_spec(self.module) is not None
        try:
            return subprocess.run([self.python, "-c", _ASK, self.module], check=False).returncode == 0
        except OSError as error:
            raise ConfigError(f"{self.name}: {self.python} cannot be run: {error.strerror}") from error


def bitpress(method: str) -> Program:
    return Program("bitpress", "bitpress", _HERE / "bitpress_job.py", options={"method": method})


def peers() -> dict[str, tuple[str, Path]]:
    """Name -> the module that must be importable, and the script."""
    return {
        "gptqmodel": ("gptqmodel", _HERE / "gptqmodel_job.py"),
        "llm-compressor": ("llmcompressor", _HERE / "llmcompressor_job.py"),
    }


def find(pythons: list[str]) -> list[Program]:
    """The peers that are installed here, and those of "NAME=PYTHON", which must be there.

    Raises:
        ConfigError: an unknown name, or a Python without that peer.
    """
    chosen: dict[str, str] = {}
    for text in pythons:
        name, separator, python = text.partition("=")
        if name not in peers() or not separator or not python:
            hint = nearest(name, peers()) if name not in peers() else ""
            raise ConfigError(f"peer {text!r}: expected NAME=PYTHON, NAME one of {', '.join(peers())}{hint}")
        chosen[name] = str(Path(python).absolute()) if os.sep in python else python
    found = []
    for name, (module, script) in peers().items():
        program = Program(name, module, script, chosen.get(name, sys.executable))
        if program.installed():
            found.append(program)
        elif name in chosen:
            raise ConfigError(f"peer {name}: {chosen[name]} has no package {module}; install it there")
    return found


def request(model: Path, tokens: Path, output: Path, scheme: Scheme, seed: int = 0) -> dict[str, Any]:
    """What every program is asked; see the keys above."""
    return {
        "model": str(model.resolve()),
        "tokens": str(tokens.resolve()),
        "output": str(output.resolve()),
        "answer": str(output.resolve().with_name(f"{output.name}.answer.json")),
        "scheme": scheme.name,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "seed": seed,
        "batch": 8,
    }


def run(program: Program, asked: dict[str, Any]) -> tuple[dict[str, Any], Cost]:
    """One job in a fresh process: the program's answer, and what the process with all its children cost.

    Raises:
        BitpressError: it failed; the message ends with its last words.
    """
    answer = Path(asked["answer"])
    answer.unlink(missing_ok=True)
    path, log = answer.with_suffix(".request.json"), answer.with_suffix(".log")
    files.write_json(path, {**asked, "options": program.options})
    with log.open("wb") as file:
        code, cost = measured([program.python, str(program.script), str(path)], file, answer.parent)
    if code or not answer.exists():
        words = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise BitpressError(f"{program.name} ended with exit code {code}:\n{words}")
    return json.loads(answer.read_text()), cost
