"""`nsnet train`: labelled pictures to a detector bundle."""

import hashlib
import json
import secrets
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobs import console, storage
from jobs.console import say
from nsnet.config import to_dict
from nsnet.errors import ConfigError, NsnetError, SourceError, UsageError
from nsnet.images import DecodeLimits

if TYPE_CHECKING:
    from jobs.resources import Shares
    from nsnet.recipes import Recipe

SETTINGS: Final = "settings.json"
EXAMPLES_DONE: Final = "examples.json"
LOST_SHARE: Final = 0.05
"""Share of unreadable training pictures above which training does not start."""


class TrainingFailedError(NsnetError):
    """Training ended without a detector."""


@click.command()
@click.argument("source")
@click.option("--out", required=True, help="Where the detector bundle goes: a folder or s3:// URI.")
@click.option("--recipe", default="tiny", show_default=True, help="tiny, vit-l-14, or an open_clip MODEL[:TAG].")
@click.option("--workers", type=int, default=1, show_default=True, help="Training processes (DDP).")
@click.option("--epochs", type=int, default=None, help="Passes over the pictures; default: the recipe's.")
@click.option("--batch-size", type=int, default=None, help="Images per step over all workers; default: the recipe's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, order and split.")
@console.weights_options
@console.limit_options
@console.address_option
def command(source: str, **options: Any) -> int:
    """Train a detector on the labelled pictures of SOURCE and write it as a bundle.

    Labels come from 0_real|1_fake, nature|ai or real|fake folders, or from a `label` column. `train` and `val` folders,
    or a `split` column, are kept; a pool without them is split by content. The same command continues after a stop.
    """
    train(source, limits=console.limits_from(options), **options)
    return 0


