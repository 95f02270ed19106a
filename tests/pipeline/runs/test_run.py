"""A run that is repeated: what is reused, what is measured again, and what its report then holds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.config.schema import Run
from bitpress.pipeline.errors import ConfigError
from bitpress.pipeline.evaluate import conditions, measure, process, worker
from bitpress.pipeline.quantize import recipe
from bitpress.pipeline.runs import executors
from bitpress.pipeline.runs.job import Job, Outcome, run_job
from bitpress.pipeline.runs.run import execute, plan_jobs, run_folder, summarize
from bitpress.pipeline.system import versions
from bitpress.pipeline.trackers.base import TrackedJob, Tracker

TEXT = "".join(f"{number} green bottles hanging on the wall\n" for number in range(20))
RECIPES = ["int4-g32", "int8-channel"]
Change = Callable[[pytest.MonkeyPatch], None]
pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def make_run(text: Path, tiny_llama: Path) -> Callable[..., Run]:
    """make_run(output, recipes=…, models=…, key=value of eval): a config."""

    def make(output: Path | str, recipes: Any = RECIPES, models: Any = None, **settings: Any) -> Run:
        chosen = {"text": str(text), "context": 32, "windows": 4, "dtype": "float32", "speed": None, **settings}
        config = {"name": "again", "models": models or [{"id": str(tiny_llama)}], "recipes": recipes, "device": "cpu"}
        return Run.model_validate({**config, "eval": {**chosen, "output_errors": 0}, "output": str(output)})

    return make


@pytest.fixture(scope="module")
def finished(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    run = make_run(output)
    outcomes = execute(run, "", lambda line: None)
    assert [outcome.error for outcome in outcomes] == [None, None, None]
    summarize(run, outcomes)
    return output


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "runs")


def metrics_of(output: Path, recipe: str) -> dict[str, Any]:
    return json.loads((output / "again" / recipe / "metrics.json").read_text())


def artifacts(output: Path) -> dict[str, tuple[int, bytes]]:
    paths = sorted(path for path in output.rglob("artifact/*"))
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def another_cpu(patch: pytest.MonkeyPatch) -> None:
    original = conditions.machine
    patch.setattr(conditions, "machine", lambda device: {**original(device), "cpu": "Zilog Z80"})


def another_number_of_threads(patch: pytest.MonkeyPatch) -> None:
    original = conditions.machine
    patch.setattr(conditions, "machine", lambda device: {**original(device), "threads": 64})


def another_patch_version(patch: pytest.MonkeyPatch) -> None:
    now = versions.versions()
    later = {**now, "bitpress": ".".join([*now["bitpress"].split(".")[:2], "99"])}
    for module in (versions, conditions):
        patch.setattr(module, "versions", lambda: later)


@pytest.mark.parametrize("change", [another_cpu, another_number_of_threads, another_patch_version])
def test_another_machine_keeps_artifact_and_quality_and_measures_speed(
    output: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    before, made = {name: metrics_of(output, name) for name in ("none", *RECIPES)}, artifacts(output)
    calls: list[bool] = []
    original = process.measure
    monkeypatch.setattr(
        process,
        "measure",
        lambda *arguments, **options: calls.append(options.get("speed_only", False)) or original(*arguments, **options),
    )
    change(monkeypatch)
    news: list[str] = []
    outcomes = execute(make_run(output), "", news.append)
    assert [outcome.error for outcome in outcomes] == [None, None, None]
    assert calls == [True, True, True], "speed alone"
    assert sum("quality was measured before" in line for line in news) == 3
    assert artifacts(output) == made
    for name, metrics in before.items():
        now = metrics_of(output, name)
        changed = {key for key, value in now["fingerprint"].items() if metrics["fingerprint"][key] != value}
        assert len(changed) == 1
        assert changed.pop().startswith("speed.")
        for key in ("quality", "protocol", "sample", "reload", "size", "model", "recipe"):
            assert now[key] == metrics[key], key
        assert now["kernels"].keys() == metrics["kernels"].keys()
    calls.clear()
    execute(make_run(output), "", news.append)
    assert not calls


def test_other_speeds_are_measured_alone(output: Path, make_run: Callable[..., Run]) -> None:
    before = metrics_of(output, "int4-g32")
    speed = {"prompt": 4, "generate": 2, "batch": [1], "repeats": 1}
    execute(make_run(output, speed=speed), "", lambda line: None)
    now = metrics_of(output, "int4-g32")
    assert (before["speed"], len(now["speed"])) == ([], 1)
    assert now["quality"] == before["quality"]
    assert now["config"]["eval"]["speed"]["generate"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"windows": 5}, "eval.windows: was '4', is '5'"),
        ({"protocol": "sliding", "stride": 16}, "eval.protocol: was '\"gptq\"', is '\"sliding\"'"),
    ],
)
def test_a_longer_or_another_evaluation_measures_again_and_keeps_the_artifact(
    output: Path, make_run: Callable[..., Run], settings: dict[str, Any], said: str
) -> None:
    made, news = artifacts(output), list[str]()
    outcomes = execute(make_run(output, **settings), "", news.append)
    assert [outcome.error for outcome in outcomes] == [None, None, None]
    assert artifacts(output) == made
    assert sum(said in line for line in news) == 3
    whole = execute(make_run(output.parent / "fresh", **settings), "", lambda line: None)
    for name, fresh in zip(("none", *RECIPES), whole, strict=True):
        assert fresh.metrics is not None
        assert metrics_of(output, name)["quality"] == fresh.metrics["quality"]
        assert not list((output / "again" / name).glob("*.partial"))


def test_windows_of_another_protocol_are_not_taken_up(
    output: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation is interrupted when its windows are scored; then another one is asked for."""
    shutil.rmtree(output / "again" / "int4-g32")
    calls: list[int] = []

    def sample(*arguments: Any) -> str:
        """The baseline's sample, the second one, comes after all windows."""
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(measure, "sample", sample)
        with pytest.raises(KeyboardInterrupt):
            execute(make_run(output), "", lambda line: None)
    assert (output / "again" / "int4-g32" / process.UNFINISHED).exists()
    outcomes = execute(make_run(output, ["int4-g32"], windows=3), "", lambda line: None)
    whole = execute(make_run(output.parent / "fresh", ["int4-g32"], windows=3), "", lambda line: None)
    assert [o.metrics["quality"] for o in outcomes if o.metrics] == [o.metrics["quality"] for o in whole if o.metrics]
    assert not (output / "again" / "int4-g32" / process.UNFINISHED).exists()


