"""llama.cpp's matrix product as an entrant of the kernel benchmark, in a process of its own (scripts/llamacpp_job.py).

Its formats differ from ours: it multiplies by other weights of the same size, and is checked against those.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress.kernels.bench.entrants import copies
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme

from ..errors import BitpressError, ConfigError, nearest
from ..system import children
from .programs import Program, absolute

NAME = "llama.cpp"
_SCRIPTS = Path(__file__).parent / "scripts"
_BLOCK = 32  # input features that share a scale, in all of its formats here
_BITS = {"q4_0": 4.5, "q8_0": 8.5, "iq4_nl": 4.5}  # bits per weight, scales included
_TRIAL_ROWS = (1, 33)  # one row and many run different code of a layout; both must work


class ProgramError(BitpressError, RuntimeError):
    """Another program that refused, or ended."""


def find(pythons: list[str], script: str) -> Program:
    """llama.cpp as it is installed here, or in the Python of "llama.cpp=PYTHON", which must have it.

    Args:
        script: what that Python is to run, of scripts/.

    Raises:
        ConfigError: an unknown name, or a Python without llama-cpp-python.
    """
    python = sys.executable
    for text in pythons:
        name, _, python = text.partition("=")
        if name != NAME or not python:
            hint = nearest(name, [NAME]) if name != NAME else ""
            raise ConfigError(f"peer {text!r}: expected NAME=PYTHON, NAME {NAME}{hint}")
        python = absolute(python)
    program = Program(NAME, "llama_cpp", _SCRIPTS / script, python)
    if pythons and not program.installed():
        raise ConfigError(f"peer {NAME}: {python} has no package llama_cpp; pip install llama-cpp-python there")
    return program


def find_kernels(pythons: list[str]) -> "LlamaCpp":
    """llama.cpp's kernels as an entrant; see find."""
    return LlamaCpp(find(pythons, "llamacpp_job.py"))


@dataclass(frozen=True)
class LlamaCpp:
    """An entrant (see bitpress.kernels.bench.entrants)."""

    program: Program

    @property
    def name(self) -> str:
        return self.program.name

    def unsupported(self, qtensor: QTensor, device: torch.device) -> str | None:
        if format_like(qtensor.scheme) is None:
            return f"has no format like {qtensor.scheme.name}"
        if device.type != "cpu":
            return f"its CPU kernels are compared, not those for {device.type}"
        if qtensor.shape[1] % _BLOCK:
            return f"in_features {qtensor.shape[1]} is not divisible by its block of {_BLOCK}"
        if not self.program.installed():
            return f"llama-cpp-python is not installed here; say where it is: --peer {NAME}=PYTHON"
        return None

    def enter(self, qtensor: QTensor) -> "_Contender":
        """The weight in the first of llama.cpp's layouts that works: in some builds AMX's crashes for several rows."""
        failed: dict[str, str] = {}
        while True:
            contender = _Contender(self.program, qtensor, list(failed))
            try:
                for rows in _TRIAL_ROWS:
                    contender.ask({"do": "check", "rows": rows})
            except ProgramError as error:
                contender.close()
                failed[contender.about["layout"]] = str(error)
                continue
            contender.about |= {f"passed over {layout}": why for layout, why in failed.items()}
            return contender


def format_like(scheme: Scheme) -> str | None:
    """The format of ggml that llama.cpp would use in a scheme's place; None if it has none."""
    weights = scheme.weight.description()
    formats = {("int", 4): "q4_0", ("int", 8): "q8_0", ("codebook", 4): "iq4_nl"}
    return formats.get((weights.type, weights.num_bits))


class Worker:
    """A process of another program's Python that answers requests, one line of JSON each; its script says which."""

    def __init__(self, program: Program):
        self.name = program.name
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.running = contextlib.ExitStack()
        folder = self.running.enter_context(children.private_folder())
        command = [program.python, str(program.script)]
        self.process = self.running.enter_context(children.start(command, folder, text=True, **streams))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            ProgramError: the process refused, or it ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self.process.stdout.readline()
        if not line:
            raise ProgramError(f"{self.name} {children.ending(self.process.wait())}{self._traceback_end()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise ProgramError(f"{self.name}: {answer['failed']}")
        return answer

    def close(self) -> None:
        """End the process by the end of its input; kill one that hangs."""
        try:
            self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.running.close()
        self.log.close()

    def _traceback_end(self) -> str:
        """The last line of a traceback; ggml's own lines say what it repacked, not what was wrong."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if any(line.startswith("Traceback") for line in lines) else ""


class _Contender(Worker):
    """The contender: a weight in another process, and requests about it."""

    def __init__(self, program: Program, qtensor: QTensor, skip: list[str]):
        kind = format_like(qtensor.scheme)
        assert kind is not None
        out_features, in_features = qtensor.shape
        super().__init__(program)
        self.itemsize = 4
        self.copies = copies(int(out_features * in_features * _BITS[kind] / 8), torch.device("cpu"))
        self.longest = self.copies - 1
        request = {"type": kind, "out": out_features, "in": in_features, "copies": self.copies, "skip": skip}
        try:
            answer = self.ask({"do": "load", **request, "threads": torch.get_num_threads()})
        except ProgramError:
            self.close()
            raise
        self.nbytes = answer["nbytes"]
        self.about: dict[str, Any] = {"format": kind, "layout": answer["layout"], **answer["versions"]}

    def error(self, x: Tensor, expected: Tensor) -> float:
        return self.ask({"do": "check", "rows": len(x)})["error"]

    def seconds(self, x: Tensor, calls: int) -> float:
        return self.ask({"do": "sample", "rows": len(x), "calls": calls})["seconds"]
