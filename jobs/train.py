"""`nsnet train`: labelled pictures to a detector bundle."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobs.cluster.address import check_address
from jobs.console import main, parameters
from jobs.console.output import say
from jobs.console.parameters import WorkersType
from jobs.experiments.request import TrainRequest
from jobs.runs import lock
from jobs.storage import listing, probes, uris, writing
from nsnet.calibration import Calibration, OperatingPoint
from nsnet.errors import UsageError

if TYPE_CHECKING:  # these import torch, which takes seconds
    from jobs.pipeline.models import Models
    from jobs.training.examples import Examples
    from nsnet.recipes import Recipe

PREDICTIONS: Final = "predictions.parquet"
RESULT: Final = "result.json"


@click.command()
@click.argument("source")
@click.option("--out", required=True, help="Where the detector bundle goes: a folder or s3:// URI.")
@click.option("--recipe", default="tiny", show_default=True, help="tiny, vit-l-14, or an open_clip MODEL[:TAG].")
@click.option("--variant", default="advanced", show_default=True, help="advanced, original[:RULE], linear, rank-k[:K].")
@click.option("--workers", type=WorkersType(), default="1", show_default=True, help="Training processes: N, or 2-8.")
@click.option("--epochs", type=int, default=None, help="Passes over the pictures; default: the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Images per step over all workers; default: the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other setting of TrainingConfig.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, order and split.")
@click.option("--captions", default=None, help="Where nsnet caption published; default: captions are made beside OUT.")
@click.option("--caption-missing", is_flag=True, help="Caption pictures that have no caption there, on the way.")
@click.option("--split", default=None, help="split.parquet of an earlier training, to use the same pictures.")
@click.option("--leave-out", default=None, metavar="GENERATOR", help="Keep this generator's pictures for the test.")
@click.option(
    "--operating-point",
    default="accuracy",
    show_default=True,
    help="What the threshold is for: accuracy, fpr=1%, or cost=10:1@0.01 (false alarm : miss @ share of fakes).",
)
@click.option(
    "--max-failed", type=parameters.ShareType(), default="5%", show_default=True, help="Share of unreadable pictures."
)
@parameters.max_left_out_option
@parameters.column_option
@parameters.weights_options
@parameters.limit_options
@parameters.address_option
def command(source: str, **options: Any) -> int:
    """Train a detector on the labelled pictures of SOURCE and write it as a bundle.

    Labels come from 0_real|1_fake, nature|ai or real|fake folders, or from a `label` column. `train`, `val` and `test`
    folders, or a `split` column, are kept; a pool without them is split by content. The same command continues after a
    stop. Split, records and predictions lie in OUT.training.
    """
    train(TrainRequest(source=source, limits=parameters.limits_from(options), **options))
    return 0


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

    from jobs.experiments import inputs
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
        recipe = inputs.fitted(request, recipe, facts, examples)

        from jobs.experiments.trainer import fit  # it imports Ray Train

        last = fit(request, recipe, facts, examples, settings)
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
            detector_id = _bundle(request, recipe, models, progress.best, judged.calibration, result, folder)
        predictions.write_predictions(judged, detector_id, uris.join(request.work, PREDICTIONS))
        writing.write_json(uris.join(request.work, RESULT), result)
        if for_use:  # last: where a bundle is, the training is finished
            writing.upload_folder(folder, request.out, last="detector.json")
            say(f"detector {detector_id}: {request.out}")
    say(predictions.summary(result))
    return result


def _bundle(
    request: TrainRequest, recipe: "Recipe", models: "Models", best: dict[str, Any], calibration: Calibration,
    result: dict[str, Any], folder: Path,
) -> str:  # fmt: skip
    """Write the bundle to a folder of this machine; returns the detector's id."""
    from jobs.experiments.inputs import FITTED
    from jobs.training import checkpoints
    from nsnet.detector import Detector

    detector = Detector.build(recipe.detector, models.clip_path(), seed=request.seed)
    if recipe.detector.projection.kind in ("global", "rank_k"):
        checkpoints.load_fitted(detector.network, uris.join(request.work, FITTED))
    checkpoints.load_weights(detector.network, best)
    detector.with_calibration(calibration)
    with tempfile.TemporaryDirectory() as scratch:
        captioner = _captioner(recipe, models, Path(scratch) / "captioner")
        return detector.save(folder, captioner=captioner, training=result).detector_id


def _captioner(recipe: "Recipe", models: "Models", scratch: Path) -> Path | None:
    """The captioner that goes into the bundle; None: it needs none, or the hub has it at a pinned revision."""
    from nsnet.captions import save_tiny_captioner

    if not recipe.detector.projection.needs_captions:
        return None
    if models.captioner_folder(recipe.detector.captioner) is not None:
        return Path(models.captioner) if models.captioner is not None else None
    scratch.mkdir()
    save_tiny_captioner(scratch, recipe.detector.captioner.seed)
    return scratch


if __name__ == "__main__":
    main.run(command, "nsnet train")
