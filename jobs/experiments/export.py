"""Write a trained network as a detector bundle."""

import tempfile
from pathlib import Path
from typing import Any

from jobs.experiments.experiment import Experiment
from jobs.experiments.paths import FITTED_FILE
from jobs.pipeline.models import Models
from jobs.training import checkpoints
from nsnet.calibration import Calibration
from nsnet.captioner import save_tiny_captioner
from nsnet.detector import Detector
from nsnet.recipes import Recipe


def write_bundle(
    experiment: Experiment, best: dict[str, Any], calibration: Calibration, result: dict[str, Any], folder: Path
) -> str:
    """Write the bundle to a local folder; returns the detector's id. `best`: weights of the best epoch."""
    recipe, models = experiment.recipe, experiment.models
    detector = Detector.build(recipe.detector, seed=experiment.request.seed, **models.tower_paths(recipe.detector))
    if recipe.detector.projection.kind in ("global", "rank_k"):
        checkpoints.load_fitted(detector.network, experiment.file(FITTED_FILE))
    checkpoints.load_weights(detector.network, best)
    detector.set_calibration(calibration)
    with tempfile.TemporaryDirectory() as scratch:
        captioner = _captioner(recipe, models, Path(scratch) / "captioner")
        return detector.save(folder, captioner=captioner, training=result).detector_id


def _captioner(recipe: Recipe, models: Models, scratch: Path) -> Path | None:
    """Folder of the captioner to include in the bundle; None: not needed, or the hub has it at a pinned revision."""
    if not recipe.detector.projection.needs_captions:
        return None
    if models.captioner_folder(recipe.detector.captioner) is not None:
        return Path(models.captioner) if models.captioner is not None else None
    scratch.mkdir()
    save_tiny_captioner(scratch, recipe.detector.captioner.seed)
    return scratch
