"""What a training process is given."""

from dataclasses import dataclass
from typing import Any

from jobs.storage.uris import Uri


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Everything that a training process needs to know; travels as JSON-ready values."""

    detector: dict[str, Any]
    training: dict[str, Any]
    preparation: dict[str, Any]
    seed: int
    source: Uri
    clip_weights: Uri | None
    work: Uri
    """The training's own place."""
    split: Uri
    """The stored split."""
    captions: Uri | None
    """Published captions; None: the detector needs none."""
    features_id: str
    """Identity of the captioner and the text tower whose captions and features are read."""
    fitted: Uri | None
    """What was computed from all captions: basis or bank."""
    digest: str
    """Of the settings."""
    failed_share: float
    """Share of an epoch's images that may fail."""
    task_cpus: float
    """CPUs of a decoding task."""
    board: str | None
    """Name of the progress board."""
