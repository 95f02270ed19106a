"""What a plan says against what the jobs then do, and what is refused before the first of them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpress.kernels.qtensor import QTensor
from bitpress.kernels.scheme import Scheme, examples
from bitpress.pipeline.api import quantize
from bitpress.pipeline.checkpoints.doctor import diagnose
from bitpress.pipeline.config.schema import Run
from bitpress.pipeline.errors import ConfigError, DiskError
from bitpress.pipeline.formats import registry as formats
from bitpress.pipeline.quantize.plan import _stored_bytes
from bitpress.pipeline.runs import estimate
from bitpress.pipeline.runs import plan as planning
from bitpress.pipeline.runs.folders import jobs_of
from bitpress.pipeline.runs.job_plan import FINISHED, HALF_DONE, NOT_BEGUN, JobPlan, Work
from bitpress.pipeline.runs.plan import plan_run, simulate
from bitpress.pipeline.runs.rates import STATED
from bitpress.pipeline.runs.run import execute
from bitpress.pipeline.storage.checkpoint import Checkpoint
from bitpress.pipeline.system import packages, remembered

LEARNING = {"text": "builtin:pydoc-topics", "windows": 2, "context": 32}


@pytest.fixture
def make_run(tmp_path: Path, tiny_llama: Path) -> Callable[..., Run]:
    def make(*recipes: Any, models: Any = None, **settings: Any) -> Run:
        config = {"name": "plan", "models": models or [{"id": str(tiny_llama)}], "recipes": list(recipes)}
        config |= {"device": "cpu", "defaults": {"calibration": LEARNING}, "output": str(tmp_path / "runs")}
        return Run.model_validate({**config, "eval": {"windows": 2, "context": 32, **settings}})

    return make


@pytest.mark.parametrize("recipe", ["int4-g32", "int8-dynamic", "nf4-dq", "gptq/int3-g32"])
def test_the_artifact_is_as_planned(
    recipe: str, make_run: Callable[..., Run], tiny_llama: Path, tmp_path: Path
) -> None:
    run = make_run(recipe)
    _, job = plan_run(run, jobs_of(run)).jobs
    method, _, scheme = recipe.rpartition("/")
    settings = {"scheme": scheme} | ({"method": method, "calibration": LEARNING} if method else {})
    quantize(str(tiny_llama), settings, tmp_path / "made", device="cpu")
    stored = Checkpoint(tmp_path / "made")
    planned = {name: nbytes for name, nbytes in job.files.items() if name.endswith(".safetensors")}
    written = {p.name: sum(info.nbytes for info in Checkpoint.single(p).tensors.values()) for p in stored.files}
    assert planned == pytest.approx(written, rel=0.005)  # a number of nf4-dq's is text, whose length differs
    assert job.files.keys() <= {path.name for path in (tmp_path / "made").iterdir()}
    diagnosis = diagnose(tmp_path / "made")
    assert (job.format, job.runtimes) == (diagnosis.what["format"], diagnosis.runtimes)
    assert {name for names in job.kept.values() for name in names} <= stored.tensors.keys()


@pytest.mark.parametrize("name", examples())
def test_bytes_of_many_rows_follow_from_those_of_few(name: str) -> None:
    scheme, shape = Scheme.parse(name), (320, 256)
    for format in formats().values():
        if not format.problems(scheme, shape):
            inputs = scheme.static.layout() if scheme.static else {}
            tensors = {name: torch.ones(size, dtype=kinds[0]) for name, (size, kinds) in inputs.items()}
            tensors |= scheme.weight.random(shape, torch.Generator().manual_seed(1))
            if tensors["scales"].is_floating_point():
                tensors["scales"] = tensors["scales"].to(format.scale_dtype(scheme, torch.bfloat16))
            written = format.write(QTensor.of(scheme, shape, tensors), torch.bfloat16)
            whole = sum(tensor.nbytes for tensor in written.values())
            assert abs(_stored_bytes(format, scheme, shape, torch.bfloat16) - whole) <= 8, format.name


def test_a_quantized_cache_is_counted_in_advance(make_run: Callable[..., Run]) -> None:
    """Two layers of two heads have 128 numbers for each token; the model's are bfloat16."""
    run = make_run({"scheme": "none", "kv_cache": "fp8"}, {"scheme": "int4-g32", "kv_cache": "int4-g16"}, "int4-g32")
    _, alone, both, plain = plan_run(run, jobs_of(run)).jobs
    assert [job.problem for job in (alone, both, plain)] == [None] * 3
    lengths = (4096, 32768, 131072)
    sizes = {"fp8": 128, "unquantized": 256, "int4-g16": 64 + 16}
    expected = {name: {str(tokens): tokens * size for tokens in lengths} for name, size in sizes.items()}
    assert alone.cache == {name: expected[name] for name in ("fp8", "unquantized")}
    assert both.cache == {name: expected[name] for name in ("int4-g16", "unquantized")}
    assert plain.cache == {}
    assert (alone.weights, alone.format, alone.runtimes["vLLM"]["loads"]) == (0, "compressed-tensors", "yes")


