"""Carry out a training: inputs, Ray Train, calibration, export of the bundle."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster.address import check_address
from jobs.console import summary
from jobs.console.output import mark, say
from jobs.dataset.source import Source
from jobs.experiments import inputs, leakage, predictions
from jobs.experiments.experiment import Experiment
from jobs.experiments.export import write_bundle
from jobs.experiments.paths import LEAKAGE_FILE, PREDICTIONS_FILE, RESULT_FILE
from jobs.experiments.request import TrainRequest
from jobs.experiments.split import Split
from jobs.runs import lock
from jobs.storage import listing, probes, uris, writing
from jobs.training import checkpoints
from nsnet.bundle import DESCRIPTION
from nsnet.calibration import OperatingPoint
from nsnet.clip_weights import find_weights
from nsnet.digest import file_digest
from nsnet.errors import UsageError

if TYPE_CHECKING:
    from jobs.training.examples import Examples


def train(request: TrainRequest) -> dict[str, Any]:
    """Train and write a bundle; returns the record of the training (`result.json`).

    Checks the request before it starts Ray or a model.
    """
    experiment, point = Experiment.resolve(request), OperatingPoint.parse(request.operating_point)
    probes.check_output(request.out)
    check_address(request.address)
    Source(request.source).check()
    if listing.exists(uris.join(request.out, DESCRIPTION)):
        raise UsageError(f"{request.out} already holds a trained detector; choose another --out")

    find_weights(experiment.recipe.detector.clip, experiment.models.clip_path(experiment.recipe.detector))
    if experiment.recipe.detector.projection.needs_captions:
        experiment.models.text_tower(experiment.recipe.detector)
    with lock.hold(request.work):
        if request.belongs_to(experiment.settings):
            say("continuing an unfinished training")
        examples = inputs.examples_of(experiment)
        point.check_reals(int((examples.labels[examples.rows("val")] == 0).sum()))

        from jobs.experiments import basis  # imports Ray Data and torch

        experiment = basis.fit_projection(experiment, examples)

        from jobs.experiments.trainer import run_trainer  # imports Ray Train

        mark(stage="training")
        last = run_trainer(experiment, examples)
        mark(stage="export")
        result = _finish(experiment, examples, last, point)
        mark(stage=None)
        return result


def _finish(experiment: Experiment, examples: "Examples", last: Path, point: OperatingPoint) -> dict[str, Any]:
    """Calibrate the weights of the best epoch on validation; write them as a bundle, with predictions and metrics."""
    request, settings = experiment.request, experiment.settings
    progress = checkpoints.read_progress(last, checkpoints.settings_digest(settings))
    checkpoints.remove(last)
    judged = predictions.judge(examples, progress, point)
    names = ("source", "recipe", "variant", "seed", "leave_out")
    origin = {name: settings[name] for name in names} | {"workers": list(request.workers)}
    split = Split(table=examples.table)
    origin |= {
        "training": settings["training"], "split": split.counts(), "leaking": split.leaking, "work": request.work
    }  # fmt: skip
    result = predictions.describe(judged, progress, origin)
    writes_bundle = experiment.recipe.training.captions == "own"  # a control is only for comparison
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        detector_id = request.variant
        if writes_bundle:
            detector_id = write_bundle(experiment, progress.best, judged.calibration, result, folder)
        predictions.write_predictions(judged, detector_id, experiment.file(PREDICTIONS_FILE))
        if progress.features:
            writing.write_json(experiment.file(LEAKAGE_FILE), leakage.measure(experiment, examples, progress))
        writing.write_json(experiment.file(RESULT_FILE), result)
        if writes_bundle:  # last, because a bundle marks a finished training
            writing.upload_folder(folder, request.out, last=DESCRIPTION)
            say(f"detector {detector_id}: {request.out}, --detector-sha256 {file_digest(folder / DESCRIPTION)}")
    say(predictions.summary(result))
    summary.note_item(
        "trainings", detector_id=detector_id, bundle=request.out if writes_bundle else None,
        record=experiment.file(RESULT_FILE), variant=request.variant, seed=request.seed, epochs=len(progress.history),
        best_epoch=result["best_epoch"]["epoch"], validation_ap=result["best_epoch"]["val_ap"],
    )  # fmt: skip
    return result
