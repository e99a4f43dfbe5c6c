"""Log a training to TensorBoard event files, and to MLflow if it is installed and configured.

The first training process writes the scalars. TensorBoard files are local and are copied to storage at every
checkpoint; after a restart a new file begins at the step where training continues.
"""

import importlib.util
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.storage import errors, uris, writing
from jobs.storage.redaction import without_secrets

logger = logging.getLogger(__name__)


class Records:
    """Scalars of one training."""

    def __init__(self, folder: str, *, first_step: int, settings: dict[str, Any], mlflow_run: str | None) -> None:
        """`folder`: URI of the TensorBoard files. `mlflow_run`: id of the MLflow run to continue; None: start one."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder = folder
        self._local = tempfile.TemporaryDirectory(prefix="nsnet-tensorboard-")
        # not SummaryWriter: it writes events in a thread, and its flush does not wait for them
        self._writer = EventsWriter(f"{self._local.name}/events", f".{first_step:08d}")
        # makes TensorBoard drop what a dead attempt wrote from this step on
        self._writer.write_event(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._mlflow = _Mlflow.begin(settings, mlflow_run) if _mlflow_wanted() else None

    @property
    def mlflow_run(self) -> str | None:
        """Id of the MLflow run; None without one."""
        return self._mlflow.run_id if self._mlflow is not None else None

    def step(self, step: int, values: dict[str, float]) -> None:
        """Log values of a step, counted from 1; to TensorBoard only, since MLflow needs a request for each value."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def epoch(self, step: int, values: dict[str, float]) -> None:
        """Log values at the end of an epoch."""
        self.step(step, values)
        if self._mlflow is not None:
            self._mlflow.log(values, step)

    def flush(self) -> None:
        """Copy the event files to storage. A failure only warns: logging must not fail the training."""
        self._writer.flush()
        for path in Path(self._local.name).iterdir():
            try:
                writing.upload_file(path, uris.join(self._folder, path.name))
            except Exception as error:  # botocore, aiohttp and OS errors share no base
                logger.warning("the TensorBoard file was not copied to %s: %s", self._folder, errors.reason(error))

    def close(self) -> None:
        """Flush and close the event file and the MLflow run."""
        self.flush()
        self._writer.close()
        self._local.cleanup()
        if self._mlflow is not None:
            self._mlflow.end()


def _mlflow_wanted() -> bool:
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) and importlib.util.find_spec("mlflow") is not None


class _Mlflow:
    """A run on the server at `MLFLOW_TRACKING_URI`. Failures only warn."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    @classmethod
    def begin(cls, settings: dict[str, Any], run_id: str | None) -> "_Mlflow | None":
        """Begin or continue a run; None if that fails."""
        from mlflow.tracking import MlflowClient

        try:
            client = MlflowClient()
            if run_id is None:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "nsnet")
                experiment = client.get_experiment_by_name(name)
                experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
                run_id = client.create_run(experiment_id).info.run_id
                for key, value in settings.items():
                    client.log_param(run_id, key, without_secrets(str(value))[:500])
        except Exception as error:  # from the server, the network or the settings
            logger.warning("MLflow is not used: %s", errors.reason(error))
            return None
        return cls(client, run_id)

    def log(self, values: dict[str, float], step: int) -> None:
        try:
            for name, value in values.items():
                self._client.log_metric(self.run_id, name, value, step=step)
        except Exception as error:  # as above
            logger.warning("MLflow did not store step %d: %s", step, errors.reason(error))

    def end(self) -> None:
        try:
            self._client.set_terminated(self.run_id)
        except Exception as error:  # as above
            logger.warning("MLflow's run was not ended: %s", errors.reason(error))
