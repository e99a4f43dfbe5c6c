"""Configuration of a training process."""

from dataclasses import dataclass
from typing import Any

from jobs.storage.uris import Uri


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """All settings of a training process, as JSON-ready values."""

    detector: dict[str, Any]
    training: dict[str, Any]
    preparation: dict[str, Any]
    seed: int
    source: Uri
    clip_weights: Uri | None
    text_weights: Uri | None
    work: Uri
    """The training's own folder."""
    split: Uri
    """The stored split."""
    captions: Uri | None
    """Published captions; None: the detector needs none."""
    features_id: str
    """Identity of the captioner and the text tower that made the captions and features."""
    fitted: Uri | None
    """Semantic basis or caption bank, computed from all captions."""
    digest: str
    """Digest of the settings."""
    failed_share: float
    """Share of an epoch's images that may fail."""
    task_cpus: float
    """CPUs of a decoding task."""
    board: str | None
    """Name of the progress board."""
    leakage: int = 0
    """Test images whose features are kept."""
    weights: Uri | None = None
    """Mirror that replaces the hub."""
