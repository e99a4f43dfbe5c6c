"""A training from its request to its bundle: inputs, Ray Train, calibration, export."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster.address import check_address
from jobs.console.output import say
from jobs.experiments.export import write_bundle
from jobs.experiments.paths import PREDICTIONS, RESULT
from jobs.experiments.request import TrainRequest
from jobs.runs import lock
from jobs.storage import listing, probes, uris, writing
from nsnet.calibration import OperatingPoint
from nsnet.errors import UsageError

if TYPE_CHECKING:
    from jobs.pipeline.models import Models
    from jobs.training.examples import Examples
    from nsnet.recipes import Recipe


def train(request: TrainRequest) -> dict[str, Any]:
    """Train and write a bundle; returns what is known of the training (`result.json`).

    Whatever is wrong with the request is found before Ray or a model is started.
    """
    request = request.absolute()
    recipe, point = request.resolved(), OperatingPoint.parse(request.operating_point)
    probes.check_output(request.out)
    check_address(request.address)
    from jobs.dataset.source import Source

    Source(request.source).check()
    if listing.exists(uris.join(request.out, "detector.json")):
        raise UsageError(f"{request.out} already holds a trained detector; choose another --out")

    from jobs.experiments import basis, inputs
    from jobs.pipeline.models import Models
    from nsnet.clip import find_weights

    models = Models(clip_weights=request.clip_weights, captioner=request.captioner)
    find_weights(recipe.detector.clip, models.clip_path())
    settings = request.identity(recipe)
    with lock.hold(request.work):
        if request.belongs_to(settings):
            say("continuing an unfinished training")
        facts = inputs.where(request, recipe, models)
        examples = inputs.examples_of(request, recipe, facts, settings)
        recipe = basis.fit_projection(request, recipe, facts, examples)

        from jobs.experiments.trainer import run_trainer  # it imports Ray Train

        last = run_trainer(request, recipe, facts, examples, settings)
        return _finish(request, recipe, models, examples, last, point, settings)


def _finish(
    request: TrainRequest, recipe: "Recipe", models: "Models", examples: "Examples", last: Path, point: OperatingPoint,
    settings: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The weights of the best epoch, calibrated on validation, as a bundle; predictions and numbers beside it."""
    from jobs.experiments import predictions
    from jobs.experiments.split import Split
    from jobs.training import checkpoints

    progress = checkpoints.read_progress(last, checkpoints.settings_digest(settings))
    checkpoints.remove(last)
    judged = predictions.judge(examples, progress, point)
    names = ("source", "recipe", "variant", "seed", "leave_out")
    told = {name: settings[name] for name in names} | {"workers": list(request.workers)}
    split = Split(table=examples.table)
    told |= {"training": settings["training"], "split": split.counts(), "leaking": split.leaking, "work": request.work}
    result = predictions.describe(judged, progress, told)
    for_use = recipe.training.captions == "own"  # a control is for comparison alone
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        detector_id = request.variant
        if for_use:
            detector_id = write_bundle(request, recipe, models, progress.best, judged.calibration, result, folder)
        predictions.write_predictions(judged, detector_id, uris.join(request.work, PREDICTIONS))
        writing.write_json(uris.join(request.work, RESULT), result)
        if for_use:  # last: where a bundle is, the training is finished
            writing.upload_folder(folder, request.out, last="detector.json")
            say(f"detector {detector_id}: {request.out}")
    say(predictions.summary(result))
    return result
