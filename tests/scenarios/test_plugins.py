"""Adding a plug-in is adding one file: one of each kind, dropped into its folder, goes all the way.

The files of tests/fixtures/plugins lie there as they would lie in the package. They are copied into a copy of it, in
which nothing is edited, and a fresh process runs that copy.
"""

import json
import math
import os
import shutil
import subprocess
import sys
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
    "cache type": "kernels/caches/toy_cache.py",
    "kernel": "kernels/external/toy_kernel.py",
    "method": "pipeline/methods/toy_smooth.py",
    "transform": "pipeline/transforms/toy_double.py",
    "format": "pipeline/formats/toy.py",
    "executor": "pipeline/runs/executors/toy_backwards.py",
}

MIXTURE = "runs/toys/mixture/artifact"
MIXED = {"int4-g32": 10, "toy6": 2, "toy6-dynamic": 2}
ARTIFACTS: dict[str, tuple[dict[str, int], str]] = {  # folder -> the schemes of its layers, and its format
    MIXTURE: (MIXED, "toy"),
    "whole": ({"toy6": 14}, "toy"),
    "calibrated": ({"toy6": 14}, "compressed-tensors"),
    "dynamic": ({"toy6-dynamic": 14}, "compressed-tensors"),
    "smooth": ({"int8-g32": 14}, "gptq"),
    "mixture-plain": (MIXED, "compressed-tensors"),
    "whole-plain": ({"toy6": 14}, "compressed-tensors"),
    "smooth-toy": ({"int8-g32": 14}, "toy"),
}
CONVERTED = {"mixture-plain": MIXTURE, "whole-plain": "whole", "smooth-toy": "smooth"}
REFUSED = {
    "toy6 as gptq": "gptq holds weight-only integers, not toy6",
    "nf4 by gptq": "gptq produces weights that have a scale per channel or group, not nf4",
    "nf4-dq as toy": "toy holds codes and scales alone, not nf4-dq",
    "nf4 by toy-smooth": "rounds to nearest, which nf4 does not define",
    "whole to gptq": "(toy6 as toy) cannot become gptq",
    "toy-cache as gptq": "gptq has no place for a quantized key-value cache (toy-cache)",
}

