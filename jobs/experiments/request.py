"""The request for a training, and the recipe that it resolves to."""

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from jobs.experiments.paths import SETTINGS_FILE
from jobs.storage import listing, reading, uris
from jobs.storage.uris import Uri
from nsnet.config import override, to_dict
from nsnet.errors import ConfigError, UsageError
from nsnet.images import DecodeLimits

if TYPE_CHECKING:  # imports torch, which takes seconds
    from nsnet.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """A request for a training: its source, recipe, changes of the recipe, and output."""

    source: Uri
    out: Uri
    recipe: str = "tiny"
    variant: str = "advanced"
    workers: tuple[int, int] = (1, 1)
    """Minimum and maximum number of training processes; training uses as many as the cluster can run."""
    epochs: int | None = None
    batch_size: int | None = None
    settings: tuple[str, ...] = ()
    """Overrides, as `NAME=VALUE`."""
    seed: int = 0
    captions: Uri | None = None
    """Output of `nsnet caption`; None: captions are made in the training's folder."""
    caption_missing: bool = False
    """Caption images that have no caption in `captions`."""
    split: Uri | None = None
    """A stored split to use; None: a new one is made."""
    columns: tuple[str, ...] = ()
    """Column names of Parquet files, as in `plan.Selection`."""
    leave_out: str | None = None
    """Generator whose images are kept for the test."""
    operating_point: str = "accuracy"
    max_failed: float = 0.05
    max_left_out: int = 0
    """Folders and containers of the source that may be unreadable while a split is made; not part of the identity."""
    leakage: int = 0
    """Test images by which leakage is measured; 0: it is not. Not part of the identity."""
    clip_weights: Uri | None = None
    text_weights: Uri | None = None
    captioner: Uri | None = None
    weights: Uri | None = None
    """Mirror that replaces the hub; a place, so not part of the identity."""
    limits: DecodeLimits = DecodeLimits()
    address: str | None = None

    def __post_init__(self) -> None:
        low, high = self.workers
        if not 1 <= low <= high or self.seed < 0:
            raise ConfigError(
                f"--workers must be N or MIN-MAX, at least 1, and --seed ≥ 0, got {low}-{high}, {self.seed}"
            )
        if self.split is not None and self.leave_out is not None:
            raise ConfigError(
                "give --split or --leave-out, not both: a stored split decides which images are trained on"
            )
        if not uris.is_local(self.out) and "/" not in uris.arrow_path(self.out):
            raise UsageError(f"--out {self.out} is a whole bucket; give a prefix in it for the detector")

    @property
    def work(self) -> Uri:
        """Folder of split, checkpoints and records, beside the bundle, which must hold no other files."""
        return Uri(f"{self.out}.training")

    def allowed_variants(self) -> tuple[str, ...]:
        """Names of the variants that the towers of the recipe allow. Raises `ConfigError`."""
        from nsnet import recipes

        return recipes.allowed_variants(recipes.get(self.recipe).detector)

    def resolved(self) -> "Recipe":
        """The recipe with the request's changes. Raises `ConfigError`."""
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
            if name.startswith(("detector.captioner.", "detector.clip.", "detector.text")):
                raise ConfigError(f"--set {setting}: the recipe fixes captioner and CLIP; choose another --recipe")
            if name.startswith("detector."):
                detector = override(detector, name.removeprefix("detector."), value)
            else:
                training = override(training, name, value)
        return replace(chosen, detector=detector, training=training)

    def belongs_to(self, settings: dict[str, Any]) -> bool:
        """Whether the training's folder belongs to these settings; raises `UsageError` if it belongs to others."""
        uri = uris.join(self.work, SETTINGS_FILE)
        if not listing.exists(uri):
            return False
        remedy = f"restore it from a copy, or choose another --out; without it, {self.work} belongs to no training"
        stored = reading.read_json(uri, {}, remedy)
        if stored != settings:
            changed = sorted(key for key in stored.keys() | settings.keys() if stored.get(key) != settings.get(key))
            raise UsageError(
                f"{self.work} holds a training with other settings ({', '.join(changed)}); run its original command to "
                "continue it, or choose another --out"
            )
        return True

    def identity(self, recipe: "Recipe") -> dict[str, Any]:
        """JSON-ready identity of the training, independent of machines and number of processes."""
        names = ("source", "recipe", "variant", "seed", "captions", "split", "leave_out", "clip_weights", "captioner")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"columns": self.columns} if self.columns else {}
        settings |= {"text_weights": self.text_weights} if self.text_weights else {}
        settings |= {"limits": to_dict(self.limits), "max_failed": self.max_failed}
        settings |= {
            "detector": to_dict(recipe.detector),
            "training": to_dict(recipe.training),
            "basis": str(recipe.basis),
        }
        values: dict[str, Any] = json.loads(json.dumps(settings))
        return values


def needs_captions(recipe: "Recipe") -> bool:
    """Whether training reads captions. A global basis is computed from them, though judging an image needs none."""
    return recipe.detector.projection.kind != "none"


COMPARED_VARIANTS: Final = (
    "linear", "no-projection", "original:energy=0.5", "original:energy=0.9", "original:energy=0.99", "advanced",
    "no-mapper", "no-alignment", "constant-caption", "shuffled-captions",
)  # fmt: skip
"""Default variants; `original` gets its rank by energy, which works for any embedding dimension."""
