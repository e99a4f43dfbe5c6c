"""What a training was asked for, and what that comes to."""

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jobs.experiments.paths import SETTINGS_FILE
from jobs.storage import listing, reading, uris
from jobs.storage.uris import Uri
from nsnet.config import override, to_dict
from nsnet.errors import ConfigError, UsageError
from nsnet.images import DecodeLimits

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from nsnet.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What is to be trained, on what, and where."""

    source: Uri
    out: Uri
    recipe: str = "tiny"
    variant: str = "advanced"
    workers: tuple[int, int] = (1, 1)
    """Fewest and most training processes; with fewer than the most, training goes on with what there is."""
    epochs: int | None = None
    batch_size: int | None = None
    settings: tuple[str, ...] = ()
    """Overrides, as `NAME=VALUE`."""
    seed: int = 0
    captions: Uri | None = None
    """Where `nsnet caption` published; None: captions are made at the training's own place."""
    caption_missing: bool = False
    """Caption what is missing there, on the way."""
    split: Uri | None = None
    """A stored split to use; None: a new one is made."""
    columns: tuple[str, ...] = ()
    """Names of columns of Parquet files, as `plan.Selection` takes them."""
    leave_out: str | None = None
    """Generator that is kept for the test."""
    operating_point: str = "accuracy"
    max_failed: float = 0.05
    max_left_out: int = 0
    """Folders and containers of the source that may be unreadable while a split is made; not part of the identity."""
    clip_weights: Uri | None = None
    captioner: Uri | None = None
    limits: DecodeLimits = DecodeLimits()
    address: str | None = None

    def __post_init__(self) -> None:
        low, high = self.workers
        if not 1 <= low <= high or self.seed < 0:
            raise ConfigError(
                f"--workers must be N or FEWEST-MOST, at least 1, and --seed ≥ 0, got {low}-{high}, {self.seed}"
            )
        if self.split is not None and self.leave_out is not None:
            raise ConfigError("--split and --leave-out exclude each other: a stored split says what is trained on")
        if not uris.is_local(self.out) and "/" not in uris.arrow_path(self.out):
            raise UsageError(f"--out {self.out} is a whole bucket; name a place in it for the detector")

    @property
    def work(self) -> Uri:
        """Where split, checkpoints and records lie: beside the bundle, which holds nothing but itself."""
        return Uri(f"{self.out}.training")

    def resolved(self) -> "Recipe":
        """The recipe with everything that was asked for. Raises `ConfigError`."""
        from nsnet import recipes

        chosen = recipes.variant(recipes.get(self.recipe), self.variant)
        training = replace(
            chosen.training,
            epochs=chosen.training.epochs if self.epochs is None else self.epochs,
            batch_size=chosen.training.batch_size if self.batch_size is None else self.batch_size,
        )
        detector = chosen.detector
        for setting in self.settings:
            name, separator, value = setting.partition("=")
            if not separator:
                raise ConfigError(f"--set {setting}: give NAME=VALUE, such as patience=3 or detector.lora.rank=8")
            if name.startswith(("detector.captioner.", "detector.clip.")):
                raise ConfigError(
                    f"--set {setting}: captions and features are those of a recipe; choose another --recipe"
                )
            if name.startswith("detector."):
                detector = override(detector, name.removeprefix("detector."), value)
            else:
                training = override(training, name, value)
        return replace(chosen, detector=detector, training=training)

    def belongs_to(self, settings: dict[str, Any]) -> bool:
        """Whether its place holds something of a training with these settings; `UsageError` where they are others."""
        uri = uris.join(self.work, SETTINGS_FILE)
        if not listing.exists(uri):
            return False
        remedy = f"restore it from a copy, or choose another --out; without it, {self.work} belongs to no training"
        found = reading.read_json(uri, {}, remedy)
        if found != settings:
            changed = sorted(key for key in found.keys() | settings.keys() if found.get(key) != settings.get(key))
            raise UsageError(
                f"{self.work} holds a training with other settings ({', '.join(changed)}); give the same command to "
                "continue it, or choose another --out"
            )
        return True

    def identity(self, recipe: "Recipe") -> dict[str, Any]:
        """What makes it the same training, whatever the machines; JSON-ready."""
        names = ("source", "recipe", "variant", "seed", "captions", "split", "leave_out", "clip_weights", "captioner")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"columns": self.columns} if self.columns else {}
        settings |= {"limits": to_dict(self.limits), "max_failed": self.max_failed}
        settings |= {
            "detector": to_dict(recipe.detector),
            "training": to_dict(recipe.training),
            "basis": str(recipe.basis),
        }
        values: dict[str, Any] = json.loads(json.dumps(settings))
        return values


def needs_captions(recipe: "Recipe") -> bool:
    """Whether training reads captions: a global basis is made of them, though an image is judged without."""
    return recipe.detector.projection.kind != "none"
