"""The table of all series that this program reports. Dashboard, alarms and reference are checked against it.

Ray exports each name with the prefix `ray_`, and with labels of its own beside those listed here: node, session and
worker. Labels are few and bounded: never an address, a run, or a text that a stranger wrote.
"""

from dataclasses import dataclass
from typing import Final, Literal

EXPORTED_PREFIX: Final = "ray_"
"""Ray puts it before each name."""
Kind = Literal["counter", "gauge"]
Key = tuple[str, ...]
"""Name of a series, and the values of its labels in their order."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A series, or one for each combination of its labels."""

    name: str
    """Ends with its unit; a counter's with `_total`."""
    kind: Kind
    labels: tuple[str, ...] = ()
    help: str
    """One line, for readers of the dashboard."""

    def key(self, *labels: str) -> Key:
        """Its key with these values of its labels."""
        return (self.name, *labels)

    @property
    def exported(self) -> str:
        """Name under which Prometheus stores it."""
        return EXPORTED_PREFIX + self.name


IMAGES: Final = Series(
    name="nsnet_images_total", kind="counter", labels=("work", "stage", "outcome", "error_class"),
    help="Images that reached a stage, by outcome: done or failed, and then the class of the error. An image counts in "
    "each stage that it reaches; a block that Ray repeats counts twice.",
)  # fmt: skip
FETCHED_BYTES: Final = Series(
    name="nsnet_fetched_bytes_total", kind="counter", labels=("work",),
    help="Bytes of images that were fetched. Blocks that Ray repeats count twice.",
)  # fmt: skip
REQUESTS_REPEATED: Final = Series(
    name="nsnet_requests_repeated_total", kind="counter", labels=("work",),
    help="Requests for images beyond the first of each.",
)  # fmt: skip
STAGE_SECONDS: Final = Series(
    name="nsnet_stage_seconds_total", kind="counter", labels=("work", "stage"),
    help="Seconds of all processes by stage. Tasks: fetching (waiting for the store), decoding. Model actors: "
    "captioning, embedding, scoring, and waiting (without a batch), or waiting for other models.",
)  # fmt: skip
QUEUE_IMAGES: Final = Series(
    name="nsnet_queue_images", kind="gauge", labels=("work", "stage"),
    help="Images that wait for a stage, or are in it.",
)  # fmt: skip
PLANNED: Final = Series(
    name="nsnet_run_images_planned", kind="gauge", labels=("work",),
    help="Images that the attempt has to do; after a crash, those that were left. Training: images of all epochs.",
)  # fmt: skip
DONE: Final = Series(
    name="nsnet_run_images_done", kind="gauge", labels=("work",), help="Images of the attempt that passed all stages."
)
LOCKS_HELD: Final = Series(
    name="nsnet_locks_held", kind="gauge", help="Leases of outputs that this process holds; 0 after their release."
)
LOCK_RENEWED: Final = Series(
    name="nsnet_lock_renewed_timestamp_seconds", kind="gauge",
    help="Time of the last successful heartbeat of the lease; of several, the oldest.",
)  # fmt: skip
PUBLISHED_AT: Final = Series(
    name="nsnet_published_timestamp_seconds", kind="gauge", labels=("product",),
    help="Time at which the process wrote its last record, also that of a run with nothing to do.",
)  # fmt: skip
PUBLISHED_IMAGES: Final = Series(
    name="nsnet_published_images", kind="gauge", labels=("product", "status"),
    help="Rows that the last command published, of several detectors all together, by status: scored or failed.",
)  # fmt: skip
PUBLISHED_SECONDS: Final = Series(
    name="nsnet_published_seconds", kind="gauge", labels=("product",),
    help="Seconds of the last attempt of the last command that published; of several detectors, the longest.",
)  # fmt: skip
FLAGGED_SHARE: Final = Series(
    name="nsnet_flagged_share",
    kind="gauge",
    labels=("detector",),
    help="Share of the last published run that is called fake. The label is the beginning of the detector's id.",
)
FLAGGED_EXPECTED: Final = Series(
    name="nsnet_flagged_share_expected",
    kind="gauge",
    labels=("detector",),
    help="The share that earlier runs of the same detector and source predict.",
)
DRIFT_ALARM: Final = Series(
    name="nsnet_drift_alarm", kind="gauge", labels=("detector", "statistic"),
    help="1: the last published run differs from earlier ones in this statistic, as `nsnet runs` says it; else 0.",
)  # fmt: skip
FAILED_SHARE: Final = Series(
    name="nsnet_failed_share",
    kind="gauge",
    help="Share of failed images of the command, at its end; of runs, the worst.",
)
FAILED_SHARE_ALLOWED: Final = Series(
    name="nsnet_failed_share_allowed", kind="gauge", help="The share that --max-failed allows."
)
EXIT_CODE: Final = Series(
    name="nsnet_exit_code", kind="gauge", labels=("command",), help="Exit code of the command, set when it ends."
)
TRAINING_LOSS: Final = Series(
    name="nsnet_training_loss", kind="gauge", labels=("term",),
    help="Terms of the last step's loss, means over all processes: loss (the sum), contrastive, bce, alignment, "
    "decorrelation.",
)  # fmt: skip
RESIDUAL_ENERGY: Final = Series(
    name="nsnet_training_residual_energy", kind="gauge",
    help="Mean share of an image feature's length that the projection leaves, in the last step.",
)  # fmt: skip
TRAINING_IMAGES: Final = Series(
    name="nsnet_training_images_total", kind="counter",
    help="Images of completed steps, all processes together. Steps that a restart repeats count twice.",
)  # fmt: skip
TRAINING_SECONDS: Final = Series(
    name="nsnet_training_seconds_total", kind="counter", labels=("part",),
    help="Seconds of the first training process: waiting (for images), computing, validating, checkpointing.",
)  # fmt: skip
TRAINING_EPOCH: Final = Series(name="nsnet_training_epoch", kind="gauge", help="Completed epochs of the training.")
VALIDATION_AP: Final = Series(
    name="nsnet_training_validation_ap", kind="gauge", help="Average precision on the validation images, last epoch."
)

TABLE: Final = {value.name: value for value in list(globals().values()) if isinstance(value, Series)}
"""All series by name, in the order above."""
