"""MLflow: an experiment for each config, a run for each job."""

import os
from typing import ClassVar

from .base import TrackedJob, Tracker, plain

_LONGEST = 500  # characters of a parameter; older servers take no longer ones


class MLflow(Tracker):
    """Sends to MLFLOW_TRACKING_URI, or without one to the folder mlruns of the run."""

    name: ClassVar[str] = "mlflow"
    rank: ClassVar[int] = 0
    package: ClassVar[str] = "mlflow"

    def send(self, job: TrackedJob) -> str:
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (job.folder.resolve() / "mlruns").as_uri()
        if uri.startswith("file:"):  # MLflow 3 asks whoever keeps experiments in a folder whether that is meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(job.run)
        ident = experiment.experiment_id if experiment else client.create_experiment(job.run)
        run = client.create_run(ident, run_name=job.job).info.run_id
        for name, text in job.settings.items():
            client.log_param(run, plain(name), text[:_LONGEST])
        for name, value in job.figures.items():
            client.log_metric(run, plain(name), value)
        for file in job.files:
            client.log_artifact(run, str(file))
        client.set_terminated(run)
        return uri


PLUGINS = (MLflow(),)
