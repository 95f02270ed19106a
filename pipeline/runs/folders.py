"""The folders of a config's run: its own, each model's, each job's."""

from pathlib import Path

from ..config.schema import BASELINE, Model, Run
from ..storage.remote import RemoteFolder, is_remote, local_output


def run_folder(run: Run) -> Path:
    """The folder of a run, with its report."""
    return local_output(run.output) / run.name


def remote_folder(run: Run) -> RemoteFolder | None:
    """The copy of a run's folder at the URL of its output; None where the output is a folder of this machine."""
    if not is_remote(run.output):
        return None
    return RemoteFolder(f"{run.output.rstrip('/')}/{run.name}", run_folder(run))


def model_folder(run: Run, model: Model) -> Path:
    """The folder in which each job on a model has its own: the run's, or one in it where there are several models."""
    folder = run_folder(run)
    if len(run.models) == 1:
        return folder
    slug = "".join(c if c.isalnum() or c in "._-" else "--" for c in model.id.strip("/.~"))
    return folder / (f"{slug}@{model.revision}" if model.revision else slug)


def recipe_names(run: Run) -> list[str]:
    """The names of a model's jobs, the baseline's first."""
    return [BASELINE, *(settings.label for settings in run.recipes if not settings.baseline)]


def jobs_of(run: Run) -> list[tuple[Model, str, Path]]:
    """The model, the recipe's name and the folder of every job of a config, in its order."""
    return [(model, name, model_folder(run, model) / name) for model in run.models for name in recipe_names(run)]
