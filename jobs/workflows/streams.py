"""How the images of a run become rows: the streams of scoring, captioning and examining.

Importing this module imports Ray and torch, which takes seconds; a workflow imports it only if there is work.
"""

from dataclasses import replace
from functools import partial

from jobs.dataset import schema
from jobs.pipeline.actors import Caption, Embed, MakeStage, Score
from jobs.pipeline.models import Models
from jobs.pipeline.pixels import with_pixels
from jobs.pipeline.stream import SCORING_COLUMNS, Stream, prepared
from jobs.runs import catalog, failures, products
from jobs.runs.attempts import Attempt
from jobs.runs.execution import Request, Work
from nsnet import bundle
from nsnet.captions import captioner_id, thumbnail_px
from nsnet.clip_weights import find_weights
from nsnet.config import to_dict
from nsnet.configuration import DetectorConfig, config_of
from nsnet.images import DecodeLimits
from nsnet.preparation import PreparationConfig

CAPTIONING_COLUMNS = schema.CAPTIONS.remove(schema.CAPTIONS.get_field_index(schema.TEXT_FEATURES.name))
"""What a row carries to the text tower."""


def scoring(
    request: Request,
    models: Models,
    description: bundle.Description,
    *,
    limits: DecodeLimits,
    batch_size: int | None,
    outage_seconds: float,
    anchors: str,
) -> Work:
    """Images to verdicts of a bundle; `anchors`: see `PreparationConfig`.

    Raises `WeightsError` if weights that the bundle refers to are missing.
    """
    config = config_of(description)
    if not (models.bundle_folder() / bundle.CLIP).is_dir():
        find_weights(config.clip, models.clip_path())
    captioned = config.projection.needs_captions
    if captioned and config.text is not None and not (models.bundle_folder() / bundle.TEXT).is_dir():
        models.text_tower(config)
    if captioned:
        folder = models.captioner_folder(config.captioner)
        models = replace(models, captioner_id=captioner_id(config.captioner, folder))
    preparation = PreparationConfig(
        thumbnail_px=thumbnail_px(folder) if captioned else 0, patches=config.patches, limits=limits,
        provenance=True, anchors=anchors,
    )  # fmt: skip

    def stream(attempt: Attempt) -> Stream:
        images = prepared(
            attempt.todo, request.source, preparation, models, keep=SCORING_COLUMNS, images_todo=attempt.count,
            batch_size=batch_size,
            checkpoint=attempt.checkpoint, outage_seconds=outage_seconds, remembered=failures.remembered(request),
        )  # fmt: skip
        common = (images.batch_size, images.report)
        stages: list[MakeStage] = [partial(Score, images.models, *common)]
        if captioned:
            keep = with_pixels(SCORING_COLUMNS, replace(preparation, thumbnail_px=0))
            stages.insert(0, partial(Caption, images.models, config.captioner, keep, *common))
        return images.through(*stages)

    known = catalog.published(request.out, schema.CAPTIONED, captioner_id=models.captioner_id)
    return Work(
        title="score",
        stages=("prepared", "captioned", "scored") if captioned else ("prepared", "scored"),
        stream=stream,
        known=known if models.reuse and captioned else (),
        captioner_id=models.captioner_id,
        details={
            "captioner_id": models.captioner_id,
            "settings": {"reuse": models.reuse, "detector": to_dict(config)},
        },
    )


def captioning(
    request: Request, models: Models, config: DetectorConfig, *, limits: DecodeLimits, batch_size: int | None
) -> Work:
    """Images to captions and their features."""
    side = thumbnail_px(models.captioner_folder(config.captioner))
    preparation = PreparationConfig(thumbnail_px=side, patches=None, fingerprint=True, limits=limits)

    def stream(attempt: Attempt) -> Stream:
        images = prepared(
            attempt.todo, request.source, preparation, models, keep=CAPTIONING_COLUMNS, images_todo=attempt.count,
            batch_size=batch_size,
            checkpoint=attempt.checkpoint, remembered=failures.remembered(request),
        )  # fmt: skip
        common = (images.batch_size, images.report)
        return images.through(
            partial(Caption, images.models, config.captioner, CAPTIONING_COLUMNS, *common),
            partial(Embed, images.models, config, schema.CAPTIONS, *common),
        )

    return Work(
        title="caption",
        stages=("prepared", "captioned", "embedded"),
        stream=stream,
        known=catalog.published(request.out, schema.CAPTIONED, products.CAPTIONS, captioner_id=models.captioner_id),
        captioner_id=models.captioner_id,
        details={
            "captioner_id": models.captioner_id,
            "settings": {"captioner": to_dict(config.captioner)},
        },
    )


def examining(request: Request, *, limits: DecodeLimits) -> Work:
    """Images to facts, without a model."""

    def stream(attempt: Attempt) -> Stream:
        preparation = PreparationConfig(patches=None, fingerprint=True, limits=limits)
        return prepared(
            attempt.todo, request.source, preparation, Models(), keep=schema.FACTS, images_todo=attempt.count,
            batch_size=1,
            checkpoint=attempt.checkpoint, remembered=failures.remembered(request),
        )  # fmt: skip

    return Work(title="examine", stages=("prepared",), stream=stream, uses_models=False)
