"""TensorBoard: event files in the folder of the run."""

from typing import ClassVar

from .base import TrackedJob, Tracker, plain


class TensorBoard(Tracker):
    """Writes the folder tensorboard of the run, for `tensorboard --logdir`."""

    name: ClassVar[str] = "tensorboard"
    rank: ClassVar[int] = 2
    package: ClassVar[str] = "tensorboard"

    def send(self, job: TrackedJob) -> str:
        from torch.utils.tensorboard import SummaryWriter

        folder = job.folder / "tensorboard"
        with SummaryWriter(str(folder / plain(job.job).replace("/", "-"))) as writer:
            for name, value in job.figures.items():
                writer.add_scalar(plain(name), value, 0)
            table = "\n".join(f"| {name} | {text} |" for name, text in job.settings.items())
            writer.add_text("settings", f"| | |\n| --- | --- |\n{table}", 0)
        return str(folder)


PLUGINS = (TensorBoard(),)
