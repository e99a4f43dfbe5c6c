"""Make the inputs of a training: facts of its images, captions, and a split."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.plan import Selection, write_manifest
from jobs.experiments import split
from jobs.experiments.experiment import Experiment
from jobs.experiments.paths import SETTINGS_FILE, SPLIT_FILE, UNREADABLE_FILE
from jobs.experiments.request import TrainRequest
from jobs.runs import products
from jobs.storage import listing, parquet, writing
from jobs.storage.left_out import first_named
from jobs.storage.uris import Uri
from jobs.training import examples
from jobs.training.examples import Examples
from jobs.workflows.caption import caption
from jobs.workflows.examine import examine
from nsnet import splits
from nsnet.calibration import OperatingPoint
from nsnet.errors import SourceError


def publish_facts(experiment: Experiment) -> None:
    """Publish missing facts or captions, unless the request forbids it."""
    request, facts = experiment.request, experiment.facts
    if facts.product is products.FACTS:
        examine(
            request.source, out=facts.place, selection=Selection(columns=request.columns), limits=request.limits,
            address=request.address,
        )  # fmt: skip
    elif request.captions is None or request.caption_missing:
        caption(
            request.source, out=facts.place, recipe=request.recipe, clip_weights=request.clip_weights,
            text_weights=request.text_weights, captioner=request.captioner, weights=request.weights,
            selection=Selection(columns=request.columns), limits=request.limits, address=request.address,
        )  # fmt: skip


def examples_of(experiment: Experiment) -> "Examples":
    """The examples of the split with caption features; makes the split if it is missing."""
    stored, workers = experiment.file(SPLIT_FILE), experiment.request.workers[1]
    if not listing.exists(stored):
        _store_split(experiment)
    loaded = examples.Examples(table=examples.read_split(stored))
    if len(loaded.rows("train")) < 2 * workers:
        raise SourceError(
            f"{len(loaded.rows('train'))} training images are too few for {workers} workers: at least two for each"
        )
    if not experiment.needs_captions:
        return loaded
    facts = experiment.facts
    features = examples.load_text_features(facts.place, facts.maker, loaded.table)
    if missing := examples.without_captions(loaded.table, features):
        raise SourceError(
            f"{len(missing)} of {loaded.table.num_rows} images have no caption in {facts.place}, such as "
            f"{missing[0]['uri']}: run nsnet caption for them first, or give --caption-missing"
        )
    return replace(loaded, text_features=features)


def share_split(experiment: Experiment) -> Uri:
    """Make the split of a training without training, for other trainings to use as `split`; returns its URI."""
    stored = experiment.file(SPLIT_FILE)
    if not experiment.request.belongs_to(experiment.settings) or not listing.exists(stored):
        _store_split(experiment)
    return stored


def _store_split(experiment: Experiment) -> None:
    """Make and store the split; from then on the training's folder belongs to these settings."""
    made = _make_split(experiment)
    writing.write_json(experiment.file(SETTINGS_FILE), experiment.settings)
    examples.write_split(made, experiment.file(SPLIT_FILE))


def _make_split(experiment: Experiment) -> "pa.Table":
    """Collect facts of the images, and split them."""
    request, training = experiment.request, experiment.recipe.training
    facts = experiment.facts  # before the listing, which may take an hour: it raises if weights are missing
    manifest = experiment.file("manifest.parquet")
    plan = write_manifest(request.source, manifest, Selection(columns=request.columns))
    if plan.unread > request.max_left_out:
        raise SourceError(
            f"{plan.unread} folders or containers of {request.source} cannot be read, more than the allowed "
            f"{request.max_left_out} (--max-left-out): {first_named(plan.unread, plan.unread_named)}"
        )
    _check_labels(plan.labels, plan.count)
    point = OperatingPoint.parse(request.operating_point)
    point.check_reals(plan.labels.get(0, 0), " reals in the whole source")  # validation gets a part of them
    _check_request(request, manifest, plan.count)
    publish_facts(experiment)
    listed = split.known_images(manifest, facts.place, facts.product, facts.maker)
    if request.split is not None:
        made = split.reuse(request.split, listed, request.max_failed)
    else:
        config = split.SplitConfig(
            seed=request.seed, validation_share=training.validation_share,
            test_share=training.test_share, leave_out=request.leave_out, lost_share=request.max_failed,
        )  # fmt: skip
        made = split.make(listed, config)
    for line in split.describe(made):
        say(line)
    if made.unreadable:
        writing.write_json(experiment.file(UNREADABLE_FILE), made.unreadable)
    return made.table


def _check_labels(labels: dict[int | None, int], count: int) -> None:
    if labels.get(None):
        raise SourceError(
            f"{labels[None]} of {count} images have no label: put them into 0_real and 1_fake (or nature and ai, real "
            "and fake) folders, or give a manifest with a label column"
        )
    if len(labels) < 2:
        real, fake = labels.get(0, 0), labels.get(1, 0)
        raise SourceError(f"the source has {real} real and {fake} fake images; both are needed")


def _check_request(request: TrainRequest, manifest: str, count: int) -> None:
    """Check the request against the listing, before hours of reading every image."""
    if count < 2 * request.workers[1]:
        raise SourceError(f"{count} images are too few for {request.workers[1]} workers: at least two for each")
    if request.split is not None:
        examples.read_split(request.split)
    if request.leave_out is not None:
        columns = schema.MANIFEST.empty_table().select(["generator"]).schema
        names = [name for batch in parquet.read(manifest, columns) for name in batch.column("generator").to_pylist()]
        splits.leave_out(np.arange(len(names)), names, request.leave_out)