def test_a_budget_takes_what_it_says(make_run: Callable[..., Run]) -> None:
    run = make_run({"budget": "4.5 bits", "choices": ["int3-g32", "int4-g32", "int8-channel"]}, {"budget": "200 kB"})
    _, bits, whole = plan_run(run, jobs_of(run)).jobs
    assert (bits.search, whole.search) == (True, True)
    shards = sum(nbytes for name, nbytes in bits.files.items() if name.endswith(".safetensors"))
    kept = sum(info.nbytes for info in Checkpoint(Path(run.models[0].id)).tensors.values()) - 2 * bits.weights
    assert shards == pytest.approx(kept + 4.5 * bits.weights / 8, rel=1e-3)
    assert whole.nbytes == pytest.approx(200_000, rel=0.15)
    plain = make_run("gptq/int4-g32")
    assert bits.work["search"].products > plan_run(plain, jobs_of(plain)).jobs[1].work["quantize"].products


def test_distillation_takes_steps_and_the_whole_model(make_run: Callable[..., Run]) -> None:
    run = make_run("gptq/int4-g32", {"scheme": "int4-g32", "method": "gptq", "distill": 50})
    _, plain, distilled = plan_run(run, jobs_of(run)).jobs
    assert distilled.memory["quantize"] >= plain.memory["quantize"]
    assert distilled.work["quantize"].products > plain.work["quantize"].products


def test_gpus_divide_the_time_of_calibrated_methods(make_run: Callable[..., Run]) -> None:
    """And a run is refused where there are not so many; blocks that do not wait for each other divide evenly."""
    first, parted = "gptq/int4-g32", {"name": "parted", "scheme": "int4-g32", "method": "gptq", "sequential": False}
    one = make_run(first, parted)
    two = one.model_copy(update={"gpus": 2})
    plans = [plan_run(run, jobs_of(run)) for run in (one, two)]
    (plain, _), (halved, even) = ([job.work["quantize"] for job in plan.jobs[1:]] for plan in plans)
    assert halved.products == plain.products / 2
    [(_, weights)], [(_, fewer)], [(_, half)] = (work.rounded.values() for work in (plain, halved, even))
    assert half == weights / 2 <= fewer < weights
    assert halved.statistics / plain.statistics == pytest.approx(fewer / weights)
    assert [str(fault) for fault in plans[1].problems()] == [
        "gpus: 2 were asked for, and torch finds 0 for device cpu; ask for as many"
    ]


def without(monkeypatch: pytest.MonkeyPatch, *gone: str) -> None:
    real = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name in gone else real(name))


