"""The command line: exit codes, sentences in place of tracebacks, and JSON where a script would read it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from standin import CANARY

from bitpress.pipeline.cli import app
from bitpress.pipeline.errors import (
    BitpressError,
    CheckpointError,
    ConfigError,
    DiskError,
    GateError,
    HubError,
    LockedError,
    NumericsError,
)
from bitpress.pipeline.evaluate import process
from bitpress.pipeline.objects import Artifact
from bitpress.pipeline.runs import job
from bitpress.pipeline.storage import files, journal
from bitpress.pipeline.system import interrupts

README = Path(__file__).parents[3] / "README.md"


class Panic(BaseException):
    """Of a library in Rust."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


Bitpress = Callable[..., Result]


@pytest.fixture
def bitpress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bitpress:
    """bitpress("list", "--json"): the command in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["bitpress", *map(str, arguments)])
        monkeypatch.setattr(interrupts, "atexit", SimpleNamespace(register=lambda *arguments: None))
        capfd.readouterr()
        try:
            app.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def artifact(tmp_path: Path, tiny_llama: Path, bitpress: Bitpress) -> Path:
    assert bitpress("quantize", tiny_llama, "--recipe", "int4-g32", "-o", tmp_path / "pressed").code == 0
    return tmp_path / "pressed"


def config(folder: Path, model: Path, **changes: Any) -> Path:
    """A config file in JSON, which is YAML."""
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    evaluation = {"text": str(folder / "text.txt"), "context": 64, "windows": 2, "speed": None}
    value = {"name": "trial", "models": [{"id": str(model)}], "recipes": ["int4-g32"], "eval": evaluation}
    path = folder / "trial.yaml"
    path.write_text(json.dumps({**value, "output": str(folder / "runs"), "device": "cpu", **changes}))
    return path


class TestExitCodes:
    def test_each_kind_has_its_own(self):
        kinds = [BitpressError, ConfigError, CheckpointError, NumericsError, DiskError, HubError, LockedError]
        assert [kind.exit_code for kind in [*kinds, GateError]] == [1, 2, 3, 4, 5, 6, 7, 8]

    @pytest.mark.parametrize("kind", [ConfigError, CheckpointError, NumericsError, DiskError, HubError, LockedError])
    def test_errors_are_a_sentence(
        self, bitpress: Bitpress, tmp_path: Path, kind: type[BitpressError], monkeypatch: pytest.MonkeyPatch
    ):
        def fail(folder: Path) -> None:
            raise kind("layers.3: got [7], expected [8]; use [red]another[/red]")

        monkeypatch.setattr("bitpress.pipeline.checkpoints.describe.describe", fail)
        found = bitpress("inspect", tmp_path)
        assert found.code == kind.exit_code
        assert found.err == "error: layers.3: got [7], expected [8]; use [red]another[/red]\n"
        assert not found.out
        with_trace = bitpress("--debug", "inspect", tmp_path)
        assert with_trace.code == kind.exit_code
        assert "Traceback" in with_trace.err

    @pytest.mark.parametrize("kind", [KeyError, Panic])
    def test_an_unknown_error_is_a_sentence(
        self, bitpress: Bitpress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
    ):
        """PyO3's panics are no Exceptions. The traceback is in a log, without tokens, and --debug shows it."""

        def fail(folder: Path) -> None:
            raise kind(CANARY)

        monkeypatch.setattr("bitpress.pipeline.checkpoints.describe.describe", fail)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        found = bitpress("inspect", tmp_path)
        log = tmp_path / "bitpress" / "errors.log"
        assert found.code == 1
        assert found.err.count("\n") == 1
        assert re.fullmatch(rf"error: unexpected .*<TOKEN>.*; its traceback is in {log}; please report it\n", found.err)
        assert "in fail" in log.read_text()
        assert "in fail" in bitpress("--debug", "inspect", tmp_path).err
        assert CANARY not in log.read_text() + found.err

    def test_config(self, bitpress: Bitpress, tmp_path: Path, tiny_llama: Path):
        found = bitpress("run", config(tmp_path, tiny_llama, recpes=["nf4"]))
        assert found.code == 2
        assert "recpes: unknown key; did you mean recipes?" in found.err

    def test_checkpoint(self, bitpress: Bitpress, tmp_path: Path):
        found = bitpress("inspect", tmp_path)
        assert (found.code, found.err) == (
            3,
            f"error: {tmp_path} has neither model.safetensors nor model.safetensors.index.json\n",
        )

    def test_numerics(self, bitpress: Bitpress, source: Path, tmp_path: Path, edit_tensors: Any):
        name = "model.norm.weight"
        edit_tensors(source / "model.safetensors", lambda tensors: tensors[name].fill_(torch.nan))
        found = bitpress("quantize", source, "--recipe", "int4-g32", "-o", tmp_path / "out")
        assert found.code == 4
        assert f"{name}: 64 of 64 values are NaN" in found.err

    def test_disk(self, bitpress: Bitpress, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def full(descriptor: int, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "write", full)
        found = bitpress("quantize", tiny_llama, "--recipe", "int4-g32", "-o", tmp_path / "out")
        assert found.code == 5
        assert "the disk is full" in found.err
        assert "run the same command again" in found.err

    def test_hub(self, bitpress: Bitpress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        found = bitpress("quantize", "nobody/nothing-of-that-name", "-o", tmp_path / "out")
        assert found.code == 6
        assert "nobody/nothing-of-that-name" in found.err
        assert not (tmp_path / "out.partial").exists()

    def test_locked(self, bitpress: Bitpress, tiny_llama: Path, tmp_path: Path):
        (tmp_path / "out.partial").mkdir()
        with journal.locked(tmp_path / "out.partial"):
            found = bitpress("quantize", tiny_llama, "--recipe", "int4-g32", "-o", tmp_path / "out")
        assert found.code == 7
        assert f"in use by process {os.getpid()} on " in found.err

    def test_interrupted(self, bitpress: Bitpress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def interrupt(folder: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("bitpress.pipeline.checkpoints.describe.describe", interrupt)
        found = bitpress("inspect", tmp_path)
        assert found.code == 130
        assert "interrupted; run the same command again to go on" in found.err

    @pytest.mark.parametrize("arguments", [["--bogus"], ["quantise"], ["quantize"], ["generate", "x"], ["eval"]])
    def test_usage(self, bitpress: Bitpress, arguments: list[str]):
        found = bitpress(*arguments)
        assert found.code == 2
        assert "Traceback" not in found.err

    def test_usage_is_one_line(self, bitpress: Bitpress):
        assert bitpress("run", "--bogus").err == "error: No such option: --bogus; see `bitpress run --help`\n"
        assert bitpress("generate", "-h").code == 0
        assert bitpress("--version").out.startswith("bitpress ")

    def test_no_traceback_in_a_real_process(self, tmp_path: Path):
        command = [sys.executable, "-m", "bitpress.pipeline.cli", "inspect", str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 3
        assert found.stderr.startswith("error: ")
        assert found.stdout == ""


def test_eval_beside_its_baseline(bitpress: Bitpress, tiny_llama: Path, artifact: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    options = [
        "--text",
        tmp_path / "text.txt",
        "--context",
        64,
        "--windows",
        3,
        "--protocol",
        "sliding",
        "--stride",
        32,
    ]
    found = bitpress("eval", artifact, "--baseline", tiny_llama, *options)
    assert found.code == 0
    assert "perplexity per token by protocol sliding-64/32 on text.txt: 3 windows" in found.out
    for name in ("ratio of perplexities", "mean KL", "same next token", "side by side", "cache per token"):
        assert name in found.out
    wrong = bitpress("eval", artifact, "--protocol", "slding")
    assert (wrong.code, "protocol: Input should be 'gptq', 'sliding'" in wrong.err) == (2, True)


class TestHostileText:
    """Names and messages from a checkpoint reach the terminal as visible escapes, and scripts unchanged."""

    ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b1m\u202e"

    def clean(self, result: Result) -> Result:
        text = result.out + result.err
        assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(text), ascii(text)
        return result

    @pytest.fixture
    def hostile(self, source: Path, edit_json: Callable[..., None]) -> Path:
        """A model type and a folder that steer a terminal."""
        edit_json(source / "config.json", model_type=f"llama{self.ESCAPE}", architectures=[self.ESCAPE])
        return source.rename(source.parent / f"name{self.ESCAPE}")

    @pytest.mark.parametrize("command", ["inspect", "doctor", "quantize", "eval", "generate", "chat", "convert"])
    def test_no_command_prints_it(self, bitpress: Bitpress, hostile: Path, tmp_path: Path, command: str):
        output = ["-o", tmp_path / self.ESCAPE] if command in ("quantize", "convert") else []
        more = {"generate": ["x"], "convert": ["--to", "gptq"]}.get(command, [])
        result = self.clean(bitpress(command, hostile, *more, *output))
        assert r"\u001b]0;owned\u0007" in result.out + result.err

    def test_json_holds_it(self, bitpress: Bitpress, hostile: Path):
        result = self.clean(bitpress("inspect", hostile, "--json"))
        assert json.loads(result.out)["architecture"] == self.ESCAPE

    @pytest.mark.parametrize("arguments", [["--\x1b[2J\x9b"], ["inspect", "--\x1b[2J\x9b"], ["bench", "\x1b[2J\x9b"]])
    def test_typer_prints_none(self, bitpress: Bitpress, arguments: list[str]):
        """typer's own errors repeat what was typed."""
        assert self.clean(bitpress(*arguments)).code == 2

    def test_debug(self, bitpress: Bitpress, hostile: Path):
        result = self.clean(bitpress("--debug", "quantize", hostile, "-o", hostile.parent / "out"))
        assert "Traceback" in result.err

    def test_generate(self, bitpress: Bitpress, source: Path):
        """The prompt comes back piece by piece."""
        result = self.clean(bitpress("generate", source, f"a {self.ESCAPE} b c می\u200cخواهم", "--tokens", 2))
        assert "a ]0;owned[2J1m b" in result.out
        assert "می\u200cخواهم" in result.out


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--recipe", "int4g128"], "'int4g128' is not a scheme"),
            (["--recipe", "int5-g32"], "bits must be one of 2, 3, 4, 8"),
            (["--recipe", "absmx/int4-g32"], "method 'absmx' is unknown; did you mean absmax?"),
            (["--recipe", "int4-g32", "--format", "gtpq"], "format 'gtpq' is unknown; did you mean gptq?"),
            (["--recipe", "nf4/int4-g32"], "nf4"),
            (["--recipe", "{schem: int4-g32}"], "did you mean scheme?"),
            (["--recipe", "{scheme: int4-g32"], "expected keys of a recipe in YAML"),
            (["--recipe", "int4-g32-asym", "--format", "gptq"], "gptq"),
            (["--recipe", "int4-g32", "--layer", "nothing*=none"], "nothing* matches no tensor"),
            (["--recipe", "int4-g32", "--revision", "main"], "is a local folder, which has no revision main"),
        ],
    )
    def test_quantize_refuses(
        self, bitpress: Bitpress, tiny_llama: Path, tmp_path: Path, arguments: list[str], said: str
    ):
        found = bitpress("quantize", tiny_llama, "-o", tmp_path / "out", *arguments)
        assert found.code == 2
        assert said in found.err
        assert "Traceback" not in found.err
        assert not list(tmp_path.iterdir())

    @pytest.mark.usefixtures("student")
    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["--option", "dampin=1"], 2, "student has no option 'dampin'; did you mean damping?"),
            (["--option", "damping=0"], 2, "options.damping: Input should be greater than 0, got 0"),
            (["--option", "damping"], 2, "damping: expected key=value, such as damping=1e-3"),
            (["--calibration", "gone.txt"], 2, "gone.txt: no such text file"),
            (["--windows", 0], 2, "windows: Input should be greater than or equal to 1, got 0"),
            (["--context", 1], 2, "context: Input should be greater than or equal to 2, got 1"),
            (["--seed", "x"], 2, "seed: Input should be a valid integer, got 'x'"),
            (["--max-fallback-layers", -1], 2, "max-fallback-layers"),
            (["--calibration", README, "--context", 64, "--windows", 9999], 4, "calibration needs 639936"),
            (["--calibration", "a.txt", "--recipe", "int4-g32"], 2, "no method of the recipe is calibrated"),
        ],
    )
    def test_quantize_refuses_what_there_is_to_learn(
        self, bitpress: Bitpress, tiny_llama: Path, tmp_path: Path, arguments: list[Any], code: int, said: str
    ):
        found = bitpress("quantize", tiny_llama, "-o", tmp_path / "out", "--recipe", "student/int4-g128", *arguments)
        assert found.code == code
        assert said in found.err
        assert "Traceback" not in found.err
        assert not list(tmp_path.iterdir())

    @pytest.fixture
    def passed_on(self, student: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What `bitpress quantize` passes on, which nothing is made of."""
        arguments: list[Any] = []
        monkeypatch.setattr(
            "bitpress.pipeline.api.quantize", lambda *own: arguments.extend(own) or Artifact(tmp_path, "")
        )
        return arguments

    def test_quantize_passes_on_what_was_typed(self, bitpress: Bitpress, tmp_path: Path, passed_on: list[Any]):
        options = ["--calibration", "a.txt", "--windows", 3, "--context", 64, "--seed", "null"]
        options += ["--option", "damping=1e-3", "--option", "order=plain", "--max-fallback-layers", 2]
        options += ["--layer", "*.down_proj=int8-g128", "--layer", "model.layers.0.*=none", "--fit-groups"]
        assert bitpress("quantize", "model", "-o", tmp_path, "--recipe", "student/int4-g128", *options).code == 0
        recipe = passed_on[1]
        assert recipe["options"] == {"damping": 1e-3, "order": "plain"}
        assert (recipe["method"], recipe["scheme"], recipe["max_fallback_layers"]) == ("student", "int4-g128", 2)
        assert recipe["layers"] == {"*.down_proj": "int8-g128", "model.layers.0.*": "none"}
        assert recipe["fit_groups"]
        assert "allow_split_fused" not in recipe
        assert recipe["calibration"] == {"text": "a.txt", "windows": 3, "context": 64, "seed": None}

    def test_quantize_adds_what_is_typed_to_a_recipes_keys(
        self, bitpress: Bitpress, tmp_path: Path, passed_on: list[Any]
    ):
        keys = "{scheme: int4-g128, method: student, format: gguf, sequential: false, options: {damping: 1}, "
        keys += "layers: {'*.down_proj': int8-g128}, calibration: {text: a.txt, windows: 3}}"
        options = ["--option", "order=plain", "--layer", "model.layers.0.*=none", "--windows", 4]
        assert bitpress("quantize", "model", "-o", tmp_path, "--recipe", keys, *options).code == 0
        assert passed_on[1] == {
            "scheme": "int4-g128",
            "method": "student",
            "format": "gguf",
            "sequential": False,
            "options": {"damping": 1, "order": "plain"},
            "layers": {"*.down_proj": "int8-g128", "model.layers.0.*": "none"},
            "calibration": {"text": "a.txt", "windows": 4},
        }

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--dtype", "fp32"], "fp32"),
            (["--kernel", "referense"], "referense"),
            (["--device", "tpu"], "tpu"),
            (["--device", "cuda:99"], "cuda"),
        ],
    )
    def test_generate_refuses(self, bitpress: Bitpress, artifact: Path, arguments: list[str], said: str):
        found = bitpress("generate", artifact, "x", *arguments)
        assert found.code == 2, found.err
        assert said in found.err

    def test_generate(self, bitpress: Bitpress, artifact: Path):
        found = bitpress("generate", artifact, "Once", "--tokens", 3, "--device", "cpu")
        assert found.code == 0, found.err
        assert found.out.startswith("Once")

    def test_quantize_says_what_next_and_verifies_when_repeated(
        self, bitpress: Bitpress, tiny_llama: Path, tmp_path: Path
    ):
        arguments = ["quantize", tiny_llama, "--recipe", "int4-g32", "-o", tmp_path / "out"]
        assert f"try `bitpress eval {tmp_path / 'out'}`" in bitpress(*arguments).out
        assert "finished before, verified" in bitpress(*arguments).err


class TestInspect:
    def test_source(self, bitpress: Bitpress, tiny_llama: Path):
        found = json.loads(bitpress("inspect", tiny_llama, "--json").out)
        assert found["architecture"] == "LlamaForCausalLM"
        assert (found["quantized"], found["files"], found["tensors"]) == ("no", 1, 21)
        assert found["parameters"] * 2 == found["bytes"]

    def test_artifact(self, bitpress: Bitpress, artifact: Path):
        found = json.loads(bitpress("inspect", artifact, "--json").out)
        assert (found["quantized"], found["format"], found["quantized layers"]) == ("int4-g32", "gptq", 14)

    def test_table(self, bitpress: Bitpress, artifact: Path):
        found = bitpress("inspect", artifact)
        assert found.code == 0
        assert "int4-g32" in found.out
        assert not found.err

    def test_damaged_artifact(self, bitpress: Bitpress, artifact: Path, edit_json: Callable[..., None]):
        edit_json(artifact / "config.json", quantization_config={"quant_method": "nonesuch"})
        found = bitpress("inspect", artifact)
        assert found.code == 3
        assert "nonesuch" in found.err


class TestList:
    def test_json(self, bitpress: Bitpress):
        found = json.loads(bitpress("list", "--json").out)
        assert {"schemes", "methods", "formats", "executors"} < found.keys()
        assert {"absmax", "nf4"} <= found["methods"].keys()
        assert "int8-dynamic-asym" in found["recipes"]["int8"]["about"]
        assert "gptq" in found["formats"]
        assert found["schemes"]["int4-g128"]["about"].startswith("4.12 bits per weight")
        kernels = next(value for key, value in found.items() if key.startswith("kernels on "))
        assert kernels["reference"]["schemes"] == list(found["schemes"])

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels serve here")
    def test_the_reason_is_the_one_that_keeps_a_kernel_away(self, bitpress: Bitpress):
        kernels = json.loads(bitpress("list", "--json").out)["kernels on cpu"]
        assert {kernels[name]["about"] for name in kernels if name.startswith("triton")} == {
            "not here: runs on NVIDIA GPUs, not on cpu"
        }

    def test_table(self, bitpress: Bitpress):
        found = bitpress("list")
        assert found.code == 0
        assert "int{2,3,4}-{g32,g64,g128,channel,g128-asym}" in found.out
        assert not found.err


def test_what_answers_at_once_imports_little():
    """torch takes a second, transformers and bitsandbytes two more."""
    program = """if True:
        import sys
        from bitpress.pipeline.cli import app
        assert "torch" not in sys.modules
        sys.argv = ["bitpress", "list"]
        try:
            app.main()
        except SystemExit as stop:
            assert not stop.code
        assert not {"transformers", "bitsandbytes", "accelerate"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


class TestRun:
    def test_a_failed_job_does_not_stop_the_others(
        self, bitpress: Bitpress, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """The jobs end where a fresh process would begin, which has its own tests."""

        def refuse(*arguments: Any, **named: Any) -> None:
            raise NumericsError("stopped here")

        monkeypatch.setattr(job, "verify_artifact", refuse)
        monkeypatch.setattr(process, "measure", refuse)
        path = config(tmp_path, tiny_llama, recipes=["int4-g128", "int4-g32"])
        together = bitpress("run", path)
        assert f"failed  {tiny_llama} none, {tiny_llama} int4-g32: stopped here" in together.out
        assert f"  {tmp_path}/runs/trial/int4-g32/artifact\n" in together.out
        found = bitpress("run", path, "--json")
        assert found.code == 1
        jobs = {outcome["recipe"]: outcome for outcome in json.loads(found.out)}
        assert list(jobs) == ["none", "int4-g128", "int4-g32"]
        assert "not divisible by group_size 128" in jobs["int4-g128"]["error"]
        assert jobs["none"]["error"] == jobs["int4-g32"]["error"] == "stopped here"
        assert (tmp_path / "runs/trial/int4-g32/artifact/bitpress.json").exists()
        assert "Traceback" not in found.err

    def test_all_configs_are_checked_before_any_runs(self, bitpress: Bitpress, tmp_path: Path, tiny_llama: Path):
        good = config(tmp_path, tiny_llama)
        found = bitpress("run", good, tmp_path / "missing.yaml")
        assert found.code == 2
        assert "missing.yaml: No such file" in found.err
        assert not (tmp_path / "runs").exists()

    def test_output_inside_the_source(self, bitpress: Bitpress, tmp_path: Path, source: Path):
        before = sorted(source.iterdir())
        found = bitpress("run", config(tmp_path, source, output=str(source / "runs"), recipes=["none"]))
        assert found.code == 2
        assert "lies in the checkpoint's own folder" in found.out
        assert sorted(source.iterdir()) == before

    def test_set(self, bitpress: Bitpress, tmp_path: Path, tiny_llama: Path):
        found = bitpress("run", config(tmp_path, tiny_llama), "--set", "eval.windws=3")
        assert found.code == 2
        assert "eval.windws: unknown key; did you mean windows?" in found.err

    @pytest.mark.parametrize(
        ("text", "code", "said"),
        [("", 4, "holds no text"), (" \n", 4, "holds no text"), ("short", 4, "has 5 tokens"), (None, 2, "no such")],
    )
    def test_text(self, bitpress: Bitpress, tmp_path: Path, tiny_llama: Path, text: str | None, code: int, said: str):
        path = config(tmp_path, tiny_llama, recipes=["none"])
        (tmp_path / "text.txt").unlink()
        if text is not None:
            (tmp_path / "text.txt").write_text(text)
        found = bitpress("run", path)
        assert found.code == code
        assert said in found.err + found.out
