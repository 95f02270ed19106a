"""Adding a plug-in is adding one file: one of each kind, dropped into its folder, goes all the way.

The files of tests/fixtures/plugins lie there as they would lie in the package. They are copied into a copy of it, in
which nothing is edited, and fresh processes run that copy.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "tests" / "fixtures" / "plugins"
KINDS = {
    "weight type": "kernels/weights/toy6.py",
    "activation type": "kernels/activations/toy_token.py",
    "kernel": "kernels/external/toy_kernel.py",
    "method": "pipeline/methods/toy_smooth.py",
    "format": "pipeline/formats/toy.py",
    "executor": "pipeline/runs/executors/toy_backwards.py",
}
WHOLE, MIXTURE = "runs/toys/whole/artifact", "runs/toys/mixture/artifact"
ARTIFACTS = {  # folder -> the schemes of its layers, its format
    WHOLE: ({"toy6": 14}, "toy"),
    MIXTURE: ({"int4-g32": 10, "toy6": 2, "toy6-dynamic": 2}, "compressed-tensors"),
    "plain": ({"toy6": 14}, "compressed-tensors"),
    "dynamic": ({"toy6-dynamic": 14}, "compressed-tensors"),
    "smooth": ({"int8-g32": 14}, "gptq"),
    "whole-plain": ({"toy6": 14}, "compressed-tensors"),
    "mixture-toy": ({"int4-g32": 10, "toy6": 2, "toy6-dynamic": 2}, "toy"),
    "smooth-toy": ({"int8-g32": 14}, "toy"),
}
CONVERTED = {"whole-plain": WHOLE, "mixture-toy": MIXTURE, "smooth-toy": "smooth"}
REFUSED = {
    "toy6 as gptq": "gptq holds weight-only integers, not toy6",
    "toy6-dynamic by gptq": "gptq produces weight-only integer schemes, not toy6-dynamic",
    "nf4-dq as toy": "toy holds codes and scales alone, not nf4-dq",
    "nf4 by toy-smooth": "integer schemes, not nf4",
    "whole to gptq": "(toy6 as toy) cannot become gptq",
}

# Several commands in one process, which takes seconds to start: {name: arguments} -> {name: [exit code, out, err]}.
COMMANDS = """
import contextlib, io, json, sys
from bitpress.pipeline.cli.app import main

