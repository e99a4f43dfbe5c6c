"""What a training needs before its first step: facts of its pictures, a split, captions, a basis or bank of them."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jobs.console.output import say
from jobs.dataset import schema
from jobs.dataset.plan import Selection, write_manifest
from jobs.experiments.paths import SETTINGS, SPLIT, UNREADABLE
from jobs.experiments.request import TrainRequest, needs_captions
from jobs.runs import products
from jobs.runs.products import Product
from jobs.storage import listing, uris, writing
from jobs.storage.left_out import first_named
from nsnet.errors import SourceError

if TYPE_CHECKING:  # these import torch and Ray, which take seconds
    import pyarrow as pa

    from jobs.pipeline.models import Models
    from jobs.training.examples import Examples
    from nsnet.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Where facts of the pictures, and captions if they are needed, are published."""

    place: str
    product: Product
    maker: str
    """Whose."""


def where(request: TrainRequest, recipe: "Recipe", models: "Models") -> Facts:
    """The facts of the source's pictures, published by `nsnet caption` or at the training's own place."""
    if not needs_captions(recipe) and request.captions is None:
        from jobs.workflows.examine import FACTS_ID

        return Facts(place=uris.join(request.work, "facts"), product=products.FACTS, maker=FACTS_ID)
    from jobs.workflows.caption import features_id

    place = request.captions or uris.join(request.work, "captions")
    return Facts(place=place, product=products.CAPTIONS, maker=features_id(recipe.detector, models))


def find_out(request: TrainRequest, facts: Facts) -> None:
    """Make the facts that are missing, where that is allowed."""
    if facts.product is products.FACTS:
        from jobs.workflows.examine import examine

        examine(
            request.source, out=facts.place, selection=Selection(columns=request.columns), limits=request.limits,
            address=request.address,
        )  # fmt: skip
    elif request.captions is None or request.caption_missing:
        from jobs.workflows.caption import caption

        caption(
            request.source, out=facts.place, recipe=request.recipe, clip_weights=request.clip_weights,
            captioner=request.captioner, selection=Selection(columns=request.columns), limits=request.limits,
            address=request.address,
        )  # fmt: skip


def examples_of(request: TrainRequest, recipe: "Recipe", facts: Facts, settings: dict[str, Any]) -> "Examples":
    """The split and its captions' features; what is missing of them is made."""
    from jobs.training import examples

    stored = uris.join(request.work, SPLIT)
    if not listing.exists(stored):
        made = _make_split(request, recipe, facts)
        writing.write_json(uris.join(request.work, SETTINGS), settings)
        examples.write_split(made, stored)
    found = examples.Examples(table=examples.read_split(stored))
    if len(found.rows("train")) < 2 * request.workers[1]:
        raise SourceError(
            f"{len(found.rows('train'))} training pictures are too few for {request.workers[1]} workers: at least two "
            "for each"
        )
    if not needs_captions(recipe):
        return found
    features = examples.load_text_features(facts.place, facts.maker, found.table)
    if missing := examples.without_captions(found.table, features):
        raise SourceError(
            f"{len(missing)} of {found.table.num_rows} pictures have no caption in {facts.place}, such as "
            f"{missing[0]['uri']}: run nsnet caption for them first, or give --caption-missing"
        )
    return replace(found, text_features=features)


def share_split(request: TrainRequest) -> str:
    """Make the split of a training without training: for others to use, as their `split`; its URI."""
    from jobs.pipeline.models import Models
    from jobs.training import examples

    recipe, stored = request.resolved(), uris.join(request.work, SPLIT)
    settings = request.identity(recipe)
    if not request.belongs_to(settings) or not listing.exists(stored):
        models = Models(clip_weights=request.clip_weights, captioner=request.captioner)
        made = _make_split(request, recipe, where(request, recipe, models))
        writing.write_json(uris.join(request.work, SETTINGS), settings)
        examples.write_split(made, stored)
    return stored


def _make_split(request: TrainRequest, recipe: "Recipe", facts: Facts) -> "pa.Table":
    """Find out what there is to know of the pictures, and split them."""
    from jobs.experiments import split

    manifest = uris.join(request.work, "manifest.parquet")
    plan = write_manifest(request.source, manifest, Selection(columns=request.columns))
    if plan.unread > request.max_left_out:
        raise SourceError(
            f"{plan.unread} folders or containers of {request.source} cannot be read, more than the allowed "
            f"{request.max_left_out} (--max-left-out): {first_named(plan.unread, plan.unread_named)}"
        )
    _check_labels(plan.labels, plan.count)
    _check_request(request, manifest, plan.count)
    find_out(request, facts)
    listed = split.known_pictures(manifest, facts.place, facts.product, facts.maker)
    if request.split is not None:
        made = split.reuse(request.split, listed, request.max_failed)
    else:
        config = split.SplitConfig(
            seed=request.seed, validation_share=recipe.training.validation_share,
            test_share=recipe.training.test_share, leave_out=request.leave_out, lost_share=request.max_failed,
        )  # fmt: skip
        made = split.make(listed, config)
    for line in split.describe(made):
        say(line)
    if made.unreadable:
        writing.write_json(uris.join(request.work, UNREADABLE), made.unreadable)
    return made.table


def _check_labels(labels: dict[int | None, int], count: int) -> None:
    if labels.get(None):
        raise SourceError(
            f"{labels[None]} of {count} pictures have no label: put them below 0_real and 1_fake (or nature and ai, "
            "real and fake) folders, or give a manifest with a label column"
        )
    if len(labels) < 2:
        real, fake = labels.get(0, 0), labels.get(1, 0)
        raise SourceError(f"the source has {real} real and {fake} fake pictures; both are needed")


def _check_request(request: TrainRequest, manifest: str, count: int) -> None:
    """What a listing can tell of a request, before every picture is looked at, which may take hours."""
    import numpy as np

    from jobs.storage import parquet
    from jobs.training import examples
    from nsnet import splits

    if count < 2 * request.workers[1]:
        raise SourceError(f"{count} pictures are too few for {request.workers[1]} workers: at least two for each")
    if request.split is not None:
        examples.read_split(request.split)
    if request.leave_out is not None:
        columns = schema.MANIFEST.empty_table().select(["generator"]).schema
        names = [name for batch in parquet.read(manifest, columns) for name in batch.column("generator").to_pylist()]
        splits.leave_out(np.arange(len(names)), names, request.leave_out)