def train(
    source: str,
    *,
    out: str,
    recipe: str = "tiny",
    workers: int = 1,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    clip_weights: str | None = None,
    captioner: str | None = None,
    limits: DecodeLimits | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Train and write a bundle; returns the record of the best epoch. Checks come before Ray or a model is started."""
    from jobs.sources import Source
    from nsnet import recipes

    if workers < 1 or seed < 0:
        raise ConfigError(f"--workers must be at least 1 and --seed at least 0, got {workers} and {seed}")
    out, limits = storage.absolute(out), limits or DecodeLimits()
    chosen = recipes.get(recipe)
    training = replace(
        chosen.training,
        epochs=chosen.training.epochs if epochs is None else epochs,
        batch_size=chosen.training.batch_size if batch_size is None else batch_size,
    )
    chosen = replace(chosen, training=training)
    storage.check_output(out)
    Source(source).check()
    if storage.exists(storage.join(out, "detector.json")):
        raise UsageError(f"{out} already holds a trained detector; choose another --out")

    from jobs.stages import Models
    from nsnet.captions import thumbnail_px
    from nsnet.clip import find_weights
    from nsnet.preparation import PreparationConfig

    models = Models(clip_weights=storage.model_path(clip_weights), captioner=storage.model_path(captioner))
    find_weights(chosen.detector.clip, models.clip_path())
    side = thumbnail_px(models.captioner_folder(chosen.detector.captioner))
    preparation = PreparationConfig(thumbnail_px=side, patches=chosen.detector.patches, limits=limits)
    settings = {
        "source": storage.absolute(source), "recipe": recipe, "seed": seed, "workers": workers,
        "clip_weights": models.clip_weights, "captioner": models.captioner,
        "detector": to_dict(chosen.detector), "training": to_dict(chosen.training), "preparation": to_dict(preparation),
    }  # fmt: skip
    work = _work_place(out)
    _check_unfinished(work, settings)
    examples_uri, plan_note = _examples(source, work, chosen, preparation, models, address, settings)
    split = _split(examples_uri, seed, chosen.training.validation_share, workers)
    say(f"split: {split['training']} training and {split['validation']} validation pictures")

    from jobs import resources

    resources.connect(address)
    best = _fit(settings, work, examples_uri, split["validation_ids"], workers, resources.cluster_shares())
    record = {**{key: settings[key] for key in ("source", "recipe", "seed", "workers", "training")}, **plan_note}
    record |= {"pictures": {key: value for key, value in split.items() if key != "validation_ids"}}
    best_epoch = _bundle(best, chosen, models, out, record, seed)
    storage.remove_folder(examples_uri)
    return best_epoch


def _work_place(out: str) -> str:
    """Where examples and checkpoints lie: beside the bundle, which holds nothing but itself."""
    if not storage.is_local(out) and "/" not in storage.arrow_path(out):
        raise UsageError(f"--out {out} is a whole bucket; name a place in it for the detector")
    return f"{out}.training"


def _check_unfinished(work: str, settings: dict[str, Any]) -> None:
    """Make sure that an unfinished training at this place, if there is one, has the same settings."""
    uri = storage.join(work, SETTINGS)
    if not storage.exists(uri):
        return
    found, given = storage.read_json(uri), json.loads(json.dumps(settings))
    if found != given:
        changed = sorted(key for key in given if found.get(key) != given[key])
        raise UsageError(
            f"{work} holds an unfinished training with other settings ({', '.join(changed)}); give the same "
            "command to continue it, or choose another --out"
        )
    say("continuing an unfinished training")


def _examples(
    source: str,
    work: str,
    recipe: "Recipe",
    preparation: Any,
    models: Any,
    address: str | None,
    settings: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Prepare the examples, or find them prepared; returns their folder and what is worth recording."""
    from jobs import schema
    from jobs.plan import write_manifest

    done = storage.join(work, EXAMPLES_DONE)
    if storage.exists(done):
        note = storage.read_json(done)
        return storage.join(work, note.pop("folder")), note
    source = storage.absolute(source)
    plan = write_manifest(source, storage.join(work, "manifest.parquet"))
    say(f"source: {plan.describe()}")
    if plan.labels.get(None):
        raise SourceError(
            f"{plan.labels[None]} of {plan.count} pictures have no label: put them below 0_real and 1_fake (or nature "
            "and ai, real and fake) folders, or give a manifest with a label column"
        )
    if len(plan.labels) < 2:
        real, fake = plan.labels.get(0, 0), plan.labels.get(1, 0)
        raise SourceError(f"the source has {real} real and {fake} fake pictures; both are needed")

    storage.write_json(storage.join(work, SETTINGS), settings)  # from here on the place belongs to this training

    from jobs import attempts, pipeline, resources
    from jobs.stages import Embed

    resources.connect(address)
    columns = [*schema.SOURCE, *schema.PICTURE, *schema.OUTCOME, *schema.LABELS, schema.MANIFEST.field("split")]
    keep = pipeline.with_pixels(columns, "patches")
    # A fresh folder each time: rows of a preparation that was stopped are not mixed with these.
    name = f"examples-{secrets.token_hex(4)}"
    todo = storage.join(work, f"{name}-todo")
    attempts.write_todo(plan.uri, todo)
    stream = pipeline.captioned(
        todo,
        source,
        preparation,
        recipe.detector.captioner,
        models,
        keep=keep,
        batch_size=recipe.training.batch_size,
    )
    with_features = keep.append(schema.text_features())
    stream = stream.through(
        Embed, stream.shares.scorers, stream.models, recipe.detector.clip, with_features, recipe.training.batch_size,
        stream.report,
    )  # fmt: skip
    stream.write(storage.join(work, name), "prepare", plan.count, ("prepared", "captioned", "embedded"))
    note = {"left_out": plan.left_out}
    storage.write_json(done, {"folder": name, **note})
    storage.remove_folder(todo)
    return storage.join(work, name), note


def _split(examples_uri: str, seed: int, share: float, workers: int) -> dict[str, Any]:
    """Which examples are for validation: by their `split`, or by content where the source has none."""
    from jobs.examples import is_validation, read_labels

    rows = read_labels(examples_uri)
    good = [row for row in rows if row["status"] == "scored"]
    lost = [row for row in rows if row["status"] != "scored"]
    for row in lost[:10]:
        say(f"  unreadable: {row['uri']}: {row['error_class']}: {row['error_message']}")
    if len(lost) > LOST_SHARE * len(rows):
        raise SourceError(
            f"{len(lost)} of {len(rows)} training pictures are unreadable, more than {LOST_SHARE:.0%}: mend the source"
        )
    given = any(row["split"] == "val" for row in good)
    usable = [row for row in good if row["split"] != "test"]
    validation = [
        row for row in usable
        if (row["split"] == "val" if given else is_validation(row["content_hash"], seed, share))
    ]  # fmt: skip
    ids = {row["image_id"] for row in validation}
    training = [row for row in usable if row["image_id"] not in ids]
    for name, part in (("training", training), ("validation", validation)):
        classes = Counter(row["label"] for row in part)
        if len(classes) < 2:
            raise SourceError(
                f"the {name} part has {classes.get(0, 0)} real and {classes.get(1, 0)} fake pictures; both are needed"
            )
    if len(training) < 2 * workers:
        raise SourceError(f"{len(training)} training pictures are too few for {workers} workers")
    return {
        "training": len(training), "validation": len(validation), "unreadable": len(lost),
        "kept_for_test": len(good) - len(usable), "validation_ids": sorted(ids),
    }  # fmt: skip


def _fit(
    settings: dict[str, Any], work: str, examples_uri: str, validation_ids: list[str], workers: int, shares: "Shares"
) -> Path:
    """Train under Ray Train; returns a local folder with the checkpoint of the best epoch."""
    import uuid

    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from jobs import progress, worker

    gpus = {"GPU": 1.0} if shares.actor_gpus > 0 else {}
    cpus = min(1.0, 0.9 * shares.cpus / workers)
    name = hashlib.sha256(work.encode()).hexdigest()[:12]
    board_name = f"nsnet-train-{uuid.uuid4().hex[:8]}"
    board = progress.start_board(board_name)
    told = worker.WorkerConfig(
        detector=settings["detector"], training=settings["training"], seed=settings["seed"],
        clip_weights=settings["clip_weights"], examples=examples_uri, validation_ids=validation_ids, run_name=name,
        board=board_name,
    )  # fmt: skip
    system, path = storage.arrow_filesystem(work)
    trainer = TorchTrainer(
        worker.run,
        train_loop_config=vars(told),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=bool(gpus), resources_per_worker={"CPU": cpus, **gpus}
        ),
        run_config=RunConfig(
            name="checkpoints", storage_path=path, storage_filesystem=system,
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="quality", checkpoint_score_order="max"
            ),
        ),
    )  # fmt: skip
    with progress.watch(board, "train", 0, ()):
        result = trainer.fit()
    if result.error is not None:
        raise TrainingFailedError(f"training failed: {result.error}")
    best = result.get_best_checkpoint("quality", "max") or result.checkpoint
    if best is None:
        raise TrainingFailedError("training ended without a checkpoint")
    return Path(best.to_directory(tempfile.mkdtemp(prefix="nsnet-best-")))


