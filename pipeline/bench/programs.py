"""bitpress and other programs that quantize: each does the same job in a process of its own.

Another program may live in another virtual environment. Its script imports nothing of bitpress, and that environment's
Python runs it as `python SCRIPT REQUEST.json`. The request's keys:

    model       folder of the checkpoint
    tokens      safetensors file; its "ids", int64 [windows, context], are what to calibrate on
    output      folder to make: the quantized checkpoint with its tokenizer
    answer      JSON file to write: {"seconds": of quantizing without the imports, "versions": {package: version}}
    bits, group_size (null: one group per output channel), symmetric, seed
    batch       windows per forward pass, for programs that have such a setting
    options     settings of this program alone
"""

import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitpress.kernels.scheme import Scheme

from ..config.load import load_typed_recipe
from ..errors import BitpressError, ConfigError, nearest
from ..quantize.recipe import Recipe
from ..storage import files
from ..system import children
from .cost import Cost, measured

_HERE = Path(__file__).parent / "scripts"
_TAIL = 30  # lines of a failed program's output that are shown
_HAS_MODULE = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


@dataclass(frozen=True)
class Program:
    """name: as --peer calls it. module: what its Python must be able to import. script: what that Python runs.

    peer: whether it is another program than bitpress.
    """

    name: str
    module: str
    script: Path
    python: str = sys.executable
    options: dict[str, Any] = field(default_factory=dict)
    peer: bool = True

    @property
    def folder(self) -> str:
        """A name for the folder of what it writes."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    def installed(self) -> bool:
        """Whether `python` finds the program; it is not imported.

        Raises:
            ConfigError: there is no such Python.
        """
        if self.python == sys.executable:
            return importlib.util.find_spec(self.module) is not None
        try:
            command = [self.python, "-c", _HAS_MODULE, self.module]
            with children.private_folder() as folder, children.start(command, folder) as process:
                return process.wait() == 0
        except OSError as error:
            raise ConfigError(f"{self.name}: {self.python} cannot be run: {error.strerror}") from error


def bitpress(recipe: str) -> Program:
    """bitpress itself, quantizing by a recipe, as `--recipe` takes it.

    Raises:
        ConfigError: there is no such recipe.
    """
    settings = load_typed_recipe(recipe)
    Recipe.make(settings)
    options = {"recipe": settings.model_dump(exclude_unset=True)}
    return Program(
        f"bitpress {settings.name or recipe}", "bitpress", _HERE / "bitpress_job.py", options=options, peer=False
    )


def other_programs() -> dict[str, tuple[str, Path]]:
    """The programs that bitpress is compared with: name -> the module that must be importable, and the script."""
    return {
        "autoround": ("auto_round", _HERE / "autoround_job.py"),
        "gptqmodel": ("gptqmodel", _HERE / "gptqmodel_job.py"),
        "llm-compressor": ("llmcompressor", _HERE / "llmcompressor_job.py"),
    }


def absolute(python: str) -> str:
    """A Python as the user named it, for a process in another folder: a path, or a name that PATH leads to."""
    return str(Path(python).absolute()) if os.sep in python else python


def find(pythons: list[str]) -> list[Program]:
    """The other programs that are installed here, and those of "NAME=PYTHON", which must be installed.

    Raises:
        ConfigError: an unknown name, or a Python without that program.
    """
    others = other_programs()
    chosen: dict[str, str] = {}
    for text in pythons:
        name, separator, python = text.partition("=")
        if name not in others or not separator or not python:
            hint = nearest(name, others) if name not in others else ""
            raise ConfigError(f"peer {text!r}: expected NAME=PYTHON, NAME one of {', '.join(others)}{hint}")
        chosen[name] = absolute(python)
    programs = []
    for name, (module, script) in others.items():
        program = Program(name, module, script, chosen.get(name, sys.executable))
        if program.installed():
            programs.append(program)
        elif name in chosen:
            raise ConfigError(f"peer {name}: {chosen[name]} has no package {module}; install it there")
    return programs


def request(model: Path, tokens: Path, output: Path, scheme: Scheme, seed: int = 0) -> dict[str, Any]:
    """The request to a program; see the keys above."""
    weights = scheme.weight.description()
    return {
        "model": str(model.resolve()),
        "tokens": str(tokens.resolve()),
        "output": str(output.resolve()),
        "answer": str(output.resolve().with_name(f"{output.name}.answer.json")),
        "scheme": scheme.name,
        "bits": weights.num_bits,
        "group_size": weights.group_size,
        "symmetric": weights.symmetric,
        "seed": seed,
        "batch": 8,
    }


def run(program: Program, request: dict[str, Any]) -> tuple[dict[str, Any], Cost]:
    """Run one job in a fresh process; returns the program's answer, and the cost of the process and all its children.

    Raises:
        BitpressError: it failed; the message ends with the last lines of its output.
    """
    answer = Path(request["answer"])
    answer.unlink(missing_ok=True)
    path, log = answer.with_suffix(".request.json"), answer.with_suffix(".log")
    files.write_json(path, {**request, "options": program.options})
    with log.open("wb") as file:
        code, cost = measured([program.python, str(program.script), str(path)], file)
    if code or not answer.exists():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])
        raise BitpressError(f"{program.name} {children.ending(code)}:\n{tail}")
    return json.loads(answer.read_text()), cost