def test_a_missing_package_stops_a_run_before_its_first_job(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without(monkeypatch, "bitsandbytes", "lm_eval")
    run = make_run("int8-channel", {"name": "mine", "scheme": "nf4"}, tasks=["arc_easy"])
    news: list[str] = []
    with pytest.raises(ConfigError) as caught:
        execute(run, "", news.append)
    assert news == []
    assert not (tmp_path / "runs").exists()
    for wanted in ("mine: the bitsandbytes package is not installed; pip install", "eval.tasks: the lm-eval package"):
        assert wanted in str(caught.value)
    plan = plan_run(run, jobs_of(run))
    assert [job.problem is None for job in plan.jobs] == [True, True, False]


def test_what_is_too_large_is_refused_before_the_first_job(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("int8-channel")
    with monkeypatch.context() as patch:
        patch.setattr(planning.psutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DiskError, match=r"need about .* kB, 1\.00 kB are free"):
            execute(run, "", lambda line: None)
        patch.setattr(planning, "total_memory", lambda device: 1 << 20)
        with pytest.raises(ConfigError, match=r"cannot be done here:\n.*needs at least .* this machine has 1\.05 MB"):
            execute(run, "", lambda line: None)


def test_each_job_has_its_own_problem(make_run: Callable[..., Run], tmp_path: Path, tiny_llama: Path) -> None:
    """A recipe that does not fit, a folder that is gone, a kernel that cannot run: others are planned all the same."""
    run = make_run("int4-g96", "int8-channel", models=[{"id": str(tiny_llama)}, {"id": str(tmp_path / "gone")}])
    problems = [job.problem for job in plan_run(run, jobs_of(run)).jobs]
    assert [problem is None for problem in problems] == [True, False, True, False, False, False]
    assert "not divisible by group_size 96" in str(problems[1])
    run = make_run("int8-channel", kernel="triton-int4")
    assert "eval.kernel: kernel triton-int4 cannot run int8-channel" in str(plan_run(run, jobs_of(run)).jobs[1].problem)


def test_a_job_that_is_done_takes_nothing_more(make_run: Callable[..., Run]) -> None:
    run = make_run("int8-channel")
    before = plan_run(run, jobs_of(run)).jobs[1]
    (before.folder / "artifact").mkdir(parents=True)
    assert plan_run(run, jobs_of(run)).jobs[1].state == HALF_DONE
    (before.folder / "artifact" / "bitpress.json").write_text("{}")
    (before.folder / "metrics.json").write_text("{}")
    after = plan_run(run, jobs_of(run)).jobs[1]
    assert (before.state, after.state) == (NOT_BEGUN, FINISHED)
    assert before.disk >= before.nbytes > after.disk == 0
    assert after.seconds(STATED) == 0 < (before.seconds(STATED) or 0)


def test_the_second_plan_needs_no_model_and_says_the_same(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "folder", lambda: tmp_path / "cache")
    fitted = {
        "name": "fitted",
        "scheme": "int4-g96",
        "method": "gptq",
        "options": {"damping": 0.02},
        "fit_groups": True,
    }
    run = make_run("int8-dynamic", fitted, {"budget": "4.5 bits"})
    first = plan_run(run, jobs_of(run))
    monkeypatch.setattr(estimate, "make_plan", None)
    monkeypatch.setattr(estimate, "skeleton", None)
    assert plan_run(run, jobs_of(run)).jobs == first.jobs
    assert [job.problem for job in first.jobs] == [None] * 4


def test_time_is_the_sum_of_its_parts() -> None:
    work = Work(products=STATED.products, read=2 * STATED.read, starts=1)
    assert work.seconds(STATED) == 3 + STATED.start


def test_an_unknown_length_is_said(make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("int8-channel", windows=None, text={"dataset": "org/name"})
    for job in plan_run(run, jobs_of(run)).jobs:
        assert job.seconds(STATED) is None
        assert "org/name is not read here" in job.unknown[0]


def test_several_machines_share_the_jobs_by_the_executors_rules() -> None:
    """Seconds by hand: two models, both baselines side by side, and two budgets one after the other."""

    def job(model: str, recipe: str, seconds: float, search: bool = False) -> JobPlan:
        work = {"evaluate": Work(products=seconds * STATED.products)}
        return JobPlan(model, recipe, Path(model) / recipe, work=work, search=search)

    first = [job("a", "none", 10), job("a", "x", 30), job("a", "y", 20), job("a", "z", 20)]
    schedule = simulate(first, STATED, 2)  # the baseline to 10; then x to 40, y to 30, z to 50
    assert schedule is not None
    assert (schedule.seconds, schedule.serial, schedule.last) == (pytest.approx(50), pytest.approx(80), "a  z")
    assert schedule.busy == pytest.approx(0.8)
    budgets = [job("b", "none", 5), job("b", "4bits", 30, True), job("b", "5bits", 5, True)]
    assert getattr(simulate(budgets, STATED, 2), "seconds", 0) == pytest.approx(40)
    assert getattr(simulate([*first, *budgets], STATED, 3), "seconds", 0) == pytest.approx(50)
    assert getattr(simulate([*first, *budgets], STATED, 1), "seconds", 0) == pytest.approx(120)
    assert simulate([JobPlan("c", "none", Path("c"), unknown=["how long"])], STATED, 2) is None


def test_budgets_that_share_a_search_pay_for_it_once(make_run: Callable[..., Run]) -> None:
    choices = ["int3-g32", "int4-g32"]
    run = make_run(
        {"budget": "4 bits", "choices": choices},
        {"budget": "5 bits", "choices": choices},
        {"budget": "5 bits", "name": "other"},
        {"budget": "6 bits", "name": "packed", "sequential": False, "choices": choices},
    )
    works = [job.work for job in plan_run(run, jobs_of(run)).jobs[1:]]
    assert ["search" in work for work in works] == [True, False, True, False]
    assert [work["quantize"].products > 0 for work in works] == [True, True, True, False]
