"""Jobs on a Ray cluster: a node is killed in the middle, and the artifacts are the serial executor's, to the byte.

Each Ray process takes seconds to start, so these are few and need the extra `ray`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitpress.pipeline.config.schema import Run
from bitpress.pipeline.runs.run import execute

pytest.importorskip("ray")
CHOICES = ["int3-g32", "int4-g32", "int8-channel"]
RECIPES = ["gptq/int4-g32", {"budget": "4.5 bits", "choices": CHOICES}, {"budget": "6 bits", "choices": CHOICES}]


@pytest.fixture
def make_run(tmp_path: Path, tiny_llama: Path) -> Callable[..., Run]:
    def make(output: str, windows: int = 8, recipes: list[Any] = RECIPES, **options: Any) -> Run:
        learning = {"text": "builtin:pydoc-topics", "windows": windows, "context": 256}
        evaluation = {"text": "builtin:pydoc-topics", "context": 32, "windows": 2, "speed": None, "output_errors": 0}
        config = {"name": "ray", "models": [{"id": str(tiny_llama)}], "recipes": recipes, "eval": evaluation}
        config |= {"defaults": {"calibration": learning}, "device": "cpu", "output": str(tmp_path / output)}
        return Run.model_validate(config | ({"executor": "ray", "executor_options": options} if options else {}))

    return make


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that has no room for jobs. As a machine's memory is asked for by several nodes, each has a part of it."""
    from ray.cluster_utils import Cluster

    nodes = {"object_store_memory": 100 << 20, "memory": 4 << 30}
    own = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **nodes})
    own.room = nodes
    yield own
    own.shutdown()


def artifacts(run: Run) -> dict[str, bytes]:
    folder = Path(run.output)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("artifact/*"))}


def test_a_node_is_killed_and_its_job_goes_on_elsewhere(make_run: Callable[..., Run], cluster: Any) -> None:
    first = cluster.add_node(num_cpus=1, **cluster.room)
    news: list[str] = []

    def say(line: str) -> None:
        news.append(line)
        if "gptq-int4-g32  quantize by" in line and not killed:
            killed.append(line)
            cluster.add_node(num_cpus=1, **cluster.room)
            cluster.remove_node(first, allow_graceful=False)

    killed: list[str] = []
    run = make_run("ray", 128, address=cluster.address, cpus=1)
    outcomes = execute(run, "", say)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert [outcome.recipe for outcome in outcomes] == ["none", "gptq-int4-g32", "4.5bits", "6bits"]
    assert sum("was lost; it goes on elsewhere" in line for line in news) == 1
    assert sum("gptq-int4-g32  quantize by" in line for line in news) == 2
    alone = make_run("serial", 128)
    assert [outcome.error for outcome in execute(alone, "", lambda line: None)] == [None] * 4
    assert artifacts(run) == artifacts(alone)
    assert len(artifacts(run)) > 20
    assert not list(Path(run.output).rglob(".shared-*"))


def test_a_job_that_no_node_is_left_for_ends_with_an_error(make_run: Callable[..., Run], cluster: Any) -> None:
    only = cluster.add_node(num_cpus=1, **cluster.room)
    news: list[str] = []

    def say(line: str) -> None:
        news.append(line)
        if "gptq-int4-g32  quantize by" in line:
            cluster.remove_node(only, allow_graceful=False)

    run = make_run("ray", 128, recipes=["gptq/int4-g32"], address=cluster.address, cpus=1, patience=3.0)
    outcomes = execute(run, "", say)
    assert outcomes[0].error is None
    assert str(outcomes[1].error).startswith("no node joined in 3 s that can run it: it needs 1 CPUs")
    assert sum("waits 3 s for a node" in line for line in news) == 1


def test_files_are_sent_where_nodes_do_not_share_a_disk(make_run: Callable[..., Run], cluster: Any) -> None:
    for _ in range(2):
        cluster.add_node(num_cpus=1, **cluster.room)
    recipes = ["gptq/int4-g32"]
    run = make_run("ray", recipes=recipes, address=cluster.address, cpus=1, storage="gather")
    news: list[str] = []
    for outcome in execute(run, "", news.append):
        assert outcome.error is None
        assert outcome.folder.is_relative_to(run.output)
    alone = make_run("serial", recipes=recipes)
    execute(alone, "", lambda line: None)
    assert artifacts(run) == artifacts(alone)
    news.clear()
    assert [outcome.error for outcome in execute(run, "", news.append)] == [None] * 2
    assert sum("measured before" in line for line in news) == 2
    assert not list(Path(run.output).rglob(".*.arriving"))