# One process does everything, because it takes seconds to start one: the commands of the command line, what a run's
# processes would do, and then whatever a caller sees of the artifacts.
PROGRAM = """
import contextlib, io, json, shutil, sys
from pathlib import Path
from bitpress.pipeline.cli.app import main
from bitpress.pipeline.evaluate import worker
from bitpress.pipeline.evaluate.__main__ import perform

worker.call = lambda task, request: json.loads(json.dumps(perform({"task": task, **request})))
commands, artifacts = map(json.loads, sys.argv[1:])
results = {}
for name, arguments in commands.items():
    sys.argv, code = ["bitpress", *arguments], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    results[name] = [code, out.getvalue(), err.getvalue()]

import torch
from transformers import AutoModelForCausalLM
import bitpress.pipeline.hf
from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.registry import registry
from bitpress.kernels.scheme import Scheme
from bitpress.pipeline.api import load
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.models.loading import kernels_used

models = {folder: load(folder, device="cpu", dtype="float32")[0] for folder in artifacts}
models["by the reference"] = load("whole", device="cpu", dtype="float32", kernel="reference")[0]
models["by transformers"] = AutoModelForCausalLM.from_pretrained("whole", dtype=torch.float32)
ids = torch.arange(32).unsqueeze(0)
with torch.inference_mode():
    logits = {name: model(ids).logits[0, -1].tolist() for name, model in models.items()}
weights = {name: QTensor.without_content(Scheme.parse(name), (64, 64)) for name in ("toy6", "toy6-dynamic", "nf4")}
shutil.copytree("whole", "changed")
Path("changed", "toy.json").write_text("{}")
print(json.dumps({
    "results": results,
    "logits": logits,
    "kernels": {name: kernels_used(model)["selected"] for name, model in models.items()},
    "unsupported": {
        name: {kernel.name: kernel.unsupported(weight, torch.bfloat16, torch.device("cpu")) for kernel in registry()}
        for name, weight in weights.items()
    },
    "faults": diagnose(Path("changed")).faults,
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


def config(model: Path) -> dict[str, Any]:
    """All but the cache in one model, schemes new and old beside each other."""
    recipe = {"name": "mixture", "method": "toy-smooth", "scheme": "int4-g32", "format": "toy"}
    return {
        "name": "toys",
        "models": [{"id": str(model)}],
        "recipes": [{**recipe, "layers": {"*.down_proj": "toy6", "*.o_proj": "toy6-dynamic"}}],
        "defaults": {"calibration": {"text": "calibration.txt", "windows": 2, "context": 32}},
        "eval": {"text": "evaluation.txt", "context": 64, "windows": 2, "speed": None},
        "executor": "toy-backwards",
        "device": "cpu",
        "output": "runs",
    }


def commands(model: Path) -> dict[str, list[str]]:
    """These in a run; some by themselves; conversions, diagnoses, and what is refused."""

    def quantize(recipe: str, out: str, *more: str) -> list[str]:
        return ["quantize", str(model), "--recipe", recipe, "-o", out, *more]

    calibration = ("--calibration", "calibration.txt", "--windows", "2", "--context", "32")
    chosen = {
        "run": ["run", "toys.yaml"],
        "whole": quantize("toy6", "whole", "--format", "toy"),
        "calibrated": quantize("gptq/toy6", "calibrated", "--kv-cache", "toy-cache", *calibration),
        "toy-cache as gptq": quantize("int4-g32", "refused", "--kv-cache", "toy-cache", "--format", "gptq"),
        "dynamic": quantize("toy6-dynamic", "dynamic"),
        "smooth": quantize("toy-smooth/int8-g32", "smooth", *calibration),
        "doubled": quantize("toy-double+int4-channel", "doubled", *calibration),
        "list": ["list", "--json"],
        "toy6 as gptq": quantize("toy6", "refused", "--format", "gptq"),
        "nf4 by gptq": quantize("gptq/nf4", "refused"),
        "nf4-dq as toy": quantize("nf4-dq", "refused", "--format", "toy"),
        "nf4 by toy-smooth": quantize("toy-smooth/nf4", "refused"),
        "whole to gptq": ["convert", "whole", "--to", "gptq", "-o", "refused"],
    }
    chosen |= {out: ["convert", folder, "--to", ARTIFACTS[out][1], "-o", out] for out, folder in CONVERTED.items()}
    return chosen | {
        f"{name} {folder}": [name, folder, "--json"] for name in ("doctor", "inspect") for folder in ARTIFACTS
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
def answer(folder: Path, source: Path, tiny_llama: Path) -> dict[str, Any]:
    """What the program prints: "results" has the exit code, output and news of each command."""
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands(tiny_llama)), json.dumps(list(ARTIFACTS))]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def metrics(answer: dict[str, Any], folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/toys/mixture/metrics.json").read_text())


def test_every_command_ends_as_it_should(answer: dict[str, Any]) -> None:
    for name, (code, _, news) in answer["results"].items():
        assert code == (2 if name in REFUSED else 0), (name, news)
        assert REFUSED.get(name, "") in news


def test_what_ran_is_the_copy(answer: dict[str, Any], source: Path) -> None:
    modules = {Path(file).relative_to(source / "bitpress") for file in answer["modules"]}
    assert {Path(file) for file in KINDS.values()} <= modules


def test_the_executor_has_its_order(answer: dict[str, Any], tiny_llama: Path) -> None:
    news = [line for line in answer["results"]["run"][2].splitlines() if line.startswith(str(tiny_llama))]
    assert [line.rpartition(" ")[2] for line in news] == ["mixture", "none"]


def test_metrics_say_what_was_used(metrics: dict[str, Any]) -> None:
    assert (metrics["scheme"], metrics["method"], metrics["format"]) == ("mixed", "toy-smooth", "toy")
    assert metrics["kernels"]["selected"].items() >= {"toy-kernel": 2, "reference": 2}.items()
    assert metrics["reload"]["max_difference"] <= metrics["reload"]["tolerance"]
    assert 0 < metrics["quality"]["kl_mean"] < 0.01
    layers = metrics["coverage"]["layers"]
    assert {scheme: sum(layer["scheme"] == scheme for layer in layers) for scheme in MIXED} == MIXED


def test_the_report_names_them(answer: dict[str, Any], folder: Path) -> None:
    page = (folder / "runs/toys/report.html").read_text()
    for name in ("mixture", "toy-smooth/toy6", "toy-smooth/toy6-dynamic", "<td>toy</td>", "toy-kernel × 2"):
        assert name in page


def test_the_transform_scaled_the_norms_by_powers_of_two(
    answer: dict[str, Any], folder: Path, tiny_llama: Path
) -> None:
    before, after = load_file(tiny_llama / "model.safetensors"), {}
    for file in (folder / MIXTURE).glob("*.safetensors"):
        after |= load_file(file)
    norms = [name for name in before if "layernorm" in name]
    ratios = torch.cat([after[name].float() / before[name].float() for name in norms])
    assert len(norms) == 4
    assert torch.equal(ratios.log2(), ratios.log2().round())
    assert len(ratios.unique()) > 1


def test_the_other_transform_halves_the_norms_and_the_manifest_says_so(
    answer: dict[str, Any], folder: Path, tiny_llama: Path
) -> None:
    assert "toy-double" in json.loads(answer["results"]["list"][1])["transforms"]
    manifest = json.loads((folder / "doubled" / "bitpress.json").read_text())
    assert {group["note"] for group in manifest["transform"]} == {"doubled"}
    before, after = load_file(tiny_llama / "model.safetensors"), {}
    for file in (folder / "doubled").glob("*.safetensors"):
        after |= load_file(file)
    norms = [name for name in before if "layernorm" in name]
    assert len(norms) == 4
    assert all(torch.equal(after[name], before[name] / 2) for name in norms)


def test_the_format_has_its_own_files(answer: dict[str, Any], folder: Path) -> None:
    config, sums, manifest = (
        json.loads((folder / MIXTURE / name).read_text()) for name in ("config.json", "toy.json", "bitpress.json")
    )
    assert config["quantization_config"]["kept"] == ["lm_head"]
    assert config["quantization_config"]["schemes"].keys() == sums.keys()
    assert "toy.json" in manifest["files"]


def test_the_cache_has_its_scales_and_everyone_says_so(answer: dict[str, Any], folder: Path) -> None:
    scales: dict[str, float] = {}
    for file in (folder / "calibrated").glob("*.safetensors"):
        tensors = load_file(file)
        scales |= {name: tensor.item() for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    assert scales.keys() == {f"model.layers.{n}.self_attn.{which}_scale" for n in range(2) for which in "kv"}
    assert all(math.frexp(scale)[0] == 0.5 for scale in scales.values())
    diagnosis, description = (json.loads(answer["results"][f"{name} calibrated"][1]) for name in ("doctor", "inspect"))
    assert description["key-value cache"] == "toy-cache"
    assert diagnosis["runtimes"]["vLLM"]["loads"] == "no"
    assert "toy-cache" in json.loads(answer["results"]["list"][1])["key-value caches"]


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_doctor_and_inspect_know_it(artifact: str, answer: dict[str, Any]) -> None:
    diagnosis, description = (json.loads(answer["results"][f"{name} {artifact}"][1]) for name in ("doctor", "inspect"))
    schemes, format = ARTIFACTS[artifact]
    assert diagnosis["sound"], diagnosis["faults"]
    assert description["format"] == format
    assert description["quantized"] == ("mixed" if len(schemes) > 1 else next(iter(schemes)))
    if len(schemes) > 1:
        assert description["layers by scheme"] == [f"{scheme}: {count}" for scheme, count in schemes.items()]
    loads = {runtime for runtime, verdict in diagnosis["runtimes"].items() if verdict["loads"] == "yes"}
    assert ("toyland" in loads) == (format == "toy")


def test_the_doctor_asks_the_format(answer: dict[str, Any]) -> None:
    assert "model.layers.1.mlp.up_proj: the sum of its codes is not that of toy.json" in answer["faults"]


def test_list_shows_them(answer: dict[str, Any]) -> None:
    everything = json.loads(answer["results"]["list"][1])
    new = {"toy6", "toy6-dynamic"}
    assert new <= set(everything["methods"]["toy-smooth"]["schemes"])
    assert new <= set(everything["formats"]["toy"]["schemes"])
    assert new <= set(everything["formats"]["compressed-tensors"]["schemes"])
    assert not new & set(everything["formats"]["gptq"]["schemes"])
    (kernels,) = (rows for kind, rows in everything.items() if kind.startswith("kernels"))
    assert kernels["toy-kernel"] == {"schemes": ["toy6"], "about": "bfloat16"}


def test_models_run_on_the_right_kernels(answer: dict[str, Any]) -> None:
    kernels, logits = answer["kernels"], answer["logits"]
    assert kernels["whole"] == kernels["calibrated"] == kernels["by transformers"] == {"toy-kernel": 14}
    assert kernels["dynamic"] == kernels["by the reference"] == {"reference": 14}
    assert logits["by transformers"] == logits["whole"]
    assert logits["by the reference"] == pytest.approx(logits["whole"], abs=1e-4)  # sums in another order


@pytest.mark.parametrize("out", CONVERTED)
def test_conversion_changes_no_bit(out: str, answer: dict[str, Any]) -> None:
    assert "the same to the bit" in answer["results"][out][2]
    assert answer["logits"][out] == answer["logits"][CONVERTED[out]]


def test_a_kernel_serves_what_it_lists(answer: dict[str, Any]) -> None:
    reasons = answer["unsupported"]
    serving = {name: [kernel for kernel, reason in reasons[name].items() if reason is None] for name in reasons}
    assert serving["toy6"] == ["toy-kernel", "reference"]
    assert serving["toy6-dynamic"] == ["reference"]
    assert reasons["nf4"]["toy-kernel"] == "serves toy6 only"