def _bundle(best: Path, recipe: "Recipe", models: Any, out: str, training: dict[str, Any], seed: int) -> dict[str, Any]:
    """Weights of the best epoch, calibrated on validation, as a bundle."""
    import shutil

    from jobs import worker
    from nsnet import calibration
    from nsnet.captions import save_tiny_captioner
    from nsnet.detector import Detector

    state = json.loads((best / worker.STATE).read_text())
    detector = Detector.build(recipe.detector, models.clip_path(), seed=seed)
    worker.load_weights(detector.network, best / worker.WEIGHTS)
    fitted = calibration.fit(state["validation"]["labels"], state["validation"]["logits"])
    detector.with_calibration(fitted)
    record: dict[str, Any] = max(state["history"], key=worker.quality)
    with tempfile.TemporaryDirectory() as scratch:
        captioner = models.captioner_folder(recipe.detector.captioner)
        if captioner is None:
            captioner = Path(scratch) / "captioner"
            captioner.mkdir()
            save_tiny_captioner(captioner, recipe.detector.captioner.seed)
        elif models.captioner is None:
            captioner = None  # the hub has it, at a pinned revision
        bundle = Path(scratch) / "bundle"
        described = detector.save(bundle, captioner=captioner, training={**training, "best_epoch": record})
        storage.upload_folder(bundle, out, last="detector.json")
    shutil.rmtree(best, ignore_errors=True)
    say(
        f"detector {described.detector_id}: epoch {record['epoch']}, validation AP {record['val_ap']:.4f}, temperature "
        f"{fitted.temperature:.3g}, threshold {fitted.threshold:.3g}\nbundle: {out}"
    )
    return record


if __name__ == "__main__":
    console.run(command, "nsnet train")
