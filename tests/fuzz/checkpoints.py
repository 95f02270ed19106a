"""Damages checkpoints and runs, and looks what becomes of them: a result, a sentence, or a finding.

    python tests/fuzz/checkpoints.py [--count 1000] [--minutes 1] [--seed 0] [--jobs 2] [--subject gptq] [--file config]
    python tests/fuzz/checkpoints.py --seed 0 --case 17 [--keep 0,2]      one case again, with its traceback

Each case is a copy of a small folder (see subjects.py) with one to three mutations (see mutations.py). It runs in a
child process with limits, forked from one that has imported everything. A finding is: an exception that is no
BitpressError; logits that are not finite; a process that dies, hangs or takes too much; a control character on the
terminal; a file that is opened outside the folder; a resumed artifact with other bytes. A case with a finding is made
smaller by leaving out mutations.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60  # of computing, for all steps of a case
WALL = 600
MEMORY = 4 << 30  # bytes beyond what the parent has
ROOM_FOR_FILES = 2 << 30

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from mutations import Mutation, draw  # noqa: E402
from subjects import CHEAP, Step, Subject, subjects  # noqa: E402

from bitpress.pipeline.cli import console  # noqa: E402
from bitpress.pipeline.errors import BitpressError  # noqa: E402
from bitpress.pipeline.evaluate import worker  # noqa: E402
from bitpress.pipeline.system.progress import quiet_libraries  # noqa: E402


@dataclass
class Case:
    """One damaged copy. number and seed decide everything; `keep`: which of its mutations are made, None for all."""

    number: int
    seed: int
    subject: Subject
    mutations: list[Mutation]
    keep: list[int] | None = None

    @property
    def command(self) -> str:
        kept = f" --keep {','.join(map(str, self.keep))}" if self.keep is not None else ""
        return f"python tests/fuzz/checkpoints.py --seed {self.seed} --case {self.number}{kept}"

    def steps(self) -> dict[str, Step]:
        """The cheap steps, and one of the others; all of them for an undamaged copy."""
        names = list(self.subject.steps)
        if self.mutations and len(names) > CHEAP:
            names = [*names[:CHEAP], names[CHEAP + self.number % (len(names) - CHEAP)]]
        return {name: self.subject.steps[name] for name in names}

    def chosen(self) -> list[Mutation]:
        return [mutation for i, mutation in enumerate(self.mutations) if self.keep is None or i in self.keep]


def make_case(number: int, options: argparse.Namespace, everything: list[Subject]) -> Case:
    generator = random.Random(f"{options.seed} {number}")
    subject = generator.choice(everything)
    return Case(number, options.seed, subject, draw(subject.folder, generator, options.file))


def run_case(case: Case, folder: Path, verbose: bool = False) -> dict[str, Any]:
    """What becomes of a case: "finding", None or a description; "where", what tells it from others; "done" and
    "refused", names of steps.

    Args:
        folder: an empty one, of the case's own.
    """
    child, start = start_case(case, folder, verbose), time.monotonic()
    while (code := ending(child, start)) is None:
        time.sleep(0.002)
    if verbose and (folder / "said").exists():
        console.news((folder / "said").read_text(encoding="utf-8", errors="surrogateescape"))
    return result_of(folder, code)


def start_case(case: Case, folder: Path, verbose: bool = False) -> int:
    """The process id of a child that runs the case."""
    child = os.fork()
    if not child:
        _child(case, folder, verbose)
    return child


def ending(child: int, start: float) -> int | None:
    """The exit code of a child, or minus its signal; None while it runs. One that takes too long is killed."""
    if time.monotonic() - start > WALL:
        os.killpg(child, signal.SIGKILL)
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def result_of(folder: Path, code: int) -> dict[str, Any]:
    """See run_case. code: of the child, which has ended."""
    answer, said = folder / "answer.json", folder / "said"
    if code or not answer.exists():
        step = (folder / "step").read_text() if (folder / "step").exists() else "copy"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return {"finding": f"{step}: the process ended by {how}", "where": f"{step} {how}", "done": [], "refused": []}
    result = json.loads(answer.read_text())
    text = said.read_text(encoding="utf-8", errors="surrogateescape")
    raw = sorted({hex(ord(c)) for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)})
    if raw and not result["finding"]:
        result |= {"finding": f"control characters are printed: {raw}", "where": "printed"}
    return result


def _child(case: Case, folder: Path, verbose: bool) -> None:
    """The life of a child: damage, steps, answer."""
    os.setsid()
    copy, free = folder / "copy", folder / "free"
    result: dict[str, Any] = {"finding": None, "where": "", "done": [], "refused": [], "errors": []}
    try:
        shutil.copytree(case.subject.folder, copy, symlinks=True)
        free.mkdir()
        for mutation in case.chosen():
            mutation.apply(copy)
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
        for descriptor in (1, 2):
            os.dup2(said, descriptor)
        _limit()
        _watch_files(copy, folder, result)
        for name, step in case.steps().items():
            (folder / "step").write_text(name)
            (free / name).mkdir()
            try:
                step(copy, free / name)
                result["done"].append(name)
            except BitpressError as error:
                console.news(f"{name}: {error}")
                result["refused"].append(name)
                if not str(error).strip():
                    result |= {"finding": f"{name}: an empty sentence", "where": f"{name} empty"}
            except BaseException as error:
                result |= {
                    "finding": f"{name}: {type(error).__name__}: {str(error)[:300]}",
                    "where": _where(name, error),
                }
                if verbose:
                    traceback.print_exc()
                break
        sys.stdout.flush()
        (folder / "answer.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
        os._exit(9)
    os._exit(0)


def _where(step: str, error: BaseException) -> str:
    """The step, the kind of the error, and the last line of ours and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "bitpress" in frame.filename and "/fuzz/" not in frame.filename]
    chosen = [*ours[-1:], *frames[-1:]]
    return f"{step} {type(error).__name__} " + " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in chosen)


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_FOR_FILES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch_files(copy: Path, folder: Path, result: dict[str, Any]) -> None:
    """Note what is opened behind a link, or by a path that a file of the case names."""
    own, outside = str(folder.resolve()), str((folder / "outside").resolve())

    def look(event: str, details: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(details[0], str | bytes | os.PathLike) or result["finding"]:
            return
        path = os.path.realpath(os.fsdecode(details[0]))
        if path.startswith(outside) or path.startswith(("/etc/passwd", "/etc/hostname")):
            result["finding"], result["where"] = f"{path.removeprefix(own)} is opened, outside the folder", "outside"

    sys.addaudithook(look)


def shrink(case: Case, base: Path) -> Case:
    """The case with as few mutations as still lead to the same finding."""
    numbers = list(range(len(case.mutations)))
    where = None
    for number in [None, *numbers]:
        keep = [n for n in numbers if n != number]
        if not keep:
            continue
        with tempfile.TemporaryDirectory(dir=base) as folder:
            result = run_case(Case(case.number, case.seed, case.subject, case.mutations, keep), Path(folder))
        if number is None:
            where = result["where"]
        elif result["finding"] and result["where"] == where:
            numbers = keep
    return Case(case.number, case.seed, case.subject, case.mutations, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10**9, help="cases at most")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--keep", help="mutations of that case to make, such as 0,2")
    parser.add_argument("--subject", help="this one alone")
    parser.add_argument("--file", help="only files whose name contains this")
    options = parser.parse_args()
    quiet_libraries()

    def refuse(*arguments: Any) -> None:
        raise BitpressError("would measure in a fresh process")

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a file system without a disk
    with tempfile.TemporaryDirectory(prefix="bitpress-fuzz-", dir=memory) as name:
        base = Path(name)
        everything = [s for s in subjects(base) if options.subject in (None, s.name)]
        worker.call = refuse
        if options.case is not None:
            case = make_case(options.case, options, everything)
            case.keep = [int(n) for n in options.keep.split(",")] if options.keep else None
            console.print_line("\n".join(f"{case.subject.name}: {mutation}" for mutation in case.chosen()))
            (base / "case").mkdir()
            console.print_line(json.dumps(run_case(case, base / "case", verbose=True), indent=2))
            return
        for subject in everything:  # undamaged: nothing is refused, and what is imported late is there
            with tempfile.TemporaryDirectory(dir=base) as folder:
                result = run_case(Case(0, 0, subject, []), Path(folder))
                assert not result["finding"], (subject.name, result)
                assert not result["refused"], (subject.name, result)
                for name, step in subject.steps.items():
                    (Path(folder) / name).mkdir()
                    with contextlib.redirect_stdout(open(os.devnull, "w")):
                        step(shutil.copytree(subject.folder, Path(folder) / "warm" / name), Path(folder) / name)
        gc.collect()
        gc.freeze()  # else each child's collector would touch, and so copy, all that it shares with this process
        sys.exit(fuzz(options, everything, base))


def fuzz(options: argparse.Namespace, everything: list[Subject], base: Path) -> int:
    """Run cases until there are enough, print what was found, and return 1 where something was."""
    findings: dict[str, tuple[Case, str]] = {}
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    running: dict[int, tuple[Case, Path, float]] = {}
    start, number, end = time.monotonic(), options.first, options.first + options.count
    console.news(f"{len(everything)} subjects are ready")
    while running or (number < end and time.monotonic() - start < 60 * options.minutes):
        if len(running) < options.jobs and number < end and time.monotonic() - start < 60 * options.minutes:
            case, folder = make_case(number, options, everything), Path(tempfile.mkdtemp(dir=base))
            running[start_case(case, folder)] = case, folder, time.monotonic()
            number += 1
            if number % 500 == 0:
                console.news(
                    f"{number - options.first} cases, {time.monotonic() - start:.0f} s, {len(findings)} findings"
                )
            continue
        for child, (case, folder, began) in list(running.items()):
            if (code := ending(child, began)) is None:
                continue
            del running[child]
            result = result_of(folder, code)
            shutil.rmtree(folder)
            counts += Counter(cases=1, mutations=len(case.mutations))
            counts += Counter({"steps done": len(result["done"]), "steps refused": len(result["refused"])})
            if finding := result["finding"]:
                if result["where"] not in findings:
                    small = shrink(case, base)
                    console.print_line(f"{finding}\n    {small.chosen()}\n    {small.command}")
                    findings[result["where"]] = small, finding
                times[result["where"]] += 1
        time.sleep(0.002)
    done = ", ".join(f"{count} {name}" for name, count in counts.items())
    seconds = time.monotonic() - start
    console.print_line(f"seed {options.seed}, cases {options.first} to {number - 1}: {done}; {seconds:.0f} s")
    for where, (case, finding) in findings.items():
        console.print_line(f"{times[where]} times: {finding}\n    {case.command}")
    console.print_line(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    main()
