"""Jobs as tasks of a Ray cluster: several at a time, each where there is room for it."""

import contextlib
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from bitpress.eval.report.words import size

from ...errors import BitpressError, ConfigError
from ...storage import files, journal
from ...storage.fingerprint import digest
from ...system.progress import job_table, quiet_libraries, reported
from ...system.unexpected import unexpected
from ...system.versions import releases
from .base import Executor

if TYPE_CHECKING:
    from ..job import Job, Outcome

_PERIOD = 0.5  # seconds between two looks at the tasks, and between two reports of a task's progress
_LOOK = 2.0  # seconds between two looks at the nodes
_PATIENCE = 300.0  # seconds that a job waits for the lock of a worker that is lost and has not ended yet
_PIECE = 16 << 20  # bytes of a file that are sent at a time
_VERSIONS = ("bitpress", "torch", "transformers")  # that all nodes must have alike, up to a patch


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Ray(Executor):
    """Runs jobs as tasks of a Ray cluster; the jobs of a node that is lost go on elsewhere.

    A model's baseline comes before its recipes, and budgets that share a search come one after the other, so that no
    job waits for a lock while it takes up a worker.

    address: of a cluster, as `ray start` prints it, or auto; None for RAY_ADDRESS or, where that is not set, for a
    cluster of this machine alone that ends with the run.
    cpus: that each job takes, and threads that it has; None for as many threads as this process has, at most a node's.
    gpus: that each job takes; None for the config's own `gpus` where the cluster has some and `device` may be cuda.
    storage: shared where workers see the output folder, gather where its files are sent to them and back; auto looks.
    retries: how often a job whose worker is lost begins again.
    patience: seconds that a job waits when no node is left that could run it, for one to join the cluster.
    """

    address: str | None = None
    cpus: Annotated[int | None, Field(ge=1)] = None
    gpus: Annotated[float | None, Field(ge=0)] = None
    storage: Literal["auto", "shared", "gather"] = "auto"
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    patience: Annotated[float, Field(ge=0)] = 60.0

    name: ClassVar[str] = "ray"
    rank: ClassVar[int] = 10
    packages: ClassVar[tuple[str, ...]] = ("ray",)

    @property
    def elsewhere(self) -> bool:
        return bool(self.address or os.environ.get("RAY_ADDRESS"))

    def map(self, jobs: "Iterable[Job]", say: Callable[[str], None]) -> "Iterator[Outcome]":
        """The outcomes, as jobs end.

        Raises:
            ConfigError: no cluster answers at the address.
        """
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        local = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"executor_options.address: no Ray cluster can be used at {address} ({str(error).splitlines()[0]}); "
                "give what `ray start --head` prints, or leave it out"
            ) from error
        try:
            with job_table() as show, _tokens() as token_of:
                yield from self._outcomes(jobs, say, show, token_of)
        finally:
            ray.shutdown()  # ends this run's tasks, too

    def _outcomes(
        self,
        jobs: "Iterable[Job]",
        say: Callable[[str], None],
        show: Callable[[list[list[str]]], None],
        token_of: Callable[[Path], str],
    ) -> "Iterator[Outcome]":
        """The outcomes; `show` is given the lines of the table of all jobs, `token_of` a folder (see _tokens)."""
        import ray
        import torch
        from ray.exceptions import RayError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from ..job import Outcome

        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=beside).remote()
        function = ray.remote(run_on_worker)
        nodes = _nodes()
        threads = self.cpus or min(torch.get_num_threads(), int(max(node.get("CPU", 1) for node in nodes)))
        room = max(1, int(sum(node.get("CPU", 0) for node in nodes) // threads))
        upcoming: Iterator[tuple[int, Job]] | None = enumerate(jobs)
        waiting: dict[int, Job] = {}
        running: dict[Any, int] = {}  # task -> number of its job
        known: dict[int, Job] = {}
        attempts: dict[int, int] = {}
        states: dict[int, dict[str, Any]] = {}
        needs: dict[int, dict[str, float]] = {}
        hopeless: dict[int, float] = {}  # job that no node can run -> since when
        looked = time.monotonic()

        def blocked(number: int) -> bool:
            """Whether an earlier job on the same model is to end before: the baseline, or one of the same search."""
            job, unfinished = known[number], {*waiting, *running.values()}
            earlier = [known[n] for n in unfinished if n < number and known[n].folder.parent == job.folder.parent]
            return any(other.recipe is None or (other.searches and job.searches) for other in earlier)

        while upcoming or waiting or running:
            while upcoming and len(running) + sum(not blocked(number) for number in waiting) < room:
                if (pair := next(upcoming, None)) is None:
                    upcoming = None
                    break
                known[pair[0]] = waiting[pair[0]] = pair[1]
            for number in [number for number in waiting if not blocked(number)]:
                job = waiting.pop(number)
                needs[number] = {"CPU": threads, "GPU": self._gpus(job, nodes), "memory": job.memory}
                if number not in attempts and (why := _unplaceable(needs[number], nodes)):
                    yield Outcome(job.model, job.name, job.folder, error=ConfigError(why))
                    continue
                task = _Task(number, threads, self.storage, token_of(job.folder.parent), releases())
                resources = {"num_cpus": threads, "num_gpus": needs[number]["GPU"], "memory": job.memory}
                running[function.options(max_retries=0, **resources).remote(job, task, board)] = number
            done = ray.wait(list(running), timeout=_PERIOD)[0] if running else []
            news, states = ray.get(board.take.remote())
            for number, line in news:
                job = known[number]
                heading = f"{job.model}  {job.name}"
                say(heading if line == heading else f"{heading}  {line.strip()}")
            show([_row(known[n], states.get(n, {}), n in waiting, n in running.values()) for n in sorted(known)])
            if time.monotonic() - looked > _LOOK:  # else a task that no node is left for would wait for ever
                looked, nodes = time.monotonic(), _nodes()
                for reference, number in list(running.items()):
                    why = None if "node" in states.get(number, {}) else _unplaceable(needs[number], nodes)
                    since = hopeless.setdefault(number, looked) if why else hopeless.pop(number, looked)
                    if why and since == looked:
                        say(f"{known[number].model}  {known[number].name}  waits {self.patience:g} s for a node: {why}")
                    if why and looked - since >= self.patience and reference not in done:
                        ray.cancel(reference)
                        del running[reference]
                        ray.get(board.give_back.remote(known[number].folder, False))
                        job, kept = known[number], "what is finished is kept"
                        reason = BitpressError(f"no node joined in {self.patience:g} s that can run it: {why}; {kept}")
                        yield Outcome(job.model, job.name, job.folder, error=reason)
            for task_reference in done:
                number = running.pop(task_reference)
                job = known[number]
                try:
                    yield ray.get(task_reference)
                    continue
                except RayTaskError as error:
                    lost, reason = False, unexpected(error, job.folder.parent)
                except RayError as error:
                    lost, count = True, attempts.get(number, 0) + 1
                    reason = BitpressError(
                        f"its worker was lost {count} times ({type(error).__name__}); look whether the nodes have "
                        "enough memory, and run the same command again: what is finished is kept"
                    )
                attempts[number] = attempts.get(number, 0) + 1
                if lost and attempts[number] <= self.retries:
                    node = states.get(number, {}).get("node", "a node")
                    say(f"{job.model}  {job.name}  its worker on {node} was lost; it goes on elsewhere")
                    waiting[number] = job
                    ray.get(board.forget.remote(number))
                    states.pop(number, None)
                else:
                    ray.get(board.give_back.remote(job.folder, False))
                    yield Outcome(job.model, job.name, job.folder, error=reason)

    def _gpus(self, job: "Job", nodes: list[dict[str, float]]) -> float:
        """How many GPUs a job takes."""
        if self.gpus is not None:
            return self.gpus
        wanted = job.run.device != "cpu" and any(node.get("GPU", 0) >= 1 for node in nodes)
        return float(job.run.gpus if wanted else 0)


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive: "CPU", "GPU", and "memory" in bytes."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _unplaceable(needs: Mapping[str, float], nodes: list[dict[str, float]]) -> str | None:
    """Why no node of the cluster can run a job; None if one can, though it may have to wait for others."""
    if any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        return None

    def words(amounts: Mapping[str, float]) -> str:
        return f"{amounts.get('CPU', 0):g} CPUs, {amounts.get('GPU', 0):g} GPUs and {size(amounts.get('memory', 0))}"

    offers = "; ".join(dict.fromkeys(map(words, nodes)))
    return f"it needs {words(needs)}, and no node of the cluster has that ({offers}); add one, or see executor_options"


def _row(job: "Job", state: Mapping[str, Any], waits: bool, runs: bool) -> list[str]:
    """A job's line in the table of all jobs: its name, its node, what it does, and how far it is."""
    done, total = state.get("done", 0), state.get("total", 0)
    doing = "waits" if waits or (runs and not state) else state.get("line", "").strip() if runs else "ended"
    since = f"{time.time() - state['since']:.0f} s" if runs and "since" in state else ""
    share = f"{state['label']} {done}/{total}" if runs and total else ""
    return [f"{job.model}  {job.name}", state.get("node", "") if runs else "", doing, share, since]


@contextlib.contextmanager
def _tokens() -> Iterator[Callable[[Path], str]]:
    """A function that puts a file into a folder, as long as this lasts, and returns its path.

    Workers that see it have the same disk.
    """
    paths: dict[Path, Path] = {}

    def token_of(folder: Path) -> str:
        if folder not in paths:
            files.make_folder(folder)
            paths[folder] = folder.absolute() / f".shared-{secrets.token_hex(8)}"
            files.write_text(paths[folder], "")
        return str(paths[folder])

    try:
        yield token_of
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Task:
    """What a worker is told of a job besides the job.

    number: of the job, in the run. threads: for torch. token: a file in the run's folder that shows whether the folder
    is shared; None where it is taken to be. releases: this machine's versions.
    """

    number: int
    threads: int
    storage: str
    token: str
    releases: dict[str, str]


class Board:
    """An actor beside the process that the user started: takes what workers tell, and hands files to and fro."""

    def __init__(self) -> None:
        self._news: list[tuple[int, str]] = []
        self._states: dict[int, dict[str, Any]] = {}
        self._locks: dict[Path, contextlib.ExitStack] = {}

    def tell(self, number: int, line: str) -> None:
        """Note a line of a job's news."""
        self._news.append((number, line))
        self._states.setdefault(number, {})["line"] = line

    def show(self, number: int, state: Mapping[str, Any]) -> None:
        """Note how far a job is."""
        self._states.setdefault(number, {}).update(state)

    def forget(self, number: int) -> None:
        """Forget how far a job was, whose worker is lost."""
        self._states.pop(number, None)

    def take(self) -> tuple[list[tuple[int, str]], dict[int, dict[str, Any]]]:
        """The news since the last call, and the states of all jobs."""
        news, self._news = self._news, []
        return news, self._states

    def lend(self, folder: Path) -> list[str]:
        """Lock a job's folder for a worker that does not see it; returns the names of what the worker is to have.

        Raises:
            LockedError: another run holds it.
        """
        from ...config.schema import BASELINE
        from ...evaluate.metrics import METRICS

        files.make_folder(folder)
        if folder not in self._locks:  # else it was lent to a worker that is lost
            self._locks[folder] = contextlib.ExitStack()
            self._locks[folder].enter_context(journal.locked(folder))
        baseline = f"../{BASELINE}/{METRICS}"  # for the report
        return list(_sizes(folder)) + ([baseline] if folder.name != BASELINE and (folder / baseline).exists() else [])

    def read(self, path: Path, start: int) -> bytes:
        """A piece of a file; b"" past its end."""
        with path.open("rb") as file:
            file.seek(start)
            return file.read(_PIECE)

    def write(self, folder: Path, name: str, start: int, piece: bytes) -> None:
        """Put a piece of a file that a worker made beside the job's folder, until all are there."""
        path = _arriving(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.disk_errors(path), path.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.write(piece)
            file.flush()
            files.fsync(file.fileno())

    def give_back(self, folder: Path, arrived: bool) -> None:
        """Unlock a job's folder, in whose place comes what was written, if all of it `arrived`."""
        with self._locks.pop(folder, contextlib.ExitStack()):
            if arrived:
                files.remove_folder(folder)
                files.publish_folder(_arriving(folder), folder)
            elif _arriving(folder).exists():
                files.remove_folder(_arriving(folder))


def _arriving(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.arriving")


def _sizes(folder: Path) -> dict[str, int]:
    """Each file below a folder, its lock left out, and its bytes."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != files.LOCK)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def run_on_worker(job: "Job", task: _Task, board: Any) -> "Outcome":
    """The outcome of a job, in a worker's process; the board is told how it goes.

    Where the worker does not see the run's folder, the job's files come from the board before, and go there after.
    """
    import torch

    from ..job import Outcome, run_job

    node = socket.gethostname()
    os.environ["OMP_NUM_THREADS"] = str(task.threads)  # of the processes that measure
    torch.set_num_threads(task.threads)
    quiet_libraries()
    board.show.remote(task.number, {"node": node, "since": time.time(), "label": "", "done": 0, "total": 0})
    last = 0.0

    def say(line: str) -> None:
        board.tell.remote(task.number, line)

    def on_step(label: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _PERIOD:
            last = time.monotonic()
            board.show.remote(task.number, {"label": label, "done": done, "total": total})

    try:
        now = releases()
        if differing := [name for name in _VERSIONS if now.get(name) != task.releases.get(name)]:
            pairs = ", ".join(f"{name} {now.get(name)} in place of {task.releases.get(name)}" for name in differing)
            raise ConfigError(f"{node} has {pairs}; install the same versions on all nodes")
        job = _with_source_here(job, node)
        with reported(on_step):
            if task.storage == "shared" or (task.storage == "auto" and Path(task.token).exists()):
                return run_job(replace(job, patience=_PATIENCE), say)
            parent = Path(tempfile.gettempdir()) / f"bitpress-{os.getuid()}-{digest({'folder': str(job.folder)})[:16]}"
            files.make_folder(parent)
            parent.chmod(0o700)  # which fails where it is another user's
            return _away(job, replace(job, folder=parent / job.folder.name, patience=_PATIENCE), board, say)
    except BitpressError as error:
        say(f"  failed: {error}")
        return Outcome(job.model, job.name, job.folder, error=error)


def _with_source_here(job: "Job", node: str) -> "Job":
    """The job, its model's files on this node: where the folder is not seen, a model of the Hub is downloaded anew.

    Raises:
        ConfigError: a local model, or a text, which this node does not see.
    """
    from ...hub.download import resolve

    text = job.run.eval.text
    if isinstance(text, str) and os.path.isabs(text) and not os.path.isfile(text):
        raise ConfigError(f"eval.text: {node} does not see {text}; put it on storage that all nodes see")
    if job.source.folder.is_dir():
        return job
    if os.path.isabs(os.path.expanduser(job.model)):
        raise ConfigError(f"{node} does not see {job.model}; put the model on storage that all nodes see")
    return replace(job, source=resolve(job.model, job.source.revision))


def _away(job: "Job", own: "Job", board: Any, say: Callable[[str], None]) -> "Outcome":
    """A job's outcome, done in a folder of this node's own: its files come from the board, and go there in the end.

    What an earlier worker of this node left in the folder is taken up, where the board has nothing.

    Args:
        job: with the folder that the board sees. own: the same with this node's.
    Raises:
        LockedError: another run holds the job's folder.
    """
    import ray

    from ..job import run_job

    lent = ray.get(board.lend.remote(job.folder))
    if lent and own.folder.exists():
        files.remove_folder(own.folder)
    files.make_folder(own.folder)
    for name in lent:
        path = own.folder / name
        files.make_folder(path.parent)
        files.write_file(path, _pieces(job.folder / name, board))
    outcome = run_job(own, say)
    for name, nbytes in _sizes(own.folder).items():
        with (own.folder / name).open("rb") as file:
            for start in range(0, max(nbytes, 1), _PIECE):
                ray.get(board.write.remote(job.folder, name, start, file.read(_PIECE)))
    ray.get(board.give_back.remote(job.folder, True))
    files.remove_folder(own.folder.parent)
    return replace(outcome, folder=job.folder)


def _pieces(path: Path, board: Any) -> Iterator[bytes]:
    """The content of a file that the board sees."""
    import ray

    start = 0
    while piece := ray.get(board.read.remote(path, start)):
        yield piece
        start += len(piece)


PLUGINS = (Ray(),)
