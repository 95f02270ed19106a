"""Weights & Biases: a project for each config, a run for each job."""

from typing import ClassVar

from .base import TrackedJob, Tracker, plain


class WandB(Tracker):
    """Sends to wandb.ai, or with WANDB_MODE=offline writes the folder wandb of the run, for `wandb sync`."""

    name: ClassVar[str] = "wandb"
    rank: ClassVar[int] = 1
    package: ClassVar[str] = "wandb"

    def send(self, job: TrackedJob) -> str:
        import wandb

        run = wandb.init(
            project=plain(job.run).replace("/", "-"),
            name=job.job,
            dir=str(job.folder),
            config=dict(job.settings),
            settings=wandb.Settings(silent=True, disable_git=True, save_code=False, console="off"),
            reinit="create_new",
        )
        run.summary.update({plain(name): value for name, value in job.figures.items()})
        for file in job.files:
            run.save(str(file), base_path=str(file.parent), policy="now")
        where = run.url or str(job.folder / "wandb")
        run.finish()
        return where


PLUGINS = (WandB(),)