results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv, code = ["bitpress", *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    results[name] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(results))
"""

# What the artifacts are to a process that has nothing but their files.
RELOAD = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
import bitpress.pipeline.hf
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import load
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.models.loading import kernels_used

whole, changed, *folders = sys.argv[1:]
models = {folder: load(folder, device="cpu", dtype="float32")[0] for folder in folders}
models["by the reference"] = load(whole, device="cpu", dtype="float32", kernel="reference")[0]
models["by transformers"] = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
schemes = {name: QTensor.without_content(Scheme.parse(name), (64, 64)) for name in ("toy6", "toy6-dynamic", "nf4")}
with torch.inference_mode():
    ids = torch.arange(32).unsqueeze(0)
    logits = {name: model(ids).logits[0, -1].tolist() for name, model in models.items()}
print(json.dumps({
    "logits": logits,
    "kernels": {name: kernels_used(model)["selected"] for name, model in models.items()},
    "unsupported": {
        name: {kernel.name: kernel.unsupported(weight, torch.bfloat16, torch.device("cpu")) for kernel in registry()}
        for name, weight in schemes.items()
    },
    "faults": diagnose(Path(changed)).faults,
    "modules": [file for name, module in sys.modules.items()
                if name.startswith("bitpress.") and (file := getattr(module, "__file__", None))],
}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, to which one file of each kind was added."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pipeline", "kernels", "eval", "configs"):
        shutil.copytree(ROOT / name, folder / "bitpress" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in KINDS.values():
        assert not (folder / "bitpress" / file).exists()
        shutil.copy(PLUGINS / file, folder / "bitpress" / file)
    return folder


@pytest.fixture(scope="module")
def python(source: Path) -> Callable[..., Any]:
    """python(folder, program, argument): what a program prints, as JSON, in a fresh process that has the copy."""
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def run(folder: Path, program: str, *arguments: str) -> Any:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def config(model: Path) -> dict[str, Any]:
    """The plug-ins in one config: one scheme for all layers, and schemes new and old beside each other."""
    return {
        "name": "toys",
        "models": [{"id": str(model)}],
        "recipes": [
            {"name": "whole", "method": "toy-smooth", "scheme": "toy6", "format": "toy"},
            {"name": "mixture", "scheme": "int4-g32", "layers": {"*.down_proj": "toy6", "*.o_proj": "toy6-dynamic"}},
        ],
        "defaults": {"calibration": {"text": "calibration.txt", "windows": 2, "context": 32}},
        "eval": {"text": "evaluation.txt", "context": 64, "windows": 2, "speed": None},
        "executor": "toy-backwards",
        "device": "cpu",
        "output": "runs",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Where the commands run."""
    folder = tmp_path_factory.mktemp("toys")
    for name in ("calibration", "evaluation"):
        (folder / f"{name}.txt").write_text(f"It was the best of times for a text of {name}. " * 20)
    (folder / "toys.yaml").write_text(json.dumps(config(tiny_llama)))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, python: Callable[..., Any], tiny_llama: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and news of every command."""

    def quantize(recipe: str, out: str, *more: str) -> list[str]:
        return ["quantize", str(tiny_llama), "--recipe", recipe, "-o", out, *more]

    calibration = ("--calibration", "calibration.txt", "--windows", "2", "--context", "32")
    commands = {
        "run": ["run", "toys.yaml"],
        "plain": quantize("gptq/toy6", "plain", *calibration),
        "dynamic": quantize("toy6-dynamic", "dynamic"),
        "smooth": quantize("toy-smooth/int8-g32", "smooth", *calibration),
        "list": ["list", "--json"],
        "toy6 as gptq": quantize("toy6", "refused", "--format", "gptq"),
        "toy6-dynamic by gptq": quantize("gptq/toy6-dynamic", "refused"),
        "nf4-dq as toy": quantize("nf4-dq", "refused", "--format", "toy"),
        "nf4 by toy-smooth": quantize("toy-smooth/nf4", "refused"),
        "whole to gptq": ["convert", WHOLE, "--to", "gptq", "-o", "refused"],
    }
    for out, artifact in CONVERTED.items():
        commands[out] = ["convert", artifact, "--to", ARTIFACTS[out][1], "-o", out]
    for artifact in ARTIFACTS:
        commands[f"doctor {artifact}"] = ["doctor", artifact, "--json"]
        commands[f"inspect {artifact}"] = ["inspect", artifact, "--json"]
    return python(folder, COMMANDS, json.dumps(commands))


@pytest.fixture(scope="module")
def reloaded(results: dict[str, Any], folder: Path, python: Callable[..., Any]) -> dict[str, Any]:
    """What a fresh process says of all artifacts, and the doctor of one whose side file was changed."""
    sums = json.loads((shutil.copytree(folder / WHOLE, folder / "changed") / "toy.json").read_text())
    sums["model.layers.1.mlp.up_proj"] += 1
    (folder / "changed" / "toy.json").write_text(json.dumps(sums))
    return python(folder, RELOAD, WHOLE, "changed", *ARTIFACTS)


@pytest.fixture
def metrics(results: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Recipe -> its metrics.json."""
    return {name: json.loads((folder / f"runs/toys/{name}/metrics.json").read_text()) for name in ("whole", "mixture")}


def test_every_command_ends_as_it_should(results: dict[str, tuple[int, str, str]]) -> None:
    for name, (code, _, news) in results.items():
        assert code == (2 if name in REFUSED else 0), (name, news)
        assert REFUSED.get(name, "") in news


def test_what_ran_is_the_copy(reloaded: dict[str, Any], source: Path) -> None:
    modules = {Path(file) for file in reloaded["modules"]}
    assert all(file.is_relative_to(source) for file in modules)
    assert {
        source / "bitpress" / KINDS[kind] for kind in ("weight type", "activation type", "kernel", "format")
    } <= modules


def test_the_executor_has_its_order(results: dict[str, tuple[int, str, str]], tiny_llama: Path) -> None:
    news = [line for line in results["run"][2].splitlines() if line.startswith(str(tiny_llama))]
    assert [line.rpartition(" ")[2] for line in news] == ["mixture", "whole", "none"]


def test_metrics_say_what_was_used(metrics: dict[str, dict[str, Any]]) -> None:
    whole, mixture = metrics["whole"], metrics["mixture"]
    assert (whole["scheme"], whole["method"], whole["format"]) == ("toy6", "toy-smooth", "toy")
    assert (mixture["scheme"], mixture["method"], mixture["format"]) == ("mixed", "absmax", "compressed-tensors")
    assert whole["kernels"]["selected"] == {"toy-kernel": 14}
    assert mixture["kernels"]["selected"].items() >= {"toy-kernel": 2, "reference": 2}.items()
    assert whole["size"]["bits_per_weight"]["quantized"] < 8.5  # elements of 8 bits, a scale for each row, a shape
    for each in (whole, mixture):
        assert each["reload"]["max_difference"] <= each["reload"]["tolerance"]
        assert 0 < each["quality"]["kl_mean"] < 0.01