def test_redo_measures_again_and_keeps_the_artifact(
    output: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = artifacts(output), list[str]()
    original = worker.call
    monkeypatch.setattr(worker, "call", lambda task, *rest: calls.append(task) or original(task, *rest))
    execute(make_run(output), "", lambda line: None)
    assert calls == []
    execute(make_run(output), "", lambda line: None, redo="evaluate")
    assert calls == ["measure", "verify", "measure", "verify", "measure"]
    assert artifacts(output) == made


def test_figures_are_sent_to_a_tracker_once(
    output: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[TrackedJob] = []

    class Toy(Tracker):
        name, rank, package = "toy", 0, "json"

        def send(self, job: TrackedJob) -> str:
            sent.append(job)
            return "here"

    monkeypatch.setattr("bitpress.pipeline.trackers.discover", lambda package: (Toy(),))
    run = make_run(output).model_copy(update={"track": ["toy"]})
    said: list[str] = []
    execute(run, "", said.append)
    again = len(sent)
    execute(run, "", lambda line: None)
    assert len(sent) == again == 3
    assert sent[0].run == run.name
    assert sent[1].figures["kl_mean"] > 0
    assert all(file.is_file() for job in sent for file in job.files)
    assert any(line.endswith("sent to toy: here") for line in said)


def test_a_report_is_not_replaced_by_one_with_fewer_jobs(output: Path, make_run: Callable[..., Run]) -> None:
    page = output / "again" / "report.md"
    run = make_run(output, ["int8-channel"])
    assert summarize(run, execute(run, "", lambda line: None)) == page.with_suffix(".html")
    assert all(name in page.read_text() for name in RECIPES)

    run = make_run(output, models=[{"id": str(output / "gone")}])
    outcomes = execute(run, "", lambda line: None)
    assert all(isinstance(outcome.error, ConfigError) for outcome in outcomes)
    assert summarize(run, outcomes) == page.with_suffix(".html")
    assert all(name in page.read_text() for name in RECIPES)


class Panic(BaseException):
    """Of a library in Rust, which is no Exception."""


@pytest.mark.parametrize("where", ["load_tokenizer", "skeleton", "calibrate"])
def test_whatever_one_model_raises_stops_no_other(
    tmp_path: Path, output: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The first model's files make a library panic; the second one is refused by a sentence of our own."""

    def panic(*arguments: Any) -> None:
        raise Panic("internal error: entered unreachable code")

    monkeypatch.setattr(f"bitpress.pipeline.runs.run.{where}", panic)
    models = [{"id": make_run(output).models[0].id}, {"id": str(tmp_path / "gone")}]
    run = make_run(tmp_path, ["gptq/int4-g32"], models=models)
    outcomes = execute(run, "", lambda line: None)
    assert [outcome.model for outcome in outcomes] == [models[0]["id"]] * 2 + [models[1]["id"]] * 2
    log = run_folder(run) / "errors.log"
    for outcome in outcomes[:2]:
        said = f"Panic: internal error: entered unreachable code; its traceback is in {log}; please report it"
        assert str(outcome.error).endswith(said)
    assert all(isinstance(outcome.error, ConfigError) for outcome in outcomes[2:])
    assert "in panic" in log.read_text()


def test_refused_jobs_are_listed_with_the_reason(
    output: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Any] = []
    monkeypatch.setattr(
        "bitpress.pipeline.runs.run.write_report", lambda folder, runs, refused: listed.append((runs, refused))
    )
    run = make_run(output, [*RECIPES, "int4-g96"])
    summarize(run, execute(run, "", lambda line: None))
    ((runs, refused),) = listed
    assert len(runs) == 3
    ((model, name, sentence),) = refused
    assert (model, name) == (run.models[0].id, "int4-g96")
    assert "not divisible by group_size 96" in sentence


def test_output_in_the_home_folder(tmp_path: Path, make_run: Callable[..., Run], monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = make_run("~/runs", ["int8-channel"])
    page = summarize(run, execute(run, "", lambda line: None))
    assert page == tmp_path / "runs" / "again" / "report.html"
    assert page.exists()


def test_a_model_is_told_by_what_it_is(
    tmp_path: Path, make_run: Callable[..., Run], save_model: Callable[..., Path], llama_config: Callable[..., Any]
) -> None:
    """Two folders have the same name, and hold different models; a third holds a copy of one."""
    folders = [tmp_path / name / "checkpoint-1000" for name in ("a", "b", "c")]
    save_model(llama_config(), folders[0])
    save_model(llama_config(intermediate_size=256), folders[1])
    shutil.copytree(folders[0], folders[2])
    run = make_run(tmp_path / "runs", ["int8-channel"], [{"id": str(folder)} for folder in folders])
    outcomes = execute(run, "", lambda line: None)
    models = [outcome.metrics["model"] for outcome in outcomes if outcome.metrics and outcome.recipe == "none"]
    assert [model["id"] for model in models] == ["checkpoint-1000"] * 3
    assert [model["name"] for model in models] == ["a/checkpoint-1000", "b/checkpoint-1000", "c/checkpoint-1000"]
    first, second, copy = (model["identity"] for model in models)
    assert first == copy != second


class Backwards(executors.Executor):
    """Plans everything, then runs the last job first."""

    name, rank = "backwards", 9

    def map(self, jobs: Any, say: Any) -> Any:
        return map(run_job, reversed(list(jobs)), [say] * 99)


def test_an_executor_is_found_by_its_name_and_may_end_jobs_in_any_order(
    tmp_path: Path, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "discover", lambda package: (executors.serial.Serial(), Backwards()))
    run = make_run(tmp_path, ["int8-channel"]).model_copy(update={"executor": "backwards"})
    news: list[str] = []
    outcomes = execute(run, "", news.append)
    assert [outcome.recipe for outcome in outcomes] == ["none", "int8-channel"]
    assert all(outcome.metrics for outcome in outcomes)
    assert [line.split("  ")[1] for line in news if line.startswith(str(run.models[0].id))] == ["int8-channel", "none"]
    with pytest.raises(ConfigError, match="executor 'serail' is unknown; did you mean serial"):
        execute(run.model_copy(update={"executor": "serail"}), "", news.append)


def test_a_job_is_plain_values(tmp_path: Path, make_run: Callable[..., Run]) -> None:
    """It goes to another process and back by what every process can send."""
    from multiprocessing.reduction import ForkingPickler

    jobs = plan_jobs(run := make_run(tmp_path), run.models[0])
    assert [job.name for job in jobs] == ["none", *RECIPES]
    for job in jobs:
        assert isinstance(job, Job)
        assert len(ForkingPickler.dumps(job)) < 100_000
    assert isinstance(run_job(jobs[-1], lambda line: None), Outcome)
    assert os.listdir(tmp_path / "again") == ["int8-channel"]


def test_the_fingerprint_of_an_artifact_leaves_out_what_its_bytes_do_not_depend_on(
    output: Path, monkeypatch: pytest.MonkeyPatch, make_run: Callable[..., Run]
) -> None:
    fields = json.loads((output / "again" / "int4-g32" / "artifact" / "bitpress.json").read_text())
    left_out = ("threads", "machine", "versions.safetensors")
    assert not [name for name in fields["fingerprint"] if name.startswith(left_out)]
    assert fields["versions"] == versions.versions()
    monkeypatch.setattr(recipe, "releases", lambda: {**versions.releases(), "bitpress": "99.0"})
    outcomes = execute(make_run(output), "", lambda line: None)
    assert "versions.bitpress: was" in str(outcomes[1].error)
