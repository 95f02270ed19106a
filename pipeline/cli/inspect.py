"""The commands that look without running a model: inspect, doctor, list."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError
from ..system.collector import collector_paused
from ..system.progress import progress, quiet_libraries
from .console import out, print_json, print_line, print_table
from .options import Json

Folder = Annotated[Path, typer.Argument(help="A checkpoint's folder, or that of the run that made it.")]


def inspect(folder: Folder, as_json: Json = False) -> None:
    """What a checkpoint is, from its headers alone."""
    with collector_paused():
        from ..checkpoints.describe import describe
        from ..storage.artifacts import local_checkpoint

    folder = local_checkpoint(folder.expanduser())
    description = describe(folder)
    if as_json:
        print_json(description)
        return
    rows = [[key, str(value)] for key, value in description.items() if not isinstance(value, list)]
    rows += [[key, str(item)] for key, value in description.items() if isinstance(value, list) for item in value]
    print_table([str(folder), ""], rows)


def doctor(folder: Folder, as_json: Json = False) -> None:
    """Whether a checkpoint is sound, and which runtimes load it; exit code 3 where it is not."""
    with collector_paused():
        from ..checkpoints.doctor import diagnose
        from ..storage.artifacts import local_checkpoint

    quiet_libraries(weights=False)
    with progress("reading every tensor") as step:
        diagnosis = diagnose(local_checkpoint(folder.expanduser()), step)
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        _show_diagnosis(diagnosis)
    if not diagnosis.sound:
        raise typer.Exit(CheckpointError.exit_code)


def _show_diagnosis(diagnosis: Any) -> None:
    what = [[key, str(value)] for key, value in diagnosis.what.items() if not isinstance(value, list)]
    print_table([diagnosis.folder, ""], what)
    out.print("\n[green]sound[/green]" if diagnosis.sound else "\n[red]unsound[/red]")
    for line in [*diagnosis.faults, *(f"note: {note}" for note in diagnosis.notes)]:
        print_line(f"    {line}")
    for name, verdict in diagnosis.runtimes.items():
        facts = [verdict["version"], f"needs {verdict['needs']}" if verdict["needs"] else None]
        more = ", ".join(fact for fact in facts if fact)
        _reasons(f"{name}: {verdict['loads']}{f' ({more})' if more else ''}", verdict["why"])
        for line in diagnosis.commands.get(name, "").splitlines():
            print_line(f"    $ {line}")
    for count, split in diagnosis.tensor_parallel.items():
        gpus = f"{count} GPU{'s' if count != '1' else ''}"
        _reasons(f"{gpus}, every layer on vLLM's and SGLang's fast kernel: {split['loads']}", split["why"])


def _reasons(line: str, reasons: list[str]) -> None:
    print_line(line)
    for reason in reasons[:3]:
        print_line(f"    {reason}")
    if len(reasons) > 3:
        print_line(f"    … and {len(reasons) - 3} more: see --json")


def list_(as_json: Json = False) -> None:
    """Schemes, methods, formats, executors, trackers, and kernels with the reason where one cannot run here."""
    with collector_paused():
        from ..checkpoints.catalogue import Entry, catalogue
        from ..runs.executors import registry as executors
        from ..trackers import registry as trackers

    everything = catalogue()
    everything["executors"] = {
        name: Entry((type(executor).__doc__ or "").partition("\n")[0]) for name, executor in executors().items()
    }
    everything["trackers"] = {
        name: Entry(f"not here: {why}" if (why := own.unsupported()) else (type(own).__doc__ or "").partition("\n")[0])
        for name, own in trackers().items()
    }
    if as_json:
        print_json({kind: {name: entry.to_dict() for name, entry in own.items()} for kind, own in everything.items()})
        return
    for kind, rows in everything.items():
        print_table([kind, ""], [[name, entry.text()] for name, entry in rows.items()])
        out.print()