def test_the_report_names_them(results: dict[str, Any], folder: Path) -> None:
    page = (folder / "runs/toys/report.html").read_text()
    for name in ("whole", "mixture", "toy-smooth/toy6", "absmax/toy6-dynamic", "<td>toy</td>", "toy-kernel × 14"):
        assert name in page


def test_the_transform_scaled_the_norms_by_powers_of_two(
    folder: Path, results: dict[str, Any], tiny_llama: Path
) -> None:
    before = load_file(tiny_llama / "model.safetensors")
    after = {
        name: tensor for file in (folder / WHOLE).glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    norms = [name for name in before if "layernorm" in name]
    ratios = torch.cat([after[name].float() / before[name].float() for name in norms])
    assert len(norms) == 4
    assert torch.equal(ratios.log2(), ratios.log2().round())
    assert len(ratios.unique()) > 1


def test_the_format_has_its_own_files(results: dict[str, Any], folder: Path) -> None:
    artifact = folder / WHOLE
    section = json.loads((artifact / "config.json").read_text())["quantization_config"]
    assert section["kept"] == ["lm_head"]
    assert set(section["schemes"]) == set(json.loads((artifact / "toy.json").read_text()))
    assert "toy.json" in json.loads((artifact / "bitpress.json").read_text())["files"]


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_doctor_and_inspect_know_it(artifact: str, results: dict[str, tuple[int, str, str]]) -> None:
    diagnosis, description = (json.loads(results[f"{command} {artifact}"][1]) for command in ("doctor", "inspect"))
    schemes, format = ARTIFACTS[artifact]
    assert diagnosis["sound"], diagnosis["faults"]
    assert description["format"] == format
    assert description["quantized"] == (next(iter(schemes)) if len(schemes) == 1 else "mixed")
    counts = [f"{scheme}: {count}" for scheme, count in schemes.items()] if len(schemes) > 1 else None
    assert description.get("layers by scheme") == counts
    loads = {runtime for runtime, verdict in diagnosis["runtimes"].items() if verdict["loads"] == "yes"}
    assert ("toyland" in loads) == (format == "toy")


def test_the_doctor_asks_the_format(reloaded: dict[str, Any]) -> None:
    assert "model.layers.1.mlp.up_proj: the sum of its codes is not that of toy.json" in reloaded["faults"]


def test_list_shows_them(results: dict[str, tuple[int, str, str]]) -> None:
    everything = json.loads(results["list"][1])
    assert "toy6, int8-dynamic, toy6-dynamic" in everything["methods"]["toy-smooth"]
    assert everything["formats"]["toy"].endswith("toy6, int8-dynamic, toy6-dynamic")
    assert "toy6, int8-dynamic, toy6-dynamic" in everything["formats"]["compressed-tensors"]
    assert "toy6" not in everything["formats"]["gptq"]
    (kernels,) = (everything[kind] for kind in everything if kind.startswith("kernels"))
    assert kernels["toy-kernel"] == "toy6 (bfloat16)"


def test_reloaded_models_run_on_the_right_kernels(reloaded: dict[str, Any]) -> None:
    kernels, logits = reloaded["kernels"], reloaded["logits"]
    assert kernels[WHOLE] == kernels["plain"] == kernels["by transformers"] == {"toy-kernel": 14}
    assert kernels["dynamic"] == {"reference": 14}
    assert logits["by transformers"] == logits[WHOLE]
    assert logits["by the reference"] == pytest.approx(logits[WHOLE], abs=1e-4)  # sums in another order


@pytest.mark.parametrize("out", CONVERTED)
def test_conversion_changes_no_bit(
    out: str, results: dict[str, tuple[int, str, str]], reloaded: dict[str, Any]
) -> None:
    assert "the same to the bit" in results[out][2]
    assert reloaded["logits"][out] == reloaded["logits"][CONVERTED[out]]


def test_a_kernel_serves_what_it_lists(reloaded: dict[str, Any]) -> None:
    serving = {
        name: [kernel for kernel, reason in reasons.items() if reason is None]
        for name, reasons in reloaded["unsupported"].items()
    }
    assert serving["toy6"] == ["toy-kernel", "reference"]
    assert serving["toy6-dynamic"] == ["reference"]
    assert reloaded["unsupported"]["nf4"]["toy-kernel"] == "serves toy6 only"
